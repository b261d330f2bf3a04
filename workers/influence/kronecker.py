"""The two sums that EK-FAC makes the eigenbasis of a weight matrix of.

Shapes: I/O input and output features, R tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class KroneckerSums:
    """Sums over tokens for one weight matrix [O, I]; sums of parts of the data add up.

    Attributes:
        input_II: float64, Σ x xᵀ over the inputs of the layer.
        output_OO: float64, Σ g gᵀ over the gradients of the layer's output.
        num_tokens: how many tokens were summed, padding not among them.
    """

    input_II: Tensor
    output_OO: Tensor
    num_tokens: int

    @classmethod
    def of_tokens(cls, x_RI: Tensor, g_RO: Tensor, *, num_tokens: int) -> Self:
        """Sum over the tokens of a batch.

        Args:
            x_RI: inputs; zero at padding, where there is any.
            g_RO: gradients of the output; zero at padding.
            num_tokens: rows that are no padding.
        """
        x_RI, g_RO = x_RI.float(), g_RO.float()
        return cls((x_RI.T @ x_RI).double(), (g_RO.T @ g_RO).double(), num_tokens)

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.input_II + other.input_II,
            self.output_OO + other.output_OO,
            self.num_tokens + other.num_tokens,
        )

    def to(self, device: torch.device | str) -> Self:
        """Return the sums on `device`."""
        return type(self)(self.input_II.to(device), self.output_OO.to(device), self.num_tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Return contiguous tensors that `from_tensors` makes the sums of again."""
        return {
            "input": self.input_II.contiguous(),
            "output": self.output_OO.contiguous(),
            "num_tokens": torch.tensor(self.num_tokens),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Make sums of what `tensors()` gave.

        Raises:
            KeyError: a tensor is missing.
        """
        return cls(tensors["input"], tensors["output"], int(tensors["num_tokens"]))
