"""Weights on disk, or in 8 and 4 bits: gradients are those of the adapter on just that base."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.influence.extraction import OBJECTIVES, extract
from tests.influence.tiny_models import Task, pad_targets, samples_for, tiny_adapted, tiny_model
from workers.influence.batching import collate
from workers.influence.gradients import GradientExtractor
from workers.sources.loading import _load_adapter
from workers.sources.models import ResolvedModel
from workers.sources.placement import (
    Placement,
    Quantization,
    can_quantize,
    keep_differentiable,
)

CASES: list[tuple[Task, str, str]] = [
    ("classification", "bert", "bert.encoder.layer"),
    ("causal_lm", "llama", "model.layers"),
    ("causal_lm", "gpt2", "transformer.h"),
]
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def save(folder: Path, task: Task, family: str, **options: Any) -> None:
    base: Any = tiny_model(task, family, **options)
    base.save_pretrained(folder / "base")
    base = tiny_model(task, family, **options)
    adapted: Any = tiny_adapted(family, task=task, base=base)
    adapted.save_pretrained(folder / "adapter")


def load(folder: Path, task: Task, placement: Placement) -> nn.Module:
    auto = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    base = auto.from_pretrained(folder / "base", dtype=torch.float32, **placement.options())
    keep_differentiable(base)
    resolved = SimpleNamespace(path=folder / "base", adapter_path=folder / "adapter")
    adapted: nn.Module = _load_adapter(base, resolved=cast("ResolvedModel", resolved))
    return adapted.eval()


def loop(model: nn.Module, task: Task, samples: tuple[list[list[int]], list[Any]]) -> Tensor:
    """The gradient of each sample's own loss by every factor and the head, side by side."""
    wanted = [
        parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name or "modules_to_save" in name
    ]
    for parameter in wanted:
        parameter.requires_grad_()
    rows = []
    for token_ids, label in zip(*samples, strict=True):
        inputs = collate([token_ids], pad_id=0, device="cpu")
        target = pad_targets([label], device=torch.device("cpu"))
        loss_B = OBJECTIVES[task].run(model, inputs, target).loss_B
        parts = torch.autograd.grad(loss_B.sum(), wanted)
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def of_extractor(
    model: nn.Module,
    task: Task,
    samples: tuple[list[list[int]], list[Any]],
    *,
    recompute: bool = False,
) -> Tensor:
    extractor = GradientExtractor(model, objective=OBJECTIVES[task], recompute=recompute)
    found = extract(extractor, *samples)
    return torch.cat([rows for name, rows in found.items() if name != "loss"], dim=1)


def assert_same_rows(actual_Bd: Tensor, expected_Bd: Tensor) -> None:
    """The same entries, whatever the order of the modules."""
    torch.testing.assert_close(
        actual_Bd.sort(dim=1).values, expected_Bd.sort(dim=1).values, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("task", "family", "blocks"), CASES)
def test_blocks_on_disk_give_the_same_gradients(
    tmp_path: Path, task: Task, family: str, blocks: str
) -> None:
    """With blocks that are computed again too, which lets go of them in between."""
    save(tmp_path, task, family)
    samples = samples_for(task, 5)
    whole = load(tmp_path, task, Placement())
    outside = {
        name: "cpu"
        for name, module in tiny_model(task, family).named_modules()
        if name and not f"{blocks}.".startswith(f"{name}.") and not name.startswith(f"{blocks}.")
    }
    spread = outside | {f"{blocks}.0": "cpu", f"{blocks}.1": "disk", f"{blocks}.2": "disk"}
    placement = Placement(device_map=spread, offload_folder=tmp_path / "offloaded")
    expected = of_extractor(whole, task, samples)
    for recompute in (False, True):
        model = load(tmp_path, task, placement)
        assert any(weight.is_meta for weight in model.parameters())
        torch.testing.assert_close(
            of_extractor(model, task, samples, recompute=recompute), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.skipif(not can_quantize(), reason="bitsandbytes is optional")
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize(
    ("task", "family", "options"), [("causal_lm", "llama", WIDE), ("classification", "bert", WIDE)]
)
def test_gradients_on_a_quantised_base_are_those_of_the_adapter(
    tmp_path: Path, task: Task, family: str, options: dict[str, int], quantization: Quantization
) -> None:
    """Held against autograd; the weights stay quantised, and the adapter is not merged."""
    save(tmp_path, task, family, **options)
    samples = samples_for(task, 5)
    placement = Placement(
        device_map={"": "cpu"}, quantization=quantization, unquantized=("lm_head", "classifier")
    )
    expected = loop(load(tmp_path, task, placement), task, samples)
    for recompute in (False, True):
        model = load(tmp_path, task, placement)
        assert any(not weight.is_floating_point() for weight in model.parameters())
        assert_same_rows(of_extractor(model, task, samples, recompute=recompute), expected)
