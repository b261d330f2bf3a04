"""Training gradients as the pipeline would stream them."""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from workers.influence.estimators import CurvatureEstimator, TrainingGradients
from workers.influence.kronecker import KroneckerSums
from workers.influence.layers import ModuleSpec, Part


def randn(*size: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def training(
    train_Td: Tensor,
    *,
    cuts: Sequence[int] = (),
    shape: tuple[int, ...] | None = None,
    kronecker: KroneckerSums | None = None,
    max_gram_bytes: int = 10**9,
) -> TrainingGradients:
    """Stream gradients in the blocks that `cuts` leave."""
    shape = shape or (train_Td.shape[1],)

    def blocks() -> Iterator[Tensor]:
        yield from torch.tensor_split(train_Td, list(cuts))

    return TrainingGradients(
        num_samples=len(train_Td),
        mean_squared_norm=float(train_Td.double().square().sum(dim=1).mean()),
        spec=ModuleSpec("block.0.value.lora_A", 0, Part.ATTENTION, prod(shape), shape),
        kronecker=kronecker,
        blocks=blocks,
        max_gram_bytes=max_gram_bytes,
    )


def influence(
    estimator: CurvatureEstimator, validation_Vd: Tensor, stream: TrainingGradients
) -> Tensor:
    """Influence [V, T], float32: queries times gradients."""
    query_Vd = estimator.queries(validation_Vd=validation_Vd, training=stream)
    assert query_Vd.dtype == torch.float32
    return query_Vd @ torch.cat(list(stream.blocks())).T


def assert_near(actual_VT: Tensor, expected_VT: Tensor, *, share: float = 2e-5) -> None:
    """A dot product is as exact as its vectors are long: errors relative to the largest entry."""
    limit = share * float(expected_VT.abs().max())
    torch.testing.assert_close(actual_VT.double(), expected_VT.double(), rtol=share, atol=limit)
