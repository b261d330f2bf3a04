"""The lease protocol: one worker at a time, zombies change nothing, nothing is tried for ever."""

from collections.abc import Callable

import pytest
from celery import Celery
from sqlalchemy import Engine, text

from app.audits.models import Audit, AuditState
from app.db import new_id, transaction
from app.settings import Settings
from app.work import repository as work
from app.work.models import Stage, UnitState, WorkUnit
from app.work.reconciler import reconcile
from app.work.repository import CancelPending, Claim, Failure, LeaseLost

REQUEST = {"estimators": ["grad_dot"], "ranking": {"estimator": "grad_dot"}, "fine_tune": None}
LEASE = 60.0


@pytest.fixture
def unit_id(engine: Engine) -> str:
    """The first unit of a fresh audit."""
    with transaction(engine) as session:
        audit = Audit(id=new_id("aud"), tenant="default", request=REQUEST)
        session.add(audit)
        session.flush()
        return work.add_units(session, audit.id, Stage.PREPARE)[0]


@pytest.fixture
def take(engine: Engine, unit_id: str) -> Callable[[], Claim | None]:
    """Claim the unit as some worker."""
    return lambda: work.claim(engine, unit_id, owner="worker", lease_seconds=LEASE)


def held(claim: Claim | None) -> Claim:
    assert claim is not None
    return claim


def expire(engine: Engine) -> None:
    """Let every lease run out."""
    with transaction(engine) as session:
        session.execute(
            text(
                "UPDATE work_units SET lease_until = now() - interval '1 second' "
                "WHERE lease_until IS NOT NULL"
            )
        )


def unit(engine: Engine, unit_id: str) -> WorkUnit:
    with transaction(engine) as session:
        return session.get_one(WorkUnit, unit_id)


def audit_of(engine: Engine, claim: Claim) -> Audit:
    with transaction(engine) as session:
        return session.get_one(Audit, claim.audit_id)


def test_a_held_unit_cannot_be_claimed_again(take: Callable[[], Claim | None]) -> None:
    assert take() is not None
    assert take() is None


def test_a_zombie_can_neither_renew_nor_finish(
    engine: Engine, take: Callable[[], Claim | None]
) -> None:
    """After its lease ran out and another worker took the unit, the first one is fenced off."""
    zombie = held(take())
    expire(engine)
    heir = held(take())
    assert heir.epoch == zombie.epoch + 1

    with pytest.raises(LeaseLost):
        work.renew(engine, zombie, lease_seconds=LEASE, done=1, total=2)
    with pytest.raises(LeaseLost), transaction(engine) as session:
        work.complete(session, zombie, result={})
    work.fail(engine, zombie, Failure("internal_error", "a zombie's opinion"))
    assert audit_of(engine, heir).state == AuditState.PREPARING

    with transaction(engine) as session:
        work.complete(session, heir, result={})


def test_finishing_the_last_unit_of_a_stage_opens_the_next(
    engine: Engine, take: Callable[[], Claim | None]
) -> None:
    claim = held(take())
    with transaction(engine) as session:
        (following,) = work.complete(session, claim, result={})
    assert unit(engine, following).stage == Stage.VALIDATION


def test_a_unit_that_kills_its_worker_is_tried_a_bounded_number_of_times(
    engine: Engine,
    celery: Celery,
    settings: Settings,
    unit_id: str,
    take: Callable[[], Claim | None],
) -> None:
    """Then the audit fails and names the part; nothing runs for ever."""
    for attempt in range(1, settings.max_attempts + 1):
        claim = held(take())
        assert claim.attempts == attempt
        expire(engine)
        reconcile(engine, celery, settings)
    audit = audit_of(engine, claim)
    assert (audit.state, audit.error_code) == (AuditState.FAILED, "worker_lost")
    assert "prepare, part 0" in (audit.error_message or "")
    assert take() is None


def test_draining_gives_a_unit_back_without_counting_the_attempt(
    engine: Engine, unit_id: str, take: Callable[[], Claim | None]
) -> None:
    work.release(engine, held(take()), reason="stopped", count_attempt=False)
    given_back = unit(engine, unit_id)
    assert (given_back.state, given_back.attempts) == (UnitState.READY, 0)


def test_cancel_ends_an_idle_audit_at_once_and_a_busy_one_when_its_worker_leaves(
    engine: Engine, take: Callable[[], Claim | None]
) -> None:
    claim = held(take())
    with transaction(engine) as session:
        work.request_cancel(session, work.locked_audit(session, claim.audit_id))
    assert audit_of(engine, claim).finished_at is None
    assert work.renew(engine, claim, lease_seconds=LEASE, done=0, total=1)
    with pytest.raises(CancelPending), transaction(engine) as session:
        work.complete(session, claim, result={})

    work.stop_for_cancel(engine, claim)

    assert audit_of(engine, claim).state == AuditState.CANCELLED


def test_a_wiped_broker_loses_nothing(
    engine: Engine, celery: Celery, settings: Settings, unit_id: str
) -> None:
    """The reconciler sends what was never sent, and sends again what an empty queue has lost."""
    assert reconcile(engine, celery, settings) == [unit_id]
    assert reconcile(engine, celery, settings) == []
    with celery.connection_for_write() as connection:
        connection.default_channel.client.flushall()
    with transaction(engine) as session:
        session.execute(text("UPDATE work_units SET sent_at = now() - interval '1 hour'"))
    assert reconcile(engine, celery, settings) == [unit_id]
