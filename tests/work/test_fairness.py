"""Whose turn it is: a tenant's thousand audits do not stand before another's one."""

from collections import Counter
from collections.abc import Sequence

import pytest
from celery import Celery
from redis import Redis
from sqlalchemy import Engine, func, insert, select, update
from sqlalchemy.orm import Session

from app.audits.models import Audit
from app.db import transaction
from app.jobs import CPU_QUEUE_NAME, FETCH_QUEUE_NAME, QUEUE_NAME, send_units
from app.settings import Settings
from app.work import repository as work
from app.work.claims import Claim
from app.work.fairness import claim_in_turn
from app.work.models import Stage, UnitState, WorkUnit
from tests.factories import (
    long_ago,
    make_audit,
    make_finished_audit,
    make_ranking,
    stored_request,
)


def queue_audits(engine: Engine, tenant: str, count: int) -> list[str]:
    """Insert queued audits, all at once, and return their units."""
    ids = [f"{tenant}_{number:05}" for number in range(count)]
    audit = {"tenant": tenant, "request": stored_request(), "metadata_": {}, "state_times": {}}
    unit = {"stage": Stage.PREPARE, "position": 0, "result": {}}
    with transaction(engine) as session:
        session.execute(insert(Audit), [{"id": f"aud_{id_}", **audit} for id_ in ids])
        units = [{"id": f"wrk_{id_}", "audit_id": f"aud_{id_}", **unit} for id_ in ids]
        session.execute(insert(WorkUnit), units)
    return [f"wrk_{id_}" for id_ in ids]


def sent(engine: Engine) -> None:
    with transaction(engine) as session:
        session.execute(update(WorkUnit).values(sent_at=func.now()))


def take(engine: Engine, unit_id: str, worker: str = "w") -> Claim | None:
    return claim_in_turn(engine, unit_id, owner=worker, lease_seconds=60)


def tenants(engine: Engine, claims: Sequence[Claim]) -> list[str]:
    with Session(engine) as session:
        return [session.get_one(Audit, claim.audit_id).tenant for claim in claims]


@pytest.fixture
def waiting(engine: Engine) -> tuple[list[str], str]:
    """A thousand units of one tenant, sent first, and one of another behind them."""
    many = queue_audits(engine, "a", 1000)
    (one,) = queue_audits(engine, "b", 1)
    sent(engine)
    return many, one


def test_one_audit_behind_a_thousand_is_begun_among_the_first(
    engine: Engine, waiting: tuple[list[str], str]
) -> None:
    """One worker, which finishes each unit before it looks at the next message."""
    messages, one = waiting
    claims = []
    for message in messages[:4]:
        held = take(engine, message)
        assert held is not None
        claims.append(held)
        work.release(engine, held, reason="done for this test")
    assert "b" in tenants(engine, claims)[:2]
    assert one in {held.unit_id for held in claims[:2]}


def test_many_workers_at_once_are_shared_out_evenly(
    engine: Engine, waiting: tuple[list[str], str]
) -> None:
    messages, _ = waiting
    more = queue_audits(engine, "c", 50)
    sent(engine)
    claims = [take(engine, message, f"w{place}") for place, message in enumerate(messages[:9])]
    held = [claim for claim in claims if claim is not None]
    assert Counter(tenants(engine, held)) == {"a": 4, "b": 1, "c": 4}
    assert len(more) == 50


def test_who_waits_alone_gets_all_workers(engine: Engine) -> None:
    messages = queue_audits(engine, "a", 5)
    sent(engine)
    assert all(take(engine, message) for message in messages)
    assert take(engine, messages[0]) is None


def test_an_audit_that_was_begun_is_ended_before_the_next_begins(engine: Engine) -> None:
    first, second = (make_audit(engine) for _ in range(2))
    with transaction(engine) as session:
        work.add_units(session, first.id, Stage.GRADIENTS, count=2)
        (message,) = work.add_units(session, second.id, Stage.VALIDATION)
    sent(engine)
    held = [take(engine, message) for _ in range(3)]
    assert [claim and claim.audit_id for claim in held] == [first.id, first.id, second.id]


def test_every_message_finds_a_unit_and_every_unit_a_message(
    engine: Engine, celery: Celery, broker: Redis
) -> None:
    """Messages are taken in their order, units by turns, and nothing is left of either."""
    units = queue_audits(engine, "a", 7) + queue_audits(engine, "b", 3)
    send_units(engine, celery, units)
    assert broker.llen(FETCH_QUEUE_NAME) == len(units)
    taken = [take(engine, unit) for unit in units]
    assert {claim.unit_id for claim in taken if claim} == set(units)


def test_a_ranking_waits_in_a_queue_of_its_own(
    engine: Engine, settings: Settings, celery: Celery
) -> None:
    ranking = make_ranking(engine, make_finished_audit(engine, settings))
    audit = make_audit(engine)
    sent(engine)
    with Session(engine) as session:
        ready = session.scalars(select(WorkUnit).where(WorkUnit.state == UnitState.READY))
        unit_of = {unit.audit_id: unit.id for unit in ready}
    assert CPU_QUEUE_NAME != QUEUE_NAME
    held = take(engine, unit_of[audit.id])
    assert held is not None
    assert held.audit_id == audit.id
    held = take(engine, unit_of[ranking.audit_id])
    assert held is not None
    assert held.ranking_id == ranking.id


class TestWhatIsNotOffered:
    def test_what_failed_waits_for_the_reconciler(self, engine: Engine) -> None:
        """Else its tries would be over at once, before what stood in its way has passed."""
        failing, other = (make_audit(engine) for _ in range(2))
        sent(engine)
        with Session(engine) as session:
            unit_of = {unit.audit_id: unit.id for unit in session.scalars(select(WorkUnit))}
        held = take(engine, unit_of[failing.id])
        assert held is not None
        work.release(engine, held, reason="no room on the disk")
        following = take(engine, unit_of[other.id])
        assert following is not None
        assert following.audit_id == other.id

    def test_what_is_being_cancelled(self, engine: Engine) -> None:
        audit = make_audit(engine)
        sent(engine)
        with transaction(engine) as session:
            session.execute(update(Audit).values(cancel_requested_at=func.now()))
            (unit_id,) = session.scalars(select(WorkUnit.id))
        assert take(engine, unit_id) is None
        assert audit.id

    def test_a_message_of_a_deleted_audit(self, engine: Engine) -> None:
        make_audit(engine)
        sent(engine)
        assert take(engine, "wrk_none") is None

    def test_a_lost_unit_is_taken_by_its_own_message(self, engine: Engine) -> None:
        make_audit(engine)
        with Session(engine) as session:
            (unit_id,) = session.scalars(select(WorkUnit.id))
        assert take(engine, unit_id) is not None
        assert take(engine, unit_id) is None
        with transaction(engine) as session:
            session.execute(update(WorkUnit).values(lease_until=long_ago()))
        held = take(engine, unit_id)
        assert held is not None
        assert (held.epoch, held.attempts) == (2, 2)
