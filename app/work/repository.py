"""The lease protocol in SQL: claim, renew, finish, release, fail (SERVICE.md, section 3).

A claim raises the unit's epoch; everything a worker writes afterwards is fenced by that epoch, so
a worker that lost its lease can change nothing. Only a unit that holds its stage back has two
holders: the one before may still finish it, and do nothing else to it. Attempts are counted when
work begins, so a unit that kills its worker is tried a bounded number of times.
"""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Engine, func, select, update
from sqlalchemy.orm import Session

from app.audits.models import Audit, AuditState, Ranking, RankingState
from app.db import new_id, transaction
from app.limits.usage import charge
from app.webhooks.outbox import owe_end
from app.work.claims import CancelPending, Claim, Failure, LeaseLost
from app.work.models import Stage, UnitState, WorkUnit
from app.work.progress import report_progress
from app.work.stages import (
    STATE_OF_STAGE,
    next_stage,
    num_units,
)
from app.work.states import enter_ranking_state, enter_state, finish
from app.work.stragglers import stragglers

Owner = Audit | Ranking
"""Whose unit it is: an audit that runs, or a ranking of an audit that has ended."""


def claim(
    engine: Engine,
    unit_id: str,
    *,
    owner: str,
    lease_seconds: float,
    straggler_seconds: float | None = None,
) -> Claim | None:
    """Take a unit that is ready or whose lease has run out; None when there is nothing to take.

    Args:
        engine: the database.
        unit_id: the unit.
        owner: who takes it.
        lease_seconds: for how long.
        straggler_seconds: take a unit that somebody else has too, if it holds its stage back
            (`stragglers`) and takes longer than this; None for never.
    """
    with transaction(engine) as session:
        # Everywhere in this file the owner's row is locked before the unit's: no deadlocks.
        ids = select(WorkUnit.audit_id, WorkUnit.ranking_id).where(WorkUnit.id == unit_id)
        found = session.execute(ids).one_or_none()
        owner_row = _locked(session, *found) if found else None
        if owner_row is None or owner_row.finished_at is not None or is_cancelling(owner_row):
            return None
        lease_is_over = WorkUnit.lease_until < func.now()
        is_free = (WorkUnit.state == UnitState.READY) | (
            (WorkUnit.state == UnitState.RUNNING) & lease_is_over
        )
        wanted = select(WorkUnit).where(WorkUnit.id == unit_id).with_for_update()
        unit = session.scalars(wanted.where(is_free)).one_or_none()
        is_copy = unit is None and straggler_seconds is not None
        if is_copy:
            slow = stragglers(least_seconds=straggler_seconds or 0.0, unit_id=unit_id)
            of_another = wanted.where(WorkUnit.id.in_(slow), WorkUnit.owner != owner)
            unit = session.scalars(of_another).one_or_none()
        if unit is None:
            return None
        unit.slower_epoch = unit.epoch if is_copy else None
        unit.slower_owner = unit.owner if is_copy else None
        unit.state = UnitState.RUNNING
        unit.epoch += 1
        unit.attempts += 1
        unit.owner = owner
        unit.lease_until = _lease_end(lease_seconds)
        unit.started_at = unit.started_at or func.now()
        unit.samples_per_second = None
        unit.waiting = owner_row.waiting = None
        stage = Stage(unit.stage)
        if isinstance(owner_row, Audit):
            enter_state(owner_row, STATE_OF_STAGE[stage])
            owner_row.busy_until = owner_row.busy_until or func.now()
            if owner_row.stage != stage:
                owner_row.stage = stage
                owner_row.samples_per_second = None
        else:
            enter_ranking_state(owner_row, RankingState.RUNNING)
        charge(session, unit, begins=True)
        return Claim(
            unit.id,
            unit.audit_id,
            stage,
            unit.position,
            unit.epoch,
            unit.attempts,
            ranking_id=unit.ranking_id,
            traceparent=owner_row.traceparent,
        )


def renew(
    engine: Engine,
    held: Claim,
    *,
    lease_seconds: float,
    done: int,
    total: int,
    samples_per_second: float | None = None,
    report_seconds: float = 0.0,
) -> bool:
    """Extend a lease and report progress.

    Within `report_seconds` of another report the audit's row is left alone: it is one for all
    workers, and they would wait for each other there.

    Returns:
        Whether the caller has asked to cancel the audit.

    Raises:
        LeaseLost: another worker has the unit, or its owner has ended or is gone.
    """
    with transaction(engine) as session:
        told = _told_of(session, held, report_seconds)
        owner = told or locked_owner(session, held)
        unit = _held_unit(session, held)
        if unit.epoch == held.epoch:  # else lease and progress are the other holder's
            unit.lease_until = _lease_end(lease_seconds)
            unit.done = done
            unit.total = total
            unit.samples_per_second = samples_per_second
        if told is not None or unit.epoch != held.epoch:
            return is_cancelling(owner)
        if isinstance(owner, Ranking):
            owner.progress = max(owner.progress, min(1.0, done / max(total, 1)))
            owner.version += 1
            return False
        session.flush()
        report_progress(session, owner, held.stage)
        return is_cancelling(owner)


def complete(session: Session, held: Claim, *, result: dict[str, Any]) -> list[str]:
    """Finish a unit inside the caller's transaction and open the next stage when it was the last.

    Returns:
        Ids of the units that are now ready; send them when the transaction is committed.

    Raises:
        LeaseLost: the unit is no longer ours; the caller's transaction must be rolled back.
    """
    owner = locked_owner(session, held)
    if is_cancelling(owner):
        raise CancelPending(held.unit_id)
    unit = _leave(session, held, state=UnitState.DONE)
    unit.result = result
    unit.done = unit.total
    unit.finished_at = func.now()
    if isinstance(owner, Ranking):
        owner.progress = 1.0
        enter_ranking_state(owner, RankingState.SUCCEEDED)
        owe_end(session, owner)
        return []
    session.flush()
    return _go_on(session, owner, held)


def _go_on(session: Session, audit: Audit, held: Claim) -> list[str]:
    """Open an audit's next stage, or end it, when the unit was the last of its stage."""
    report_progress(session, audit, held.stage)
    open_units = select(func.count()).where(
        WorkUnit.audit_id == audit.id,
        WorkUnit.stage == held.stage,
        WorkUnit.state != UnitState.DONE,
    )
    if session.scalar(open_units):
        return []
    following = held.stage
    while later := next_stage(audit.request, following):
        following = later
        if count := num_units(following, audit.provenance):
            return add_units(session, audit.id, following, count=count)
    audit.progress = 1.0
    finish(audit, AuditState.SUCCEEDED)
    owe_end(session, audit)
    return []


def add_ranking_unit(session: Session, ranking: Ranking) -> list[str]:
    """Add the unit of a ranking, ready to be sent, and return its id."""
    unit = WorkUnit(
        id=new_id("wrk"),
        audit_id=ranking.audit_id,
        ranking_id=ranking.id,
        stage=Stage.RANK,
        position=0,
    )
    session.add(unit)
    session.flush()
    return [unit.id]


def add_units(session: Session, audit_id: str, stage: Stage, *, count: int = 1) -> list[str]:
    """Add the units of a stage, ready to be sent, and return their ids."""
    units = [
        WorkUnit(id=new_id("wrk"), audit_id=audit_id, stage=stage, position=position)
        for position in range(count)
    ]
    session.add_all(units)
    session.flush()
    return [unit.id for unit in units]


def release(
    engine: Engine,
    held: Claim,
    *,
    reason: str,
    count_attempt: bool = True,
    waiting: str | None = None,
) -> None:
    """Give a unit back so that a worker can take it again; does nothing when it is not ours.

    Args:
        engine: the database.
        held: the unit.
        reason: kept with it.
        count_attempt: whether this was one of the tries that a unit has.
        waiting: what it waits for; nobody offers it before that is there.
    """
    with transaction(engine) as session:
        try:
            owner = locked_owner(session, held)
            unit = _leave(session, held, state=UnitState.READY)
        except LeaseLost:
            return
        unit.last_error = reason
        unit.waiting = waiting
        if waiting is not None:
            owner.waiting = waiting
            owner.version += 1
        if not count_attempt:
            unit.attempts -= 1


def fail(engine: Engine, held: Claim, failure: Failure) -> None:
    """End a unit's audit or ranking as failed, unless the unit is no longer ours."""
    with transaction(engine) as session:
        try:
            owner = locked_owner(session, held)
            unit = _leave(session, held, state=UnitState.FAILED)
        except LeaseLost:
            return
        unit.last_error = failure.message
        fail_owner(session, owner, failure)


def fail_owner(session: Session, owner: Owner, failure: Failure) -> None:
    """End an audit or a ranking as failed and withdraw what is left of its work."""
    if owner.finished_at is not None:
        return
    owner.error_code = failure.code
    owner.error_message = failure.message
    owner.error_field = failure.field
    if isinstance(owner, Audit):
        finish(owner, AuditState.FAILED)
    else:
        enter_ranking_state(owner, RankingState.FAILED)
    owe_end(session, owner)
    _withdraw_units(session, owner, states=(UnitState.READY, UnitState.RUNNING))


def request_cancel(session: Session, audit: Audit) -> None:
    """Ask for an audit's end; it ends at once when no worker holds any of its units."""
    if audit.cancel_requested_at is None:
        audit.cancel_requested_at = func.now()
        audit.version += 1
    _withdraw_units(session, audit, states=(UnitState.READY,))
    session.flush()
    settle_cancel(session, audit)


def stop_for_cancel(engine: Engine, held: Claim) -> None:
    """Drop a unit because its audit is being cancelled, and end the audit when it was the last."""
    with transaction(engine) as session:
        try:
            audit = locked_audit(session, held.audit_id)
            _leave(session, held, state=UnitState.CANCELLED)
        except LeaseLost:
            return
        session.flush()
        settle_cancel(session, audit)


def settle_cancel(session: Session, audit: Audit) -> None:
    """End an audit as cancelled once nobody works on it any more."""
    held = select(func.count()).where(
        WorkUnit.audit_id == audit.id,
        WorkUnit.state == UnitState.RUNNING,
        WorkUnit.lease_until >= func.now(),
    )
    if audit.finished_at is None and audit.cancel_requested_at and not session.scalar(held):
        _withdraw_units(session, audit, states=(UnitState.READY, UnitState.RUNNING))
        finish(audit, AuditState.CANCELLED)
        owe_end(session, audit)


def is_cancelling(owner: Owner) -> bool:
    """Return whether an audit's end was asked for; a ranking is deleted instead."""
    return isinstance(owner, Audit) and owner.cancel_requested_at is not None


def _lease_end(seconds: float) -> ColumnElement[datetime]:
    return func.now() + timedelta(seconds=seconds)


def locked_audit(session: Session, audit_id: str) -> Audit:
    """Return an audit's row, held until the transaction ends.

    Raises:
        LeaseLost: the audit was deleted.
    """
    audit = _locked(session, audit_id, None)
    if not isinstance(audit, Audit):
        raise LeaseLost(audit_id)
    return audit


def locked_owner(session: Session, held: Claim) -> Owner:
    """Return the row of the audit or ranking that a unit belongs to, held likewise.

    Raises:
        LeaseLost: it was deleted.
    """
    owner = _locked(session, held.audit_id, held.ranking_id)
    if owner is None:
        raise LeaseLost(held.unit_id)
    return owner


def _told_of(session: Session, held: Claim, seconds: float) -> Audit | None:
    """Return an audit's row, not locked, if its progress was told so many seconds ago or less."""
    if not seconds or held.ranking_id is not None:
        return None
    lately = Audit.busy_until > func.now() - timedelta(seconds=seconds)
    return session.scalars(select(Audit).where(Audit.id == held.audit_id, lately)).one_or_none()


def _locked(session: Session, audit_id: str, ranking_id: str | None) -> Owner | None:
    # FOR NO KEY UPDATE: heartbeats go on while a long COPY refers to the owner's row
    if ranking_id is None:
        audit = select(Audit).where(Audit.id == audit_id)
        return session.scalars(audit.with_for_update(key_share=True)).one_or_none()
    ranking = select(Ranking).where(Ranking.id == ranking_id)
    return session.scalars(ranking.with_for_update(key_share=True)).one_or_none()


def _held_unit(session: Session, held: Claim) -> WorkUnit:
    unit = session.scalars(
        select(WorkUnit)
        .where(WorkUnit.id == held.unit_id)
        .where((WorkUnit.epoch == held.epoch) | (WorkUnit.slower_epoch == held.epoch))
        .where(WorkUnit.state == UnitState.RUNNING)
        .with_for_update()
    ).one_or_none()
    if unit is None:
        raise LeaseLost(held.unit_id)
    charge(session, unit)
    return unit


def _leave(session: Session, held: Claim, *, state: UnitState) -> WorkUnit:
    unit = _held_unit(session, held)
    if unit.epoch != held.epoch and state is not UnitState.DONE:
        unit.slower_epoch = unit.slower_owner = None
        raise LeaseLost(held.unit_id)  # the other holder goes on
    unit.state = state
    unit.owner = None
    unit.lease_until = None
    unit.sent_at = None
    return unit


def _withdraw_units(session: Session, owner: Owner, *, states: tuple[UnitState, ...]) -> None:
    if isinstance(owner, Ranking):
        is_theirs = WorkUnit.ranking_id == owner.id
    else:
        is_theirs = (WorkUnit.audit_id == owner.id) & WorkUnit.ranking_id.is_(None)
    session.execute(
        update(WorkUnit)
        .where(is_theirs, WorkUnit.state.in_(states))
        .values(state=UnitState.CANCELLED, lease_until=None, owner=None)
    )
