"""Queries on decisions: set by set, so that a million samples are a matter of seconds.

Whoever writes holds the audit's row, so that nothing here is ever interleaved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ARRAY,
    CTE,
    ColumnElement,
    Insert,
    Integer,
    Row,
    Select,
    String,
    Text,
    and_,
    any_,
    cast,
    exists,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session, aliased

from app.audits.filters import SuspectFilter, matching
from app.audits.models import RankedSample, Ranking, TrainingSample
from app.decisions.models import CLEAR, Action, Decision, DecisionBatch, DecisionChange

_SAMPLE = (RankedSample.sample_index, RankedSample.suggested_label)
_SAID = ("action", "label", "text", "reviewer", "decided_at", "version")


@dataclass(frozen=True)
class Counts:
    """What a batch or an undo did.

    Attributes:
        num_changed: samples whose decision is another than before.
        num_more: by how many more samples are decided now; negative for fewer.
    """

    num_changed: int
    num_more: int


def samples_of(
    ranking: Ranking, *, indices: Sequence[int] | None, filters: SuspectFilter | None
) -> Select[Any]:
    """Return a query of the samples that are named, or match: index and suggested label."""
    if filters is not None:
        return matching(ranking, filters, *_SAMPLE)
    is_named = RankedSample.sample_index == any_(literal(list(indices or ()), ARRAY(Integer)))
    return matching(ranking, SuspectFilter(), *_SAMPLE).where(is_named)


def has_suggestion(ranking: Ranking) -> ColumnElement[bool]:
    """Tell whether a sample has a suggested label; one that is not finite has none to trust."""
    is_not_finite = exists().where(
        TrainingSample.audit_id == ranking.audit_id,
        TrainingSample.sample_index == RankedSample.sample_index,
        TrainingSample.non_finite,
    )
    return and_(RankedSample.suggested_label.is_not(None), ~is_not_finite)


def count(session: Session, samples: Select[*tuple[Any, ...]]) -> int:
    """Return how many samples a query has."""
    return session.scalars(select(func.count()).select_from(samples.subquery())).one()


def first_indices(session: Session, samples: Select[Any], limit: int) -> list[int]:
    """Return the lowest indices of a query's samples."""
    return list(session.scalars(samples.order_by(RankedSample.sample_index).limit(limit)))


def conflicts(
    session: Session, audit_id: str, samples: Select[Any], *, as_of: int, reviewer: str, limit: int
) -> tuple[int, Sequence[Row[int, str, int]]]:
    """Return how many samples others changed since a version, and the first of them."""
    of = samples.subquery()
    index = Decision.sample_index
    changed = (
        select(index, Decision.changed_by, Decision.changed_version)
        .join(of, of.c.sample_index == index)
        .where(
            Decision.audit_id == audit_id,
            Decision.changed_version > as_of,
            Decision.changed_by != reviewer,
        )
    )
    number = count(session, changed)
    return number, session.execute(changed.order_by(index).limit(limit)).all()


def store(session: Session, batch: DecisionBatch, samples: Select[Any]) -> Counts:
    """Note what stood on the samples, and put the batch's decision there, in one statement.

    In the order of the samples: so rows and indexes grow at their ends.
    """
    of = samples.subquery()
    is_clear = batch.action == CLEAR
    is_same = (Decision.audit_id == batch.audit_id) & (Decision.sample_index == of.c.sample_index)
    before = (
        select(
            *(of.c.sample_index, of.c.suggested_label),
            *(getattr(Decision, name) for name in _SAID),
            Decision.batch_id.label("before_id"),
        )
        .join_from(of, Decision, is_same, isouter=not is_clear)
        .order_by(of.c.sample_index)
    )
    if is_clear:
        before = before.where(Decision.action.is_not(None))
    found = before.cte("found").prefix_with("MATERIALIZED")
    noted = ["sample_index", *_SAID, "before_id"]
    note = insert(DecisionChange).from_select(
        ["batch_id", *noted], select(literal(batch.id), *(found.c[name] for name in noted))
    )
    said = _said(batch, found.c.suggested_label)
    had = tuple_(found.c.action, found.c.label, found.c.text)
    has = tuple_(said["action"], said["label"], said["text"])
    row = session.execute(
        select(
            func.count().filter(had.is_distinct_from(has)).label("changed"),
            ((0 if is_clear else func.count()) - func.count(found.c.action)).label("more"),
        )
        .select_from(found)
        .add_cte(note.cte("noted"), _put(batch, found, said).cte("put"))
    ).one()
    return Counts(row.changed, row.more)


def _said(batch: DecisionBatch, suggested: ColumnElement[str]) -> dict[str, ColumnElement[Any]]:
    """Return what a batch puts on a sample."""
    if batch.action == CLEAR:
        return {name: cast(null(), Decision.__table__.c[name].type) for name in _SAID}
    is_accept = batch.action == Action.ACCEPT
    return {
        "action": literal(batch.action),
        "label": suggested if is_accept else literal(batch.label, String),
        "text": literal(batch.text, Text),
        "reviewer": literal(batch.reviewer),
        "decided_at": literal(batch.created_at),
        "version": literal(batch.version),
    }


def _put(batch: DecisionBatch, found: CTE, said: dict[str, ColumnElement[Any]]) -> Insert:
    values: dict[str, ColumnElement[Any]] = {
        "audit_id": literal(batch.audit_id),
        "sample_index": found.c.sample_index,
        **said,
        "batch_id": literal(batch.id),
        "changed_version": literal(batch.version),
        "changed_by": literal(batch.reviewer),
    }
    row = upsert(Decision).from_select(list(values), select(*values.values()))
    keys = ("audit_id", "sample_index")
    changed = {name: row.excluded[name] for name in values if name not in keys}
    return row.on_conflict_do_update(index_elements=list(keys), set_=changed)


def take_back(session: Session, batch: DecisionBatch, *, version: int, reviewer: str) -> Counts:
    """Put back what stood before a batch, but for samples that were decided again since.

    The batch is taken out of what later ones found, too, so that undoing one of these does not
    bring it back: what stands on a sample is always the last batch that was not undone.

    Returns:
        num_changed: samples that were put back.
    """
    found, now = DecisionChange, Decision
    is_mine = and_(
        found.batch_id == batch.id,
        now.audit_id == batch.audit_id,
        now.sample_index == found.sample_index,
        now.batch_id == batch.id,
    )
    back = (
        update(now)
        .where(is_mine)
        .values(
            {name: getattr(found, name) for name in _SAID}
            | {"batch_id": found.before_id, "changed_version": version, "changed_by": reviewer}
        )
        .returning(now.action)
        .cte("back")
    )
    number, num_decided = session.execute(select(func.count(), func.count(back.c.action))).one()
    more = num_decided - (0 if batch.action == CLEAR else number)
    later = aliased(DecisionChange)
    session.execute(
        update(later)
        .where(
            later.before_id == batch.id,
            found.batch_id == batch.id,
            found.sample_index == later.sample_index,
        )
        .values({name: getattr(found, name) for name in (*_SAID, "before_id")})
        .execution_options(synchronize_session=False)
    )
    return Counts(number, more)


def num_touched(session: Session, batch: DecisionBatch) -> int:
    """Return on how many samples a batch decided."""
    of_batch = select(DecisionChange.sample_index).where(DecisionChange.batch_id == batch.id)
    return count(session, of_batch)


def refresh_statistics(session: Session) -> None:
    """Tell the planner of many new rows now; where somebody is at it, it learns of them anyway."""
    session.execute(text("ANALYZE (SKIP_LOCKED) decisions, decision_changes"))


def find_batch(session: Session, tenant: str, audit_id: str, batch_id: str) -> DecisionBatch | None:
    """Return a batch of decisions of a tenant's audit."""
    statement = select(DecisionBatch).where(
        DecisionBatch.id == batch_id,
        DecisionBatch.audit_id == audit_id,
        DecisionBatch.tenant == tenant,
    )
    return session.scalars(statement).one_or_none()


def list_batches(
    session: Session, tenant: str, audit_id: str, *, limit: int, before_version: int | None
) -> list[DecisionBatch]:
    """Return batches, the newest first, one more than `limit` when there are more."""
    statement = select(DecisionBatch).where(
        DecisionBatch.audit_id == audit_id, DecisionBatch.tenant == tenant
    )
    if before_version is not None:
        statement = statement.where(DecisionBatch.version < before_version)
    ordered = statement.order_by(DecisionBatch.version.desc())
    return list(session.scalars(ordered.limit(limit + 1)))


def wrong_among_lowest(
    session: Session, ranking: Ranking, ks: Sequence[int]
) -> list[tuple[int, int]]:
    """Return for every k how many of the k lowest are decided, and how many of these are wrong.

    Wrong is what was dropped, or was given another label or completion than it had.
    """
    has_label = Decision.label.is_not(None)
    is_relabelled = has_label & Decision.label.is_distinct_from(RankedSample.given_label)
    is_wrong = or_(Decision.action == Action.DROP, Decision.text.is_not(None), is_relabelled)
    is_same = (Decision.audit_id == ranking.audit_id) & (
        Decision.sample_index == RankedSample.sample_index
    )
    counts = [
        func.count().filter(RankedSample.rank < k, *only) for k in ks for only in ((), (is_wrong,))
    ]
    if not counts:
        return []
    row = session.execute(
        select(*counts)
        .join_from(Decision, RankedSample, is_same)
        .where(RankedSample.ranking_id == ranking.id, Decision.action.is_not(None))
    ).one()
    return list(zip(row[::2], row[1::2], strict=True))
