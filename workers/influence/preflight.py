"""Preflight: does a sample's gradient depend on the batch that it is in?

Attention kernels, padding and low precision change gradients without a word. A few samples, each
alone and then together in a padded batch, tell what an audit of this model is worth.

Shapes: N samples, M modules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workers.influence.rows import GradientRows, SparseRows

if TYPE_CHECKING:
    from workers.influence.gradients import GradientExtractor

_TINY = 1e-30

Batch = tuple[Mapping[str, Tensor], Tensor]
"""Inputs and targets."""


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """How far the samples of a padded batch are from the same samples alone.

    A sample that is finite either alone or in the batch, but not both, makes the errors infinite;
    one that is neither is only counted, for its batch has nothing to do with it.

    Attributes:
        max_loss_error: largest |loss in the batch - loss alone| / max(1, |loss alone|).
        max_gradient_error: largest length of the difference of a sample's gradients over all
            modules together, by the length of the gradient alone.
        zero_modules: names of the modules whose gradients are zero for every sample alone; none,
            if no sample is finite.
        gradient_errors: by module, the largest length of the difference of a sample's gradients in
            that module by the length of the one alone (0 where both are zero, 1 where only one is).
        num_non_finite: samples without a finite loss and gradient even alone.
    """

    max_loss_error: float
    max_gradient_error: float
    zero_modules: tuple[str, ...]
    gradient_errors: dict[str, float]
    num_non_finite: int


def preflight(
    extractor: "GradientExtractor", *, samples: Sequence[Batch], padded: Batch
) -> PreflightReport:
    """Compare the gradients of a few samples alone with those in one batch.

    Args:
        extractor: of the audit to come.
        samples: each a batch of one sample without padding; at least one.
        padded: the same samples in the same order as one batch.

    Raises:
        ValueError: there is no sample, or the batch holds another number of them.
    """
    if not samples or len(padded[1]) != len(samples):
        raise ValueError(f"{len(samples)} samples alone, {len(padded[1])} in the padded batch.")
    together = extractor.extract(*padded)
    difference_MN = torch.zeros(len(extractor.modules), len(samples), dtype=torch.float64)
    alone_MN = torch.zeros_like(difference_MN)
    loss_error_N = torch.zeros(len(samples), dtype=torch.float64)
    is_finite_N = torch.zeros(len(samples), dtype=torch.bool)
    for position, batch in enumerate(samples):
        alone = extractor.extract(*batch)
        is_finite_N[position] = bool(alone.is_finite_B[0])
        if bool(alone.is_finite_B[0]) != bool(together.is_finite_B[position]):
            loss_error_N[position] = torch.inf
            difference_MN[:, position] = torch.inf
        elif is_finite_N[position]:
            loss, expected = float(together.loss_B[position]), float(alone.loss_B[0])
            loss_error_N[position] = abs(loss - expected) / max(1.0, abs(expected))
            place = torch.tensor([position], device=together.loss_B.device)
            for module, (one, rows) in enumerate(
                zip(alone.gradients, together.gradients, strict=True)
            ):
                difference, length = _compare(one, rows.select(place))
                difference_MN[module, position], alone_MN[module, position] = difference, length
    difference_N = torch.linalg.vector_norm(difference_MN, dim=0)
    alone_N = torch.linalg.vector_norm(alone_MN, dim=0)
    error_M = _relative(difference_MN, alone_MN).amax(dim=1).tolist()
    is_zero_M = ~alone_MN.any(dim=1) & is_finite_N.any()
    names = [spec.name for spec in extractor.modules]
    return PreflightReport(
        max_loss_error=float(loss_error_N.max()),
        max_gradient_error=float(_relative(difference_N, alone_N).max()),
        zero_modules=tuple(name for name, zero in zip(names, is_zero_M, strict=True) if zero),
        gradient_errors=dict(zip(names, error_M, strict=True)),
        num_non_finite=int((~is_finite_N).sum()),
    )


def _compare(one: GradientRows, other: GradientRows) -> tuple[float, float]:
    """Return the lengths of the difference and of the first of two gradients of one sample each.

    From the entries themselves: from dot products, rounding alone would make a difference of 1e-4.
    """
    first, second = _entries(one, other)
    length = torch.linalg.vector_norm(first)
    return float(torch.linalg.vector_norm(first - second)), float(length)


def _entries(one: GradientRows, other: GradientRows) -> tuple[Tensor, Tensor]:
    """Return the entries of two gradients side by side, where either has any."""
    if not (isinstance(one, SparseRows) and isinstance(other, SparseRows)):
        return one.dense(), other.dense()
    token_U = torch.cat([one.token_P, other.token_P]).unique()
    both = []
    for rows in (one, other):
        value_UH = rows.value_PH.new_zeros(len(token_U), rows.value_PH.shape[1])
        both.append(
            value_UH.index_copy_(0, torch.searchsorted(token_U, rows.token_P), rows.value_PH)
        )
    return both[0], both[1]


def _relative(difference: Tensor, length: Tensor) -> Tensor:
    """Divide lengths; a gradient that is zero alone and not in the batch has error 1."""
    relative = difference / length.clamp(min=_TINY)
    return torch.where(length > _TINY, relative, (difference > _TINY).double()).masked_fill(
        difference.isinf(), torch.inf
    )
