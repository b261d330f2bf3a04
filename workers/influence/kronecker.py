"""The two sums that EK-FAC makes the eigenbasis of a weight matrix of.

Shapes: I/O input and output features, R tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

MAX_SIDE = 8192
"""Longest side of a weight matrix whose sums are made.

A longer one, such as the vocabulary of a language model, would take gigabytes, and its
eigenvectors hours.
"""


@dataclass(eq=False, slots=True)
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
        """Sum over the tokens of a batch, in float32 on their device.

        The sums are on the CPU: those of all modules together may be larger than the device.

        Args:
            x_RI: inputs; zero at padding, where there is any.
            g_RO: gradients of the output; zero at padding.
            num_tokens: rows that are no padding.
        """
        x_RI, g_RO = x_RI.float(), g_RO.float()
        # one after the other, so that neither float64 nor both at once are on the device
        input_II = (x_RI.T @ x_RI).cpu().double()
        output_OO = (g_RO.T @ g_RO).cpu().double()
        return cls(input_II, output_OO, num_tokens)

    @classmethod
    def zeros(cls, num_outputs: int, num_inputs: int) -> Self:
        """Return the sums over no tokens for a matrix [O, I], on the CPU."""
        return cls(
            torch.zeros(num_inputs, num_inputs, dtype=torch.float64),
            torch.zeros(num_outputs, num_outputs, dtype=torch.float64),
            0,
        )

    def add_(self, other: Self) -> Self:
        """Add sums to these, in place; they stay where they are."""
        self.input_II += other.input_II.to(self.input_II.device)
        self.output_OO += other.output_OO.to(self.output_OO.device)
        self.num_tokens += other.num_tokens
        return self

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
