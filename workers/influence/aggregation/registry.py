"""The aggregations by name."""

from workers.influence.aggregation.base import (
    Aggregation,
    ColumnAggregation,
    SampleAggregation,
)
from workers.influence.aggregation.columns import Mean, Minimum, Rank, Vote
from workers.influence.aggregation.samples import CommonSet, Median, TrimmedMean

AGGREGATIONS: dict[str, Aggregation] = {
    aggregation.name: aggregation
    for aggregation in (
        Mean(),
        Rank(),
        Vote(),
        TrimmedMean(),
        Median(),
        Minimum(),
        CommonSet(),
    )
}
"""All of them, in the order of the tables."""

COLUMN_AGGREGATIONS: dict[str, ColumnAggregation] = {
    name: each for name, each in AGGREGATIONS.items() if isinstance(each, ColumnAggregation)
}
"""Those that take the columns as they come."""

SAMPLE_AGGREGATIONS: dict[str, SampleAggregation] = {
    name: each for name, each in AGGREGATIONS.items() if isinstance(each, SampleAggregation)
}
"""Those that look at all columns of a sample together."""
