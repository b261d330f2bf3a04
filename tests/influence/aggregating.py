"""Run influence that is in memory through the aggregators, cut into blocks as a test likes."""

import itertools
from collections.abc import Iterator, Sequence
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

GROUPS = {"all": (0, 1, 2), "low": (0, 1), "CL": (2,)}
NUM_TRAIN, NUM_VALIDATION = 9, 5
IS_CORRECT_V = torch.tensor([True, False, True, True, False])
OPTIONS = AggregationOptions(vote_fraction=0.4, trim_fraction=0.2, common_share=0.6)


def random_influence(*, seed: int = 0, with_ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    influence_MVT = torch.randn(3, NUM_VALIDATION, NUM_TRAIN, generator=generator)
    return influence_MVT.round() if with_ties else influence_MVT


def pieces(size: int, cuts: Sequence[int]) -> Iterator[slice]:
    """Cut a range; empty pieces are left out."""
    for start, stop in itertools.pairwise([0, *sorted(cuts), size]):
        if start < stop:
            yield slice(start, stop)


class Aggregated:
    """All scores of one influence tensor."""

    def __init__(
        self,
        influence_MVT: Tensor,
        *,
        cuts: Sequence[int] = (),
        train_cuts: Sequence[int] = (),
        is_correct_V: Tensor = IS_CORRECT_V,
        options: AggregationOptions = OPTIONS,
        aggregations: Sequence[str] = tuple(COLUMN_AGGREGATIONS),
    ) -> None:
        """Feed everything: validation samples cut at `cuts`, training samples at `train_cuts`."""
        num_modules, num_validation, num_train = influence_MVT.shape
        self.rank_KT = torch.zeros(num_modules * num_validation, num_train, dtype=torch.int32)
        present = {
            name: [module for module in modules if module < num_modules]
            for name, modules in GROUPS.items()
        }
        shared: dict[str, Any] = {
            "groups": {name: modules for name, modules in present.items() if modules},
            "num_train": num_train,
            "is_correct_V": is_correct_V,
            "options": options,
        }
        self.by_column = GroupAggregator(
            **shared, aggregations=aggregations, keep_ranks=self._keep_ranks
        )
        for module in range(num_modules):
            for validation in pieces(num_validation, cuts):
                self.by_column.add(
                    module=module,
                    influence_VT=influence_MVT[module, validation],
                    validation=validation,
                )
        self.by_sample = SampleAggregator(**shared, aggregations=["trimmed_mean", "median"])
        self.of_ranks = SampleAggregator(**shared, aggregations=["common_set"])
        for train in pieces(num_train, train_cuts):
            index_B = torch.arange(num_train)[train]
            self.by_sample.add(index_B, influence_MVT.flatten(0, 1)[:, train])
            self.of_ranks.add(index_B, self.rank_KT[:, train])

    def scores(self, group: str, aggregation: str, *, correct_only: bool = False) -> Tensor:
        if aggregation in COLUMN_AGGREGATIONS:
            return self.by_column.scores(group, aggregation, correct_only=correct_only)
        needs_order = SAMPLE_AGGREGATIONS[aggregation].needs_order
        aggregator = self.of_ranks if needs_order else self.by_sample
        return aggregator.scores(group, aggregation, correct_only=correct_only)

    def _keep_ranks(self, first: int, rank_CT: Tensor) -> None:
        self.rank_KT[first : first + len(rank_CT)] = rank_CT
