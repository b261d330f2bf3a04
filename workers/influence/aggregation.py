"""Aggregate influence over modules and validation samples into one score per training sample.

A *column* is the influence on one validation sample by one module, over all training samples.
Columns are summed as they come, so that memory does not grow with their number.

Shapes: T training samples, V a block of validation samples, C columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from workers.influence.errors import NonFiniteInfluence

_SORT_ENTRIES = 65_536


def order_by_score(score_T: Tensor) -> Tensor:
    """Return the int64 training indices from the most suspect on, ties by training index."""
    return score_T.argsort(stable=True)


def sort_columns(influence_CT: Tensor) -> Tensor:
    """Return order_CT, int64: every column's training indices from the lowest on, ties by index.

    The same as `influence_CT.argsort(dim=1, stable=True)` for finite float32, two to three times
    faster on a CPU: torch sorts whole numbers by radix, but only in one dimension and from 32,768
    entries on. So the bits are read as whole numbers of the same order, the column is put into the
    high bits, and as many columns as the cache holds are sorted at once.
    """
    step = -(-_SORT_ENTRIES // max(1, influence_CT.shape[1]))
    blocks = [_sort_block(block_CT) for block_CT in torch.split(influence_CT, step)]
    return torch.cat(blocks) if len(blocks) != 1 else blocks[0]


def _sort_block(influence_CT: Tensor) -> Tensor:
    # adding zero turns -0.0, whose bits sort below those of 0.0, into 0.0
    bits_CT = (influence_CT + 0.0).view(torch.int32)
    key_CT = torch.where(bits_CT < 0, bits_CT ^ 0x7FFFFFFF, bits_CT).long()
    column_C1 = torch.arange(len(key_CT), device=key_CT.device)[:, None]
    order_CT = (key_CT + (column_C1 << 32)).flatten().argsort(stable=True).view(key_CT.shape)
    return order_CT - column_C1 * key_CT.shape[1]


class Aggregation(ABC):
    """How columns become a score; stateless.

    Attributes:
        name: key in the registry.
        description: when to use it, in a sentence.
        needs_order: whether it looks at the columns' order.
        dtype: of the sums.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    needs_order: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.int64

    @abstractmethod
    def add(
        self, sum_T: Tensor, *, influence_CT: Tensor, order_CT: Tensor, vote_count: int
    ) -> None:
        """Add columns to a running sum, in place, one after the other.

        Args:
            sum_T: the sum so far, of this aggregation's dtype.
            influence_CT: float32.
            order_CT: `sort_columns(influence_CT)`; empty where `needs_order` is False.
            vote_count: how many of the lowest get votes, k.
        """


class Mean(Aggregation):
    """The mean influence."""

    name = "mean"
    description = "The classic; a few modules or validation samples with huge gradients decide it."
    needs_order = False
    dtype = torch.float64

    def add(
        self,
        sum_T: Tensor,
        *,
        influence_CT: Tensor,
        order_CT: Tensor,  # noqa: ARG002 - the mean needs no order
        vote_count: int,  # noqa: ARG002
    ) -> None:
        # one by one: a sum over the block would round differently for other blocks
        for influence_T in influence_CT:
            sum_T += influence_T


class Rank(Aggregation):
    """The mean rank in a column, 0 = lowest."""

    name = "rank"
    description = "Every column counts the same, whatever its scale: the choice for deep models."

    def add(
        self,
        sum_T: Tensor,
        *,
        influence_CT: Tensor,  # noqa: ARG002 - the order is all that counts
        order_CT: Tensor,
        vote_count: int,  # noqa: ARG002
    ) -> None:
        rank_T = torch.arange(order_CT.shape[1], device=order_CT.device)
        sum_T.scatter_add_(0, order_CT.flatten(), rank_T.repeat(len(order_CT)))


class Vote(Aggregation):
    """Minus the mean of max(k − rank, 0)."""

    name = "vote"
    description = (
        "Only the k lowest of every column get votes: makes the choice of layers nearly harmless."
    )

    def add(
        self,
        sum_T: Tensor,
        *,
        influence_CT: Tensor,  # noqa: ARG002 - the order is all that counts
        order_CT: Tensor,
        vote_count: int,
    ) -> None:
        vote_k = torch.arange(-vote_count, 0, device=order_CT.device)
        sum_T.scatter_add_(0, order_CT[:, :vote_count].flatten(), vote_k.repeat(len(order_CT)))


AGGREGATIONS: dict[str, Aggregation] = {
    aggregation.name: aggregation for aggregation in (Mean(), Rank(), Vote())
}


@dataclass
class _Sums:
    """Running sums by aggregation, int64 or float64 [2, T].

    Row 0 is over the validation samples that the model predicts wrongly, row 1 over the others.
    """

    by_aggregation: dict[str, Tensor]
    num_validation: int = 0


@dataclass
class _Group:
    sums: _Sums
    missing: set[int] = field(default_factory=set)
    num_modules: int = 0


class GroupAggregator:
    """Streams influence, one module and one block of validation samples at a time, into scores.

    Every column is sorted once, for all groups and aggregations. The scores do not depend, to the
    bit, on how the validation samples are cut into blocks.

    Memory is 16 bytes per training sample, group and aggregation, and as much for every module that
    has begun and is not complete: give it all blocks of one module before the next.

    Args:
        groups: for every group the modules in it, such as `layer_groups` gives.
        num_train: T.
        vote_fraction: k as a share of T for the vote, above 0 and at most 1.
        is_correct_V: bool over ALL validation samples, whether the model predicts them correctly;
            `torch.ones(1)` for estimators without validation samples.
        aggregations: names from `AGGREGATIONS`.
        device: where the influence will be.

    Raises:
        ValueError: an unknown aggregation, or a fraction out of range.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[int]],
        *,
        num_train: int,
        vote_fraction: float,
        is_correct_V: Tensor,
        aggregations: Sequence[str] = tuple(AGGREGATIONS),
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < vote_fraction <= 1:
            raise ValueError(f"vote_fraction {vote_fraction} is not above 0 and at most 1.")
        if unknown := set(aggregations) - set(AGGREGATIONS):
            raise ValueError(f"unknown aggregations: {', '.join(sorted(unknown))}.")
        self._aggregations = tuple(AGGREGATIONS[name] for name in aggregations)
        self._num_train = num_train
        self._device = torch.device(device)
        self.vote_count: int = max(1, round(vote_fraction * num_train))
        is_correct_V = is_correct_V.to(device=self._device, dtype=torch.bool)
        self.correct_only_fell_back: bool = not bool(is_correct_V.any())
        self._is_correct_V = is_correct_V
        self._groups = {
            name: _Group(self._zeros(), set(modules), len(set(modules)))
            for name, modules in groups.items()
        }
        self._open: dict[int, _Sums] = {}

    def add(self, *, module: int, influence_VT: Tensor, validation: slice) -> None:
        """Add the influence by one module on one block of validation samples.

        Args:
            module: the module's position, as in the groups.
            influence_VT: float32, for all T training samples in their original order.
            validation: which validation samples these are; the blocks of a module follow one
                another from 0 on without gaps.

        Raises:
            NonFiniteInfluence: an influence is NaN or infinite; names the training samples.
            ValueError: a block or module is not the next one, or the shape does not fit.
        """
        start, stop, _ = validation.indices(len(self._is_correct_V))
        if influence_VT.shape != (stop - start, self._num_train):
            raise ValueError(
                f"influence of shape {tuple(influence_VT.shape)} for validation samples "
                f"{start} to {stop} and {self._num_train} training samples."
            )
        sums = self._open.get(module)
        if sums is None:
            if not any(module in group.missing for group in self._groups.values()):
                raise ValueError(f"module {module} is complete already, or in no group.")
            sums = self._open[module] = self._zeros()
        if start != sums.num_validation:
            raise ValueError(
                f"module {module} goes on at validation sample {sums.num_validation}, not {start}."
            )
        broken_T = ~torch.isfinite(influence_VT).all(dim=0)
        if bool(broken_T.any()):
            raise NonFiniteInfluence("influence", positions=broken_T.nonzero().flatten().tolist())

        for row, block_CT in self._split(influence_VT, self._is_correct_V[start:stop]):
            for aggregation, order_CT in self._with_order(block_CT):
                aggregation.add(
                    sums.by_aggregation[aggregation.name][row],
                    influence_CT=block_CT,
                    order_CT=order_CT,
                    vote_count=self.vote_count,
                )
        sums.num_validation = stop
        if stop == len(self._is_correct_V):
            self._close(module)

    def scores(self, group: str, aggregation: str, *, correct_only: bool) -> Tensor:
        """Return score_T, float32: the lowest are suspects.

        With `correct_only` only validation samples count that the model predicts correctly; where
        there is none, all count and `correct_only_fell_back` is True.

        The mean is over modules and validation samples, for `vote` too: its scores are METHOD's
        sum divided by their number, which orders the same and compares between groups. Float32 is
        what is stored, so whoever sorts stored scores gets the same ranking.

        Raises:
            KeyError: an unknown group or aggregation.
            ValueError: modules of the group are still missing.
        """
        entry = self._groups[group]
        if entry.missing:
            raise ValueError(f"group '{group}' still misses modules {sorted(entry.missing)}.")
        sum_2T = entry.sums.by_aggregation[aggregation]
        use_correct = correct_only and not self.correct_only_fell_back
        num_validation = int(self._is_correct_V.sum()) if use_correct else len(self._is_correct_V)
        sum_T = sum_2T[1] if use_correct else sum_2T[0] + sum_2T[1]
        return (sum_T.double() / (entry.num_modules * num_validation)).float()

    def _zeros(self) -> _Sums:
        return _Sums(
            {
                aggregation.name: torch.zeros(
                    2, self._num_train, dtype=aggregation.dtype, device=self._device
                )
                for aggregation in self._aggregations
            }
        )

    def _split(self, influence_VT: Tensor, is_correct_V: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the wrongly and the correctly predicted validation samples with their row."""
        for row, chosen_V in enumerate((~is_correct_V, is_correct_V)):
            if bool(chosen_V.all()):
                yield row, influence_VT
            elif bool(chosen_V.any()):
                yield row, influence_VT[chosen_V]

    def _with_order(self, influence_CT: Tensor) -> Iterator[tuple[Aggregation, Tensor]]:
        empty = torch.empty(0, dtype=torch.int64, device=influence_CT.device)
        needs_order = any(aggregation.needs_order for aggregation in self._aggregations)
        order_CT = sort_columns(influence_CT) if needs_order else empty
        for aggregation in self._aggregations:
            yield aggregation, order_CT if aggregation.needs_order else empty

    def _close(self, module: int) -> None:
        sums = self._open.pop(module)
        for group in self._groups.values():
            if module in group.missing:
                group.missing.remove(module)
                for name, sum_2T in sums.by_aggregation.items():
                    group.sums.by_aggregation[name] += sum_2T
