"""Aggregations that look at all columns of a training sample together.

Shapes: B a block of training samples, K the columns that are aggregated.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from workers.influence.aggregation.base import AggregationOptions, SampleAggregation


class TrimmedMean(SampleAggregation):
    """The mean influence without the lowest and the highest ⌊trim_fraction · K⌋ of a sample."""

    name = "trimmed_mean"
    description = (
        "The mean without a sample's extreme columns: where a few of them decide the mean."
    )

    def places(
        self,
        num_columns: int,  # noqa: ARG002 - in whatever order they are summed, it must be one order
        options: AggregationOptions,  # noqa: ARG002
    ) -> Sequence[int] | None:
        return None

    def score(self, value_BK: Tensor, options: AggregationOptions) -> Tensor:
        num_columns = value_BK.shape[1]
        cut = math.floor(_share(options.trim_fraction, num_columns))
        kept_BK = value_BK[:, cut : num_columns - cut]
        return _sum_in_halves(kept_BK) / kept_BK.shape[1]


class Median(SampleAggregation):
    """The median influence; the mean of the two middle ones of an even number of columns."""

    name = "median"
    description = "What the middle column says of a sample: the most robust to extreme columns."

    def places(
        self,
        num_columns: int,
        options: AggregationOptions,  # noqa: ARG002 - the median has none
    ) -> Sequence[int] | None:
        return [(num_columns - 1) // 2, num_columns // 2]

    def score(
        self,
        value_BK: Tensor,
        options: AggregationOptions,  # noqa: ARG002
    ) -> Tensor:
        num_columns = value_BK.shape[1]
        low_B, high_B = value_BK[:, (num_columns - 1) // 2], value_BK[:, num_columns // 2]
        return (low_B.double() + high_B.double()) / 2


class CommonSet(SampleAggregation):
    """The depth at which `common_share` of the rankings have listed a sample, 0 = at once.

    Walking down all rankings in parallel, a sample is taken as soon as ⌈common_share · K⌉ of them
    have listed it: at that order statistic of its ranks.
    """

    name = "common_set"
    description = (
        "How deep all rankings must be read until a share of them lists a sample: for agreement."
    )
    needs_order = True

    def places(self, num_columns: int, options: AggregationOptions) -> Sequence[int] | None:
        return [max(1, math.ceil(_share(options.common_share, num_columns))) - 1]

    def score(self, value_BK: Tensor, options: AggregationOptions) -> Tensor:
        (place,) = self.places(value_BK.shape[1], options) or ()
        return value_BK[:, place].double()


def _share(fraction: float, num_columns: int) -> float:
    """Return a share of the columns, to nine digits: 0.29 of 100 are 29, 0.1 of 30 are 3."""
    return round(fraction * num_columns, 9)


def _sum_in_halves(value_BK: Tensor) -> Tensor:
    """Return Σ_K, float64 [B], the second half added to the first until one is left.

    `sum` adds in an order that depends on the number of samples and threads; these bits do not.
    """
    num_columns = value_BK.shape[1]
    half = (num_columns + 1) // 2
    sum_BK = value_BK[:, :half].double()
    sum_BK[:, : num_columns - half] += value_BK[:, half:]
    while half > 1:
        num_columns, half = half, (half + 1) // 2
        sum_BK[:, : num_columns - half] += sum_BK[:, half:num_columns]
    return sum_BK[:, 0]
