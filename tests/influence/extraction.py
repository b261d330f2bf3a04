"""Extract gradients of samples, and hold them against the loop's."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.influence.tiny_models import (
    CAUSAL_FAMILIES,
    FAMILIES,
    Task,
    pad_targets,
)
from tests.oracles import loop_gradients
from workers.influence.batching import collate
from workers.influence.gradients import GradientExtractor, SampleGradients
from workers.influence.objectives import CausalLanguageModel, Classification, Objective
from workers.influence.rows import GradientRows, SparseRows

CASES: list[tuple[Task, str]] = [
    *(("classification", family) for family in FAMILIES),
    *(("causal_lm", family) for family in CAUSAL_FAMILIES),
]
OBJECTIVES: dict[Task, Objective] = {
    "classification": Classification(),
    "causal_lm": CausalLanguageModel(),
}


def written_out(rows: GradientRows) -> Tensor:
    """Rows [B, d], those of an embedding too."""
    if not isinstance(rows, SparseRows):
        return rows.dense()
    width = rows.value_PH.shape[1]
    dense = torch.zeros(len(rows), rows.num_parameters // width, width, device=rows.value_PH.device)
    dense[rows.sample_P, rows.token_P] = rows.value_PH
    return dense.flatten(1)


def extract(
    extractor: GradientExtractor,
    token_ids: Sequence[Sequence[int]],
    labels: Sequence[Any],
    *,
    batch_size: int | None = None,
) -> dict[str, Tensor]:
    """Extract in batches; gradients by module name and the loss under 'loss'."""
    size = batch_size or len(labels)
    batches = [
        extractor.extract(
            collate(token_ids[start : start + size], pad_id=0, device=extractor.device),
            pad_targets(labels[start : start + size], device=extractor.device),
        )
        for start in range(0, len(labels), size)
    ]
    result = {
        spec.name: torch.cat([written_out(batch.gradients[index]) for batch in batches])
        for index, spec in enumerate(extractor.modules)
    }
    return result | {"loss": torch.cat([batch.loss_B for batch in batches])}


def assert_rows_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every sample's row agrees within 1e-5 of its length, in every module.

    Rows below a hundredth of the sample's whole gradient are rounding errors in part (a query
    that sees one key has none at all) and are held to that hundredth.
    """
    assert actual.keys() == expected.keys()
    expected = {name: rows.reshape(len(rows), -1) for name, rows in expected.items()}
    whole_B = torch.stack([rows.norm(dim=1) for rows in expected.values()]).norm(dim=0)
    for name, expected_Bd in expected.items():
        error_B = (actual[name].reshape(expected_Bd.shape) - expected_Bd).norm(dim=1)
        length_B = expected_Bd.norm(dim=1).clamp(min=1e-2 * whole_B)
        assert bool((error_B <= 1e-5 * length_B).all()), (name, error_B / length_B)


def exact_loop(
    model: nn.Module, token_ids: Sequence[Sequence[int]], labels: Sequence[Any]
) -> dict[str, Tensor]:
    """The loop in float64: in float32 its own rounding would be half of the difference."""
    gradients, loss_B = loop_gradients(copy.deepcopy(model).double(), token_ids, labels)
    return gradients | {"loss": loss_B.float()}


def cosine(first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
    """Cosine of every sample's whole gradients."""
    names = sorted(first.keys() - {"loss"})
    return torch.cosine_similarity(
        torch.cat([first[name] for name in names], dim=1),
        torch.cat([second[name] for name in names], dim=1),
    )


def norm_names(model: nn.Module) -> list[str]:
    """Last parts of the names of the norms inside the blocks."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if "Norm" in type(module).__name__ and any(part.isdigit() for part in name.split("."))
        }
    )


def run(
    extractor: GradientExtractor, token_ids: Sequence[Sequence[int]], labels: Sequence[Any]
) -> SampleGradients:
    """All samples in one batch."""
    return extractor.extract(
        collate(token_ids, pad_id=0, device=extractor.device),
        pad_targets(labels, device=extractor.device),
    )


def by_name(extractor: GradientExtractor, batch: SampleGradients) -> dict[str, Any]:
    return {spec.name: rows for spec, rows in zip(extractor.modules, batch.gradients, strict=True)}
