"""Gradients written out, for modules of a few thousand entries.

Shapes: N samples, d entries of the module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from workers.influence.rows.base import GradientRows


@dataclass(eq=False)
class DenseRows(GradientRows):
    """One row of d entries per sample.

    Attributes:
        gradient_Nd: float32; rows are flattened like the module's parameter.
    """

    gradient_Nd: Tensor

    def __post_init__(self) -> None:
        self.num_samples, self.num_parameters = self.gradient_Nd.shape

    def _dot(self, other: Self) -> Tensor:
        return self.gradient_Nd @ other.gradient_Nd.T

    def squared_norm(self) -> Tensor:
        squared_norm_N: Tensor = torch.linalg.vecdot(self.gradient_Nd, self.gradient_Nd)
        return squared_norm_N

    def absolute_sum(self) -> Tensor:
        absolute_sum_N: Tensor = torch.linalg.vector_norm(self.gradient_Nd, ord=1, dim=1)
        return absolute_sum_N

    def entry_sum(self) -> Tensor:
        return self.gradient_Nd.sum(dim=1)

    def total(self) -> Tensor:
        """Return the sum of the rows, float64 [d]."""
        return self.gradient_Nd.sum(dim=0, dtype=torch.float64)

    def dense(self) -> Tensor:
        return self.gradient_Nd

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.gradient_Nd.to(device))

    def select(self, index_N: Tensor) -> Self:
        return type(self)(self.gradient_Nd[index_N])

    def tensors(self) -> dict[str, Tensor]:
        return {"gradient": self.gradient_Nd.contiguous()}

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(torch.cat([part.gradient_Nd for part in parts]))
