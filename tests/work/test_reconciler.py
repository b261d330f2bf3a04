"""The reconciler: lost work is offered again, and every audit comes to an end."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import Celery
from redis import Redis
from sqlalchemy import Engine, select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from app.audits.models import Audit, AuditState, IdempotencyKey
from app.db import make_engine, transaction
from app.jobs import FETCH_QUEUE_NAME, queue_length
from app.settings import Settings
from app.work import repository as work
from app.work.models import UnitState, WorkerHeartbeat, WorkUnit
from app.work.reconciler import RECONCILER_LOCK, Reconciler, reconcile
from tests.factories import long_ago, make_audit


def unit_of(engine: Engine, audit: Audit) -> WorkUnit:
    with Session(engine) as session:
        return session.scalars(select(WorkUnit).where(WorkUnit.audit_id == audit.id)).one()


def lose_worker(engine: Engine, audit: Audit) -> None:
    """Take the audit's unit and never be heard of again."""
    assert work.claim(engine, unit_of(engine, audit).id, owner="dead", lease_seconds=60)
    with transaction(engine) as session:
        session.execute(
            update(WorkUnit).where(WorkUnit.audit_id == audit.id).values(lease_until=long_ago())
        )


def change(engine: Engine, **values: object) -> None:
    with transaction(engine) as session:
        session.execute(update(WorkUnit).values(values))


class TestSending:
    def test_a_unit_that_was_never_sent_is_sent(
        self, engine: Engine, celery: Celery, settings: Settings
    ) -> None:
        unit = unit_of(engine, make_audit(engine))
        assert reconcile(engine, celery, settings) == [unit.id]
        assert queue_length(celery) == 1
        assert reconcile(engine, celery, settings) == []

    def test_messages_that_a_broker_lost_are_sent_again(
        self, engine: Engine, celery: Celery, settings: Settings, broker: Redis
    ) -> None:
        unit = unit_of(engine, make_audit(engine))
        reconcile(engine, celery, settings)
        broker.flushall()
        assert reconcile(engine, celery, settings) == []  # it may just be on its way
        change(engine, sent_at=long_ago())
        assert reconcile(engine, celery, settings) == [unit.id]

    def test_messages_that_wait_in_the_broker_are_not_doubled(
        self, engine: Engine, celery: Celery, settings: Settings, broker: Redis
    ) -> None:
        make_audit(engine)
        reconcile(engine, celery, settings)
        change(engine, sent_at=long_ago())
        assert reconcile(engine, celery, settings) == []
        assert broker.llen(FETCH_QUEUE_NAME) == 1

    def test_work_that_is_held_is_left_alone(
        self, engine: Engine, celery: Celery, settings: Settings
    ) -> None:
        audit = make_audit(engine)
        work.claim(engine, unit_of(engine, audit).id, owner="alive", lease_seconds=60)
        assert reconcile(engine, celery, settings) == []
        assert unit_of(engine, audit).owner == "alive"


class TestLostWorkers:
    def test_their_work_is_offered_again(
        self, engine: Engine, celery: Celery, settings: Settings
    ) -> None:
        audit = make_audit(engine)
        lose_worker(engine, audit)
        assert reconcile(engine, celery, settings) == [unit_of(engine, audit).id]
        unit = unit_of(engine, audit)
        assert (unit.state, unit.attempts) == (UnitState.READY, 1)
        assert unit.last_error == "its worker was lost"

    def test_a_unit_that_kills_its_workers_ends_its_audit(
        self, engine: Engine, celery: Celery, settings: Settings
    ) -> None:
        audit = make_audit(engine)
        for _ in range(settings.max_attempts):
            assert unit_of(engine, audit).state == UnitState.READY
            lose_worker(engine, audit)
            reconcile(engine, celery, settings)
        with Session(engine) as session:
            ended = session.get_one(Audit, audit.id)
        assert (ended.state, ended.error_code) == (AuditState.FAILED, "worker_lost")
        assert "Stage prepare, part 0, lost its worker 3 times" in (ended.error_message or "")
        assert reconcile(engine, celery, settings) == []

    def test_a_cancelled_audit_whose_worker_is_lost_ends(
        self, engine: Engine, celery: Celery, settings: Settings
    ) -> None:
        audit = make_audit(engine)
        work.claim(engine, unit_of(engine, audit).id, owner="dies soon", lease_seconds=60)
        with transaction(engine) as session:
            work.request_cancel(session, work.locked_audit(session, audit.id))
        reconcile(engine, celery, settings)
        with Session(engine) as session:
            assert session.get_one(Audit, audit.id).state == AuditState.PREPARING
        change(engine, lease_until=long_ago())
        reconcile(engine, celery, settings)
        with Session(engine) as session:
            assert session.get_one(Audit, audit.id).state == AuditState.CANCELLED
        assert unit_of(engine, audit).state == UnitState.CANCELLED


class TestTwoReconcilers:
    def test_one_works_while_the_other_goes_home(
        self, engine: Engine, celery: Celery, settings: Settings
    ) -> None:
        audit = make_audit(engine)
        lose_worker(engine, audit)
        lock = text("SELECT pg_advisory_xact_lock(:lock)")
        with transaction(engine) as other:
            other.execute(lock, {"lock": RECONCILER_LOCK})
            assert reconcile(engine, celery, settings) == []
            assert unit_of(engine, audit).state == UnitState.RUNNING
        assert len(reconcile(engine, celery, settings)) == 1

    def test_at_the_same_moment_each_attempt_counts_once(
        self, engine: Engine, celery: Celery, settings: Settings
    ) -> None:
        audits = [make_audit(engine) for _ in range(10)]
        for audit in audits:
            lose_worker(engine, audit)
        together = threading.Barrier(4)

        def run(_number: int) -> None:
            together.wait()
            reconcile(engine, celery, settings)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, range(4)))
        for audit in audits:
            unit = unit_of(engine, audit)
            assert (unit.state, unit.attempts, unit.epoch) == (UnitState.READY, 1, 1)


def test_old_rows_are_forgotten(engine: Engine, celery: Celery, settings: Settings) -> None:
    with transaction(engine) as session:
        for name, when in (("old", {"created_at": long_ago()}), ("new", {})):
            session.add(
                IdempotencyKey(
                    tenant="t", route="r", key=name, body_sha256="", answer_id="", **when
                )
            )
        for name, when in (("old", {"seen_at": long_ago()}), ("new", {})):
            session.add(
                WorkerHeartbeat(name=name, device="cpu", queues=[], engine_version="1", **when)
            )
    reconcile(engine, celery, settings)
    with Session(engine) as session:
        assert list(session.scalars(select(IdempotencyKey.key))) == ["new"]
        assert list(session.scalars(select(WorkerHeartbeat.name))) == ["new"]


@pytest.mark.parametrize("is_down_first", [False, True])
def test_the_thread_goes_on_through_failures(
    *,
    engine: Engine,
    celery: Celery,
    settings: Settings,
    is_down_first: bool,
) -> None:
    """A round that the database broke is not the last one."""
    fast = settings.model_copy(update={"reconcile_seconds": 0.05})
    if is_down_first:
        with transaction(engine) as session:
            session.execute(text("ALTER TABLE work_units RENAME TO away"))
    reconciler = Reconciler(engine, celery, fast)
    reconciler.start()
    try:
        if is_down_first:
            time.sleep(0.2)
            with transaction(engine) as session:
                session.execute(text("ALTER TABLE away RENAME TO work_units"))
        audit = make_audit(engine)
        give_up_at = time.monotonic() + 10
        while unit_of(engine, audit).sent_at is None:
            assert time.monotonic() < give_up_at
            time.sleep(0.02)
    finally:
        reconciler.stop()
    assert not reconciler.is_alive()


def test_any_error_at_all_leaves_the_thread_alive(
    engine: Engine, celery: Celery, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process would offer lost work again if its reconcilers had all ended."""
    rounds = threading.Semaphore(0)

    def broken(*_: object) -> list[str]:
        rounds.release()
        raise RuntimeError("something that nobody thought of")

    monkeypatch.setattr("app.work.reconciler.reconcile", broken)
    reconciler = Reconciler(engine, celery, settings.model_copy(update={"reconcile_seconds": 0.01}))
    reconciler.start()
    try:
        for _ in range(3):
            assert rounds.acquire(timeout=10)
        assert reconciler.is_alive()
    finally:
        reconciler.stop()


class TestFrozenProcesses:
    """A process that is stopped keeps its connections, and with them its locks."""

    def test_a_worker_frozen_in_its_transaction_holds_nothing_up(
        self, engine: Engine, celery: Celery, settings: Settings
    ) -> None:
        audit = make_audit(engine)
        owner = f"{'long-host-name-' * 8}:4711"
        unit_id = unit_of(engine, audit).id
        assert work.claim(engine, unit_id, owner=owner, lease_seconds=60)
        frozen = make_engine(settings.require_database_url(), owner=owner)
        bystander = make_engine(settings.require_database_url(), owner="other:4711")
        with Session(frozen) as held, Session(bystander) as other:
            work.locked_audit(held, audit.id)
            other.execute(text("SELECT 1"))
            # the lock keeps the lease from being changed: it is over when it is over
            with transaction(engine) as session:
                session.execute(update(WorkUnit).values(lease_until=long_ago()))
            give_up_at = time.monotonic() + 10
            while unit_of(engine, audit).state != UnitState.READY:
                assert time.monotonic() < give_up_at
                reconcile(engine, celery, settings)
            with pytest.raises(OperationalError):  # the worker wakes up
                held.execute(text("SELECT 1"))
            other.execute(text("SELECT 1"))
            held.invalidate()
        frozen.dispose()
        bystander.dispose()

    def test_a_process_frozen_in_its_round_holds_up_the_others_for_seconds_alone(
        self,
        engine: Engine,
        celery: Celery,
        settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        audit = make_audit(engine)
        lose_worker(engine, audit)
        monkeypatch.setattr("app.work.reconciler.MAX_IDLE", "100ms")
        monkeypatch.setattr("app.work.reconciler.reach", lambda point: time.sleep(0.6))
        with pytest.raises(DBAPIError):  # its session was ended meanwhile
            reconcile(engine, celery, settings)
        monkeypatch.setattr("app.work.reconciler.reach", lambda point: None)
        assert reconcile(engine, celery, settings) == [unit_of(engine, audit).id]
