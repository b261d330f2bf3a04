"""What the pages count in a ranking. A finished ranking never changes, so counts are kept."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import ARRAY, Double, Integer, cast, func, select
from sqlalchemy.orm import Session

from app.audits.filters import as_stored
from app.audits.models import Audit, RankedSample, Ranking, TrainingSample
from app.web.pictures import Curve, Histogram

NUM_BINS = 192
NUM_CURVE_POINTS = 101
MAX_KEPT = 64
# Rank correlations are right within 0.01 from as many samples, evenly taken from the ranking.
MAX_COMPARED = 50_000

LabelPair = tuple[str, str]


@dataclass(frozen=True)
class Counts:
    """What is counted once of a ranking.

    Attributes:
        pairs: how many samples have a given and a suggested label.
        curve: None without known noise.
        agreement: by layer group, how alike its order is to the ranking's (Spearman).
    """

    histogram: Histogram
    pairs: dict[LabelPair, int]
    curve: Curve | None
    agreement: dict[str, float | None]


class CountsCache:
    """The counts of the rankings that were looked at last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Counts] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, ranking_id: str, count: Callable[[], Counts]) -> Counts:
        """Return a ranking's counts, counted now if they are not there."""
        with self._lock:
            if ranking_id in self._kept:
                self._kept.move_to_end(ranking_id)
                return self._kept[ranking_id]
        counted = count()
        with self._lock:
            self._kept[ranking_id] = counted
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return counted


def counts_of(cache: CountsCache, session: Session, audit: Audit, ranking: Ranking) -> Counts:
    """Return what is counted of a finished ranking, kept from the last time or counted now."""
    return cache.get(ranking.id, lambda: _count(session, ranking, num_samples=audit.num_train or 0))


def _count(session: Session, ranking: Ranking, *, num_samples: int) -> Counts:
    return Counts(
        histogram=_histogram(session, ranking),
        pairs=_pairs(session, ranking),
        curve=_curve(session, ranking, num_samples=num_samples),
        agreement=_agreement(session, ranking, num_samples=num_samples),
    )


def _histogram(session: Session, ranking: Ranking) -> Histogram:
    """Count the scores in bins of one width; an edge belongs to the bin below it.

    So the samples up to an edge are those that the filter `max_score` selects with that edge.
    """
    is_counted = (
        (RankedSample.ranking_id == ranking.id)
        & (RankedSample.score > -math.inf)
        & (RankedSample.score < math.inf)
    )
    extent = select(func.min(RankedSample.score), func.max(RankedSample.score)).where(is_counted)
    low, high = session.execute(extent).one()
    if low is None:
        return Histogram([0.0, 0.0], [0], [0])
    low, high = as_stored(low), as_stored(high)  # the driver reads 32 bits by their decimals
    width = (high - low) / NUM_BINS
    inner = (as_stored(low + width * place) for place in range(1, NUM_BINS))
    edges = list(dict.fromkeys((low, *inner, high))) if high > low else [low, high]
    # PostgreSQL gives an edge to the bin above, so each is moved by the least step there is
    limits = [math.nextafter(edge, math.inf) for edge in edges[1:]]
    place = func.width_bucket(cast(RankedSample.score, Double), cast(limits, ARRAY(Double)))
    statement = (
        select(place, func.count(), func.count().filter(RankedSample.flagged))
        .where(is_counted)
        .group_by(place)
    )
    counts, flagged_counts = [0] * len(limits), [0] * len(limits)
    for bin_, number, num_flagged in session.execute(statement):
        counts[bin_], flagged_counts[bin_] = number, num_flagged
    return Histogram(edges, counts, flagged_counts)


def _pairs(session: Session, ranking: Ranking) -> dict[LabelPair, int]:
    given, suggested = RankedSample.given_label, RankedSample.suggested_label
    statement = (
        select(given, suggested, func.count())
        .where(RankedSample.ranking_id == ranking.id, given.is_not(None), suggested.is_not(None))
        .group_by(given, suggested)
    )
    return {
        (one, other): number
        for one, other, number in session.execute(statement)
        if one is not None and other is not None
    }


def _curve(session: Session, ranking: Ranking, *, num_samples: int) -> Curve | None:
    if ranking.summary.get("detection") is None or not num_samples:
        return None
    place = RankedSample.rank * (NUM_CURVE_POINTS - 1) / num_samples
    step = cast(func.floor(place), Integer)
    statement = (
        select(step, func.count())
        .join(
            TrainingSample,
            (TrainingSample.audit_id == ranking.audit_id)
            & (TrainingSample.sample_index == RankedSample.sample_index),
        )
        .where(RankedSample.ranking_id == ranking.id, TrainingSample.is_noisy.is_(True))
        .group_by(step)
    )
    by_step = {row[0]: row[1] for row in session.execute(statement)}
    num_noisy = sum(by_step.values())
    if not num_noisy:
        return None
    found, sums = 0, [0.0]
    for number in range(NUM_CURVE_POINTS - 1):
        found += by_step.get(number, 0)
        sums.append(found / num_noisy)
    return Curve(sums)


def _agreement(session: Session, ranking: Ranking, *, num_samples: int) -> dict[str, float | None]:
    groups = ranking.summary["group_order"]
    every = max(1, num_samples // MAX_COMPARED)
    columns = [
        func.corr(RankedSample.group_ranks[place], RankedSample.rank)
        for place in range(1, len(groups) + 1)
    ]
    statement = select(*columns).where(
        RankedSample.ranking_id == ranking.id, RankedSample.rank % every == 0
    )
    return dict(zip(groups, session.execute(statement).one(), strict=True)) if groups else {}
