"""Units of later rankings: the same leases, and their audit is left alone."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import Celery
from redis import Redis
from sqlalchemy import Engine, delete, select, update
from sqlalchemy.orm import Session

from app.audits import ranking_service
from app.audits.models import Audit, Ranking
from app.audits.service import delete as delete_audit
from app.db import transaction
from app.errors import Conflict
from app.jobs import CPU_QUEUE_NAME, FETCH_QUEUE_NAME, queue_length, send_units
from app.settings import Settings
from app.work import repository as work
from app.work.claims import Claim, Failure, LeaseLost
from app.work.models import Stage, UnitState, WorkUnit
from app.work.reconciler import reconcile
from app.work.restart import give_back_all_work
from tests.factories import TENANT, long_ago, make_audit, make_finished_audit, make_ranking

FAILURE = Failure("unknown_layers", "There is no block 9.", "layers")


@pytest.fixture
def audit(engine: Engine, settings: Settings) -> Audit:
    return make_finished_audit(engine, settings)


@pytest.fixture
def ranking(engine: Engine, audit: Audit) -> Ranking:
    return make_ranking(engine, audit)


@pytest.fixture(autouse=True)
def the_audit_is_left_alone(engine: Engine, audit: Audit) -> Iterator[None]:
    """Whatever becomes of a ranking, its audit has ended well and does not change."""
    names = ("state", "version", "stage", "progress", "state_times", "finished_at", "error_code")
    with Session(engine) as session:
        row = session.get_one(Audit, audit.id)
        before = {name: getattr(row, name) for name in names}
    yield
    with Session(engine) as session:
        left = session.get(Audit, audit.id)
        assert left is None or {name: getattr(left, name) for name in names} == before


def unit_of(engine: Engine, ranking: Ranking) -> WorkUnit:
    with Session(engine) as session:
        return session.scalars(select(WorkUnit).where(WorkUnit.ranking_id == ranking.id)).one()


def now(engine: Engine, ranking: Ranking) -> Ranking:
    with Session(engine) as session:
        return session.get_one(Ranking, ranking.id)


def take(engine: Engine, ranking: Ranking, owner: str = "one") -> Claim | None:
    return work.claim(engine, unit_of(engine, ranking).id, owner=owner, lease_seconds=60)


def hold(engine: Engine, ranking: Ranking) -> Claim:
    claim = take(engine, ranking)
    assert claim is not None
    return claim


def outlive(engine: Engine) -> None:
    with transaction(engine) as session:
        is_held = WorkUnit.state == UnitState.RUNNING
        session.execute(update(WorkUnit).where(is_held).values(lease_until=long_ago()))


class TestLeases:
    def test_a_ranking_is_taken_once_and_runs(self, engine: Engine, ranking: Ranking) -> None:
        together = threading.Barrier(6)

        def race(number: int) -> Claim | None:
            together.wait()
            return take(engine, ranking, str(number))

        with ThreadPoolExecutor(6) as pool:
            (claim,) = [claim for claim in pool.map(race, range(6)) if claim]
        assert (claim.stage, claim.ranking_id) == (Stage.RANK, ranking.id)
        assert now(engine, ranking).state == "running"

    def test_a_heartbeat_reports_progress_and_a_new_version(
        self, engine: Engine, ranking: Ranking
    ) -> None:
        claim = hold(engine, ranking)
        version = now(engine, ranking).version
        for done in (6, 3):
            assert not work.renew(engine, claim, lease_seconds=60, done=done, total=10)
        found = now(engine, ranking)
        assert (round(found.progress, 6), found.version) == (0.6, version + 2)

    def test_its_end_is_its_own(self, engine: Engine, ranking: Ranking) -> None:
        claim = hold(engine, ranking)
        with transaction(engine) as session:
            assert work.complete(session, claim, result={"some": "thing"}) == []
        ended = now(engine, ranking)
        assert (ended.state, ended.progress) == ("succeeded", 1.0)
        assert ended.finished_at is not None
        assert unit_of(engine, ranking).result == {"some": "thing"}
        assert take(engine, ranking) is None

    def test_a_failure_is_its_own(self, engine: Engine, audit: Audit, ranking: Ranking) -> None:
        other = make_ranking(engine, audit)
        work.fail(engine, hold(engine, ranking), FAILURE)
        failed = now(engine, ranking)
        assert (failed.state, failed.error_code) == ("failed", FAILURE.code)
        assert (failed.error_message, failed.error_field) == (FAILURE.message, FAILURE.field)
        assert unit_of(engine, ranking).state == UnitState.FAILED
        assert (now(engine, other).state, take(engine, other) is not None) == ("queued", True)

    def test_a_zombie_changes_nothing(self, engine: Engine, ranking: Ranking) -> None:
        zombie = hold(engine, ranking)
        outlive(engine)
        holder = hold(engine, ranking)
        assert (holder.epoch, holder.attempts) == (2, 2)
        work.fail(engine, zombie, FAILURE)
        work.release(engine, zombie, reason="late")
        with pytest.raises(LeaseLost):
            work.renew(engine, zombie, lease_seconds=60, done=1, total=1)
        with pytest.raises(LeaseLost), transaction(engine) as session:
            work.complete(session, zombie, result={})
        assert unit_of(engine, ranking).state == UnitState.RUNNING
        with transaction(engine) as session:
            work.complete(session, holder, result={})

    def test_a_unit_that_is_given_back_is_taken_again(
        self, engine: Engine, ranking: Ranking
    ) -> None:
        work.release(engine, hold(engine, ranking), reason="drained", count_attempt=False)
        assert unit_of(engine, ranking).attempts == 0
        assert hold(engine, ranking).epoch == 2
        assert give_back_all_work(engine) == 1
        assert hold(engine, ranking).attempts == 1

    def test_every_ranking_of_an_audit_has_a_unit(self, engine: Engine, audit: Audit) -> None:
        """Stage and position are the same; an audit's own units stay unique without a ranking."""
        rankings = [make_ranking(engine, audit) for _ in range(3)]
        claims = [hold(engine, ranking) for ranking in rankings]
        assert len({claim.unit_id for claim in claims}) == 3


class TestDeleted:
    @pytest.fixture
    def orphan(self, engine: Engine, ranking: Ranking) -> Claim:
        """The hold of a worker whose ranking was deleted meanwhile."""
        claim = hold(engine, ranking)
        with transaction(engine) as session:
            session.execute(delete(Ranking).where(Ranking.id == ranking.id))
        return claim

    def test_its_worker_loses_its_hold(self, engine: Engine, orphan: Claim) -> None:
        with pytest.raises(LeaseLost):
            work.renew(engine, orphan, lease_seconds=60, done=1, total=2)
        with pytest.raises(LeaseLost), transaction(engine) as session:
            work.complete(session, orphan, result={})
        work.release(engine, orphan, reason="it does not matter any more")
        work.fail(engine, orphan, FAILURE)
        assert work.claim(engine, orphan.unit_id, owner="two", lease_seconds=60) is None

    def test_deleting_waits_for_a_commit_and_does_not_lock_up(
        self, engine: Engine, settings: Settings, audit: Audit, ranking: Ranking
    ) -> None:
        """The worker holds the row for its COPY, then wants it for its end."""
        claim = hold(engine, ranking)
        holds_row, may_end = threading.Event(), threading.Event()

        def finish() -> None:
            with transaction(engine) as session:
                row = select(Ranking.id).where(Ranking.id == ranking.id)
                session.execute(row.with_for_update(read=True, key_share=True))
                holds_row.set()
                assert may_end.wait(20)
                work.complete(session, claim, result={})

        def remove() -> None:
            ranking_service.delete(
                engine, settings, tenant=TENANT, audit_id=audit.id, ranking_id=ranking.id
            )

        with ThreadPoolExecutor(2) as pool:
            worker = pool.submit(finish)
            assert holds_row.wait(20)
            caller = pool.submit(remove)
            assert not wait_briefly(caller.done)
            may_end.set()
            worker.result(20)
            caller.result(20)
        with Session(engine) as session:
            assert session.get(Ranking, ranking.id) is None
            assert not session.scalars(select(WorkUnit).where(WorkUnit.stage == "rank")).all()


class TestReconciling:
    def test_a_lost_worker_is_replaced(
        self, engine: Engine, celery: Celery, settings: Settings, ranking: Ranking
    ) -> None:
        hold(engine, ranking)
        outlive(engine)
        assert unit_of(engine, ranking).id in reconcile(engine, celery, settings)
        unit = unit_of(engine, ranking)
        assert (unit.state, unit.attempts, unit.last_error) == (
            *("ready", 1, "its worker was lost"),
        )

    def test_a_ranking_that_kills_its_workers_fails(
        self, engine: Engine, celery: Celery, settings: Settings, ranking: Ranking
    ) -> None:
        for _ in range(settings.max_attempts):
            hold(engine, ranking)
            outlive(engine)
            reconcile(engine, celery, settings)
        ended = now(engine, ranking)
        assert (ended.state, ended.error_code) == ("failed", "worker_lost")
        assert "Stage rank, part 0, lost its worker 3 times" in (ended.error_message or "")
        assert unit_of(engine, ranking).state == UnitState.CANCELLED

    def test_units_wait_in_the_queue_of_their_kind(
        self, engine: Engine, celery: Celery, broker: Redis, ranking: Ranking
    ) -> None:
        prepare = make_audit(engine)
        with Session(engine) as session:
            statement = select(WorkUnit.id).where(WorkUnit.audit_id == prepare.id)
            audit_unit = session.scalars(statement).one()
        send_units(engine, celery, [unit_of(engine, ranking).id, audit_unit, "wrk_deleted"])
        assert broker.llen(FETCH_QUEUE_NAME) == broker.llen(CPU_QUEUE_NAME) == 1
        assert unit_of(engine, ranking).id.encode() in _bodies(broker, CPU_QUEUE_NAME)
        assert queue_length(celery, CPU_QUEUE_NAME) == 1
        assert queue_length(celery) == 2

    @pytest.mark.parametrize("lost", [FETCH_QUEUE_NAME, CPU_QUEUE_NAME])
    def test_messages_of_one_queue_do_not_hide_those_lost_from_the_other(
        self, engine: Engine, celery: Celery, settings: Settings, ranking: Ranking, lost: str
    ) -> None:
        make_audit(engine)
        assert len(reconcile(engine, celery, settings)) == 2
        with celery.connection_for_write() as connection:
            connection.default_channel.client.delete(lost)
        with transaction(engine) as session:
            is_ready = WorkUnit.state == UnitState.READY
            session.execute(update(WorkUnit).where(is_ready).values(sent_at=long_ago()))
        (again,) = reconcile(engine, celery, settings)
        assert (again == unit_of(engine, ranking).id) == (lost == CPU_QUEUE_NAME)
        assert [queue_length(celery, name) for name in (FETCH_QUEUE_NAME, CPU_QUEUE_NAME)] == [1, 1]


def test_an_audit_is_not_deleted_under_a_ranking(
    engine: Engine, settings: Settings, audit: Audit, ranking: Ranking
) -> None:
    claim = hold(engine, ranking)
    with pytest.raises(Conflict):
        delete_audit(engine, settings, tenant=TENANT, audit_id=audit.id)
    with transaction(engine) as session:
        work.complete(session, claim, result={})
    delete_audit(engine, settings, tenant=TENANT, audit_id=audit.id)


def _bodies(broker: Redis, queue: str) -> bytes:
    """Return the arguments of the messages of a queue, decoded."""
    messages = [json.loads(message) for message in broker.lrange(queue, 0, -1)]
    return b"".join(base64.b64decode(message["body"]) for message in messages)


def wait_briefly(is_so: Callable[[], bool]) -> bool:
    """Return whether something becomes true within a moment."""
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        if is_so():
            return True
        time.sleep(0.02)
    return False
