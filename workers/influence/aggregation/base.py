"""What an aggregation is: two kinds by how they go through the columns.

A *column* is the influence on one validation sample by one module, over all training samples.
Lower scores are more suspect; positive influence is helpful.

Shapes: T training samples, B a block of them, C a block of columns, K the columns that are
aggregated.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AggregationOptions:
    """What a user may set.

    Attributes:
        vote_fraction: k of the vote as a share of T, above 0 and at most 1.
        trim_fraction: the share of the columns that the trimmed mean cuts off at EACH end, from 0
            to below 0.5.
        common_share: the share of the columns that must have listed a sample for the common set,
            above 0 and at most 1.

    Raises:
        ValueError: one of them is out of range.
    """

    vote_fraction: float = 0.3
    trim_fraction: float = 0.1
    common_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.vote_fraction <= 1:
            raise ValueError(f"vote_fraction {self.vote_fraction} is not above 0 and at most 1.")
        if not 0 <= self.trim_fraction < 0.5:  # noqa: PLR2004  something must remain
            raise ValueError(f"trim_fraction {self.trim_fraction} is not at least 0 and below 0.5.")
        if not 0 < self.common_share <= 1:
            raise ValueError(f"common_share {self.common_share} is not above 0 and at most 1.")

    def vote_count(self, num_train: int) -> int:
        """Return how many of the lowest of a column get votes, k: at least one."""
        return max(1, round(self.vote_fraction * num_train))


@dataclass(frozen=True, slots=True)
class ColumnBlock:
    """Some columns.

    Attributes:
        influence_CT: float32, finite.
        rank_CT: `rank_columns(influence_CT)` where an aggregation needs the order, else None.
    """

    influence_CT: Tensor
    rank_CT: Tensor | None

    def select(self, chosen_C: Tensor) -> "ColumnBlock":
        """Return the columns where a bool [C] is True."""
        if bool(chosen_C.all()):
            return self
        rank_CT = None if self.rank_CT is None else self.rank_CT[chosen_C]
        return ColumnBlock(self.influence_CT[chosen_C], rank_CT)


class Aggregation(ABC):
    """How columns become a score; stateless.

    Attributes:
        name: key in the registry.
        description: when to use it, in a sentence.
        needs_order: whether it looks at the ranks in the columns.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    needs_order: ClassVar[bool] = False


class ColumnAggregation(Aggregation):
    """An aggregation that takes columns as they come and keeps one number a training sample.

    Attributes:
        dtype: of what is kept.
        start: what is kept of no column at all.
    """

    dtype: ClassVar[torch.dtype] = torch.int64
    start: ClassVar[float] = 0

    @abstractmethod
    def add(self, kept_T: Tensor, columns: ColumnBlock, options: AggregationOptions) -> None:
        """Add columns to what is kept, in place, one after the other."""

    def merge(self, kept_T: Tensor, other_T: Tensor) -> Tensor:
        """Return what is kept of two sets of columns together."""
        return kept_T + other_T

    def finish(self, kept_T: Tensor, num_columns: int) -> Tensor:
        """Return score_T, float64."""
        return kept_T.double() / num_columns


class SampleAggregation(Aggregation):
    """An aggregation that looks at all columns of a training sample together.

    With `needs_order` the values are the sample's ranks in the columns, else its influence.
    """

    @abstractmethod
    def places(self, num_columns: int, options: AggregationOptions) -> Sequence[int] | None:
        """Return which places in a sample's sorted values `score` looks at; None is all."""

    @abstractmethod
    def score(self, value_BK: Tensor, options: AggregationOptions) -> Tensor:
        """Score samples, float64 [B].

        Args:
            value_BK: float32 influence or int32 ranks; at its `places` stands, for every sample,
                what would stand there if its values were sorted.
            options: what the user set.
        """
