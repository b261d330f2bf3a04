"""Queries on decisions: set by set, so that a million samples are a matter of seconds.

Whoever writes holds the audit's row, so that nothing here is ever interleaved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Integer,
    Row,
    Select,
    and_,
    any_,
    exists,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session, aliased

from app.audits.filters import SuspectFilter, matching
from app.audits.models import RankedSample, Ranking, TrainingSample
from app.decisions.models import Action, Decision, DecisionBatch, DecisionChange

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
    """Return a query of the samples that are named, or match: their indices."""
    if filters is not None:
        return matching(ranking, filters, RankedSample.sample_index)
    is_named = RankedSample.sample_index == any_(literal(list(indices or ()), ARRAY(Integer)))
    return matching(ranking, SuspectFilter(), RankedSample.sample_index).where(is_named)


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
    """Note what stood on the samples, and put the batch's decision there."""
    of = samples.subquery()
    before = select(
        literal(batch.id),
        of.c.sample_index,
        *(getattr(Decision, name) for name in _SAID),
        Decision.batch_id,
    )
    is_same = (Decision.audit_id == batch.audit_id) & (Decision.sample_index == of.c.sample_index)
    is_clear = batch.action not in set(Action)
    before = before.join_from(of, Decision, is_same, isouter=not is_clear)
    if is_clear:
        before = before.where(Decision.action.is_not(None))
    columns = ["batch_id", "sample_index", *_SAID, "before_id"]
    session.execute(insert(DecisionChange).from_select(columns, before))
    session.execute(_decided(batch, is_clear=is_clear))
    return _counts(session, batch)


def _decided(batch: DecisionBatch, *, is_clear: bool) -> Any:  # noqa: ANN401  an INSERT has no short type
    label: Any = literal(batch.label)
    now = select(DecisionChange.sample_index).where(DecisionChange.batch_id == batch.id)
    if batch.action == Action.ACCEPT:
        label = RankedSample.suggested_label
        is_same = (RankedSample.ranking_id == batch.ranking_id) & (
            RankedSample.sample_index == DecisionChange.sample_index
        )
        now = now.join(RankedSample, is_same)
    said = {
        "action": literal(batch.action),
        "label": label,
        "text": literal(batch.text),
        "reviewer": literal(batch.reviewer),
        "decided_at": literal(batch.created_at),
        "version": literal(batch.version),
    }
    values: dict[str, Any] = {
        "sample_index": DecisionChange.sample_index,
        "audit_id": literal(batch.audit_id),
        **(dict.fromkeys(said, null()) if is_clear else said),
        "batch_id": literal(batch.id),
        "changed_version": literal(batch.version),
        "changed_by": literal(batch.reviewer),
    }
    row = upsert(Decision).from_select(list(values), now.with_only_columns(*values.values()))
    keys = ("audit_id", "sample_index")
    changed = {name: row.excluded[name] for name in values if name not in keys}
    return row.on_conflict_do_update(index_elements=list(keys), set_=changed)


def _counts(session: Session, batch: DecisionBatch) -> Counts:
    """Count what differs between what a batch found and what stands there now."""
    found, now = DecisionChange, Decision
    said = [tuple_(of.action, of.label, of.text) for of in (found, now)]
    is_same = (now.audit_id == batch.audit_id) & (now.sample_index == found.sample_index)
    row = session.execute(
        select(
            func.count().filter(said[0].is_distinct_from(said[1])).label("changed"),
            (func.count(now.action) - func.count(found.action)).label("more"),
        )
        .join_from(found, now, is_same)
        .where(found.batch_id == batch.id)
    ).one()
    return Counts(row.changed, row.more)


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
    number, more = session.execute(
        select(func.count(), func.count(found.action) - func.count(now.action)).where(is_mine)
    ).one()
    session.execute(
        update(now)
        .where(is_mine)
        .values(
            {name: getattr(found, name) for name in _SAID}
            | {"batch_id": found.before_id, "changed_version": version, "changed_by": reviewer}
        )
        .execution_options(synchronize_session=False)
    )
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
