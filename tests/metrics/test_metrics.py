"""What /metrics tells of the service, whom it tells, and that it answers in trouble."""

import re
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from redis import Redis
from sqlalchemy import Engine, null, update

from app.audits.models import Audit, AuditState
from app.db import make_engine, transaction
from app.jobs import FETCH_QUEUE_NAME, QUEUE_NAME, make_celery, send_units
from app.main import create_app
from app.settings import Settings
from app.webhooks.models import DeliveryState, Webhook, WebhookDelivery
from app.work import repository as work
from app.work.models import Stage, UnitState, WorkerHeartbeat, WorkUnit
from tests.factories import make_audit, make_ended_audit, make_finished_audit

Samples = dict[tuple[str, tuple[str, ...]], float]
Read = Callable[..., Samples]


def parsed(text: str) -> Samples:
    """Return every sample by its name and its labels' values, in the order of their names."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def client_of(
    settings: Settings, engine: Engine, celery: Celery, *, host: str = "127.0.0.1"
) -> TestClient:
    return TestClient(
        create_app(settings, engine, celery),
        client=(host, 50000),
        raise_server_exceptions=False,
    )


@pytest.fixture
def read(settings: Settings, engine: Engine, celery: Celery) -> Read:
    """Reads the metrics as a new API process tells them."""

    def get() -> Samples:
        answer = client_of(settings, engine, celery).get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain")
        return parsed(answer.text)

    return get


def the_unit(engine: Engine, audit: Audit) -> WorkUnit:
    with transaction(engine) as session:
        return session.query(WorkUnit).filter_by(audit_id=audit.id).one()


def test_a_quiet_service_says_so(read: Read) -> None:
    """Series exist before anything happens, so that an alert on them is never without data."""
    samples = read()
    assert samples["winnow_database_up", ()] == 1
    assert samples["winnow_broker_up", ()] == 1
    assert samples["winnow_units", ("gradients", "running")] == 0
    assert samples["winnow_oldest_waiting_unit_seconds", (QUEUE_NAME,)] == 0
    assert samples["winnow_workers", (QUEUE_NAME,)] == 0
    assert samples["winnow_data_free_bytes", ()] > 0
    assert samples["process_resident_memory_bytes", ()] > 0


def test_work_that_waits_and_work_that_is_held(
    read: Read, engine: Engine, celery: Celery, broker: Redis
) -> None:
    waiting, held, lost = (make_audit(engine) for _ in range(3))
    send_units(engine, celery, [the_unit(engine, waiting).id])
    claim = work.claim(engine, the_unit(engine, held).id, owner="w", lease_seconds=60)
    assert claim is not None
    work.renew(engine, claim, lease_seconds=60, done=1, total=2, samples_per_second=12.5)
    assert work.claim(engine, the_unit(engine, lost).id, owner="w", lease_seconds=0.01)
    with transaction(engine) as session:
        hour_ago = datetime.now(UTC) - timedelta(hours=1)
        session.execute(
            update(WorkUnit).where(WorkUnit.audit_id == waiting.id).values(created_at=hour_ago)
        )
    time.sleep(0.05)
    samples = read()
    assert samples["winnow_units", ("prepare", "ready")] == 1
    assert samples["winnow_units", ("prepare", "running")] == 2
    assert samples["winnow_leases", ("held",)] == 1
    assert samples["winnow_leases", ("expired",)] == 1
    assert samples["winnow_queue_messages", (FETCH_QUEUE_NAME,)] == 1
    assert samples["winnow_oldest_waiting_unit_seconds", (FETCH_QUEUE_NAME,)] >= 3600
    assert samples["winnow_oldest_waiting_unit_seconds", (QUEUE_NAME,)] == 0
    assert samples["winnow_samples_per_second", ("prepare",)] == 12.5
    assert samples["winnow_audits", ("queued",)] == 1
    assert samples["winnow_audits", ("preparing",)] == 2


def test_how_long_stages_took(read: Read, engine: Engine) -> None:
    """Over the last hour; what ended before is history, and Prometheus has that."""
    now = datetime.now(UTC)
    for seconds, ended in ((1, now), (2, now), (30, now), (500, now - timedelta(hours=2))):
        audit = make_audit(engine)
        with transaction(engine) as session:
            times = {"started_at": ended - timedelta(seconds=seconds), "finished_at": ended}
            session.execute(
                update(WorkUnit)
                .where(WorkUnit.audit_id == audit.id)
                .values(state=UnitState.DONE, stage=Stage.GRADIENTS, **times)
            )
    samples = read()
    assert samples["winnow_units_finished_last_hour", ("gradients",)] == 3
    assert samples["winnow_unit_seconds", ("0.5", "gradients")] == pytest.approx(2)
    assert samples["winnow_unit_seconds", ("1", "gradients")] == pytest.approx(30)


def test_failures_by_their_code(read: Read, engine: Engine) -> None:
    old, _ = (make_ended_audit(engine, AuditState.FAILED) for _ in range(2))
    with transaction(engine) as session:
        yesterday = datetime.now(UTC) - timedelta(days=1)
        session.execute(update(Audit).where(Audit.id == old.id).values(finished_at=yesterday))
    samples = read()
    assert samples["winnow_failures", ("unsupported_model", "audit")] == 2
    assert samples["winnow_failures_last_hour", ("unsupported_model", "audit")] == 1


def test_webhooks_that_are_owed_and_given_up(read: Read, engine: Engine) -> None:
    with transaction(engine) as session:
        webhook = Webhook(id="whk_1", tenant="t", url="https://x.example", events=[], secret="s")
        session.add(webhook)
        session.flush()
        owed = {"webhook_id": webhook.id, "type": "audit.failed", "payload": {}}
        session.add(WebhookDelivery(id="whd_1", **owed))
        over = {"state": DeliveryState.FAILED, "next_attempt_at": null()}
        session.add(WebhookDelivery(id="whd_2", finished_at=datetime.now(UTC), **owed | over))
    samples = read()
    assert samples["winnow_webhooks_owed", ()] == 1
    assert samples["winnow_webhooks_failed_last_hour", ()] == 1


def test_workers_and_their_gpus(read: Read, engine: Engine) -> None:
    """A worker that was silent for a minute counts no more; one without a GPU has no memory."""
    row: dict[str, Any] = {"device": "auto", "engine_version": "1"}
    gpu = {"gpu_memory_used": 2**30, "gpu_memory_total": 80 * 2**30}
    with transaction(engine) as session:
        long_ago = datetime.now(UTC) - timedelta(hours=1)
        rows: list[dict[str, Any]] = [
            {"name": "g", **gpu},
            {"name": "c"},
            {"name": "gone", "seen_at": long_ago, **gpu},
        ]
        for changes in rows:
            session.add(WorkerHeartbeat(queues=[QUEUE_NAME], **row | changes))
    samples = read()
    assert samples["winnow_workers", (QUEUE_NAME,)] == 2
    told = {name: value for name, value in samples.items() if "gpu_memory" in name[0]}
    assert told == {
        ("winnow_gpu_memory_used_bytes", ("g",)): 2**30,
        ("winnow_gpu_memory_total_bytes", ("g",)): 80 * 2**30,
    }


def test_requests_by_template_and_never_by_id(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    """What callers make up becomes no series of its own."""
    audit = make_finished_audit(engine, settings)
    for path in (audit.id, "aud_none", "../../made/up", "../../static/nothing.css"):
        client.get(f"/v1/audits/{path}")
    client.request("BREW", "/v1/audits")
    other = {"authorization": "Bearer wrong"}
    client.get("/v1/audits", headers=other)
    registry = client.app.state.metrics.registry  # type: ignore[attr-defined]
    counted = {
        tuple(sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "winnow_http_request_seconds_count"
    }
    assert counted == {
        ("/v1/audits/{audit_id}", "GET", "200"): 1,
        ("/v1/audits/{audit_id}", "GET", "404"): 1,
        ("none", "GET", "404"): 1,
        ("/static", "GET", "404"): 1,
        ("/v1/audits", "other", "405"): 1,
        ("/v1/audits", "GET", "401"): 1,
    }


def test_nothing_of_a_tenant_is_told(settings: Settings, engine: Engine, celery: Celery) -> None:
    make_finished_audit(engine, settings, tenant="acme")
    text = client_of(settings, engine, celery).get("/metrics").text
    assert not re.search(r"acme|aud_|rnk_|sample \d", text)


class TestAccess:
    """Who is told."""

    def test_without_a_token_only_its_own_machine(
        self, settings: Settings, engine: Engine, celery: Celery
    ) -> None:
        """A proxy on the machine is none of it: whom it serves is somewhere else."""
        near = client_of(settings, engine, celery)
        assert near.get("/metrics").status_code == 200
        proxied = near.get("/metrics", headers={"X-Forwarded-For": "127.0.0.1"})
        far = client_of(settings, engine, celery, host="10.0.0.5").get("/metrics")
        empty = settings.model_copy(update={"metrics_token": SecretStr("")})
        unset = client_of(empty, engine, celery, host="10.0.0.5").get("/metrics")
        for answer in (proxied, far, unset):
            assert answer.status_code == 403
            assert "WINNOW_METRICS_TOKEN" in answer.json()["detail"]

    def test_with_a_token_whoever_has_it(
        self, settings: Settings, engine: Engine, celery: Celery
    ) -> None:
        changes = {"metrics_token": SecretStr("scrape-me")}
        guarded = settings.model_copy(update=changes)
        client = client_of(guarded, engine, celery, host="10.0.0.5")
        sent = {"Authorization": "Bearer scrape-me"}
        assert client.get("/metrics", headers=sent).status_code == 200
        for wrong in (b"Bearer scrape", "Bearer ü".encode(), b""):
            answer = client.get("/metrics", headers={b"Authorization": wrong})
            assert answer.status_code == 401
        assert "scrape-me" not in repr(guarded)


class TestInTrouble:
    """It answers soon, says what is down, and goes on telling the rest."""

    @pytest.fixture
    def frozen(self, tmp_path: Path) -> Iterator[Path]:
        """A socket that takes calls and never answers."""
        address = tmp_path / ".s.PGSQL.5432"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(address))
            listening.listen()
            yield address

    def test_a_database_that_is_down_or_frozen(
        self, settings: Settings, celery: Celery, frozen: Path
    ) -> None:
        for where in ("127.0.0.1:1/x", f"/x?host={frozen.parent}"):
            engine = make_engine(f"postgresql+psycopg://nobody@{where}")
            started = time.perf_counter()
            answer = client_of(settings, engine, celery).get("/metrics")
            assert time.perf_counter() - started < 6
            samples = parsed(answer.text)
            assert samples["winnow_database_up", ()] == 0
            assert samples["winnow_broker_up", ()] == 1
            assert not any(name == "winnow_units" for name, _ in samples)

    def test_a_broker_that_is_down_or_frozen(
        self, settings: Settings, engine: Engine, frozen: Path, tmp_path: Path
    ) -> None:
        for address in (frozen, tmp_path / "nobody"):
            url = SecretStr(f"redis+socket://{address}")
            celery = make_celery(settings.model_copy(update={"broker_url": url}))
            started = time.perf_counter()
            samples = parsed(client_of(settings, engine, celery).get("/metrics").text)
            assert time.perf_counter() - started < 8
            assert samples["winnow_broker_up", ()] == 0
            assert samples["winnow_database_up", ()] == 1

    def test_many_scrapes_are_one_look(
        self, settings: Settings, engine: Engine, celery: Celery
    ) -> None:
        client = client_of(settings, engine, celery)
        first = parsed(client.get("/metrics").text)
        make_audit(engine)
        again = parsed(client.get("/metrics").text)
        audits = ("winnow_audits", ("queued",))
        assert (first[audits], again[audits]) == (0, 0)
