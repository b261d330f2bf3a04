"""Aggregate block by block of training samples, each with all its columns.

Shapes: T training samples, B a block of them, K columns: of module m and validation sample j at
position m · V + j.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workers.influence.aggregation.base import AggregationOptions, SampleAggregation
from workers.influence.aggregation.choice import ColumnChoice
from workers.influence.aggregation.registry import SAMPLE_AGGREGATIONS
from workers.influence.errors import NonFiniteInfluence

_DEFAULT = AggregationOptions()


class SampleAggregator:
    """Scores training samples from all their columns, some samples at a time.

    A sample's scores depend, to the bit, on nothing but its own columns. Memory is four bytes per
    training sample, group and aggregation (twice with `correct_only`), and three times the block.

    Args:
        groups: for every group the modules in it.
        num_train: T.
        is_correct_V: bool over ALL validation samples, whether `correct_only` keeps them.
        aggregations: names from `SAMPLE_AGGREGATIONS`; all of them of influence, or all of ranks.
        options: what the user set.
        choices: with which `correct_only` the scores will be asked for.

    Raises:
        ValueError: an unknown aggregation, or some of influence and some of ranks.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[int]],
        *,
        num_train: int,
        is_correct_V: Tensor,
        aggregations: Sequence[str],
        options: AggregationOptions = _DEFAULT,
        choices: Sequence[bool] = (False, True),
    ) -> None:
        if unknown := sorted(set(aggregations) - set(SAMPLE_AGGREGATIONS)):
            raise ValueError(f"unknown aggregations: {', '.join(unknown)}.")
        self._aggregations = tuple(SAMPLE_AGGREGATIONS[name] for name in aggregations)
        if len({aggregation.needs_order for aggregation in self._aggregations}) > 1:
            raise ValueError("aggregations of influence and of ranks are not of the same values.")
        self._options = options
        self._choice = ColumnChoice(groups, is_correct_V)
        differ = {self._choice.uses_correct(correct_only=choice) for choice in choices}
        self._columns = {
            (group, correct_only): self._choice.columns(group, correct_only=correct_only)
            for group, correct_only in itertools.product(groups, sorted(differ))
        }
        self._scores = {
            (*choice, aggregation.name): torch.zeros(num_train)
            for choice, aggregation in itertools.product(self._columns, self._aggregations)
        }
        self._is_missing_T = torch.ones(num_train, dtype=torch.bool)

    def add(self, index_B: Tensor, value_KB: Tensor) -> None:
        """Score some training samples.

        Args:
            index_B: which they are, int64.
            value_KB: float32 influence or int32 ranks of all columns, on the CPU.

        Raises:
            NonFiniteInfluence: an influence is NaN or infinite; names the training samples.
        """
        if value_KB.is_floating_point():
            broken_B = ~torch.isfinite(value_KB).all(dim=0)
            if bool(broken_B.any()):
                raise NonFiniteInfluence("influence", positions=index_B[broken_B].tolist())
        value_BK = value_KB.T.contiguous()
        for choice, column_N in self._columns.items():
            chosen_BN = self._arrange(value_BK.index_select(1, column_N))
            for aggregation in self._aggregations:
                score_B = aggregation.score(chosen_BN, self._options)
                # which of -0.0 and 0.0 stands at a place is chance: both become 0.0
                self._scores[*choice, aggregation.name][index_B] = score_B.float() + 0.0
        self._is_missing_T[index_B] = False

    def scores(self, group: str, aggregation: str, *, correct_only: bool) -> Tensor:
        """Return score_T, float32: the lowest are suspects; see `GroupAggregator.scores`.

        Raises:
            KeyError: an unknown group or aggregation, or a choice that was not named.
            ValueError: training samples are still missing.
        """
        if bool(self._is_missing_T.any()):
            raise ValueError(f"{int(self._is_missing_T.sum())} training samples are missing.")
        is_correct = self._choice.uses_correct(correct_only=correct_only)
        return self._scores[group, is_correct, aggregation]

    def _arrange(self, value_BK: Tensor) -> Tensor:
        """Put the values of every sample in order, in place, as far as the aggregations look."""
        values = value_BK.numpy()  # whose sort and partition are far faster than torch's
        asked = [self._places(aggregation, value_BK.shape[1]) for aggregation in self._aggregations]
        places = [place for some in asked if some is not None for place in some]
        if any(some is None for some in asked):
            values.sort(axis=1)
        else:
            values.partition(sorted(set(places)), axis=1)
        return value_BK

    def _places(self, aggregation: SampleAggregation, num_columns: int) -> Sequence[int] | None:
        return aggregation.places(num_columns, self._options)
