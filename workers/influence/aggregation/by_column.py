"""Aggregate column by column: nothing grows with the number of columns.

Shapes: T training samples, V a block of validation samples, C columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.influence.aggregation.base import (
    AggregationOptions,
    ColumnAggregation,
    ColumnBlock,
)
from workers.influence.aggregation.choice import ColumnChoice
from workers.influence.aggregation.module_sums import ModuleSums
from workers.influence.aggregation.ordering import rank_columns
from workers.influence.aggregation.registry import COLUMN_AGGREGATIONS
from workers.influence.errors import NonFiniteInfluence

_DEFAULT = AggregationOptions()

KeepRanks = Callable[[int, Tensor], None]
"""Is given the position of a block's first column, and rank_CT."""


@dataclass
class _Kept:
    """What is kept by aggregation, a pair of tensors [T].

    The first is over the validation samples that do not count with `correct_only`, the second over
    those that do.
    """

    by_aggregation: dict[str, list[Tensor]]
    num_validation: int = 0


class GroupAggregator:
    """Streams influence, one module and one block of validation samples at a time, into scores.

    Every column is sorted once, for all groups and aggregations, and not at all where none asks
    for its ranks. The scores do not depend, to the bit, on how the validation samples are cut into
    blocks.

    Memory is 16 bytes per training sample and aggregation, for the module that has begun. What the
    others added waits on disk until a group is asked for.

    Args:
        groups: for every group the modules in it, such as `layer_groups` gives.
        num_train: T.
        is_correct_V: bool over ALL validation samples, whether `correct_only` keeps them;
            `torch.ones(1)` for estimators without validation samples.
        aggregations: names from `COLUMN_AGGREGATIONS`.
        options: what the user set.
        device: where the influence will be.
        scratch: a folder for what waits; None is the system's own for temporary files.
        keep_ranks: is given the ranks in every block of columns, of module m and validation sample
            j at position m · V + j.

    Raises:
        ValueError: an unknown aggregation.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[int]],
        *,
        num_train: int,
        is_correct_V: Tensor,
        aggregations: Sequence[str] = tuple(COLUMN_AGGREGATIONS),
        options: AggregationOptions = _DEFAULT,
        device: torch.device | str = "cpu",
        scratch: Path | None = None,
        keep_ranks: KeepRanks | None = None,
    ) -> None:
        if unknown := sorted(set(aggregations) - set(COLUMN_AGGREGATIONS)):
            raise ValueError(f"unknown aggregations: {', '.join(unknown)}.")
        self._aggregations = tuple(COLUMN_AGGREGATIONS[name] for name in aggregations)
        self._num_train = num_train
        self._options = options
        self._device = torch.device(device)
        self._choice = ColumnChoice(groups, is_correct_V, device)
        self._keep_ranks = keep_ranks
        self._needs_order = keep_ranks is not None or any(
            aggregation.needs_order for aggregation in self._aggregations
        )
        self._groups = {name: sorted(modules) for name, modules in groups.items()}
        self._missing = {name: set(modules) for name, modules in groups.items()}
        self._sums = ModuleSums(scratch)
        self._open: _Kept | None = None
        self._module = -1

    @property
    def correct_only_fell_back(self) -> bool:
        """Whether `correct_only` would leave no validation sample, so that all count."""
        return self._choice.fell_back

    def add(self, *, module: int, influence_VT: Tensor, validation: slice) -> None:
        """Add the influence by one module on one block of validation samples.

        Args:
            module: the module's position, as in the groups; modules come in ascending order.
            influence_VT: float32, for all T training samples in their original order.
            validation: which validation samples these are; the blocks of a module follow one
                another from 0 on without gaps.

        Raises:
            NonFiniteInfluence: an influence is NaN or infinite; names the training samples.
            ValueError: a block or module is not the next one, or the shape does not fit.
        """
        is_correct_V = self._choice.is_correct_V
        start, stop, _ = validation.indices(len(is_correct_V))
        if influence_VT.shape != (stop - start, self._num_train):
            raise ValueError(
                f"influence of shape {tuple(influence_VT.shape)} for validation samples "
                f"{start} to {stop} and {self._num_train} training samples."
            )
        kept = self._begin(module, start)
        broken_T = ~torch.isfinite(influence_VT).all(dim=0)
        if bool(broken_T.any()):
            raise NonFiniteInfluence("influence", positions=broken_T.nonzero().flatten().tolist())

        rank_VT = rank_columns(influence_VT) if self._needs_order else None
        if self._keep_ranks is not None and rank_VT is not None:
            self._keep_ranks(module * len(is_correct_V) + start, rank_VT)
        columns = ColumnBlock(influence_VT, rank_VT)
        for row, chosen_V in enumerate((~is_correct_V[start:stop], is_correct_V[start:stop])):
            if bool(chosen_V.any()):
                block = columns.select(chosen_V)
                for aggregation in self._aggregations:
                    pair = kept.by_aggregation[aggregation.name]
                    aggregation.add(pair[row], block, self._options)
        kept.num_validation = stop
        if stop == len(is_correct_V):
            self._close(kept)

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
        if self._missing[group]:
            raise ValueError(
                f"group '{group}' still misses modules {sorted(self._missing[group])}."
            )
        method = COLUMN_AGGREGATIONS[aggregation]
        rest_T, correct_T = self._start(method), self._start(method)
        for module in self._groups[group]:
            more_rest_T, more_correct_T = self._sums.get(module, aggregation)
            rest_T = method.merge(rest_T, more_rest_T.to(self._device))
            correct_T = method.merge(correct_T, more_correct_T.to(self._device))
        if self._choice.uses_correct(correct_only=correct_only):
            kept_T = correct_T
        else:
            kept_T = method.merge(rest_T, correct_T)
        num_columns = len(self._choice.columns(group, correct_only=correct_only))
        return method.finish(kept_T, num_columns).float()

    def _nothing(self) -> _Kept:
        return _Kept(
            {each.name: [self._start(each), self._start(each)] for each in self._aggregations}
        )

    def _start(self, aggregation: ColumnAggregation) -> Tensor:
        return torch.full(
            (self._num_train,), aggregation.start, dtype=aggregation.dtype, device=self._device
        )

    def _begin(self, module: int, start: int) -> _Kept:
        """Return what is kept of the module that goes on, or begins."""
        if self._open is None:
            if module <= self._module:
                raise ValueError(
                    f"module {module} comes after module {self._module}: modules come once, in "
                    "ascending order, or their sums would depend on the order."
                )
            if not any(module in modules for modules in self._groups.values()):
                raise ValueError(f"module {module} is in no group.")
            self._open, self._module = self._nothing(), module
        if module != self._module:
            raise ValueError(f"module {self._module} is not complete, and module {module} begins.")
        if start != self._open.num_validation:
            raise ValueError(
                f"module {module} goes on at validation sample {self._open.num_validation}, "
                f"not {start}."
            )
        return self._open

    def _close(self, kept: _Kept) -> None:
        self._open = None
        for missing in self._missing.values():
            missing.discard(self._module)
        for aggregation, pair in kept.by_aggregation.items():
            self._sums.put(self._module, aggregation, pair)
