"""Aggregations that take the columns as they come.

Shapes: T training samples, C a block of columns.
"""

import math

import torch
from torch import Tensor

from workers.influence.aggregation.base import AggregationOptions, ColumnAggregation, ColumnBlock
from workers.influence.aggregation.ordering import lowest_of_columns


class Mean(ColumnAggregation):
    """The mean influence."""

    name = "mean"
    description = "The classic; a few modules or validation samples with huge gradients decide it."
    dtype = torch.float64

    def add(
        self,
        kept_T: Tensor,
        columns: ColumnBlock,
        options: AggregationOptions,  # noqa: ARG002 - the mean has none
    ) -> None:
        # one by one: a sum over the block would round differently for other blocks
        for influence_T in columns.influence_CT:
            kept_T += influence_T


class Minimum(ColumnAggregation):
    """The lowest influence."""

    name = "min"
    description = "The harm where a sample does most: for few validation samples; noisy."
    dtype = torch.float32
    start = math.inf

    def add(
        self,
        kept_T: Tensor,
        columns: ColumnBlock,
        options: AggregationOptions,  # noqa: ARG002 - the minimum has none
    ) -> None:
        torch.minimum(kept_T, columns.influence_CT.amin(dim=0), out=kept_T)

    def merge(self, kept_T: Tensor, other_T: Tensor) -> Tensor:
        return torch.minimum(kept_T, other_T)

    def finish(
        self,
        kept_T: Tensor,
        num_columns: int,  # noqa: ARG002 - one column decides
    ) -> Tensor:
        # which of -0.0 and 0.0 is the lower depends on the blocks: both become 0.0
        return kept_T.double() + 0.0


class Rank(ColumnAggregation):
    """The mean rank in a column, 0 = lowest."""

    name = "rank"
    description = "Every column counts the same, whatever its scale: the choice for deep models."
    needs_order = True

    def add(
        self,
        kept_T: Tensor,
        columns: ColumnBlock,
        options: AggregationOptions,  # noqa: ARG002 - the rank has none
    ) -> None:
        assert columns.rank_CT is not None  # noqa: S101  it says needs_order
        kept_T += columns.rank_CT.sum(dim=0)


class Vote(ColumnAggregation):
    """Minus the mean of max(k − rank, 0)."""

    name = "vote"
    description = (
        "Only the k lowest of every column get votes: makes the choice of layers nearly harmless."
    )

    def add(self, kept_T: Tensor, columns: ColumnBlock, options: AggregationOptions) -> None:
        count = options.vote_count(len(kept_T))
        if columns.rank_CT is not None:
            kept_T += (columns.rank_CT - count).clamp_(max=0).sum(dim=0)
            return
        lowest_Ck = lowest_of_columns(columns.influence_CT, count)
        vote_k = torch.arange(-count, 0, device=lowest_Ck.device)
        kept_T.scatter_add_(0, lowest_Ck.flatten(), vote_k.repeat(len(lowest_Ck)))
