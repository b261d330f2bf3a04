"""Progress is true to the work: it never goes back, and speed and time left are of the work."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from app.audits.models import Audit
from app.db import transaction
from app.work import repository as work
from app.work.claims import Claim, Failure
from app.work.models import Stage, WorkUnit
from app.work.stages import busy_seconds, overall_progress, seconds_left, stages_of
from tests.factories import long_ago, make_audit, stored_request
from tests.work.test_leases import complete, now, take, take_first, units_of

FIXED = {"estimator": "ekfac", "layers": "all", "aggregation": "rank"}
TEST = {"reference": "hf://datasets/org/texts@main?split=test"}
REQUESTS: list[dict[str, Any]] = [
    stored_request(fine_tune=None),
    stored_request(fine_tune={"epochs": 1}),
    stored_request(fine_tune={"epochs": 7}, ranking=FIXED),
    stored_request(fine_tune={"epochs": 2}, estimators=["tracin", "grad_dot"]),
    stored_request(ranking=dict.fromkeys(FIXED, "auto"), flag="auto"),
    stored_request(test=TEST, verify={"fraction": 0.2, "seeds": [0, 1]}, ranking=FIXED),
]
share = st.floats(0, 1)


@given(st.sampled_from(REQUESTS), share, share, st.data())
def test_more_work_is_more_progress(
    request: dict[str, Any], one: float, other: float, data: st.DataObject
) -> None:
    """Within a stage and from each stage to every later one, from 0 to 1."""
    stages = stages_of(request)
    places = st.integers(0, len(stages) - 1)
    earlier, later = sorted([(data.draw(places), one), (data.draw(places), other)])
    values = [overall_progress(request, stages[place], part) for place, part in (earlier, later)]
    assert 0 <= values[0] <= values[1] <= 1
    assert overall_progress(request, stages[0], 0.0) == 0
    assert overall_progress(request, stages[-1], 1.0) == pytest.approx(1)


@given(st.lists(st.floats(0, 100_000), min_size=1))
def test_time_left_is_reckoned_from_work_and_not_from_nights(pauses: list[float]) -> None:
    busy, since = 0.0, datetime(2026, 1, 1, tzinfo=UTC)
    for pause in pauses:
        before, then = busy, since + timedelta(seconds=pause)
        busy = busy_seconds(busy, since=since, now=then)
        assert before <= busy <= before + min(pause, 30) + 1e-6
        since = then
    assert busy_seconds(busy, since=None, now=since) == busy
    assert busy_seconds(busy, since=since, now=since - timedelta(seconds=5)) == busy


@given(st.floats(0, 1e6), share)
def test_the_time_left_falls_as_progress_grows(busy: float, progress: float) -> None:
    left = seconds_left(busy, progress)
    if progress < 0.05:
        assert left is None
    else:
        assert left is not None
        assert 0 <= left <= 20 * busy
        assert seconds_left(busy, 1.0) == 0


def shards_of(engine: Engine, count: int) -> tuple[Audit, list[Claim]]:
    """Return an audit whose gradients are taken by so many workers at once."""
    audit = make_audit(engine, fine_tune=None)
    complete(engine, take_first(engine, audit))
    with transaction(engine) as session:
        session.get_one(Audit, audit.id).provenance = {"num_shards": count}
    validation = take(engine, units_of(engine, audit)[1].id)
    assert validation
    claims = [take(engine, unit_id) for unit_id in complete(engine, validation)]
    return audit, [claim for claim in claims if claim]


def tell(engine: Engine, claim: Claim, done: int, speed: float | None = None) -> None:
    work.renew(engine, claim, lease_seconds=60, done=done, total=100, samples_per_second=speed)


def test_the_speed_is_that_of_all_workers_together(engine: Engine) -> None:
    audit, (one, other, third) = shards_of(engine, 3)
    assert now(engine, audit).samples_per_second is None
    tell(engine, one, 10, 5.0)
    tell(engine, other, 10, 7.0)
    assert now(engine, audit).samples_per_second == 12.0
    complete(engine, one)
    assert now(engine, audit).samples_per_second == 7.0
    work.release(engine, other, reason="stopped")
    tell(engine, third, 10, 3.0)
    assert now(engine, audit).samples_per_second == 3.0


def test_between_shards_the_last_speed_stands_and_a_new_stage_begins_without(
    engine: Engine,
) -> None:
    audit, (one, other) = shards_of(engine, 2)
    tell(engine, one, 10, 5.0)
    complete(engine, one)
    assert now(engine, audit).samples_per_second == 5.0
    (aggregate,) = complete(engine, other)
    assert take(engine, aggregate)
    assert now(engine, audit).samples_per_second is None


def test_progress_follows_the_shards_and_no_lost_worker_takes_it_back(engine: Engine) -> None:
    audit, claims = shards_of(engine, 2)
    seen = [now(engine, audit).progress]
    for claim, done in ((claims[0], 50), (claims[1], 50), (claims[0], 90)):
        tell(engine, claim, done)
        seen.append(now(engine, audit).progress)
    assert seen == sorted(set(seen))
    with transaction(engine) as session:
        lost = update(WorkUnit).where(WorkUnit.id == claims[0].unit_id)
        session.execute(lost.values(lease_until=long_ago()))
    again = take(engine, claims[0].unit_id)
    assert again
    tell(engine, again, 0)
    assert now(engine, audit).progress == seen[-1]
    tell(engine, again, 1000)  # more than there is
    complete(engine, claims[1])
    work.fail(engine, again, Failure("broken", "It broke."))
    ended = now(engine, audit)
    assert seen[-1] < ended.progress < 1
    assert (ended.eta_seconds, ended.samples_per_second) == (None, None)


def test_a_night_without_service_is_not_in_the_time_left(engine: Engine) -> None:
    audit, (claim,) = shards_of(engine, 1)
    with transaction(engine) as session:
        row = session.get_one(Audit, audit.id)
        row.busy_seconds, row.busy_until = 60.0, datetime.now(UTC) - timedelta(hours=9)
        row.state_times = {**row.state_times, "preparing": long_ago().isoformat()}
    tell(engine, claim, 50)
    row = now(engine, audit)
    assert row.eta_seconds == pytest.approx(90 * (1 - row.progress) / row.progress, rel=0.05)


def test_a_unit_of_another_stage_counts_for_nothing(engine: Engine) -> None:
    audit, (claim,) = shards_of(engine, 1)
    tell(engine, claim, 0)
    assert units_of(engine, audit)[0].stage == Stage.PREPARE
    with Session(engine) as session:
        row = session.get_one(Audit, audit.id)
    expected = overall_progress(row.request, Stage.GRADIENTS, 0.0)
    assert row.progress == pytest.approx(expected, rel=1e-5)
