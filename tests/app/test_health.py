"""Alive and ready: each part's state, and what to do about it."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine

from app import health
from app.catalogue import AGGREGATIONS, ESTIMATORS
from app.db import make_engine, transaction
from app.jobs import CPU_QUEUE_NAME, FETCH_QUEUE_NAME, QUEUE_NAME, QUEUES, make_celery
from app.main import create_app
from app.settings import Settings
from app.work.models import WorkerHeartbeat
from tests.buckets import bucket, in_bucket
from tests.factories import long_ago

__all__ = ["bucket", "in_bucket"]


def readiness(settings: Settings, engine: Engine, celery: Celery) -> tuple[int, dict[str, Any]]:
    response = TestClient(create_app(settings, engine, celery)).get("/readyz")
    body = response.json()
    assert body["ready"] == (response.status_code == 200)
    return response.status_code, body["checks"]


def worker_seen(
    engine: Engine, name: str = "w", queues: tuple[str, ...] = QUEUES, **fields: Any
) -> None:
    row = {"name": name, "device": "cpu", "queues": [*queues], "engine_version": "1"}
    with transaction(engine) as session:
        session.add(WorkerHeartbeat(**row | fields))


def test_alive(client: TestClient) -> None:
    assert client.get("/healthz").json()["status"] == "alive"


def test_ready_when_all_parts_are_there(settings: Settings, engine: Engine, celery: Celery) -> None:
    worker_seen(engine)
    status, checks = readiness(settings, engine, celery)
    assert status == 200
    assert set(checks) == {"database", "broker", "worker", "storage"}
    assert all(check["ok"] for check in checks.values())


def test_a_worker_that_is_silent_counts_as_gone(
    settings: Settings, engine: Engine, celery: Celery
) -> None:
    worker_seen(engine, seen_at=long_ago())
    status, checks = readiness(settings, engine, celery)
    assert status == 503
    assert not checks["worker"]["ok"]
    assert "winnow worker" in checks["worker"]["detail"]


@pytest.mark.parametrize(
    ("queue", "missing"),
    [(CPU_QUEUE_NAME, "rankings"), (QUEUE_NAME, "audits"), (FETCH_QUEUE_NAME, "what audits begin")],
)
def test_all_kinds_of_work_need_a_worker(
    settings: Settings, engine: Engine, celery: Celery, queue: str, missing: str
) -> None:
    """A worker may leave rankings, or take nothing else; together they are enough."""
    worker_seen(engine, queues=tuple({*QUEUES} - {queue}))
    status, checks = readiness(settings, engine, celery)
    assert status == 503
    assert f"1 at work, but none that takes {missing}" in checks["worker"]["detail"]
    worker_seen(engine, "other", queues=(queue,))
    assert readiness(settings, engine, celery)[0] == 200


def test_a_dead_or_frozen_broker_is_said_soon(
    settings: Settings, engine: Engine, tmp_path: Path
) -> None:
    address = tmp_path / "f.sock"
    with socket.socket(socket.AF_UNIX) as frozen:
        frozen.bind(str(address))
        frozen.listen()
        for path in (address, tmp_path / "nobody.sock"):
            url = SecretStr(f"redis+socket://{path}")
            celery = make_celery(settings.model_copy(update={"broker_url": url}))
            started = time.perf_counter()
            _, checks = readiness(settings, engine, celery)
            assert time.perf_counter() - started < 8
            assert checks["database"]["ok"]
            assert "WINNOW_BROKER_URL" in checks["broker"]["detail"]


def test_a_database_that_is_down(settings: Settings, celery: Celery) -> None:
    engine = make_engine("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    status, checks = readiness(settings, engine, celery)
    assert status == 503
    assert "WINNOW_DATABASE_URL" in checks["database"]["detail"]
    assert checks["broker"]["ok"]


def test_a_disk_that_is_full_or_missing(
    settings: Settings, engine: Engine, celery: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = settings.model_copy(update={"data_dir": settings.data_dir / "no"})
    assert "WINNOW_DATA_DIR" in readiness(elsewhere, engine, celery)[1]["storage"]["detail"]
    monkeypatch.setattr(health, "LEAST_FREE_BYTES", 2**60)
    assert "add room" in readiness(settings, engine, celery)[1]["storage"]["detail"]


class TestTheBucket:
    """Where files are in one."""

    def test_it_answers(self, in_bucket: Settings, engine: Engine, celery: Celery) -> None:
        worker_seen(engine)
        status, checks = readiness(in_bucket, engine, celery)
        assert status == 200, checks
        assert checks["bucket"]["ok"]

    def test_it_is_not_there(self, in_bucket: Settings, engine: Engine, celery: Celery) -> None:
        worker_seen(engine)
        (in_bucket.data_dir / "of-another").mkdir()
        of_another = {"artifacts": "nobodys/lab", "data_dir": in_bucket.data_dir / "of-another"}
        wrong = in_bucket.model_copy(update=of_another)
        status, checks = readiness(wrong, engine, celery)
        assert status == 503
        assert "correct WINNOW_ARTIFACTS" in checks["bucket"]["detail"]
        assert checks["storage"]["ok"]

    def test_a_store_that_is_dead_or_frozen_is_said_soon(
        self, in_bucket: Settings, engine: Engine, celery: Celery
    ) -> None:
        """And neither its address nor a key is told, which anybody may read here."""
        with socket.create_server(("127.0.0.1", 0)) as frozen:
            for number, port in enumerate((frozen.getsockname()[1], 9)):
                settings = in_bucket.model_copy(
                    update={
                        "s3_endpoint": f"http://someone:pass@127.0.0.1:{port}",
                        "data_dir": in_bucket.data_dir / str(number),
                    }
                )
                started = time.perf_counter()
                _, checks = readiness(settings, engine, celery)
                assert time.perf_counter() - started < 8
                assert checks["database"]["ok"]
                detail = checks["bucket"]["detail"]
                assert "WINNOW_S3_ENDPOINT" in detail
                assert not [word for word in ("pass", "127.0.0.1", "hidden") if word in detail]


def test_the_catalogue_lists_what_can_be_asked_for(client: TestClient) -> None:
    estimators = client.get("/v1/estimators").json()
    assert [estimator["name"] for estimator in estimators] == list(ESTIMATORS)
    aggregations = client.get("/v1/aggregations").json()
    assert [aggregation["name"] for aggregation in aggregations] == list(AGGREGATIONS)
