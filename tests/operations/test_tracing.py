"""One trace from the request to the units it sets to work, at a real receiver; or none at all."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select

from app.audits.models import Audit
from app.db import transaction
from app.keys.service import create_key
from app.main import create_app
from app.settings import Settings
from app.tracing import ENDPOINTS, start_tracing, stop_tracing
from app.work import repository as work
from app.work.models import WorkUnit
from tests.factories import make_finished_audit, request_body
from tests.operations.collector import Collector, trace_collector
from workers.tasks import execute

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A receiver that this process sends to."""
    with trace_collector() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        yield receiver
        stop_tracing()


def client_of(settings: Settings, engine: Engine, celery: Celery) -> TestClient:
    key = create_key(engine, tenant="default", name="test", valid_days=1)
    headers = {"Authorization": f"Bearer {key.secret}"}
    return TestClient(create_app(settings, engine, celery), headers=headers)


def test_units_belong_to_the_trace_of_the_request(
    collector: Collector, settings: Settings, engine: Engine, celery: Celery
) -> None:
    """A worker finds the trace in the database, so it holds over queues, crashes and restarts."""
    client = client_of(settings, engine, celery)
    answer = client.post("/v1/audits", json=request_body(), headers={"traceparent": CALLER})
    assert answer.status_code == 202
    with transaction(engine) as session:
        audit = session.scalars(select(Audit)).one()
        unit = session.scalars(select(WorkUnit.id)).one()
    assert audit.traceparent is not None
    offline = settings.model_copy(update={"hub_endpoint": "http://127.0.0.1:1", "max_attempts": 1})
    claim = work.claim(engine, unit, owner="w", lease_seconds=60)
    assert claim is not None
    execute(engine, offline, claim)  # it fails: there is no hub
    stop_tracing()
    submitted, done = (
        next(span for span in collector.spans if span.name == name)
        for name in ("POST /v1/audits", "unit prepare")
    )
    assert submitted.trace_id == done.trace_id == CALLER.split("-")[1]
    assert submitted.parent_id == CALLER.split("-")[2]
    assert done.parent_id == submitted.span_id
    assert done.failure == "hub_unreachable"
    assert done.attributes["winnow.audit_id"] == audit.id
    assert submitted.attributes["http.response.status_code"] == 202


def test_a_later_ranking_has_a_trace_of_its_own(
    collector: Collector, settings: Settings, engine: Engine, celery: Celery
) -> None:
    audit = make_finished_audit(engine, settings)
    client = client_of(settings, engine, celery)
    wish = {"estimator": "grad_cosine", "layers": "all", "aggregation": "mean"}
    fixed = wish | {"flag": {"count": 1}}
    asked = client.post(f"/v1/audits/{audit.id}/rankings", json=fixed)
    assert asked.status_code == 202, asked.text
    with transaction(engine) as session:
        unit = session.scalars(select(WorkUnit.id).where(WorkUnit.stage == "rank")).one()
    claim = work.claim(engine, unit, owner="w", lease_seconds=60)
    assert claim is not None
    stop_tracing()
    (span,) = [span for span in collector.spans if "rankings" in span.name]
    assert (claim.traceparent or "").startswith(f"00-{span.trace_id}-{span.span_id}-")


def test_what_a_caller_searches_for_stays_out(
    collector: Collector, settings: Settings, engine: Engine, celery: Celery
) -> None:
    client = client_of(settings, engine, celery)
    client.get("/v1/audits?state=failed&limit=7")
    client.get("/healthz")
    stop_tracing()
    (span,) = collector.spans
    assert span.name == "GET /v1/audits"
    assert span.attributes["url.query"] == "REDACTED"


def test_a_receiver_that_is_gone_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, engine: Engine, celery: Celery
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    client = client_of(settings, engine, celery)
    assert client.get("/v1/audits").status_code == 200
    started = time.perf_counter()
    stop_tracing()
    assert time.perf_counter() - started < 5


def test_without_an_endpoint_nothing_is_imported_and_nothing_kept(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, engine: Engine, celery: Celery
) -> None:
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert start_tracing("api") is None
    sent = client_of(settings, engine, celery).post("/v1/audits", json=request_body())
    assert sent.status_code == 202
    with transaction(engine) as session:
        assert session.scalars(select(Audit.traceparent)).one() is None
    program = (
        "import sys; from app.main import create_app; from app.settings import Settings;"
        "create_app(Settings(database_url='postgresql://127.0.0.1:1/x', broker_url='redis://x'));"
        "print([name for name in sys.modules if name.startswith("
        "('opentelemetry.exporter', 'opentelemetry.sdk.trace'))])"
    )
    without = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=without,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"


def test_it_can_be_switched_off(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert start_tracing("api") is None
