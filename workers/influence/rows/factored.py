"""Gradients of a big weight matrix as the two factors that make it.

With the inputs X and the output gradients G of a sample's S tokens the gradient of a linear layer's
weight is Gᵀ X, and the dot product of two of them

    ⟨Gᵀ X, Hᵀ Y⟩ = Σ_{s,t} (x_s · y_t)(g_s · h_t)

needs S · S' (I + O) products where the matrices have I · O entries each.

Shapes: N samples, S tokens, I/O input and output features, d = O · I entries of the module.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from workers.influence.rows.base import GradientRows

_CHUNK_ENTRIES = 2**22


@dataclass(eq=False)
class FactoredRows(GradientRows):
    """The gradient Gᵀ X of every sample, a row-major [O, I] like the weight of `nn.Linear`.

    Attributes:
        x_NSI: float32 inputs.
        g_NSO: float32 output gradients; zero at padding.
    """

    x_NSI: Tensor
    g_NSO: Tensor

    def __post_init__(self) -> None:
        self.num_samples = len(self.x_NSI)
        self.num_parameters = self.x_NSI.shape[2] * self.g_NSO.shape[2]

    def _dot(self, other: Self) -> Tensor:
        num_tokens, num_other_tokens = self.x_NSI.shape[1], other.x_NSI.shape[1]
        dot_NN = self.x_NSI.new_zeros(len(self), len(other))
        if dot_NN.numel() == 0 or num_tokens * num_other_tokens == 0:
            return dot_NN
        # a square block of token pairs fits the bound, unless one sample alone is longer
        edge = int(_CHUNK_ENTRIES**0.5)
        step, other_step = max(1, edge // num_tokens), max(1, edge // num_other_tokens)
        for start in range(0, len(self), step):
            x_TI = self.x_NSI[start : start + step].flatten(0, 1)
            g_TO = self.g_NSO[start : start + step].flatten(0, 1)
            for other_start in range(0, len(other), other_step):
                rows = slice(other_start, other_start + other_step)
                product_TT = x_TI @ other.x_NSI[rows].flatten(0, 1).T
                product_TT *= g_TO @ other.g_NSO[rows].flatten(0, 1).T
                product_NSNS = product_TT.view(
                    -1, num_tokens, product_TT.shape[1] // num_other_tokens, num_other_tokens
                )
                dot_NN[start : start + step, rows] = product_NSNS.sum(dim=3).sum(dim=1)
        return dot_NN

    def squared_norm(self) -> Tensor:
        num_tokens = self.x_NSI.shape[1]
        parts = [
            ((x_BSI @ x_BSI.mT) * (g_BSO @ g_BSO.mT)).sum(dim=(1, 2))
            for x_BSI, g_BSO in self._chunks(num_tokens**2)
        ]
        # rounding may leave the tiniest of them below zero
        return torch.cat(parts).clamp(min=0)

    def absolute_sum(self) -> Tensor:
        if self.x_NSI.shape[1] == 1:
            return self.x_NSI.abs().sum(dim=(1, 2)) * self.g_NSO.abs().sum(dim=(1, 2))
        parts = [
            torch.linalg.vector_norm((g_BSO.mT @ x_BSI).flatten(1), ord=1, dim=1)
            for x_BSI, g_BSO in self._chunks(self.num_parameters)
        ]
        return torch.cat(parts)

    def entry_sum(self) -> Tensor:
        return (self.x_NSI.sum(dim=2) * self.g_NSO.sum(dim=2)).sum(dim=1)

    def total(self) -> Tensor:
        """Return the sum of the rows, float64 [d]."""
        num_inputs, num_outputs = self.x_NSI.shape[2], self.g_NSO.shape[2]
        total_OI = self.x_NSI.new_zeros(num_outputs, num_inputs, dtype=torch.float64)
        for x_BSI, g_BSO in self._chunks(self.x_NSI.shape[1] * (num_inputs + num_outputs)):
            total_OI += g_BSO.flatten(0, 1).double().T @ x_BSI.flatten(0, 1).double()
        return total_OI.flatten()

    def dense(self) -> Tensor:
        return (self.g_NSO.mT @ self.x_NSI).flatten(1)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.x_NSI.to(device), self.g_NSO.to(device))

    def select(self, index_N: Tensor) -> Self:
        return type(self)(self.x_NSI[index_N], self.g_NSO[index_N])

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.x_NSI.contiguous(), "g": self.g_NSO.contiguous()}

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        longest = max(part.x_NSI.shape[1] for part in parts)
        return cls(
            torch.cat([_pad_tokens(part.x_NSI, longest) for part in parts]),
            torch.cat([_pad_tokens(part.g_NSO, longest) for part in parts]),
        )

    def _chunks(self, entries_per_sample: int) -> Iterator[tuple[Tensor, Tensor]]:
        step = max(1, _CHUNK_ENTRIES // max(1, entries_per_sample))
        yield from zip(self.x_NSI.split(step), self.g_NSO.split(step), strict=True)


def _pad_tokens(value_NSH: Tensor, length: int) -> Tensor:
    return pad(value_NSH, (0, 0, 0, length - value_NSH.shape[1]))
