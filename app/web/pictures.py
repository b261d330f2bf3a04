"""Pictures as numbers: what the templates draw as SVG, which follows the colours of the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.catalogue import AggregationName

SPARK_WIDTH, SPARK_HEIGHT = 72, 18
CHART_WIDTH, CHART_HEIGHT = 480, 150
SHOWN_BINS = 48
NUM_SHADES = 10


def sparkline(ranks: Sequence[int], num_samples: int) -> str:
    """Return the points of a line over layer groups: at the top the most suspect, rank 0."""
    last = max(1, num_samples - 1)
    step = (SPARK_WIDTH - 4) / max(1, len(ranks) - 1)
    height = SPARK_HEIGHT - 4
    points = [(2 + place * step, 2 + height * rank / last) for place, rank in enumerate(ranks)]
    if len(points) == 1:
        points.append((SPARK_WIDTH - 2, points[0][1]))
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram, from the bottom up: flagged samples, then the others."""

    x: float
    width: float
    flagged_height: float
    height: float
    low: float
    high: float
    count: int
    num_flagged: int


@dataclass(frozen=True)
class Histogram:
    """How many samples have which score.

    Attributes:
        edges: of the bins; one more than bins. The last bin's upper edge belongs to it.
        counts: samples of each bin.
        flagged_counts: the flagged ones among them.
    """

    edges: list[float]
    counts: list[int]
    flagged_counts: list[int]

    @property
    def num_below(self) -> list[int]:
        """How many samples have at most the score of each edge but the first."""
        total, sums = 0, []
        for number in self.counts:
            total += number
            sums.append(total)
        return sums

    def bars(self) -> list[Bar]:
        """Return the bars, several bins in one where there are many."""
        step = max(1, -(-len(self.counts) // SHOWN_BINS))
        groups = [
            (
                self.edges[first],
                self.edges[min(first + step, len(self.counts))],
                sum(self.counts[first : first + step]),
                sum(self.flagged_counts[first : first + step]),
            )
            for first in range(0, len(self.counts), step)
        ]
        highest = max((number for _, _, number, _ in groups), default=0) or 1
        width = CHART_WIDTH / max(1, len(groups))
        return [
            Bar(
                x=place * width,
                width=max(1.0, width - 1),
                flagged_height=CHART_HEIGHT * flagged / highest,
                height=max(CHART_HEIGHT * number / highest, 1.0 if number else 0.0),
                low=low,
                high=high,
                count=number,
                num_flagged=flagged,
            )
            for place, (low, high, number, flagged) in enumerate(groups)
        ]


@dataclass(frozen=True)
class Curve:
    """The share of known noise among the lowest-scored samples, over their share."""

    found: list[float]

    def points(self) -> str:
        """Return the line's points, from none to all samples."""
        step = CHART_WIDTH / max(1, len(self.found) - 1)
        return " ".join(
            f"{place * step:.1f},{CHART_HEIGHT * (1 - value):.1f}"
            for place, value in enumerate(self.found)
        )

    def at(self, share: float) -> float:
        """Return the noise that is found in a share of the samples."""
        return self.found[round(share * (len(self.found) - 1))]


@dataclass(frozen=True)
class Cell:
    """A value of a heat map; None where there is none."""

    value: float | None
    shade: int
    is_chosen: bool


@dataclass(frozen=True)
class HeatMap:
    """One estimator's values over layer groups (rows) and aggregations (columns)."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Measured:
    """A configuration with one value."""

    estimator: str
    layers: str
    aggregation: str
    value: float

    @property
    def place(self) -> tuple[str, str, str]:
        """Where it stands."""
        return self.estimator, self.layers, self.aggregation


def heat_maps(
    measured: Sequence[Measured],
    *,
    layer_order: Sequence[str],
    chosen: Mapping[tuple[str, str, str], Any],
) -> list[HeatMap]:
    """Return a heat map for every estimator that has more than one configuration.

    Args:
        measured: of several with one place the best counts.
        layer_order: all layer groups in their order.
        chosen: places of what ranks.
    """
    best: dict[tuple[str, str, str], float] = {}
    for item in measured:
        best[item.place] = max(item.value, best.get(item.place, item.value))
    if not best:
        return []
    low, high = min(best.values()), max(best.values())
    maps = []
    for estimator in dict.fromkeys(item.estimator for item in measured):
        mine = {place[1:] for place in best if place[0] == estimator}
        if len(mine) == 1 and not chosen.keys() & {(estimator, *place) for place in mine}:
            continue
        asked = {aggregation for _, aggregation in mine}
        columns = [name.value for name in AggregationName if name in asked]
        found = {layers for layers, _ in mine}
        layers = [name for name in layer_order if name in found]
        layers += sorted(found - set(layers))
        rows = []
        for name in layers:
            places = [(estimator, name, column) for column in columns]
            rows.append(
                (
                    name,
                    [_cell(best.get(p), low=low, high=high, is_chosen=p in chosen) for p in places],
                )
            )
        maps.append(HeatMap(estimator, columns, rows))
    return maps


def _cell(value: float | None, *, low: float, high: float, is_chosen: bool) -> Cell:
    if value is None:
        return Cell(None, 0, is_chosen)
    share = (value - low) / (high - low) if high > low else 0.0
    return Cell(value, min(NUM_SHADES - 1, int(share * NUM_SHADES)), is_chosen)
