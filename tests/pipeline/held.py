"""Rows of training samples as the worker reads them from its shards, here from one tensor."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Held:
    """The rows [T, W], read in shards that mix early and late samples."""

    value_TW: Tensor
    num_shards: int = 3

    def __len__(self) -> int:
        return len(self.value_TW)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        step = min(self.num_shards, len(self))
        for first in range(step):
            index_N = torch.arange(first, len(self), step)
            yield index_N, self.value_TW[index_N]

    def take(self, index_N: Tensor) -> Tensor:
        return self.value_TW[index_N]
