"""Project the gradients of big weight matrices from both sides, at random but by a seed.

The gradient of a linear layer is Σ_s g_s x_sᵀ; its projection Σ_s (P_O g_s)(P_I x_s)ᵀ comes from
projected tokens, and the whole matrix is never built. The entries of P_I and P_O are N(0, 1)/√k, so
that E[PᵀP] = 1 and the dot product of two projected gradients has the exact one as its mean. Its
standard deviation is near ‖v‖‖g‖/k for a pair that is not of low rank: safe for sums over many
modules, poor for the order inside one.

Shapes: B batch, S sequence, I/O input and output features, K projected features.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Projection:
    """How far every side of a weight matrix is projected down, and the seed of the draw."""

    dimension: int
    seed: int

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ValueError(f"dimension {self.dimension} of a projection is below 1.")


class ModuleProjection:
    """The two random matrices of one module.

    They depend on the seed, the module's name and its sizes alone: neither on other modules nor on
    the device, since they are drawn on the CPU. A side that is no longer than the dimension is left
    as it is.

    Args:
        projection: dimension and seed.
        name: of the module.
        in_features: I.
        out_features: O.
        device: where the tokens will be.
    """

    def __init__(
        self,
        projection: Projection,
        *,
        name: str,
        in_features: int,
        out_features: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._input_KI = _draw(projection, f"{name}/input", in_features, device)
        self._output_KO = _draw(projection, f"{name}/output", out_features, device)
        self.shape: tuple[int, int] = (
            min(projection.dimension, out_features),
            min(projection.dimension, in_features),
        )

    def project(self, x_BSI: Tensor, g_BSO: Tensor) -> Tensor:
        """Return the projected gradients, float32 [B, K_O · K_I], row-major like `shape`.

        Args:
            x_BSI: inputs of the module.
            g_BSO: gradients of its output; zero at padding.
        """
        x_BSK, g_BSK = self.project_tokens(x_BSI, g_BSO)
        return (g_BSK.mT @ x_BSK).flatten(1)

    def project_tokens(self, x_BSI: Tensor, g_BSO: Tensor) -> tuple[Tensor, Tensor]:
        """Return projected inputs [B, S, K_I] and output gradients [B, S, K_O], float32."""
        return _apply(x_BSI.float(), self._input_KI), _apply(g_BSO.float(), self._output_KO)


def _draw(
    projection: Projection, name: str, size: int, device: torch.device | str
) -> Tensor | None:
    if size <= projection.dimension:
        return None
    digest = hashlib.sha256(f"{projection.seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    matrix_KF = torch.randn(projection.dimension, size, generator=generator)
    return (matrix_KF / math.sqrt(projection.dimension)).to(device)


def _apply(value_BSF: Tensor, matrix_KF: Tensor | None) -> Tensor:
    return value_BSF if matrix_KF is None else value_BSF @ matrix_KF.T
