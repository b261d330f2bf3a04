"""A shard that holds its stage back: a second worker takes it too, and the first one counts."""

from datetime import timedelta

import pytest
from celery import Celery
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from app.audits.models import Audit, AuditState
from app.db import transaction
from app.jobs import queue_length
from app.settings import Settings
from app.work import repository as work
from app.work.claims import Claim, Failure, LeaseLost
from app.work.fairness import claim_in_turn
from app.work.models import Stage, UnitState, WorkUnit
from app.work.reconciler import reconcile
from tests.factories import long_ago, make_audit

NUM_SHARDS = 5


def take(engine: Engine, unit_id: str, owner: str) -> Claim:
    claim = work.claim(engine, unit_id, owner=owner, lease_seconds=60)
    assert claim is not None
    return claim


def complete(engine: Engine, claim: Claim) -> list[str]:
    with transaction(engine) as session:
        return work.complete(session, claim, result={})


def row(engine: Engine, claim: Claim) -> WorkUnit:
    with Session(engine) as session:
        return session.get_one(WorkUnit, claim.unit_id)


def change(engine: Engine, unit_id: str, **values: object) -> None:
    with transaction(engine) as session:
        session.execute(update(WorkUnit).where(WorkUnit.id == unit_id).values(values))


class Stages:
    """An audit in its gradients: four shards took 30 s each, and the last one is at work."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.audit_id = make_audit(engine, fine_tune=None).id
        with transaction(engine) as session:
            session.get_one(Audit, self.audit_id).provenance = {"num_shards": NUM_SHARDS}
            first = select(WorkUnit.id).where(WorkUnit.audit_id == self.audit_id)
            (prepare,) = session.scalars(first)
        (validation,) = complete(engine, take(engine, prepare, "any"))
        *others, self.last = complete(engine, take(engine, validation, "any"))
        for unit_id in others:
            complete(engine, take(engine, unit_id, "quick"))
            change(engine, unit_id, started_at=func.now() - timedelta(seconds=30))
        self.slow = take(engine, self.last, "slow")

    def runs_for(self, seconds: float, *, done: int = 0) -> None:
        began = func.now() - timedelta(seconds=seconds)
        change(self.engine, self.last, started_at=began, done=done, total=100)

    def copy(self, owner: str = "idle") -> Claim | None:
        return claim_in_turn(
            self.engine, self.last, owner=owner, lease_seconds=60, straggler_seconds=10
        )

    def state(self) -> str:
        with Session(self.engine) as session:
            return session.get_one(Audit, self.audit_id).state


@pytest.fixture
def stages(engine: Engine) -> Stages:
    return Stages(engine)


@pytest.fixture
def copied(stages: Stages) -> Claim:
    stages.runs_for(61)
    claim = stages.copy()
    assert claim is not None
    return claim


class TestWhoIsCopied:
    @pytest.mark.parametrize(
        ("seconds", "done", "is_slow"),
        [
            (61, 0, True),  # nothing is known of how far it is
            (59, 0, False),  # not yet twice as long
            (61, 60, True),  # 40 s are left, a copy takes 30
            (61, 70, False),  # 26 s are left
        ],
    )
    def test_one_that_takes_long_and_will_for_longer_than_a_copy(
        self, stages: Stages, *, seconds: float, done: int, is_slow: bool
    ) -> None:
        stages.runs_for(seconds, done=done)
        assert (stages.copy() is not None) == is_slow

    def test_one_that_is_short_is_not(self, stages: Stages, engine: Engine) -> None:
        change_all = update(WorkUnit).where(WorkUnit.state == UnitState.DONE)
        with transaction(engine) as session:
            session.execute(change_all.values(started_at=WorkUnit.finished_at))
        stages.runs_for(9)
        assert stages.copy() is None
        stages.runs_for(11)
        assert stages.copy() is not None

    def test_none_while_another_waits(self, stages: Stages, engine: Engine) -> None:
        stages.runs_for(300)
        with Session(engine) as session:
            done = session.scalars(select(WorkUnit).where(WorkUnit.state == UnitState.DONE))
            waiting = next(unit.id for unit in done if unit.stage == Stage.GRADIENTS)
        change(engine, waiting, state=UnitState.READY, sent_at=func.now(), finished_at=None)
        found = stages.copy()
        assert found is not None
        assert found.unit_id == waiting
        assert stages.copy() is not None  # now nothing waits

    def test_none_whose_worker_has_it_already(self, stages: Stages) -> None:
        stages.runs_for(300)
        assert stages.copy("slow") is None

    def test_one_is_copied_once(self, stages: Stages, copied: Claim) -> None:
        stages.runs_for(600)
        assert stages.copy("third") is None

    def test_none_where_it_is_turned_off(
        self, stages: Stages, engine: Engine, celery: Celery, settings: Settings
    ) -> None:
        stages.runs_for(300)
        off = settings.model_copy(update={"straggler_seconds": 0})
        assert reconcile(engine, celery, off) == []
        assert claim_in_turn(engine, stages.last, owner="idle", lease_seconds=60) is None

    def test_none_of_an_audit_that_is_being_cancelled(self, stages: Stages, engine: Engine) -> None:
        stages.runs_for(300)
        with transaction(engine) as session:
            work.request_cancel(session, work.locked_audit(session, stages.audit_id))
        assert stages.copy() is None


class TestTheFirstOneCounts:
    def test_the_copy(self, stages: Stages, copied: Claim, engine: Engine) -> None:
        (aggregate,) = complete(engine, copied)
        assert aggregate
        with pytest.raises(LeaseLost):
            complete(engine, stages.slow)
        with pytest.raises(LeaseLost):
            work.renew(engine, stages.slow, lease_seconds=60, done=1, total=2)

    def test_the_slow_one_if_it_is_quicker_after_all(
        self, stages: Stages, copied: Claim, engine: Engine
    ) -> None:
        (aggregate,) = complete(engine, stages.slow)
        assert aggregate
        with pytest.raises(LeaseLost):
            complete(engine, copied)
        with pytest.raises(LeaseLost):
            work.renew(engine, copied, lease_seconds=60, done=1, total=2)


class TestTheSlowOneBesideItsCopy:
    def test_it_goes_on_without_telling_of_itself(
        self, stages: Stages, copied: Claim, engine: Engine
    ) -> None:
        work.renew(engine, copied, lease_seconds=60, done=50, total=100)
        before = row(engine, copied)
        assert not work.renew(engine, stages.slow, lease_seconds=600, done=7, total=9)
        after = row(engine, copied)
        assert (after.done, after.total, after.lease_until) == (50, 100, before.lease_until)

    @pytest.mark.parametrize("ending", ["release", "fail"])
    def test_what_ends_it_does_not_end_the_copy(
        self, stages: Stages, copied: Claim, engine: Engine, ending: str
    ) -> None:
        if ending == "release":
            work.release(engine, stages.slow, reason="it was stopped")
        else:
            work.fail(engine, stages.slow, Failure("broken", "It broke."))
        assert row(engine, copied).state == UnitState.RUNNING
        assert stages.state() == AuditState.COMPUTING
        with pytest.raises(LeaseLost):
            complete(engine, stages.slow)
        assert complete(engine, copied)

    def test_both_stop_where_the_audit_is_cancelled(
        self, stages: Stages, copied: Claim, engine: Engine
    ) -> None:
        with transaction(engine) as session:
            work.request_cancel(session, work.locked_audit(session, stages.audit_id))
        assert work.renew(engine, stages.slow, lease_seconds=60, done=1, total=2)
        work.stop_for_cancel(engine, stages.slow)
        assert stages.state() == AuditState.COMPUTING
        work.stop_for_cancel(engine, copied)
        assert stages.state() == AuditState.CANCELLED

    def test_where_the_copy_is_lost_a_third_worker_begins(
        self, stages: Stages, copied: Claim, engine: Engine, celery: Celery, settings: Settings
    ) -> None:
        change(engine, copied.unit_id, lease_until=long_ago())
        assert reconcile(engine, celery, settings) == [copied.unit_id]
        for claim in (stages.slow, copied):
            with pytest.raises(LeaseLost):
                complete(engine, claim)
        third = take(engine, copied.unit_id, "third")
        assert third.attempts == 3
        with pytest.raises(LeaseLost):  # the epoch of the first is over, not beside the third's
            complete(engine, stages.slow)
        assert complete(engine, third)


def test_the_reconciler_wakes_an_idle_worker_while_it_is_slow(
    stages: Stages, engine: Engine, celery: Celery, settings: Settings
) -> None:
    assert reconcile(engine, celery, settings) == []
    stages.runs_for(300)
    assert reconcile(engine, celery, settings) == [stages.last]
    assert queue_length(celery) == 1
    assert reconcile(engine, celery, settings) == []  # nobody came yet: all are busy
