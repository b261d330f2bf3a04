"""The hold on a unit: renewed while the work ticks, and only then."""

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from sqlalchemy.exc import OperationalError

from app.audits.models import Audit
from app.db import transaction
from app.work import repository as work
from app.work.claims import Claim
from tests.factories import make_audit
from tests.pipeline.workplace import Workplace
from workers.lease import (
    HUNG_EXIT_CODE,
    CancelRequested,
    Draining,
    Hold,
    HoldLost,
    Stopped,
)

QUICK = {"heartbeat_seconds": 0.01, "lease_seconds": 30.0, "stall_seconds": 30.0}


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    return workplace.with_settings(**QUICK)


@pytest.fixture
def claim(place: Workplace) -> Claim:
    claim = place.claim(make_audit(place.engine).id)
    assert claim is not None
    return claim


def hold_of(place: Workplace, claim: Claim) -> Hold:
    return Hold(place.engine, place.settings, claim)


def tick_until_stopped(hold: Hold, *, seconds: float = 10) -> type[Stopped]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            hold.tick(1, 2)
        except Stopped as stopped:
            return type(stopped)
        time.sleep(0.002)
    raise AssertionError("nothing stopped the work")


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)


def lease_of(place: Workplace, claim: Claim) -> datetime:
    until = place.unit(claim).lease_until
    assert until is not None
    return until


def test_ticks_bring_progress_and_a_longer_lease(place: Workplace, claim: Claim) -> None:
    before = lease_of(place, claim)
    with hold_of(place, claim) as hold:
        hold.tick(30, 100)
        wait_until(lambda: lease_of(place, claim) > before)
        hold.tick(60, 100)
        wait_until(lambda: place.unit(claim).done == 60)
    assert place.unit(claim).total == 100
    assert 0 < place.audit(claim.audit_id).progress < 1
    assert (place.audit(claim.audit_id).samples_per_second or 0) > 0


def test_a_lost_lease_stops_the_work_at_its_next_tick(place: Workplace, claim: Claim) -> None:
    with hold_of(place, claim) as hold:
        place.expire(claim)
        assert tick_until_stopped(hold) is HoldLost


def test_a_cancelled_audit_stops_the_work(place: Workplace, claim: Claim) -> None:
    with hold_of(place, claim) as hold:
        with transaction(place.engine) as session:
            work.request_cancel(session, session.get_one(Audit, claim.audit_id))
        assert tick_until_stopped(hold) is CancelRequested


def test_draining_stops_the_work_even_where_it_only_keeps_alive(
    place: Workplace, claim: Claim
) -> None:
    with hold_of(place, claim) as hold:
        hold.drain()
        with pytest.raises(Draining):
            hold.keep_alive()


def test_work_that_stalls_is_not_renewed(place: Workplace, claim: Claim) -> None:
    """Whoever hangs loses the unit, though the thread that renews is alive."""
    stalling = place.with_settings(stall_seconds=0.05)
    with hold_of(stalling, claim) as hold:
        hold.tick(1, 2)
        time.sleep(0.15)
        stalled_at = lease_of(place, claim)
        time.sleep(0.1)
        assert lease_of(place, claim) == stalled_at
        hold.tick(2, 2)  # it was only slow
        wait_until(lambda: lease_of(place, claim) > stalled_at)


def test_a_step_that_cannot_tick_may_be_silent(place: Workplace, claim: Claim) -> None:
    stalling = place.with_settings(stall_seconds=0.02)
    with hold_of(stalling, claim) as hold, hold.silence():
        time.sleep(0.1)
        before = lease_of(place, claim)
        wait_until(lambda: lease_of(place, claim) > before)


def test_a_worker_that_hangs_past_its_lease_ends_its_process(
    place: Workplace, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hung call cannot be interrupted from within; the parent starts a new child."""
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    hanging = place.with_settings(stall_seconds=0.02, lease_seconds=0.05)
    with hold_of(hanging, claim):
        wait_until(lambda: bool(exits))
    assert exits[0] == HUNG_EXIT_CODE


def test_a_database_that_is_away_longer_than_the_lease_stops_the_work(
    place: Workplace, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short absence is borne; after the lease another worker may have the unit."""
    renew, away_until = work.renew, time.monotonic() + 0.1

    def away(*arguments: object, **options: object) -> bool:
        if time.monotonic() < away_until:
            raise OperationalError("SELECT 1", {}, Exception("connection refused"))
        return renew(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(work, "renew", away)
    with hold_of(place, claim) as hold:
        while time.monotonic() < away_until + 0.05:
            hold.tick(1, 2)
            time.sleep(0.005)
    assert place.unit(claim).done == 1

    away_until = time.monotonic() + 60
    brief = place.with_settings(lease_seconds=0.1)
    with hold_of(brief, claim) as hold:
        assert tick_until_stopped(hold) is HoldLost


def test_leaving_the_hold_ends_its_thread(place: Workplace, claim: Claim) -> None:
    with hold_of(place, claim) as hold:
        assert hold._thread.is_alive()
    assert not hold._thread.is_alive()
    assert lease_of(place, claim) > datetime.now(UTC)


def test_a_pass_that_begins_anew_tells_its_own_speed(place: Workplace, claim: Claim) -> None:
    """Never a negative one, and none where no samples are counted."""
    with hold_of(place, claim) as hold:
        hold.tick(0, 100)
        time.sleep(0.01)
        hold.tick(90, 100)
        assert (hold._samples_per_second() or 0) > 0
        hold.tick(0, 50)
        assert hold._samples_per_second() is None
        time.sleep(0.01)
        hold.tick(10, 50)
        assert (hold._samples_per_second() or 0) > 0
        hold.step(1, 2)
        assert hold._samples_per_second() is None
