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
from sqlalchemy import Engine, select, text, update
from sqlalchemy.orm import Session

from app.audits.models import Audit, AuditState
from app.db import Base, transaction
from app.settings import Settings
from app.work import repository as work
from app.work.models import Stage, UnitState, WorkUnit
from app.work.reconciler import reconcile
from app.work.repository import Claim, Failure, LeaseLost
from tests.factories import long_ago, make_audit

pick = st.integers(0, 1000)


class Leases(RuleBasedStateMachine):
    """One audit of two shards, workers that come, stall, die and return, and a reconciler."""

    engine: Engine
    celery: Celery
    service: Settings

    def __init__(self) -> None:
        super().__init__()
        tables = ", ".join(table.name for table in Base.metadata.sorted_tables)
        with transaction(self.engine) as session:
            session.execute(text(f"TRUNCATE {tables} CASCADE"))
        self.audit_id = make_audit(self.engine, fine_tune=None).id
        with transaction(self.engine) as session:
            session.get_one(Audit, self.audit_id).provenance = {"num_shards": 2}
        self.claims: list[Claim] = []  # all that were ever given, dead ones too
        self.completed: list[tuple[str, int]] = []
        self.progress = 0.0
        self.version = 0
        self.final: str | None = None

    def units(self) -> list[WorkUnit]:
        with Session(self.engine) as session:
            return list(session.scalars(select(WorkUnit).order_by(WorkUnit.id)))

    def audit(self) -> Audit:
        with Session(self.engine) as session:
            return session.get_one(Audit, self.audit_id)

    def is_holder(self, claim: Claim) -> bool:
        """Tell from the row alone whether a claim still stands."""
        unit = next(unit for unit in self.units() if unit.id == claim.unit_id)
        return unit.state == UnitState.RUNNING and unit.epoch == claim.epoch

    @rule(number=pick)
    def claim(self, number: int) -> None:
        units = self.units()
        unit = units[number % len(units)]
        claim = work.claim(self.engine, unit.id, owner=str(number), lease_seconds=3600)
        if claim is not None:
            assert unit.state == UnitState.READY or unit.lease_until == long_ago()
            assert claim.epoch == unit.epoch + 1
            self.claims.append(claim)

    @precondition(lambda self: self.claims)
    @rule(number=pick, done=st.integers(0, 10))
    def renew(self, number: int, done: int) -> None:
        claim = self.claims[number % len(self.claims)]
        stands = self.is_holder(claim)
        try:
            work.renew(self.engine, claim, lease_seconds=3600, done=done, total=10)
        except LeaseLost:
            assert not stands
        else:
            assert stands

    @precondition(lambda self: self.claims)
    @rule(number=pick)
    def complete(self, number: int) -> None:
        claim = self.claims[number % len(self.claims)]
        may = self.is_holder(claim) and self.audit().cancel_requested_at is None
        try:
            with transaction(self.engine) as session:
                work.complete(session, claim, result={})
        except LeaseLost:
            assert not may
        else:
            assert may
            self.completed.append((claim.stage, claim.position))

    @precondition(lambda self: self.claims)
    @rule(number=pick, count_attempt=st.booleans())
    def release(self, number: int, *, count_attempt: bool) -> None:
        claim = self.claims[number % len(self.claims)]
        work.release(self.engine, claim, reason="", count_attempt=count_attempt)
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
        if self.audit().cancel_requested_at is not None:
            work.stop_for_cancel(self.engine, self.claims[number % len(self.claims)])

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

    @rule()
    def reconcile(self) -> None:
        reconcile(self.engine, self.celery, self.service)
        assert not [unit for unit in self.units() if unit.lease_until == long_ago()]

    @invariant()
    def the_promises_hold(self) -> None:
        audit, units = self.audit(), self.units()
        assert len(set(self.completed)) == len(self.completed)  # nothing is finished twice
        assert audit.version >= self.version
        assert audit.progress >= self.progress
        self.version, self.progress = audit.version, audit.progress
        assert self.final in {None, audit.state}  # an end is for ever
        is_open = any(unit.state in {UnitState.READY, UnitState.RUNNING} for unit in units)
        if AuditState(audit.state).is_final:
            self.final = audit.state
            assert audit.finished_at is not None
            assert not is_open
        else:
            # Somebody works on it, or somebody can: no audit waits for nothing.
            assert is_open or audit.cancel_requested_at is not None
        if audit.state == AuditState.SUCCEEDED:
            stages = [Stage.PREPARE, Stage.VALIDATION, *[Stage.GRADIENTS] * 2, Stage.AGGREGATE]
            assert sorted(unit.stage for unit in units) == sorted(stages)
            assert {unit.state for unit in units} == {UnitState.DONE}


@pytest.mark.timeout(300)
def test_any_order_of_events_keeps_the_promises(
    engine: Engine, celery: Celery, settings: Settings
) -> None:
    machine = type("Machine", (Leases,), {"engine": engine, "celery": celery, "service": settings})
    run_state_machine_as_test(machine, settings=EXAMPLES)


EXAMPLES = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
