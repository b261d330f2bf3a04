"""The lease protocol: one holder at a time, the dead are fenced off, nothing is lost."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from app.audits.models import Audit, AuditState
from app.db import transaction
from app.work import repository as work
from app.work.claims import CancelPending, Claim, Failure, LeaseLost
from app.work.models import Stage, UnitState, WorkUnit
from app.work.restart import give_back_all_work
from tests.factories import long_ago, make_audit

FAILURE = Failure("diverged", "Lower the learning rate.", "fine_tune.learning_rate")


def units_of(engine: Engine, audit: Audit) -> list[WorkUnit]:
    with Session(engine) as session:
        statement = select(WorkUnit).where(WorkUnit.audit_id == audit.id).order_by(WorkUnit.id)
        return list(session.scalars(statement))


def now(engine: Engine, audit: Audit) -> Audit:
    """Return the audit as it is now."""
    with Session(engine) as session:
        return session.get_one(Audit, audit.id)


def take(engine: Engine, unit_id: str, owner: str = "one") -> Claim | None:
    return work.claim(engine, unit_id, owner=owner, lease_seconds=60)


def take_first(engine: Engine, audit: Audit) -> Claim:
    claim = take(engine, units_of(engine, audit)[0].id)
    assert claim is not None
    return claim


def renew(engine: Engine, claim: Claim, done: int = 1, total: int = 2) -> bool:
    return work.renew(engine, claim, lease_seconds=60, done=done, total=total)


def complete(engine: Engine, claim: Claim, **result: Any) -> list[str]:
    with transaction(engine) as session:
        return work.complete(session, claim, result=result)


def outlive(engine: Engine) -> None:
    """Let every lease run out."""
    with transaction(engine) as session:
        session.execute(
            update(WorkUnit)
            .where(WorkUnit.state == UnitState.RUNNING)
            .values(lease_until=long_ago())
        )


class TestClaim:
    def test_a_ready_unit_is_taken_once(self, engine: Engine) -> None:
        audit = make_audit(engine)
        claim = take_first(engine, audit)
        assert (claim.stage, claim.epoch, claim.attempts) == (Stage.PREPARE, 1, 1)
        assert take(engine, claim.unit_id, "two") is None
        assert now(engine, audit).state == AuditState.PREPARING
        assert now(engine, audit).stage == Stage.PREPARE

    def test_of_many_at_the_same_moment_one_gets_it(self, engine: Engine) -> None:
        unit_id = units_of(engine, make_audit(engine))[0].id
        together = threading.Barrier(8)

        def race(number: int) -> Claim | None:
            together.wait()
            return take(engine, unit_id, str(number))

        with ThreadPoolExecutor(8) as pool:
            claims = list(pool.map(race, range(8)))
        assert sum(claim is not None for claim in claims) == 1

    def test_a_lease_that_ran_out_is_taken_over(self, engine: Engine) -> None:
        claim = take_first(engine, make_audit(engine))
        outlive(engine)
        second = take(engine, claim.unit_id, "two")
        assert second is not None
        assert (second.epoch, second.attempts) == (2, 2)

    def test_there_is_nothing_to_take_of_an_audit_that_ends(self, engine: Engine) -> None:
        audit = make_audit(engine)
        with transaction(engine) as session:
            session.get_one(Audit, audit.id).cancel_requested_at = long_ago()
        assert take(engine, units_of(engine, audit)[0].id) is None
        assert take(engine, "wrk_nope") is None


class TestRenew:
    def test_it_extends_the_lease_and_reports_progress(self, engine: Engine) -> None:
        audit = make_audit(engine)
        claim = take_first(engine, audit)
        outlive(engine)
        assert not renew(engine, claim)
        assert take(engine, claim.unit_id, "two") is None
        assert 0 < now(engine, audit).progress < 1

    def test_progress_never_goes_back(self, engine: Engine) -> None:
        audit = make_audit(engine)
        claim = take_first(engine, audit)
        renew(engine, claim, done=9, total=10)
        most = now(engine, audit).progress
        renew(engine, claim, done=1, total=10)
        assert now(engine, audit).progress == most

    def test_it_tells_of_a_cancel(self, engine: Engine) -> None:
        audit = make_audit(engine)
        claim = take_first(engine, audit)
        with transaction(engine) as session:
            work.request_cancel(session, work.locked_audit(session, audit.id))
        assert renew(engine, claim)

    def test_it_leaves_the_audits_row_alone_where_another_worker_just_told(
        self, engine: Engine
    ) -> None:
        """Of many workers few wait there; the lease is extended, and a cancel is heard of."""
        audit = make_audit(engine)
        claim = take_first(engine, audit)
        told: dict[str, Any] = {"lease_seconds": 60, "done": 1, "total": 2, "report_seconds": 60}
        renew(engine, claim, done=0)
        outlive(engine)
        before = now(engine, audit)
        with transaction(engine) as session:
            work.locked_audit(session, audit.id)
            assert not work.renew(engine, claim, **told)
        assert now(engine, audit).version == before.version
        assert take(engine, claim.unit_id, "two") is None
        (unit,) = units_of(engine, audit)
        assert (unit.done, unit.total) == (1, 2)
        with transaction(engine) as session:
            work.request_cancel(session, work.locked_audit(session, audit.id))
        assert work.renew(engine, claim, **told)

    def test_it_tells_again_when_that_was_long_ago(self, engine: Engine) -> None:
        audit = make_audit(engine)
        claim = take_first(engine, audit)
        with transaction(engine) as session:
            session.get_one(Audit, audit.id).busy_until = long_ago()
        work.renew(engine, claim, lease_seconds=60, done=1, total=2, report_seconds=60)
        assert now(engine, audit).progress > 0


class TestAZombie:
    """A worker that lost its lease, and does not know it, can change nothing."""

    @pytest.fixture
    def audit(self, engine: Engine) -> Audit:
        return make_audit(engine)

    @pytest.fixture
    def zombie(self, engine: Engine, audit: Audit) -> Claim:
        return take_first(engine, audit)

    @pytest.fixture(autouse=True)
    def holder(self, engine: Engine, zombie: Claim) -> Claim:
        """The worker that has the unit now."""
        outlive(engine)
        claim = take(engine, zombie.unit_id, "two")
        assert claim is not None
        return claim

    def test_it_cannot_renew(self, engine: Engine, zombie: Claim) -> None:
        with pytest.raises(LeaseLost):
            renew(engine, zombie)

    def test_its_result_is_dropped_with_all_it_wrote(
        self, engine: Engine, audit: Audit, zombie: Claim, holder: Claim
    ) -> None:
        def finish_late() -> None:
            with transaction(engine) as session:
                session.get_one(Audit, audit.id).num_train = 666
                work.complete(session, zombie, result={"by": "zombie"})

        with pytest.raises(LeaseLost):
            finish_late()
        assert now(engine, audit).num_train is None
        complete(engine, holder, by="holder")
        assert units_of(engine, audit)[0].result == {"by": "holder"}

    def test_it_cannot_fail_release_or_stop(
        self, engine: Engine, audit: Audit, zombie: Claim, holder: Claim
    ) -> None:
        work.fail(engine, zombie, FAILURE)
        work.release(engine, zombie, reason="late", count_attempt=False)
        work.stop_for_cancel(engine, zombie)
        unit = units_of(engine, audit)[0]
        assert (unit.state, unit.owner, unit.attempts) == (UnitState.RUNNING, "two", 2)
        assert now(engine, audit).finished_at is None
        complete(engine, holder)


class TestComplete:
    def test_the_last_unit_of_a_stage_opens_the_next(self, engine: Engine) -> None:
        audit = make_audit(engine, fine_tune=None)
        ready = complete(engine, take_first(engine, audit))
        assert [unit.stage for unit in units_of(engine, audit)] == [Stage.PREPARE, Stage.VALIDATION]
        assert ready == [units_of(engine, audit)[1].id]

    def test_a_sharded_stage_waits_for_its_last_shard_whatever_the_order(
        self, engine: Engine
    ) -> None:
        audit = make_audit(engine, fine_tune=None)
        complete(engine, take_first(engine, audit))
        with transaction(engine) as session:
            session.get_one(Audit, audit.id).provenance = {"num_shards": 3}
        validation = take(engine, units_of(engine, audit)[1].id)
        assert validation is not None
        shards = [take(engine, unit_id) for unit_id in complete(engine, validation)]
        assert [shard and shard.position for shard in shards] == [0, 1, 2]
        assert [complete(engine, shard) for shard in (shards[2], shards[0]) if shard] == [[], []]
        assert shards[1]
        (aggregate,) = complete(engine, shards[1])
        last = take(engine, aggregate)
        assert last
        assert complete(engine, last) == []
        ended = now(engine, audit)
        assert (ended.state, ended.progress) == (AuditState.SUCCEEDED, 1.0)
        assert ended.finished_at is not None
        assert sorted(ended.state_times, key=ended.state_times.__getitem__) == [
            *("queued", "preparing", "computing", "aggregating", "succeeded")
        ]

    def test_two_last_shards_at_once_open_the_next_stage_once(self, engine: Engine) -> None:
        audit = make_audit(engine, fine_tune=None)
        complete(engine, take_first(engine, audit))
        with transaction(engine) as session:
            session.get_one(Audit, audit.id).provenance = {"num_shards": 4}
        validation = take(engine, units_of(engine, audit)[1].id)
        assert validation
        shards = [take(engine, unit_id) for unit_id in complete(engine, validation)]
        together = threading.Barrier(4)

        def finish(shard: Claim | None) -> list[str]:
            together.wait()
            assert shard
            return complete(engine, shard)

        with ThreadPoolExecutor(4) as pool:
            opened = [ready for ready in pool.map(finish, shards) if ready]
        assert len(opened) == 1
        assert [unit.stage for unit in units_of(engine, audit)].count(Stage.AGGREGATE) == 1

    def test_not_while_the_audit_is_being_cancelled(self, engine: Engine) -> None:
        audit = make_audit(engine)
        claim = take_first(engine, audit)
        with transaction(engine) as session:
            work.request_cancel(session, work.locked_audit(session, audit.id))
        with pytest.raises(CancelPending):
            complete(engine, claim)
        work.stop_for_cancel(engine, claim)
        assert now(engine, audit).state == AuditState.CANCELLED


class TestLettingGo:
    def test_a_unit_that_is_given_back_can_be_taken_again(self, engine: Engine) -> None:
        audit = make_audit(engine)
        claim = take_first(engine, audit)
        work.release(engine, claim, reason="its worker was stopped", count_attempt=False)
        unit = units_of(engine, audit)[0]
        assert (unit.state, unit.attempts, unit.sent_at) == (UnitState.READY, 0, None)
        again = take(engine, claim.unit_id)
        assert again
        assert again.epoch == 2

    def test_a_try_that_counts_is_counted(self, engine: Engine) -> None:
        audit = make_audit(engine)
        work.release(engine, take_first(engine, audit), reason="hub down")
        assert units_of(engine, audit)[0].attempts == 1

    def test_a_failure_ends_the_audit_and_withdraws_the_rest(self, engine: Engine) -> None:
        audit = make_audit(engine)
        with transaction(engine) as session:
            work.add_units(session, audit.id, Stage.GRADIENTS, count=3)
        first, second, *_ = [take(engine, unit.id) for unit in units_of(engine, audit)[:2]]
        assert first
        assert second
        work.fail(engine, first, FAILURE)
        ended = now(engine, audit)
        assert (ended.state, ended.error_code) == (AuditState.FAILED, "diverged")
        assert (ended.error_message, ended.error_field) == (FAILURE.message, FAILURE.field)
        states = [unit.state for unit in units_of(engine, audit)]
        assert states == [UnitState.FAILED, *[UnitState.CANCELLED] * 3]
        with pytest.raises(LeaseLost):
            renew(engine, second)

    def test_after_a_stop_of_the_whole_service_all_work_is_ready_again(
        self, engine: Engine
    ) -> None:
        held, waiting, done = (make_audit(engine) for _ in range(3))
        claim = take_first(engine, held)
        complete(engine, take_first(engine, done))
        with transaction(engine) as session:
            session.execute(
                update(WorkUnit).where(WorkUnit.audit_id == waiting.id).values(sent_at=long_ago())
            )
        assert give_back_all_work(engine) == 1
        for audit in (held, waiting):
            unit = units_of(engine, audit)[0]
            assert (unit.state, unit.attempts, unit.sent_at) == (UnitState.READY, 0, None)
        assert units_of(engine, done)[0].state == UnitState.DONE
        with pytest.raises(LeaseLost):
            renew(engine, claim)
