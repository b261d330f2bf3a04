"""Aggregate influence over modules and validation samples into one score per training sample.

A *column* is the influence on one validation sample by one module, over all training samples. Two
ways through them, neither of which ever holds all: `GroupAggregator` takes columns as they come,
`SampleAggregator` takes some training samples with all their columns.
"""

from workers.influence.aggregation.base import (
    Aggregation,
    AggregationOptions,
    ColumnAggregation,
    SampleAggregation,
)
from workers.influence.aggregation.by_column import GroupAggregator, KeepRanks
from workers.influence.aggregation.by_sample import SampleAggregator
from workers.influence.aggregation.choice import lower_half
from workers.influence.aggregation.ordering import (
    lowest_of_columns,
    lowest_places,
    order_by_score,
    rank_columns,
    sort_columns,
)
from workers.influence.aggregation.registry import (
    AGGREGATIONS,
    COLUMN_AGGREGATIONS,
    SAMPLE_AGGREGATIONS,
)

__all__ = [
    "AGGREGATIONS",
    "COLUMN_AGGREGATIONS",
    "SAMPLE_AGGREGATIONS",
    "Aggregation",
    "AggregationOptions",
    "ColumnAggregation",
    "GroupAggregator",
    "KeepRanks",
    "SampleAggregation",
    "SampleAggregator",
    "lower_half",
    "lowest_of_columns",
    "lowest_places",
    "order_by_score",
    "rank_columns",
    "sort_columns",
]
