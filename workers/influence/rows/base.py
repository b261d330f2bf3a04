"""What the gradients of one module can be asked, whatever form they are held in.

Shapes: N samples, d entries of the module.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor

Rows = TypeVar("Rows", bound="GradientRows")


class GradientRows(ABC):
    """Gradients of one module for N samples, float32, one row of d entries for each.

    Attributes:
        num_samples: N, also `len()`.
        num_parameters: d, the entries of the module.
    """

    num_samples: int
    num_parameters: int

    def __len__(self) -> int:
        return self.num_samples

    def dot(self, other: "GradientRows") -> Tensor:
        """Return the dot product of every row with every row of `other`, float32 [N, N of other].

        Raises:
            TypeError: `other` is held in another form.
            ValueError: `other` has another number of entries.
        """
        if type(other) is not type(self):
            raise TypeError(f"{type(self).__name__} has no dot product with {type(other).__name__}")
        if other.num_parameters != self.num_parameters:
            raise ValueError(f"{self.num_parameters} entries against {other.num_parameters}.")
        return self._dot(other)

    @abstractmethod
    def _dot(self, other: Self) -> Tensor:
        """Do the work of `dot` for rows that fit."""

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """Return the squared length of every row, float32 [N]."""

    @abstractmethod
    def absolute_sum(self) -> Tensor:
        """Return the sum of the absolute entries of every row, float32 [N]."""

    @abstractmethod
    def entry_sum(self) -> Tensor:
        """Return the sum of the entries of every row, float32 [N]."""

    @abstractmethod
    def total(self) -> Tensor | tuple[Tensor, Tensor]:
        """Return the sum of the rows, float64 [d]; a pair for `SparseRows`, see there."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the rows themselves, float32 [N, d].

        Raises:
            TypeError: the rows are too long to be written out (`SparseRows`).
        """

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Return the rows on `device`."""

    @abstractmethod
    def select(self, index_N: Tensor) -> Self:
        """Return the rows of the samples `index_N` (int64), in that order; repeats are allowed."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return contiguous tensors that `rows_from_tensors` makes the rows of again."""

    @classmethod
    @abstractmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Do the work of `concatenate` for parts that fit."""

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """Put rows of one module behind one another.

        Raises:
            TypeError: the parts are held in different forms.
            ValueError: there is no part, or they have different numbers of entries.
        """
        if not parts:
            raise ValueError("there is nothing to concatenate.")
        first = parts[0]
        if names := {type(part).__name__ for part in parts if type(part) is not type(first)}:
            raise TypeError(f"{type(first).__name__} cannot be joined with {', '.join(names)}")
        if len(sizes := {part.num_parameters for part in parts}) > 1:
            raise ValueError(f"parts with {sorted(sizes)} entries are not of one module.")
        return first if len(parts) == 1 else first.join(parts)
