"""Preflight sees what a batch does to a sample's gradient, and what has no gradient at all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.influence.tiny_models import FAMILIES, sample_tokens, tiny_adapted, tiny_classifier
from tests.pipeline.tiny import LANGUAGE_VOCABULARY, llama_config
from workers.influence.batching import collate
from workers.influence.gradients import GradientExtractor
from workers.influence.objectives import IGNORED, CausalLanguageModel
from workers.influence.preflight import Batch, PreflightReport, preflight
from workers.influence.rows import DenseRows, GradientRows, SparseRows

CPU = torch.device("cpu")


def batches() -> tuple[list[Batch], Batch]:
    token_ids, labels = sample_tokens(4)

    def batch(*places: int) -> Batch:
        inputs = collate([token_ids[place] for place in places], pad_id=0, device=CPU)
        return inputs, torch.tensor([labels[place] for place in places])

    return [batch(place) for place in range(4)], batch(*range(4))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_model_that_minds_its_mask_passes(family: str) -> None:
    extractor = GradientExtractor(tiny_adapted(family))
    samples, padded = batches()
    report = preflight(extractor, samples=samples, padded=padded)
    assert report.max_loss_error < 1e-5
    assert report.max_gradient_error < 1e-4
    assert report.zero_modules == ()
    assert report.num_non_finite == 0
    assert list(report.gradient_errors) == [spec.name for spec in extractor.modules]
    assert max(report.gradient_errors.values()) < 1e-3


def test_attention_to_padding_is_seen() -> None:
    model: Any = tiny_classifier("bert")
    forward = model.bert.forward

    def blind(*arguments: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        assert attention_mask is not None
        return forward(*arguments, attention_mask=torch.ones_like(attention_mask), **options)

    model.bert.forward = blind
    extractor = GradientExtractor(model, target_modules=list(FAMILIES["bert"]))
    samples, padded = batches()
    report = preflight(extractor, samples=samples, padded=padded)
    assert report.max_loss_error > 1e-3
    assert report.max_gradient_error > 1e-2


def test_a_module_without_gradient_is_named() -> None:
    """As LoRA's A while B is zero, in a model that was not trained."""
    model = tiny_adapted("bert")
    for name, parameter in model.named_parameters():
        if "layer.1." in name and "query.lora_B" in name:
            nn.init.zeros_(parameter)
    extractor = GradientExtractor(model)
    samples, padded = batches()
    report = preflight(extractor, samples=samples, padded=padded)
    assert report.zero_modules == ("bert.encoder.layer.1.attention.self.query.lora_A",)
    assert report.gradient_errors[report.zero_modules[0]] == 0


def test_factored_and_sparse_gradients_are_compared_entry_by_entry() -> None:
    """From dot products, the difference of two equal gradients would come out around 1e-4."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(llama_config(hidden_size=64))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    extractor = GradientExtractor(
        model,
        objective=CausalLanguageModel(),
        target_modules=["q_proj"],
        longest=2,
        word_embeddings=True,
    )
    assert [spec.form for spec in extractor.modules] == ["factored", "factored", "sparse"]
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 9, 5]
    tokens = [
        torch.randint(3, len(LANGUAGE_VOCABULARY), (length,), generator=generator).tolist()
        for length in lengths
    ]

    def batch(*places: int) -> Batch:
        inputs = collate([tokens[place] for place in places], pad_id=0, device=CPU)
        label_BS = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
        return inputs, label_BS

    report = preflight(
        extractor, samples=[batch(place) for place in range(3)], padded=batch(0, 1, 2)
    )
    assert report.zero_modules == ()
    assert max(report.gradient_errors.values()) < 1e-5


@dataclass
class FakeExtractor:
    """Gives made-up gradients: those of a batch, and those of every sample alone."""

    together: tuple[GradientRows, ...]
    alone: tuple[GradientRows, ...]
    finite_together: list[bool]
    finite_alone: list[bool]
    modules: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.modules = [SimpleNamespace(name=f"m{place}") for place in range(len(self.together))]

    def extract(self, inputs: Mapping[str, Tensor], targets: Tensor) -> Any:
        if "alone" not in inputs:
            rows, finite = self.together, self.finite_together
        else:
            place = int(targets[0])
            rows = tuple(each.select(torch.tensor([place])) for each in self.alone)
            finite = self.finite_alone[place : place + 1]
        return SimpleNamespace(
            gradients=rows, loss_B=torch.ones(len(finite)), is_finite_B=torch.tensor(finite)
        )

    def report(self) -> PreflightReport:
        number = len(self.finite_alone)
        return preflight(
            self,  # type: ignore[arg-type]  # stands in for the extractor
            samples=[({"alone": torch.ones(1)}, torch.tensor([place])) for place in range(number)],
            padded=({}, torch.arange(number)),
        )


def dense(*rows: list[float]) -> DenseRows:
    return DenseRows(torch.tensor(rows))


def test_errors_are_relative_to_the_whole_gradient_of_a_sample() -> None:
    """A small module may be far off by itself while the sample's gradient hardly is."""
    extractor = FakeExtractor(
        together=(dense([3.0, 4.0], [0.0, 5.0]), dense([0.2], [0.0])),
        alone=(dense([3.0, 4.0], [0.0, 4.0]), dense([0.1], [0.0])),
        finite_together=[True, True],
        finite_alone=[True, True],
    )
    report = extractor.report()
    assert report.max_gradient_error == pytest.approx(0.25)
    assert report.gradient_errors == {"m0": pytest.approx(0.25), "m1": pytest.approx(1.0)}
    assert report.zero_modules == ()


def test_a_gradient_only_in_the_batch_is_an_error_of_one() -> None:
    report = FakeExtractor((dense([1.0]),), (dense([0.0]),), [True], [True]).report()
    assert report.gradient_errors == {"m0": 1.0}
    assert report.zero_modules == ("m0",)


@pytest.mark.parametrize(
    ("together", "alone", "error", "number"),
    [
        ([True, True], [True, False], torch.inf, 1),
        ([True, False], [True, True], torch.inf, 0),
        ([True, False], [True, False], 0.0, 1),
        ([False, False], [False, False], 0.0, 2),
    ],
)
def test_samples_that_are_not_finite(
    together: list[bool], alone: list[bool], error: float, number: int
) -> None:
    """Broken in any company is not the batch's doing; broken in one of the two is."""
    rows = (dense([1.0], [1.0]),)
    report = FakeExtractor(rows, rows, together, alone).report()
    assert report.max_gradient_error == report.max_loss_error == error
    assert report.num_non_finite == number
    assert report.zero_modules == ()


def test_sparse_gradients_of_different_tokens() -> None:
    def sparse(token: int) -> SparseRows:
        return SparseRows(
            num_samples=1,
            num_parameters=8,
            sample_P=torch.tensor([0]),
            token_P=torch.tensor([token]),
            value_PH=torch.tensor([[3.0, 4.0]]),
            count_P=torch.tensor([1]),
        )

    same = FakeExtractor((sparse(1),), (sparse(1),), [True], [True]).report()
    assert same.gradient_errors == {"m0": 0.0}
    other = FakeExtractor((sparse(2),), (sparse(1),), [True], [True]).report()
    assert other.gradient_errors["m0"] == pytest.approx(2**0.5)


def test_the_batch_must_hold_the_samples() -> None:
    samples, padded = batches()
    extractor = GradientExtractor(tiny_adapted("bert"))
    with pytest.raises(ValueError, match="3 samples alone, 4 in"):
        preflight(extractor, samples=samples[:3], padded=padded)
    with pytest.raises(ValueError, match="0 samples"):
        preflight(extractor, samples=[], padded=padded)
