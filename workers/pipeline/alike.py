"""The training samples most alike, and most opposed, to each in gradient space.

Under a gradient step two samples with a cosine near 1 do the same to the model, two near -1 the
opposite: that is how two near-duplicates with different labels show. The cosines are those of
sketches (`workers.influence.sketch`).

Shapes: T training samples, A those that are asked for, K neighbours, C a block of candidates,
B a block of the asked, W width of the sketches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

NUM_ALIKE = 5
# Up to here all samples are compared with all; beyond, these many of the most suspect are.
MAX_ALL = 20_000
MAX_SUSPECTS = 10_000
# Cosines are told in steps, so that copies are equal, and stand in the order of the file.
_STEPS = 2**16
_ASKED_BLOCK = 1024


@dataclass(frozen=True)
class Neighbours:
    """The nearest samples on one side, the nearest first; -1 where there are no more.

    Attributes:
        index_AK: int64, training indices.
        cosine_AK: float32.
    """

    index_AK: Tensor
    cosine_AK: Tensor


@dataclass(frozen=True)
class Alike:
    """The neighbours of the samples that were asked for.

    Attributes:
        place_T: int64, where a sample stands in the others; -1 where it was not asked for.
        alike: those with the highest cosines, all above 0.
        opposed: those with the lowest cosines, all below 0.
    """

    place_T: Tensor
    alike: Neighbours
    opposed: Neighbours


def asked_samples(order_T: Tensor) -> Tensor:
    """Return the samples whose neighbours are looked for, int64 [A] ascending.

    Args:
        order_T: all samples, the most suspect first.
    """
    count = len(order_T) if len(order_T) <= MAX_ALL else MAX_SUSPECTS
    return order_T[:count].sort().values


class Sketches(Protocol):
    """The sketches of all samples, of length 1 in any floating dtype, or zero."""

    def __len__(self) -> int: ...

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ascending training indices [C] with their sketches [C, W], until all came."""
        ...

    def take(self, index_N: Tensor) -> Tensor:
        """Return the sketches of some samples, [N, W]."""
        ...


def find_alike(sketches: Sketches, asked_A: Tensor, *, keep_alive: Callable[[], None]) -> Alike:
    """Find the samples with the highest and the lowest cosines to each that is asked for.

    A sample without a gradient has no neighbours and is none; equals stand by training index.

    Args:
        sketches: of all samples; read again for every block of the asked.
        asked_A: training indices.
        keep_alive: is called again and again.
    """
    place_T = torch.full((len(sketches),), -1)
    place_T[asked_A] = torch.arange(len(asked_A))
    sketch_AW = sketches.take(asked_A)
    blocks = [
        _nearest(sketches, asked_B, sketch_BW, keep_alive=keep_alive)
        for asked_B, sketch_BW in zip(
            asked_A.split(_ASKED_BLOCK), sketch_AW.split(_ASKED_BLOCK), strict=True
        )
    ]
    return Alike(
        place_T,
        alike=_join([alike for alike, _ in blocks]),
        opposed=_join([opposed for _, opposed in blocks]),
    )


def _nearest(
    sketches: Sketches, asked_B: Tensor, sketch_BW: Tensor, *, keep_alive: Callable[[], None]
) -> tuple[Neighbours, Neighbours]:
    """Return who is alike and who is opposed to a block of samples."""
    asked_BW = _unit(sketch_BW)
    nobody = torch.full((len(asked_B), NUM_ALIKE), -1)
    best = [(nobody, torch.zeros(nobody.shape)) for _ in range(2)]
    for index_C, sketch_CW in sketches.blocks():
        keep_alive()
        cosine_BC = (asked_BW @ _unit(sketch_CW).T).mul_(_STEPS).round_().div_(_STEPS)
        own_B = torch.searchsorted(index_C, asked_B).clamp_(max=len(index_C) - 1)
        is_here_B = index_C[own_B] == asked_B
        cosine_BC[is_here_B, own_B[is_here_B]] = 0
        for side, sign in enumerate((1, -1)):
            signed_BC = cosine_BC if sign == 1 else cosine_BC.neg_()
            place_BK = highest_positive(signed_BC, NUM_ALIKE)
            index, value = best[side]
            value = torch.cat([value, signed_BC.gather(1, place_BK)], dim=1)
            index = torch.cat([index, index_C[place_BK]], dim=1)
            # first by index, then by value: equals stay in the order of the training set
            by_index = index.argsort(dim=1)
            value, index = value.gather(1, by_index), index.gather(1, by_index)
            order = value.argsort(dim=1, descending=True, stable=True)[:, :NUM_ALIKE]
            best[side] = index.gather(1, order), value.gather(1, order)
    (alike, alike_cosine), (opposed, opposed_cosine) = best
    return (
        Neighbours(alike.masked_fill(alike_cosine <= 0, -1), alike_cosine.clamp(max=1)),
        Neighbours(opposed.masked_fill(opposed_cosine <= 0, -1), -opposed_cosine.clamp(max=1)),
    )


def highest_positive(value_BC: Tensor, count: int) -> Tensor:
    """Return the places of every row's highest values, int64 [B, min(count, C)], ties by place.

    The same as a stable sort as far as values are above 0; which of the others come is left open.
    """
    if value_BC.shape[1] <= count:
        return value_BC.argsort(dim=1, descending=True, stable=True)
    value, place = value_BC.topk(count + 1, dim=1)
    is_open_B = (value[:, count - 1] == value[:, count]) & (value[:, count] > 0)
    place_BK = place[:, :count].sort(dim=1).values
    order = value_BC.gather(1, place_BK).argsort(dim=1, descending=True, stable=True)
    place_BK = place_BK.gather(1, order)
    if bool(is_open_B.any()):
        whole = value_BC[is_open_B].argsort(dim=1, descending=True, stable=True)
        place_BK[is_open_B] = whole[:, :count]
    return place_BK


def _join(parts: Sequence[Neighbours]) -> Neighbours:
    return Neighbours(
        torch.cat([part.index_AK for part in parts]), torch.cat([part.cosine_AK for part in parts])
    )


def _unit(sketch_NW: Tensor) -> Tensor:
    return normalize(sketch_NW.float())
