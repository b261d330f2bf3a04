"""What the top of an audit's page tells: what ranks and why, how much is wrong, the pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.audits.models import Audit, Ranking
from app.web.pictures import HeatMap, Measured, heat_maps
from app.web.queries import Counts, LabelPair

MAX_MATRIX_LABELS = 12
MAX_PAIRS = 40


@dataclass(frozen=True)
class Matrix:
    """How many samples have which given (rows) and suggested (columns) label.

    Attributes:
        labels: none where there are too many for a table; then `pairs` stand alone.
        pairs: those that differ, the most frequent first.
        most: the largest number among those that differ, for the shades.
    """

    labels: list[str]
    counts: dict[LabelPair, int]
    pairs: list[tuple[LabelPair, int]]
    most: int

    def shade(self, pair: LabelPair) -> int:
        """Return how strong a cell is coloured, from 0 to 9."""
        number = self.counts.get(pair, 0)
        return 0 if not number or pair[0] == pair[1] else 1 + int(8 * number / self.most)


def label_matrix(pairs: Mapping[LabelPair, int], labels: Sequence[str]) -> Matrix | None:
    """Return the matrix; None where no label is suggested."""
    if not pairs:
        return None
    differing = sorted(
        ((pair, number) for pair, number in pairs.items() if pair[0] != pair[1]),
        key=lambda item: (-item[1], item[0]),
    )
    return Matrix(
        labels=list(labels) if len(labels) <= MAX_MATRIX_LABELS else [],
        counts=dict(pairs),
        pairs=differing[:MAX_PAIRS],
        most=differing[0][1] if differing else 1,
    )


@dataclass(frozen=True)
class Chosen:
    """What ranks: one configuration, or a member of a consensus."""

    estimator: str
    layers: str
    aggregation: str
    weight: float | None
    auc_ndr: float | None


def chosen_configurations(ranking: Ranking) -> list[Chosen]:
    """Return what makes a ranking, whether it was asked for or chosen."""
    choice = ranking.summary.get("choice")
    members = choice["members"] if choice else [ranking.specification]
    return [
        Chosen(
            estimator=member["estimator"],
            layers=member["layers"],
            aggregation=member["aggregation"],
            weight=member.get("weight") if len(members) > 1 else None,
            auc_ndr=member.get("auc_ndr"),
        )
        for member in members
    ]


@dataclass(frozen=True)
class Comparison:
    """How the configurations compare, and by what."""

    caption: str
    explanation: str
    maps: list[HeatMap]
    baselines: list[tuple[str, float]]


KNOWN_NOISE = Comparison(
    "AUC-NDR by the known noise",
    "1.00 puts all known wrong labels first; about 0.50 is a random order.",
    [],
    [],
)
PROBES = Comparison(
    "AUC-NDR by planted probes",
    "No noise is known here: this is how well each configuration finds copies of training samples "
    "that were given wrong labels. About 0.50 is a random order.",
    [],
    [],
)


def compare(ranking: Ranking, chosen: Sequence[Chosen]) -> Comparison | None:
    """Return the heat maps of what was computed; None where nothing says what is better."""
    summary = ranking.summary
    order = summary.get("layer_group_order", summary["group_order"])
    known = [item for item in summary["configurations"] if item["detection"]]
    if known:
        basis = KNOWN_NOISE
        measured, baselines = _known(known)
    else:
        choice = summary.get("choice") or {}
        found = choice.get("measured") or choice.get("configurations") or []
        basis = PROBES
        measured = [
            Measured(each["estimator"], each["layers"], each["aggregation"], each["auc_ndr"])
            for each in found
            if each["auc_ndr"] is not None
        ]
        baselines = []
    places = {(one.estimator, one.layers, one.aggregation): True for one in chosen}
    maps = heat_maps(measured, layer_order=order, chosen=places)
    if not maps and not baselines:
        return None
    return Comparison(basis.caption, basis.explanation, maps, baselines)


def _known(configurations: Sequence[Mapping[str, Any]]) -> tuple[list[Measured], list[Any]]:
    measured, baselines = [], []
    for each in configurations:
        value = each["detection"]["auc_ndr"]
        if each["aggregation"] is None:
            baselines.append((each["estimator"], value))
        else:
            measured.append(
                Measured(each["estimator"], each["layer_group"], each["aggregation"], value)
            )
    return measured, baselines


@dataclass(frozen=True)
class Overview:
    """All pictures of a ranking."""

    counts: Counts
    matrix: Matrix | None
    comparison: Comparison | None
    agreement: list[tuple[str, float]]


def overview_of(audit: Audit, ranking: Ranking, counts: Counts) -> Overview:
    """Return the pictures of a finished ranking."""
    chosen = chosen_configurations(ranking)
    return Overview(
        counts=counts,
        matrix=label_matrix(counts.pairs, audit.summary["labels"]),
        comparison=compare(ranking, chosen),
        agreement=[(name, value) for name, value in counts.agreement.items() if value is not None],
    )
