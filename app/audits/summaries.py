"""What the samples that match a filter are like, counted in one pass."""

import math

from pydantic import BaseModel, Field
from sqlalchemy import Double, Integer, case, cast, func, literal, select, tuple_
from sqlalchemy.orm import Session

from app.audits.filters import SuspectFilter, as_stored, matching
from app.audits.models import RankedSample, Ranking
from app.decisions.models import Action, Decision

NUM_BINS = 50
MAX_CELLS = 10_000


class LabelCell(BaseModel):
    """How many samples have a given label and a suggested one."""

    given_label: str
    suggested_label: str | None
    count: int


class Histogram(BaseModel):
    """How many samples have which score."""

    edges: list[float] = Field(
        description="Of the bins, over all scores of the ranking; one more than counts. Empty "
        "where all scores are the same or not finite."
    )
    counts: list[int] = Field(description="Matching samples in each bin.")
    flagged_counts: list[int] = Field(description="The flagged ones among them.")


class SuspectSummary(BaseModel):
    """The samples that match a filter, counted."""

    ranking_id: str
    num_matching: int
    num_undecided: int
    matrix: list[LabelCell] = Field(
        description=f"The largest first, at most {MAX_CELLS:,}; empty for a causal language model."
    )
    by_decision: dict[Action, int]
    histogram: Histogram


def summarise(session: Session, ranking: Ranking, filters: SuspectFilter) -> SuspectSummary:
    """Count the samples that match."""
    low, high = _range(session, ranking)
    bins = NUM_BINS if low < high else 0
    score = cast(RankedSample.score, Double)
    place = func.least(func.width_bucket(score, low, high, NUM_BINS), NUM_BINS) - 1
    bin_of_score = case((score.between(low, high), place)) if bins else literal(None, Integer)
    of = matching(
        ranking,
        filters,
        RankedSample.given_label,
        RankedSample.suggested_label,
        Decision.action,
        RankedSample.flagged,
        (case((score.between(low, high), bin_of_score)) if bins else literal(None, Integer)).label(
            "bin"
        ),
        with_decision=True,
    ).subquery()
    cells = tuple_(of.c.given_label, of.c.suggested_label)
    places = tuple_(of.c.bin, of.c.flagged)
    counted = select(
        *of.c,
        func.grouping(of.c.given_label, of.c.action).label("kind"),
        func.count().label("number"),
    ).group_by(func.grouping_sets(cells, tuple_(of.c.action), places))
    matrix: list[LabelCell] = []
    by_decision = dict.fromkeys(Action, 0)
    num_undecided = 0
    counts, flagged_counts = [0] * bins, [0] * bins
    for row in session.execute(counted):
        match row.kind:
            case 1 if row.given_label is not None:  # grouped by the labels
                cell = {"given_label": row.given_label, "suggested_label": row.suggested_label}
                matrix.append(LabelCell(**cell, count=row.number))
            case 2 if row.action is None:  # grouped by the decision
                num_undecided = row.number
            case 2:
                by_decision[Action(row.action)] = row.number
            case 3 if row.bin is not None:
                counts[row.bin] += row.number
                flagged_counts[row.bin] += row.number * row.flagged
    matrix.sort(key=lambda cell: (-cell.count, cell.given_label, cell.suggested_label or ""))
    return SuspectSummary(
        ranking_id=ranking.id,
        num_matching=num_undecided + sum(by_decision.values()),
        num_undecided=num_undecided,
        matrix=matrix[:MAX_CELLS],
        by_decision=by_decision,
        histogram=Histogram(
            edges=[low + (high - low) * number / bins for number in range(bins + 1)]
            if bins
            else [],
            counts=counts,
            flagged_counts=flagged_counts,
        ),
    )


def _range(session: Session, ranking: Ranking) -> tuple[float, float]:
    """Return the lowest and the highest score that is finite; 0 and 0 where none is."""
    score = RankedSample.score
    scores = select(score).where(
        RankedSample.ranking_id == ranking.id, score > -math.inf, score < math.inf
    )
    low = session.scalars(scores.order_by(score).limit(1)).first()
    high = session.scalars(scores.order_by(score.desc()).limit(1)).first()
    return (0.0, 0.0) if low is None or high is None else (as_stored(low), as_stored(high))
