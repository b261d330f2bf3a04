"""Slow, obvious aggregations: Python's own sorts, sums and walks, one sample after the other."""

import statistics
from collections.abc import Callable, Sequence

from torch import Tensor

from tests.oracles import ranks

Columns = Sequence[Sequence[float]]


def mean(columns: Columns) -> list[float]:
    return [statistics.fmean(values) for values in zip(*columns, strict=True)]


def rank(columns: Columns) -> list[float]:
    return mean([ranks(column) for column in columns])


def vote(columns: Columns, *, fraction: float) -> list[float]:
    count = max(1, round(fraction * len(columns[0])))
    return mean([[-max(count - place, 0) for place in ranks(column)] for column in columns])


def minimum(columns: Columns) -> list[float]:
    return [min(values) for values in zip(*columns, strict=True)]


def median(columns: Columns) -> list[float]:
    return [statistics.median(values) for values in zip(*columns, strict=True)]


def trimmed_mean(columns: Columns, *, fraction: float) -> list[float]:
    scores = []
    for values in zip(*columns, strict=True):
        # in whole percents, so that the oracle rounds nothing
        cut = round(fraction * 100) * len(values) // 100
        scores.append(statistics.fmean(sorted(values)[cut : len(values) - cut]))
    return scores


def common_set(columns: Columns, *, share: float) -> list[float]:
    """Walk down all rankings in parallel; a sample is taken once enough of them have listed it."""
    num_train = len(columns[0])
    orders = [
        sorted(range(num_train), key=lambda i, column=column: (column[i], i))  # type: ignore[misc]  # a default
        for column in columns
    ]
    depth_of: dict[int, float] = {}
    listed = [0] * num_train
    for depth in range(num_train):
        for order in orders:
            listed[order[depth]] += 1
        for sample in range(num_train):
            # in whole percents, so that the oracle rounds nothing
            enough = listed[sample] * 100 >= round(share * 100) * len(columns)
            if enough and sample not in depth_of:
                depth_of[sample] = depth
    return [depth_of[sample] for sample in range(num_train)]


def aggregate(
    influence_MVT: Tensor,
    aggregation: str,
    *,
    vote_fraction: float = 0.3,
    trim_fraction: float = 0.1,
    common_share: float = 0.5,
) -> list[float]:
    """Aggregate all columns by name."""
    columns = influence_MVT.flatten(0, 1).tolist()
    by_name: dict[str, Callable[[], list[float]]] = {
        "mean": lambda: mean(columns),
        "rank": lambda: rank(columns),
        "vote": lambda: vote(columns, fraction=vote_fraction),
        "min": lambda: minimum(columns),
        "median": lambda: median(columns),
        "trimmed_mean": lambda: trimmed_mean(columns, fraction=trim_fraction),
        "common_set": lambda: common_set(columns, share=common_share),
    }
    return by_name[aggregation]()
