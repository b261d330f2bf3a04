"""From rows to the tables of the paper: win rates, rank correlations, the best configurations.

Vitel and Chhabra, arXiv 2511.04715, section 4. Pure functions of rows, in plain Python.
"""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from app.experiments.rows import FACTORS, MEASURES, Cell, Row

CONFIGURATION = "configuration"
_LEAST_POINTS = 3  # of two points a rank correlation is 1 or -1, whatever they are


@dataclass(frozen=True)
class WinRate:
    """How often one level of a factor beats the others.

    Attributes:
        level: such as datainf, or 02-03.
        win_rate: share of the comparisons, 0 to 1; a tie counts half.
        num_comparisons: how many there were.
    """

    level: str
    win_rate: float
    num_comparisons: int


@dataclass(frozen=True)
class Correlation:
    """How well one measure predicts another in one cell.

    Attributes:
        spearman: in [-1, 1]; None where one of the two does not vary, or of fewer than 3 points.
        num_points: how many points it is of.
    """

    cell: Cell
    spearman: float | None
    num_points: int


@dataclass(frozen=True)
class Best:
    """The configuration with the highest mean of a measure over some cells.

    Attributes:
        row: one of its rows, which names it.
        means: of every measure, over the cells.
        beside: the same of the baselines, by name.
    """

    row: Row
    means: Mapping[str, float]
    beside: Mapping[str, Mapping[str, float]]


def win_rates(
    rows: Iterable[Row], *, measure: str, level_of: Callable[[Row], str], factor: str
) -> list[WinRate]:
    """Return the win rates of a factor's levels, the highest first.

    Two rows are compared when they belong to the same cell and agree in all other factors; with
    the whole configuration as the factor, when they belong to the same cell.

    Args:
        rows: configurations; those without the measure take no part.
        measure: of which higher is better.
        level_of: the level of a row.
        factor: one of FACTORS, or CONFIGURATION.
    """
    contexts: dict[Hashable, list[tuple[str, float]]] = defaultdict(list)
    for row in rows:
        value = row.value(measure)
        if value is None:
            continue
        others = (
            ()
            if factor == CONFIGURATION
            else tuple(getattr(row, name) for name in FACTORS if name != factor)
        )
        contexts[row.cell, others].append((level_of(row), value))
    wins: dict[str, float] = defaultdict(float)
    comparisons: dict[str, int] = defaultdict(int)
    for members in contexts.values():
        ordered = sorted(value for _, value in members)
        for level, value in members:
            below, not_above = bisect_left(ordered, value), bisect_right(ordered, value)
            wins[level] += below + (not_above - below - 1) / 2
            comparisons[level] += len(members) - 1
    rates = [
        WinRate(level, wins[level] / number, number)
        for level, number in comparisons.items()
        if number
    ]
    return sorted(rates, key=lambda rate: (-rate.win_rate, rate.level))


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation: Pearson's of the ranks, ties at their mean rank.

    Returns:
        None where one of the two is constant, or of fewer than 3 points.
    """
    if len(first) < _LEAST_POINTS:
        return None
    ranks = [_ranks(first), _ranks(second)]
    centred = [[rank - (len(first) + 1) / 2 for rank in each] for each in ranks]
    lengths = [math.fsum(rank * rank for rank in each) for each in centred]
    if 0.0 in lengths:
        return None
    product = math.fsum(a * b for a, b in zip(*centred, strict=True))
    return max(-1.0, min(1.0, product / math.sqrt(lengths[0] * lengths[1])))


def _ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 1, ties at their mean."""
    ordered = sorted(values)
    return [
        (bisect_left(ordered, value) + bisect_right(ordered, value) + 1) / 2 for value in values
    ]


def correlate_configurations(
    rows: Iterable[Row], *, predictor: str, outcome: str
) -> list[Correlation]:
    """Return a cell's correlation of two measures over its configurations, for every cell."""
    return [
        _correlation(cell, [(row.value(predictor), row.value(outcome)) for row in members])
        for cell, members in by_cell(rows).items()
    ]


def correlate_layer_groups(
    rows: Iterable[Row], *, predictor: str, outcome: str
) -> list[Correlation]:
    """Return a cell's correlation of two measures over its layer groups, for every cell.

    A group's value is the mean over all configurations that use it, of both measures; `all` is
    left out, since the other groups are parts of it.
    """
    result = []
    for cell, members in by_cell(rows).items():
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in members:
            if row.layer_group not in {None, "all"}:
                groups[str(row.layer_group)].append(row)
        points = [(_mean(group, predictor), _mean(group, outcome)) for group in groups.values()]
        result.append(_correlation(cell, points))
    return result


def _correlation(cell: Cell, points: Iterable[tuple[float | None, float | None]]) -> Correlation:
    known = [(x, y) for x, y in points if x is not None and y is not None]
    return Correlation(cell, spearman([x for x, _ in known], [y for _, y in known]), len(known))


def best_configuration(rows: Sequence[Row], *, measure: str) -> Best | None:
    """Return the configuration with the highest mean of a measure, beside the baselines.

    Args:
        rows: of the cells that count, baselines among them.
        measure: of which higher is better.

    Returns:
        None where no configuration has the measure in every cell.
    """
    cells = set(by_cell(rows))
    configurations: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    baselines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.is_baseline:
            baselines[row.estimator].append(row)
        else:
            configurations[row.configuration].append(row)
    means = {
        key: mean
        for key, members in configurations.items()
        if {row.cell for row in members if row.value(measure) is not None} == cells
        and (mean := _mean(members, measure)) is not None
    }
    if not means:
        return None
    chosen = max(means, key=lambda key: (means[key], key))
    return Best(
        row=configurations[chosen][0],
        means=_means(configurations[chosen]),
        beside={name: _means(members) for name, members in baselines.items()},
    )


def by_cell(rows: Iterable[Row]) -> dict[Cell, list[Row]]:
    """Return the rows by cell, in the order that the cells come in."""
    cells: dict[Cell, list[Row]] = defaultdict(list)
    for row in rows:
        cells[row.cell].append(row)
    return dict(cells)


def _means(rows: Sequence[Row]) -> dict[str, float]:
    means = {measure: _mean(rows, measure) for measure in (*MEASURES, "ndr_10", "ndr_20")}
    return {measure: mean for measure, mean in means.items() if mean is not None}


def _mean(rows: Iterable[Row], measure: str) -> float | None:
    return mean_of(row.value(measure) for row in rows)


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that are known, None where none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
