"""Turn ranks by column into ranks by training sample, on disk.

Shapes: T training samples, B a block of them, C a block of columns, K all columns.
"""

import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from app.storage import wait_if_full
from workers.influence.errors import InsufficientMemory
from workers.pipeline.column_source import samples_per_block

_INT32 = np.dtype(np.int32)


class RankTiles:
    """A scratch file of int32 ranks in tiles [K, B]: written by columns, read by samples.

    A tile is one block of samples; it is read in one piece, and a block of columns is a piece of
    every tile. The file has no name, so it is gone when it is closed or the process ends.

    Args:
        folder: where the file is.
        num_columns: K.
        num_train: T.

    Raises:
        InsufficientMemory: the disk has no room for it.
    """

    def __init__(self, folder: Path, *, num_columns: int, num_train: int) -> None:
        self._num_columns, self._num_train = num_columns, num_train
        self._step = samples_per_block(num_columns)
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = num_columns * num_train * _INT32.itemsize, shutil.disk_usage(folder).free
        if needed > free:
            wait_if_full(folder)
            raise InsufficientMemory(
                f"The ranks for common_set need {needed / 1e9:.1f} GB of disk for a while, and "
                f"{free / 1e9:.1f} GB are free in the data directory. Leave common_set out, use "
                "fewer validation samples, or make room."
            )
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, first: int, rank_CT: Tensor) -> None:
        """Keep the ranks in the columns from `first` on."""
        ranks = rank_CT.cpu().numpy()
        for start, stop in self._blocks():
            offset = start * self._num_columns + first * (stop - start)
            self._file.seek(offset * _INT32.itemsize)
            self._file.write(np.ascontiguousarray(ranks[:, start:stop]).data)

    def read(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield training samples and rank_KB, once all columns are there."""
        for start, stop in self._blocks():
            self._file.seek(start * self._num_columns * _INT32.itemsize)
            rank_KB = np.empty((self._num_columns, stop - start), dtype=_INT32)
            if self._file.readinto(rank_KB.data) != rank_KB.nbytes:
                raise EOFError("not all columns have been written.")
            yield torch.arange(start, stop), torch.from_numpy(rank_KB)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        for block in range(math.ceil(self._num_train / self._step)):
            start = block * self._step
            yield start, min(start + self._step, self._num_train)
