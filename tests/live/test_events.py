"""Server-sent events: every change once, to the end, whoever listens and however many."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import fastapi.routing
import httpx2
import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from app.audits.models import Audit, AuditState
from app.db import transaction
from app.live.watcher import Watcher
from app.settings import Settings
from app.work import repository as work
from app.work.claims import Claim, Failure
from app.work.models import WorkUnit
from tests.factories import (
    experiment_body,
    finish_experiment,
    make_audit,
    make_ended_audit,
    make_finished_audit,
    make_ranking,
)
from tests.live.conftest import NewClient
from tests.live.sse import Event, read_events


def claim_of(engine: Engine, audit: Audit) -> Claim:
    with Session(engine) as session:
        unit_id = session.scalars(select(WorkUnit.id).where(WorkUnit.audit_id == audit.id)).one()
    claim = work.claim(engine, unit_id, owner="test", lease_seconds=60)
    assert claim is not None
    return claim


def renew(engine: Engine, claim: Claim, done: int) -> None:
    work.renew(engine, claim, lease_seconds=60, done=done, total=100, samples_per_second=5.0)


def cancel(engine: Engine, audit: Audit) -> None:
    with transaction(engine) as session:
        work.request_cancel(session, work.locked_audit(session, audit.id))


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def listening(
    client: httpx2.Client, path: str, last_event_id: str | None = None
) -> Iterator[Iterator[Event]]:
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    with client.stream("GET", f"{path}/events", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield read_events(response.iter_lines())


def path_of(audit: Audit) -> str:
    return f"/v1/audits/{audit.id}"


def test_a_listener_hears_of_every_step_and_of_the_end(
    client: httpx2.Client, engine: Engine, watcher: Watcher
) -> None:
    audit = make_audit(engine)
    with listening(client, path_of(audit)) as events:
        first = next(events)
        assert (first.name, first.data["state"], first.data["progress"]) == (
            "progress",
            "queued",
            0,
        )
        claim = claim_of(engine, audit)
        started = next(events)
        assert (started.data["state"], started.data["stage"]) == ("preparing", "prepare")
        renew(engine, claim, 50)
        working = next(events)
        assert working.data["samples_per_second"] == 5.0
        assert 0 < working.data["progress"] < 1
        cancel(engine, audit)
        asked = next(events)
        assert (asked.name, asked.data["done"]) == ("progress", False)
        work.stop_for_cancel(engine, claim)
        (last,) = events
    assert (last.name, last.data["state"], last.data["done"]) == ("done", "cancelled", True)
    assert last.data["links"] == {"self": path_of(audit)}
    ids = [int(event.id) for event in (first, started, working, asked, last)]
    assert ids == sorted(set(ids))
    assert client.get(path_of(audit)).headers["etag"] == f'"{last.id}"'
    wait_until(lambda: watcher.num_watched == 0)


def test_who_comes_back_hears_nothing_twice(client: httpx2.Client, engine: Engine) -> None:
    audit = make_audit(engine)
    with listening(client, path_of(audit)) as events:
        first = next(events)
    claim = claim_of(engine, audit)
    with listening(client, path_of(audit), first.id) as events:
        second = next(events)
        assert int(second.id) > int(first.id)
    with listening(client, path_of(audit), second.id) as events:
        renew(engine, claim, 10)
        assert int(next(events).id) > int(second.id)


def test_after_the_end_there_is_one_event_and_then_nothing(
    client: httpx2.Client, engine: Engine, settings: Settings
) -> None:
    """204 tells a browser not to come back."""
    audit = make_finished_audit(engine, settings)
    with listening(client, path_of(audit)) as events:
        (done,) = events
    assert (done.name, done.data["progress"]) == ("done", 1.0)
    assert done.data["links"]["suspects"] == f"{path_of(audit)}/suspects"
    again = client.get(f"{path_of(audit)}/events", headers={"Last-Event-ID": done.id})
    assert (again.status_code, again.content) == (204, b"")
    with listening(client, path_of(audit), "not one of ours") as events:
        assert [event.name for event in events] == ["done"]


def test_rankings_and_experiments_are_followed_the_same_way(
    client: httpx2.Client, engine: Engine, settings: Settings
) -> None:
    finished = make_finished_audit(engine, settings)
    ranking = make_ranking(engine, finished)
    with listening(client, f"{path_of(finished)}/rankings/{ranking.id}") as events:
        assert next(events).data["state"] == "queued"
        with transaction(engine) as session:
            row = session.merge(ranking)
            work.fail_owner(session, row, Failure("broken", "It broke."))
        (last,) = events
        assert (last.name, last.data["state"]) == ("done", "failed")
    experiment_id = client.post("/v1/experiments", json=experiment_body()).json()["id"]
    with listening(client, f"/v1/experiments/{experiment_id}") as events:
        assert next(events).data["state"] == "running"
        finish_experiment(engine, experiment_id, [AuditState.SUCCEEDED, None])
        assert next(events).data["progress"] == 0.5
        finish_experiment(engine, experiment_id, [None, AuditState.FAILED])
        (last,) = events
    assert (last.data["state"], last.data["progress"]) == ("failed", 1.0)
    assert last.data["links"]["results"] == f"/v1/experiments/{experiment_id}/results"


def test_a_deleted_audit_ends_its_streams(client: httpx2.Client, engine: Engine) -> None:
    audit = make_audit(engine)
    with listening(client, path_of(audit)) as events:
        next(events)
        with transaction(engine) as session:
            session.delete(session.get_one(Audit, audit.id))
        assert list(events) == []
        assert client.get(f"{path_of(audit)}/events").status_code == 404


def test_a_hundred_listeners_take_neither_connections_nor_threads(
    client: httpx2.Client, engine: Engine, watcher: Watcher
) -> None:
    audit = make_audit(engine)
    claim = claim_of(engine, audit)
    heard = threading.Semaphore(0)

    def listen(_number: int) -> str:
        with listening(client, path_of(audit)) as events:
            next(events)
            heard.release()
            return [event.name for event in events][-1]

    with ThreadPoolExecutor(100) as pool:
        threads = threading.active_count()
        ends = [pool.submit(listen, number) for number in range(100)]
        for _ in range(100):
            assert heard.acquire(timeout=30)
        time.sleep(0.6)
        assert watcher.num_watched == 1
        statement = text(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND state <> 'idle' AND pid <> pg_backend_pid()"
        )
        with engine.connect() as connection:
            assert (connection.scalar(statement) or 0) <= 1
        # the pool of the server's threads is not larger for it, and answers others at once
        assert threading.active_count() - threads <= 100 + 45
        started = time.monotonic()
        assert client.get(path_of(audit)).status_code == 200
        assert time.monotonic() - started < 2
        work.fail(engine, claim, Failure("broken", "It broke."))
        assert {end.result(30) for end in ends} == {"done"}


def test_who_hangs_up_is_forgotten(client: httpx2.Client, engine: Engine, watcher: Watcher) -> None:
    audit = make_audit(engine)
    with listening(client, path_of(audit)) as events:
        next(events)
        assert watcher.num_watched == 1
    wait_until(lambda: watcher.num_watched == 0)


def test_silence_is_filled_with_comments(
    client: httpx2.Client, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastapi.routing, "_PING_INTERVAL", 0.05)
    audit = make_audit(engine)
    with client.stream("GET", f"{path_of(audit)}/events") as response:
        lines = response.iter_lines()
        assert any(line.startswith(":") for line in lines)


def test_a_stranger_hears_nothing(new_client: NewClient, engine: Engine) -> None:
    for audit in (make_audit(engine), make_ended_audit(engine, AuditState.FAILED)):
        answer = new_client("stranger").get(f"{path_of(audit)}/events")
        assert answer.status_code == 404
        waiting = new_client("stranger").get(path_of(audit), params={"wait": 60})
        assert waiting.status_code == 404


def test_a_database_that_is_away_for_a_while_ends_no_stream(
    client: httpx2.Client, engine: Engine
) -> None:
    audit = make_audit(engine)
    with listening(client, path_of(audit)) as events:
        next(events)
        with transaction(engine) as session:
            session.execute(text("ALTER TABLE audits RENAME TO away"))
        time.sleep(1.2)
        with transaction(engine) as session:
            session.execute(text("ALTER TABLE away RENAME TO audits"))
        claim_of(engine, audit)
        assert next(events).data["state"] == "preparing"


class TestLongPolling:
    def get(
        self, client: httpx2.Client, audit: Audit, wait: int, etag: str | None = None
    ) -> tuple[httpx2.Response, float]:
        headers = {} if etag is None else {"If-None-Match": etag}
        started = time.monotonic()
        response = client.get(path_of(audit), params={"wait": wait}, headers=headers)
        return response, time.monotonic() - started

    def later(self, act: Callable[[], object]) -> threading.Timer:
        timer = threading.Timer(1.0, act)
        timer.start()
        return timer

    def test_it_answers_when_something_changes(self, client: httpx2.Client, engine: Engine) -> None:
        audit = make_audit(engine)
        etag = client.get(path_of(audit)).headers["etag"]
        timer = self.later(lambda: claim_of(engine, audit))
        response, seconds = self.get(client, audit, 20, etag)
        assert (response.status_code, response.json()["state"]) == (200, "preparing")
        assert 0.9 < seconds < 10
        timer.join()
        response, seconds = self.get(client, audit, 20, etag)
        assert seconds < 5  # what the caller has is old

    def test_without_an_etag_it_answers_at_the_next_change(
        self, client: httpx2.Client, engine: Engine
    ) -> None:
        audit = make_audit(engine)
        timer = self.later(lambda: claim_of(engine, audit))
        response, seconds = self.get(client, audit, 20)
        assert response.json()["state"] == "preparing"
        assert seconds > 0.9
        timer.join()

    def test_after_the_time_it_answers_what_is(self, client: httpx2.Client, engine: Engine) -> None:
        audit = make_audit(engine)
        response, seconds = self.get(client, audit, 1)
        assert (response.status_code, response.json()["state"]) == (200, "queued")
        assert 1 <= seconds < 5
        response, seconds = self.get(client, audit, 1, response.headers["etag"])
        assert (response.status_code, response.content) == (304, b"")
        assert seconds >= 1

    def test_what_has_ended_is_answered_at_once(
        self, client: httpx2.Client, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings)
        ranking_path = f"{path_of(audit)}/rankings/{audit.summary['ranking_id']}"
        experiment = client.post("/v1/experiments", json=experiment_body()).json()["id"]
        finish_experiment(engine, experiment, [AuditState.FAILED] * 2)
        started = time.monotonic()
        for path in (path_of(audit), ranking_path, f"/v1/experiments/{experiment}"):
            assert client.get(path, params={"wait": 60}).json()["done"], path
        assert time.monotonic() - started < 10

    @pytest.mark.parametrize("wait", ["0", "61", "soon"])
    def test_other_times_are_refused_by_name(
        self, client: httpx2.Client, engine: Engine, wait: str
    ) -> None:
        response = client.get(path_of(make_audit(engine)), params={"wait": wait})
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == "query.wait"


def test_closing_lets_every_listener_go_at_once(
    client: httpx2.Client, engine: Engine, watcher: Watcher
) -> None:
    audit = make_audit(engine)
    with ThreadPoolExecutor(2) as pool, listening(client, path_of(audit)) as events:
        next(events)
        waiting = pool.submit(client.get, path_of(audit), params={"wait": 60})
        time.sleep(0.5)
        started = time.monotonic()
        watcher.close()
        assert list(events) == []
        assert waiting.result().status_code == 200
        assert time.monotonic() - started < 2
