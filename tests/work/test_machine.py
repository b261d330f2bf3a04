"""The lease tables under any order of events: the promises of SERVICE.md hold in every state."""

import pytest
from celery import Celery
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis
from sqlalchemy import Engine, select, text, update
from sqlalchemy.orm import Session

from app.audits.models import Audit, AuditState, Ranking, RankingState
from app.db import Base, transaction
from app.settings import Settings
from app.storage import WAITING
from app.work import repository as work
from app.work import stragglers
from app.work.claims import Claim, Failure, LeaseLost
from app.work.models import Stage, UnitState, WorkUnit
from app.work.reconciler import reconcile
from tests.factories import long_ago, make_audit, make_ranking

OPEN = {UnitState.READY, UnitState.RUNNING}
pick = st.integers(0, 1000)


class Leases(RuleBasedStateMachine):
    """Audits of two shards and their rankings, workers that come, stall, die and return, messages
    that are lost, and a reconciler.
    """

    engine: Engine
    celery: Celery
    service: Settings
    broker: Redis

    def __init__(self) -> None:
        super().__init__()
        tables = ", ".join(table.name for table in Base.metadata.sorted_tables)
        with transaction(self.engine) as session:
            session.execute(text(f"TRUNCATE {tables} CASCADE"))
        self.broker.flushall()
        self.claims: list[Claim] = []  # all that were ever given, dead ones too
        self.completed: list[str] = []
        self.ended_rankings: dict[str, str] = {}
        self.begin()

    def begin(self) -> None:
        """Submit an audit, the only one that there is."""
        self.audit_id = make_audit(self.engine, fine_tune=None).id
        with transaction(self.engine) as session:
            session.get_one(Audit, self.audit_id).provenance = {"num_shards": 2}
        self.progress = 0.0
        self.version = 0
        self.final: str | None = None

    def units(self) -> list[WorkUnit]:
        with Session(self.engine) as session:
            return list(session.scalars(select(WorkUnit).order_by(WorkUnit.id)))

    def audit(self) -> Audit:
        with Session(self.engine) as session:
            return session.get_one(Audit, self.audit_id)

    def rankings(self) -> list[Ranking]:
        with Session(self.engine) as session:
            return list(session.scalars(select(Ranking).order_by(Ranking.id)))

    def is_holder(self, claim: Claim) -> bool:
        """Tell from the row alone whether a claim still stands."""
        found = [unit for unit in self.units() if unit.id == claim.unit_id]
        return any(
            unit.state == UnitState.RUNNING and claim.epoch in {unit.epoch, unit.slower_epoch}
            for unit in found
        )

    @rule(number=pick)
    def claim(self, number: int) -> None:
        """A message comes: the first, one of several copies, or one that is long out of date."""
        units = self.units()
        unit = units[number % len(units)]
        claim = work.claim(
            self.engine, unit.id, owner=str(number), lease_seconds=3600, straggler_seconds=0.1
        )
        if claim is not None:
            is_free = unit.state == UnitState.READY or unit.lease_until == long_ago()
            is_slow = unit.started_at == long_ago() and unit.attempts == 1
            assert is_free or is_slow
            assert claim.epoch == unit.epoch + 1
            self.claims.append(claim)

    @precondition(lambda self: self.claims)
    @rule(number=pick, done=st.integers(0, 10), report_seconds=st.sampled_from([0.0, 60.0]))
    def renew(self, number: int, done: int, report_seconds: float) -> None:
        claim = self.claims[number % len(self.claims)]
        stands = self.is_holder(claim)
        try:
            work.renew(
                self.engine,
                claim,
                lease_seconds=3600,
                done=done,
                total=10,
                report_seconds=report_seconds,
            )
        except LeaseLost:
            assert not stands
        else:
            assert stands

    @precondition(lambda self: self.claims)
    @rule(number=pick)
    def complete(self, number: int) -> None:
        claim = self.claims[number % len(self.claims)]
        is_cancelling = claim.ranking_id is None and self.audit().cancel_requested_at is not None
        may = self.is_holder(claim) and not is_cancelling
        try:
            with transaction(self.engine) as session:
                work.complete(session, claim, result={})
        except LeaseLost:
            assert not may
        else:
            assert may
            self.completed.append(claim.unit_id)

    @precondition(lambda self: self.claims)
    @rule(number=pick, count_attempt=st.booleans(), waiting=st.sampled_from([None, WAITING]))
    def release(self, number: int, *, count_attempt: bool, waiting: str | None) -> None:
        claim = self.claims[number % len(self.claims)]
        work.release(self.engine, claim, reason="", count_attempt=count_attempt, waiting=waiting)
        assert not self.is_holder(claim)

    @precondition(lambda self: self.claims)
    @rule(number=pick, dice=st.integers(0, 9))
    def fail(self, number: int, dice: int) -> None:
        if dice == 0:  # seldom, or no audit would ever get far
            claim = self.claims[number % len(self.claims)]
            work.fail(self.engine, claim, Failure("broken", "It broke."))

    @precondition(lambda self: self.claims)
    @rule(number=pick)
    def stop_for_cancel(self, number: int) -> None:
        claim = self.claims[number % len(self.claims)]
        if claim.ranking_id is None and self.audit().cancel_requested_at is not None:
            work.stop_for_cancel(self.engine, claim)

    @rule(dice=st.integers(0, 9))
    def cancel(self, dice: int) -> None:
        if dice == 0:
            with transaction(self.engine) as session:
                audit = work.locked_audit(session, self.audit_id)
                if audit.finished_at is None:
                    work.request_cancel(session, audit)

    @rule(number=pick)
    def outlive_a_lease(self, number: int) -> None:
        running = [unit.id for unit in self.units() if unit.state == UnitState.RUNNING]
        if running:
            with transaction(self.engine) as session:
                session.execute(
                    update(WorkUnit)
                    .where(WorkUnit.id == running[number % len(running)])
                    .values(lease_until=long_ago())
                )

    @rule(number=pick)
    def crawl(self, number: int) -> None:
        """A shard takes far longer than the others did."""
        running = [unit.id for unit in self.units() if unit.state == UnitState.RUNNING]
        if running:
            with transaction(self.engine) as session:
                session.execute(
                    update(WorkUnit)
                    .where(WorkUnit.id == running[number % len(running)])
                    .values(started_at=long_ago())
                )

    @rule()
    def reconcile(self) -> None:
        reconcile(self.engine, self.celery, self.service)
        assert not [unit for unit in self.units() if unit.lease_until == long_ago()]

    @rule()
    def lose_all_messages(self) -> None:
        self.broker.flushall()
        with transaction(self.engine) as session:
            session.execute(
                update(WorkUnit).where(WorkUnit.sent_at.is_not(None)).values(sent_at=long_ago())
            )

    @rule()
    def work_in_peace(self) -> None:
        """Nothing goes wrong for a while: what can end, ends."""
        while ready := [unit.id for unit in self.units() if unit.state == UnitState.READY]:
            claim = work.claim(self.engine, ready[0], owner="calm", lease_seconds=3600)
            if claim is None:
                return
            with transaction(self.engine) as session:
                work.complete(session, claim, result={})
            self.completed.append(claim.unit_id)

    @precondition(lambda self: self.audit().state == AuditState.SUCCEEDED)
    @rule()
    def ask_for_a_ranking(self) -> None:
        if len(self.rankings()) < 3:
            make_ranking(self.engine, self.audit())

    @precondition(lambda self: self.rankings())
    @rule(number=pick)
    def delete_a_ranking(self, number: int) -> None:
        rankings = self.rankings()
        with transaction(self.engine) as session:
            session.delete(session.get_one(Ranking, rankings[number % len(rankings)].id))

    @precondition(lambda self: AuditState(self.audit().state).is_final)
    @rule()
    def delete_the_audit(self) -> None:
        """As the API does: not while a ranking of it runs. Another audit comes."""
        if all(RankingState(ranking.state).is_final for ranking in self.rankings()):
            with transaction(self.engine) as session:
                session.delete(session.get_one(Audit, self.audit_id))
            self.begin()

    @invariant()
    def the_promises_hold(self) -> None:
        audit, units = self.audit(), self.units()
        own = [unit for unit in units if unit.ranking_id is None]
        assert len(set(self.completed)) == len(self.completed)  # nothing is finished twice
        assert audit.version >= self.version
        assert audit.progress >= self.progress
        self.version, self.progress = audit.version, audit.progress
        assert self.final in {None, audit.state}  # an end is for ever
        is_open = any(unit.state in OPEN for unit in own)
        if AuditState(audit.state).is_final:
            self.final = audit.state
            assert audit.finished_at is not None
            assert audit.waiting is None
            assert not is_open
        else:
            # Somebody works on it, or somebody can: no audit waits for nothing.
            assert is_open or audit.cancel_requested_at is not None
        if audit.state == AuditState.SUCCEEDED:
            stages = [Stage.PREPARE, Stage.VALIDATION, *[Stage.GRADIENTS] * 2, Stage.AGGREGATE]
            assert sorted(unit.stage for unit in own) == sorted(stages)
            assert {unit.state for unit in own} == {UnitState.DONE}
        assert all(unit.attempts <= unit.epoch for unit in units)

    @invariant()
    def rankings_end_once(self) -> None:
        unit_of = {unit.ranking_id: unit for unit in self.units()}
        for ranking in self.rankings():
            is_final = RankingState(ranking.state).is_final
            assert is_final != (unit_of[ranking.id].state in OPEN)
            assert self.ended_rankings.get(ranking.id) in {None, ranking.state}
            if is_final:
                self.ended_rankings[ranking.id] = ranking.state

    def teardown(self) -> None:
        """Whatever went before, from here on everything comes to its end by messages alone."""
        rounds = 0
        while not self.is_over():
            rounds += 1
            assert rounds < 20
            self.lose_all_messages()
            with transaction(self.engine) as session:
                running = WorkUnit.state == UnitState.RUNNING
                session.execute(update(WorkUnit).where(running).values(lease_until=long_ago()))
            for unit_id in reconcile(self.engine, self.celery, self.service):
                claim = work.claim(self.engine, unit_id, owner="last", lease_seconds=3600)
                if claim is not None:
                    with transaction(self.engine) as session:
                        work.complete(session, claim, result={})

    def is_over(self) -> bool:
        states = [RankingState(ranking.state) for ranking in self.rankings()]
        return AuditState(self.audit().state).is_final and all(state.is_final for state in states)


@pytest.mark.timeout(300)
def test_any_order_of_events_keeps_the_promises(
    engine: Engine,
    celery: Celery,
    settings: Settings,
    broker: Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stragglers, "LEAST_SIBLINGS", 1)
    parts = {"engine": engine, "celery": celery, "service": settings, "broker": broker}
    run_state_machine_as_test(type("Machine", (Leases,), parts), settings=EXAMPLES)


EXAMPLES = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
