"""What each module adds to the scores, on disk until a group of modules is asked for.

Shapes: T training samples.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class ModuleSums:
    """A scratch file of tensors [T]; it has no name, so it is gone when the process ends.

    Args:
        folder: where the file is; None is the system's own for temporary files.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed with the object
        self._places: dict[tuple[int, str], tuple[int, list[torch.dtype], int]] = {}

    def put(self, module: int, aggregation: str, values: list[Tensor]) -> None:
        """Keep some tensors [T] of a module."""
        offset = self._file.seek(0, 2)
        self._places[module, aggregation] = offset, [each.dtype for each in values], len(values[0])
        for value_T in values:
            value_T.cpu().numpy().tofile(self._file)

    def get(self, module: int, aggregation: str) -> list[Tensor]:
        """Return the tensors of a module as they were put."""
        offset, dtypes, num_train = self._places[module, aggregation]
        self._file.seek(offset)
        values = []
        for dtype in dtypes:
            value_T = torch.empty(num_train, dtype=dtype)
            array: np.ndarray = value_T.numpy()
            if self._file.readinto(array.data) != array.nbytes:
                raise EOFError("a module's sums are cut off.")
            values.append(value_T)
        return values
