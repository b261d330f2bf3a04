"""A page of the ranked table, read by rank, so that a late page takes no longer than the first."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.audits.filters import SuspectFilter, matching
from app.audits.models import RankedSample, Ranking, TrainingSample
from app.audits.repository import SuspectRow
from app.decisions.models import Decision
from app.web.addresses import Place

ROWS_PER_PAGE = 50


@dataclass(frozen=True)
class SuspectTable:
    """Some places of a ranking in their order.

    Attributes:
        before_rank: where the page before this one ends; None on the first one.
        next_rank: where the next page begins; None on the last one.
    """

    rows: Sequence[SuspectRow]
    before_rank: int | None
    next_rank: int | None


def suspect_table(
    session: Session, ranking: Ranking, filters: SuspectFilter, place: Place
) -> SuspectTable:
    """Return a page of the samples that a filter selects."""
    statement = matching(
        ranking,
        filters,
        *(RankedSample, TrainingSample, Decision),
        with_sample=True,
        with_decision=True,
    ).limit(ROWS_PER_PAGE + 1)
    rank = RankedSample.rank
    if place.before_rank is not None:
        earlier = statement.where(rank < place.before_rank).order_by(rank.desc())
        found = session.execute(earlier).all()
        if len(found) > ROWS_PER_PAGE:
            rows = found[:ROWS_PER_PAGE][::-1]
            return SuspectTable(rows, rows[0][0].rank, place.before_rank)
    # where less than a page stands before, the first page is what was meant
    first = (place.from_rank or 0) if place.before_rank is None else 0
    found = session.execute(statement.where(rank >= first).order_by(rank)).all()
    has_more = len(found) > ROWS_PER_PAGE
    return SuspectTable(
        found[:ROWS_PER_PAGE], first or None, found[ROWS_PER_PAGE][0].rank if has_more else None
    )
