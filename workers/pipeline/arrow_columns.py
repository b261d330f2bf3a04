"""Columns of Arrow tables from tensors: no value passes through Python.

Shapes: N rows, K numbers of each.
"""

from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor

from workers.pipeline.samples import NO_CLASS


def numbers(value_N: Tensor) -> pa.Array:
    """Return a number, or a boolean, of each row; floating ones as float32."""
    return pa.array((value_N.float() if value_N.is_floating_point() else value_N).numpy())


def lists(
    value_NK: Tensor, is_there_NK: Tensor | None = None, *, is_null_N: Tensor | None = None
) -> pa.Array:
    """Return a list of numbers of each row.

    Args:
        value_NK: the numbers.
        is_there_NK: bool, which of them are in the list; by default all.
        is_null_N: bool, which rows have no list.
    """
    if is_there_NK is None:
        is_there_NK = torch.ones(value_NK.shape, dtype=torch.bool)
    ends_N = is_there_NK.sum(dim=1).cumsum(dim=0)
    offsets = torch.cat([torch.zeros(1), ends_N]).int()
    return pa.ListArray.from_arrays(
        numbers(offsets),
        numbers(value_NK[is_there_NK]),
        mask=None if is_null_N is None else numbers(is_null_N),
    )


def name_labels(class_N: Tensor, labels: Sequence[str]) -> pa.Array:
    """Return the labels of classes; null for NO_CLASS, of causal language models."""
    place_N = pa.array(class_N.numpy(), mask=(class_N == NO_CLASS).numpy())
    return pa.array(labels, pa.string()).take(place_N)
