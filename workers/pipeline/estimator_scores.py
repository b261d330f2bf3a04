"""All scores of one estimator, in at most three passes that each hold a block.

Shapes: F training samples, K columns of a row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.influence.aggregation import (
    COLUMN_AGGREGATIONS,
    SAMPLE_AGGREGATIONS,
    AggregationOptions,
    GroupAggregator,
    SampleAggregator,
)
from workers.pipeline.column_source import ColumnSource, ShardedSource
from workers.pipeline.rank_tiles import RankTiles


class EstimatorScores:
    """The scores of every layer group with every aggregation.

    Aggregations that take columns as they come share one pass over the columns; those of a
    sample's influence share a pass over the samples; those of a sample's ranks read what the first
    pass left on disk.

    Args:
        source: the influence.
        groups: for every layer group the rows in it.
        is_correct_K: which columns of every row `correct_only` keeps.
        aggregations: names.
        options: what the user set.
        choices: with which `correct_only` the scores will be asked for.
        scratch: a folder for ranks and sums; nothing stays in it.
        tick: is told the share of the passes that is done.

    Raises:
        NonFiniteInfluence: an influence is NaN or infinite; names positions among the F samples.
        InsufficientMemory: the disk has no room for the ranks.
    """

    def __init__(
        self,
        source: ColumnSource,
        *,
        groups: Mapping[str, Sequence[int]],
        is_correct_K: Tensor,
        aggregations: Sequence[str],
        options: AggregationOptions,
        choices: Sequence[bool],
        scratch: Path,
        tick: Callable[[float], None],
    ) -> None:
        self._source, self._choices, self._tick = source, choices, tick
        self._scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        self._shared: dict[str, Any] = {
            "groups": groups,
            "num_train": source.num_train,
            "is_correct_V": is_correct_K,
            "options": options,
        }
        streamed = [name for name in aggregations if name in COLUMN_AGGREGATIONS]
        by_sample = [name for name in aggregations if name in SAMPLE_AGGREGATIONS]
        of_ranks = [name for name in by_sample if SAMPLE_AGGREGATIONS[name].needs_order]
        of_influence = [name for name in by_sample if name not in of_ranks]
        self._num_passes = bool(streamed or of_ranks) + bool(of_ranks) + bool(of_influence)
        self._passes_done = 0
        self._aggregators: dict[str, GroupAggregator | SampleAggregator] = {}
        if of_ranks:
            num_columns = source.num_rows * source.num_columns
            with RankTiles(scratch, num_columns=num_columns, num_train=source.num_train) as tiles:
                self._stream(streamed, tiles)
                self._collect(of_ranks, tiles.read())
        elif streamed:
            self._stream(streamed, None)
        if of_influence:
            if not isinstance(source, ShardedSource):
                raise TypeError(f"{', '.join(of_influence)} need influence by samples.")
            self._collect(of_influence, source.sample_blocks())

    def get(self, group: str, aggregation: str, *, correct_only: bool) -> Tensor:
        """Return score_F, float32: the lowest are suspects."""
        return self._aggregators[aggregation].scores(group, aggregation, correct_only=correct_only)

    def _stream(self, names: Sequence[str], tiles: RankTiles | None) -> None:
        source = self._source
        aggregator = GroupAggregator(
            **self._shared,
            aggregations=names,
            scratch=self._scratch,
            keep_ranks=tiles.write if tiles else None,
        )
        asked = {row for rows in self._shared["groups"].values() for row in rows}
        for row in range(source.num_rows):
            for columns in source.column_blocks():
                self._report(row / source.num_rows)
                if row in asked:
                    aggregator.add(
                        module=row, influence_VT=source.read(row, columns), validation=columns
                    )
                elif tiles is not None:  # no group looks there, but the tiles have a place for it
                    num_columns = columns.stop - columns.start
                    nothing_CT = torch.zeros(num_columns, source.num_train, dtype=torch.int32)
                    tiles.write(row * source.num_columns + columns.start, nothing_CT)
        self._passes_done += 1
        self._aggregators |= dict.fromkeys(names, aggregator)

    def _collect(self, names: Sequence[str], blocks: Iterable[tuple[Tensor, Tensor]]) -> None:
        aggregator = SampleAggregator(**self._shared, aggregations=names, choices=self._choices)
        num_done = 0
        for index_B, value_KB in blocks:
            self._report(num_done / self._source.num_train)
            aggregator.add(index_B, value_KB)
            num_done += len(index_B)
        self._passes_done += 1
        self._aggregators |= dict.fromkeys(names, aggregator)

    def _report(self, share: float) -> None:
        self._tick((self._passes_done + share) / self._num_passes)
