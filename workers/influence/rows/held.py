"""Rows of one module that come batch by batch, held once.

Shapes: N samples, B a batch of them, S tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from workers.influence.rows.base import GradientRows
from workers.influence.rows.sparse import SparseRows
from workers.influence.rows.stored import rows_from_tensors


class HeldRows:
    """Puts rows where they belong as they come.

    Room for all is taken at once. Parts that are joined in the end are held twice, and the room of
    the parts, between those of other modules, is of no use afterwards: full models took 1.4 times
    the memory of their validation gradients more.

    Args:
        num_samples: N.
    """

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._tensors: dict[str, Tensor] = {}
        self._sparse: list[tuple[Tensor, SparseRows]] = []

    def put(self, index_B: Tensor, rows: GradientRows) -> None:
        """Keep the rows of the samples `index_B` (int64)."""
        if isinstance(rows, SparseRows):  # how many they are only the last batch tells
            self._sparse.append((index_B, rows))
            return
        for name, value in rows.tensors().items():
            if name not in self._tensors:
                self._tensors[name] = value.new_zeros(self._num_samples, *value.shape[1:])
            held = self._tensors[name]
            if (missing := value.shape[1] - held.shape[1]) > 0:  # tokens
                self._tensors[name] = held = pad(held, (0, 0, 0, missing))
            held[index_B, : value.shape[1]] = value

    def rows(self) -> GradientRows:
        """Return the rows of all samples, in their order."""
        if self._sparse:
            indices, parts = zip(*self._sparse, strict=True)
            joined: SparseRows = SparseRows.concatenate(parts)
            return joined.select(torch.cat(indices).argsort())
        return rows_from_tensors(self._tensors)
