"""Write what a shard computes to its file as it comes, so that memory does not grow with a shard.

Shapes: R rows of influence (modules or blocks of the model), V validation samples or classes,
T the shard's training samples, B a batch of them, P those of a part.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor

from workers.pipeline.artifacts import atomically

PART_BYTES = 8 * 1024**2
"""Influence of one estimator that is collected before it is written: longer runs of bytes."""

_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}


class TensorWriter:
    """Writes a safetensors file of known shapes part by part; what is never written is zero.

    Args:
        path: of the file.
        like: by name a tensor of the same shape and precision, on the meta device for instance.
    """

    def __init__(self, path: Path, like: Mapping[str, Tensor]) -> None:
        self._like = like
        self._offset: dict[str, int] = {}
        header: dict[str, dict[str, object]] = {}
        size = 0
        # wide entries first, so that all are aligned
        for name, tensor in sorted(like.items(), key=lambda item: -item[1].element_size()):
            self._offset[name] = size
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [size, size := size + tensor.numel() * tensor.element_size()],
            }
        # the format: length of the header, the header in JSON, the bytes of the tensors
        text = orjson.dumps(header)
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = path.open("wb", buffering=0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + size)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def put_rows(self, name: str, positions: slice | Tensor, value: Tensor) -> None:
        """Write `tensor[positions]`; rows between positions that ascend with gaps become zero."""
        start, stop = _range(positions)
        if isinstance(positions, Tensor):
            rows = value.new_zeros(stop - start, *value.shape[1:])
            rows[positions.to(value.device) - start] = value
            value = rows
        self._write(name, start * math.prod(self._like[name].shape[1:]), value)

    def put_columns(self, name: str, row: int, start: int, value_VP: Tensor) -> None:
        """Write `tensor[row, :, start : start + P]`."""
        _, num_columns, length = self._like[name].shape
        first = row * num_columns * length + start
        if value_VP.shape[1] == length:
            self._write(name, first, value_VP)
            return
        for place, value_P in enumerate(value_VP):
            self._write(name, first + place * length, value_P)

    def _write(self, name: str, first: int, value: Tensor) -> None:
        like = self._like[name]
        array: Any = value.detach().to("cpu", like.dtype).contiguous().numpy()
        rest = memoryview(array.reshape(-1).view("u1"))
        offset = self._start + self._offset[name] + first * like.element_size()
        while rest:
            written = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[written:], offset + written


class InfluenceWriter:
    """Collects the influence [R, V, T] of a shard, and writes it in parts of some samples.

    Args:
        file: has a tensor `influence` [R, V, T].
        shape: R, V and T.
    """

    def __init__(self, file: TensorWriter, shape: tuple[int, int, int]) -> None:
        self._file = file
        num_rows, self._num_columns, self._num_samples = shape
        row_bytes = torch.float32.itemsize * num_rows * self._num_columns
        self._width = max(1, PART_BYTES // max(1, row_bytes))
        self._parts: dict[int, tuple[int, Tensor]] = {}

    def put(self, row: int, positions: slice | Tensor, value_VB: Tensor) -> None:
        """Keep the influence of one row on samples at ascending positions in the shard.

        Batches come in the order of the shard; one that was only begun may come again.
        """
        start, stop = _range(positions)
        if row in self._parts and stop > self._parts[row][0] + self._parts[row][1].shape[1]:
            self._flush(row)
        if row not in self._parts:
            width = min(max(self._width, stop - start), self._num_samples - start)
            self._parts[row] = start, torch.zeros(self._num_columns, width)
        first, part_VP = self._parts[row]
        place = slice(start - first, stop - first)
        part_VP[:, place if isinstance(positions, slice) else positions - first] = value_VB.cpu()

    def flush(self) -> None:
        """Write what is still held."""
        for row in list(self._parts):
            self._flush(row)

    def _flush(self, row: int) -> None:
        first, part_VP = self._parts.pop(row)
        self._file.put_columns("influence", row, first, part_VP)


@contextmanager
def writing_tensors(path: Path, like: Mapping[str, Tensor]) -> Iterator[TensorWriter]:
    """Write a file of tensors, whole or not at all; `like` is as for `TensorWriter`."""
    with atomically(path) as temporary, closing(TensorWriter(temporary, like)) as file:
        yield file


@contextmanager
def writing_influence(
    path: Path, shape: tuple[int, int, int], **others: Tensor
) -> Iterator[InfluenceWriter]:
    """Write a file of influence, whole or not at all.

    Args:
        path: of the file.
        shape: R, V and T.
        others: what else the file holds, as it is at the end of the block.
    """
    like = {"influence": torch.empty(shape, device="meta"), **others}
    with writing_tensors(path, like) as file:
        influence = InfluenceWriter(file, shape)
        yield influence
        influence.flush()
        for name, tensor in others.items():
            file.put_rows(name, slice(0, len(tensor)), tensor)


def _range(positions: slice | Tensor) -> tuple[int, int]:
    """Return the first of ascending positions, and what follows the last."""
    if isinstance(positions, slice):
        return positions.start, positions.stop
    return int(positions[0]), int(positions[-1]) + 1
