"""Blocks that are computed again on the way back give the same gradients, and hold less."""

import copy
from typing import Any

import pytest
import torch

from tests.influence.extraction import OBJECTIVES, extract
from tests.influence.tiny_models import (
    FAMILIES,
    Task,
    samples_for,
    tiny_adapted,
    tiny_causal_lm,
    tiny_classifier,
)
from workers.influence.batching import collate
from workers.influence.footprint import counting, peak_of
from workers.influence.gradients import GradientExtractor

CASES: list[tuple[Task, str]] = [
    ("classification", "bert"),
    ("classification", "llama"),
    ("causal_lm", "gpt2"),
    ("causal_lm", "llama"),
]


@pytest.mark.parametrize(("task", "family"), CASES)
@pytest.mark.parametrize("is_adapted", [True, False])
def test_gradients_are_the_same_to_the_bit(task: Task, family: str, is_adapted: bool) -> None:
    """Hidden states and sums over tokens too; nothing is captured twice."""
    make = tiny_causal_lm if task == "causal_lm" else tiny_classifier
    model = tiny_adapted(family, task=task) if is_adapted else make(family)
    options: dict[str, Any] = {
        "objective": OBJECTIVES[task],
        "target_modules": None if is_adapted else [*FAMILIES[family], "all-linear"],
    }
    samples = samples_for(task, 5)
    plain = extract(GradientExtractor(copy.deepcopy(model), **options), *samples)
    again = extract(GradientExtractor(model, **options, recompute=True), *samples)
    assert plain.keys() == again.keys()
    for name, rows in plain.items():
        assert torch.equal(rows, again[name]), name


def peak(
    task: Task, family: str, *, num_layers: int, device: str = "cpu", recompute: bool = False
) -> int:
    """What the gradients of a padded batch take."""
    model = tiny_adapted(family, task=task, num_layers=num_layers).to(device)
    with counting():
        extractor = GradientExtractor(model, objective=OBJECTIVES[task], recompute=recompute)
    inputs = collate([[5] * 40, [7] * 39, [9] * 40], pad_id=0, device=device)
    targets = inputs["input_ids"].clone()
    if task == "classification":
        targets = torch.zeros(3, dtype=torch.int64, device=device)
    return peak_of(lambda: extractor.extract(inputs, targets))


def test_a_deep_model_holds_less_at_once() -> None:
    plain, again = (
        peak("causal_lm", "llama", num_layers=12, recompute=recompute)
        for recompute in (False, True)
    )
    assert again < 0.5 * plain


@pytest.mark.parametrize(("task", "family"), CASES)
def test_a_pass_on_paper_takes_what_it_takes_for_real(task: Task, family: str) -> None:
    """The meta device knows no values, but every shape: within a seventh."""
    real, paper = (peak(task, family, num_layers=6, device=device) for device in ("cpu", "meta"))
    assert paper == pytest.approx(real, rel=0.15)


def test_sums_over_tokens_can_be_taken_on_paper() -> None:
    """What goes to the host counts as if it stayed."""
    model = tiny_adapted("bert").to("meta")
    with counting():
        extractor = GradientExtractor(model, kronecker=True, hidden_states=True)
    inputs = collate([[5] * 7, [9] * 4], pad_id=0, device="meta")
    targets = torch.zeros(2, dtype=torch.int64, device="meta")
    assert peak_of(lambda: extractor.extract(inputs, targets)) > 0
