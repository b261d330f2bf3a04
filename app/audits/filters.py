"""Which samples of a ranking count: the filters of pages, of summaries and of decisions.

Pages are read in the order of ranks. By construction scores rise with the rank, the probability of
being wrong falls, and the first samples are the flagged ones; so each of these filters is also a
bound on the rank, which one look into an index tells, and a page behind it starts there.
"""

import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from sqlalchemy import CTE, ColumnElement, Select, and_, false, or_, select
from sqlalchemy.orm import InstrumentedAttribute

from app.audits.models import RankedSample, Ranking, TrainingSample
from app.decisions.models import Decision

MAX_INDEX = 2**31 - 1
MAX_SCORE = 3.4e38  # scores are 32-bit
MAX_SEARCH_CHARS = 500

DecisionState = Literal["none", "accept", "keep", "drop", "edit", "any"]
Score = Annotated[float | None, Field(ge=-MAX_SCORE, le=MAX_SCORE, allow_inf_nan=False)]
Probability = Annotated[float | None, Field(ge=0, le=1)]
Search = Annotated[str | None, Field(min_length=1, max_length=MAX_SEARCH_CHARS)]
Label = Annotated[str | None, Field(max_length=200)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class SuspectFilter(BaseModel):
    """Which samples count; all that is said must hold, and nothing said is every sample."""

    model_config = ConfigDict(extra="forbid")

    flagged: bool | None = Field(None, description="Only flagged, or only others.")
    label: Label = Field(None, description="Only samples with this given label.")
    suggested_label: Label = Field(None, description="Only samples with this suggested label.")
    min_score: Score = None
    max_score: Score = None
    min_noise_probability: Probability = None
    max_noise_probability: Probability = None
    search: Search = Field(
        None,
        description="Only samples whose text or second text holds this, whatever the case. Every "
        "text is looked at: some seconds a million where little is found.",
    )
    decision: Annotated[list[DecisionState], BeforeValidator(_listed)] | None = Field(
        None,
        min_length=1,
        max_length=6,
        description="Only samples with one of these decisions; none: undecided, any: decided.",
    )

    def said(self) -> dict[str, Any]:
        """Return what the filter says, as it is stored and shown."""
        return self.model_dump(mode="json", exclude_none=True)


def is_sample_of(ranking: Ranking) -> ColumnElement[bool]:
    """Join places of a ranking with their training samples."""
    return and_(
        TrainingSample.audit_id == ranking.audit_id,
        TrainingSample.sample_index == RankedSample.sample_index,
    )


def is_decision_of(ranking: Ranking) -> ColumnElement[bool]:
    """Join places of a ranking with what was decided on their samples."""
    return and_(
        Decision.audit_id == ranking.audit_id,
        Decision.sample_index == RankedSample.sample_index,
        Decision.action.is_not(None),
    )


def matching(
    ranking: Ranking,
    filters: SuspectFilter,
    *columns: Any,
    with_sample: bool = False,
    with_decision: bool = False,
) -> Select[Any]:
    """Return columns of the samples that match.

    Args:
        ranking: whose places count.
        filters: which samples.
        columns: of RankedSample, and of what is joined.
        with_sample: join the training sample.
        with_decision: join the decision, where there is one.
    """
    statement = select(*columns).select_from(RankedSample)
    statement = statement.where(RankedSample.ranking_id == ranking.id)
    if with_sample or filters.search is not None:
        statement = statement.join(TrainingSample, is_sample_of(ranking))
    states = filters.decision or []
    if with_decision:
        statement = statement.outerjoin(Decision, is_decision_of(ranking))
        statement = statement.where(_is_decided(states)) if states else statement
    elif "none" in states:
        others = _decided_otherwise(ranking, states)
        is_other = others.c.sample_index == RankedSample.sample_index
        statement = statement.outerjoin(others, is_other).where(others.c.sample_index.is_(None))
    elif states:
        statement = statement.join(Decision, is_decision_of(ranking)).where(_is_decided(states))
    return statement.where(*_conditions(ranking, filters))


def _conditions(ranking: Ranking, filters: SuspectFilter) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if filters.flagged is not None:
        found.append(RankedSample.flagged == filters.flagged)
        number: int = ranking.summary["num_flagged"]
        found.append(RankedSample.rank < number if filters.flagged else RankedSample.rank >= number)
    if filters.label is not None:
        found.append(RankedSample.given_label == filters.label)
    if filters.suggested_label is not None:
        found.append(RankedSample.suggested_label == filters.suggested_label)
    found += _bounds(ranking, RankedSample.score, filters.min_score, filters.max_score, rises=True)
    found += _bounds(
        ranking,
        RankedSample.noise_probability,
        filters.min_noise_probability,
        filters.max_noise_probability,
        rises=False,
    )
    if filters.search is not None:
        pattern = f"%{_escaped(filters.search)}%"
        found.append(
            or_(
                TrainingSample.text.ilike(pattern, escape="\\"),
                TrainingSample.text_pair.ilike(pattern, escape="\\"),
            )
        )
    return found


def _bounds(
    ranking: Ranking,
    column: InstrumentedAttribute[float] | InstrumentedAttribute[float | None],
    low: float | None,
    high: float | None,
    *,
    rises: bool,
) -> list[ColumnElement[bool]]:
    """Return bounds on a column, and on the rank: those of the nearest sample within them."""
    found: list[ColumnElement[bool]] = []
    nearest = select(RankedSample.rank).where(RankedSample.ranking_id == ranking.id).limit(1)
    nearest = nearest.correlate(None)
    if low is not None:
        within = column >= as_stored(low)
        rank = RankedSample.rank if rises else RankedSample.rank.desc()
        edge = nearest.where(within).order_by(column, rank).scalar_subquery()
        found += [within, RankedSample.rank >= edge if rises else RankedSample.rank <= edge]
    if high is not None:
        within = column <= as_stored(high)
        rank = RankedSample.rank.desc() if rises else RankedSample.rank
        edge = nearest.where(within).order_by(column.desc(), rank).scalar_subquery()
        found += [within, RankedSample.rank <= edge if rises else RankedSample.rank >= edge]
    return found


def as_stored(score: float) -> float:
    """Return a score in the 32 bits of its column, so that a score that was read back matches."""
    stored: float = struct.unpack("f", struct.pack("f", score))[0]
    return stored


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def _is_decided(states: Sequence[DecisionState]) -> ColumnElement[bool]:
    """Tell whether what stands on a sample is one of these states."""
    is_one = Decision.action.is_not(None)
    if "any" not in states:
        is_one = Decision.action.in_(sorted(set(states) - {"none"}))
    return or_(is_one, Decision.action.is_(None)) if "none" in states else is_one


def _decided_otherwise(ranking: Ranking, states: Sequence[DecisionState]) -> CTE:
    """Return the samples whose decision is none of these states, one of which is none.

    As a set of its own: where the first half of a ranking is decided, asking sample by sample for
    the first page of what is not takes seconds.
    """
    others = select(Decision.sample_index).where(
        Decision.audit_id == ranking.audit_id, Decision.action.is_not(None)
    )
    if "any" in states:
        others = others.where(false())
    elif len(states) > 1:
        others = others.where(Decision.action.not_in(sorted(set(states) - {"none"})))
    return others.cte("decided_otherwise").prefix_with("MATERIALIZED")
