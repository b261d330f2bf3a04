"""What `winnow doctor` finds where the service is installed, on the real servers."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from redis import Redis
from sqlalchemy import Engine, text, update
from winnow.commands.findings import Finding

from app import doctor, doctor_servers
from app.db import transaction
from app.embedded import EmbeddedServers
from app.jobs import QUEUES
from app.keys.models import ApiKey
from app.keys.service import create_key
from app.settings import Settings
from app.shared_files import bucket_of
from app.work.models import WorkerHeartbeat
from tests.buckets import MotoBucket, bucket, in_bucket

__all__ = ["bucket", "in_bucket"]


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_servers_that_answer_and_workers_that_do_not(engine: Engine, settings: Settings) -> None:
    found = by_name(list(doctor_servers.check_servers(settings)))
    assert {name: finding.status for name, finding in found.items()} == {
        "database": "ok",
        "tenants": "ok",
        "clock": "ok",
        "broker": "ok",
        "workers": "fail",
        "versions": "ok",
        "keys": "warn",
    }
    assert "winnow worker" in found["workers"].detail


def test_servers_that_are_not_there() -> None:
    nowhere = {"database_url": "postgresql://nobody@127.0.0.1:1/x", "broker_url": None}
    found = by_name(list(doctor_servers.check_servers(Settings.model_validate(nowhere))))
    assert {finding.status for finding in found.values()} == {"fail"}
    assert "Start PostgreSQL" in (found["database"].advice or "")
    assert "WINNOW_BROKER_URL" in found["broker"].detail


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_PORT", "high")
    found = by_name(list(doctor.look_around()))
    assert found["settings"].status == "fail"
    assert "WINNOW_PORT" in found["settings"].detail


def test_a_library_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_libraries().status == "ok"
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "celery" else real(name))
    finding = doctor.check_libraries()
    assert finding.status == "fail"
    assert "celery is 1.0" in finding.detail
    assert "pip install" in (finding.advice or "")


def test_a_cuda_that_is_asked_for_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finding = doctor.check_gpu(Settings(device="cuda"))
    assert finding.status == "fail"
    assert "WINNOW_DEVICE=cpu" in (finding.advice or "")


def test_an_installation_without_torch_runs_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    assert doctor.check_gpu(Settings()).status == "warn"


def test_the_disk(
    servers: EmbeddedServers, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "none"
    assert doctor.check_disk(Settings(data_dir=missing)).status == "ok"
    shared = Settings(data_dir=missing, database_url=servers.database_url)
    assert doctor.check_disk(shared).status == "fail"
    monkeypatch.setattr(doctor, "ENOUGH_FREE_BYTES", 0)
    assert doctor.check_disk(settings).status == "ok"
    monkeypatch.setattr(doctor, "ENOUGH_FREE_BYTES", 2**60)
    assert doctor.check_disk(settings).status == "warn"


class TestTheBucket:
    """Each thing that files need is done once, and nothing stays of it."""

    def test_one_that_does_all(self, in_bucket: Settings, bucket: MotoBucket) -> None:
        assert look_at_bucket(in_bucket).status == "ok"
        assert bucket.names() == []

    @pytest.mark.parametrize(
        ("action", "named"),
        [
            ("s3:PutObject", "PutObject"),
            ("s3:GetObject", "GetObject"),
            ("s3:DeleteObject", "DeleteObjects"),
        ],
    )
    def test_one_that_refuses_something(
        self, in_bucket: Settings, bucket: MotoBucket, action: str, named: str
    ) -> None:
        with bucket.refusing(action):
            finding = look_at_bucket(in_bucket)
        assert finding.status == "fail"
        assert f"{named} is answered with" in finding.detail
        assert "what the key, or this machine's role, may do" in finding.detail
        assert "hidden" not in f"{finding.detail}{finding.advice}"

    def test_the_command_looks_at_it(
        self, in_bucket: Settings, bucket: MotoBucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WINNOW_DATA_DIR", str(in_bucket.data_dir))
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        assert by_name(list(doctor.look_around()))["bucket"].status == "ok"


def look_at_bucket(settings: Settings) -> Finding:
    bucket = bucket_of(settings)
    assert bucket is not None
    return doctor.check_bucket(bucket)


class TestWhatGoesWrongOnlyLater:
    """What works today and will not some day."""

    @pytest.fixture
    def unforced(self, engine: Engine) -> Iterator[None]:
        """A table whose policy somebody switched off."""
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE audits DISABLE ROW LEVEL SECURITY"))
        yield
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE audits ENABLE ROW LEVEL SECURITY"))

    def test_row_level_security_that_is_off(self, engine: Engine, unforced: None) -> None:
        finding = doctor_servers.check_tenants(engine)
        assert finding.status == "fail"
        assert "off for 1 of" in finding.detail

    def test_a_broker_that_evicts(self, celery: Celery, broker: Redis) -> None:
        broker.config_set("maxmemory-policy", "allkeys-lru")
        try:
            finding = doctor_servers.check_broker_server(celery)
        finally:
            broker.config_set("maxmemory-policy", "noeviction")
        assert finding.status == "warn"
        assert "allkeys-lru" in finding.detail
        assert doctor_servers.check_broker_server(celery).status == "ok"

    def test_workers_of_another_version(self, engine: Engine, settings: Settings) -> None:
        row = {"device": "cpu", "queues": [*QUEUES], "engine_version": "0.0.9"}
        with transaction(engine) as session:
            session.add(WorkerHeartbeat(name="gpu-7:12", **row))
        finding = doctor_servers.check_versions(engine, settings)
        assert finding.status == "fail"
        assert "gpu-7:12 has 0.0.9" in finding.detail

    def test_a_clock_that_is_wrong(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() - 90)
        finding = doctor_servers.check_clock(engine)
        assert finding.status == "warn"
        assert "90 s behind the database" in finding.detail

    def test_a_key_in_use_that_ends_soon(self, engine: Engine, settings: Settings) -> None:
        """One that nobody uses may end in silence."""
        used, _ = (
            create_key(engine, tenant="acme", name=name, valid_days=days)
            for name, days in (("pipeline", 7), ("forgotten", 7))
        )
        assert doctor_servers.check_keys(engine, settings).status == "ok"
        with transaction(engine) as session:
            now = datetime.now(UTC)
            session.execute(update(ApiKey).where(ApiKey.id == used.id).values(last_used_at=now))
        finding = doctor_servers.check_keys(engine, settings)
        assert finding.status == "warn"
        assert "(acme, pipeline)" in finding.detail
        assert "forgotten" not in finding.detail

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"lease_seconds": 5, "heartbeat_seconds": 3}, "WINNOW_LEASE_SECONDS"),
            ({"worker_stale_seconds": 12}, "WINNOW_WORKER_STALE_SECONDS"),
            ({"audit_days": 7, "influence_days": 30}, "WINNOW_AUDIT_DAYS"),
            ({"broker_url": "redis://x"}, "WINNOW_DATABASE_URL"),
            ({"file_roots": "/nowhere/at/all"}, "/nowhere/at/all"),
            ({"webhook_ca_file": "/nowhere.pem"}, "WINNOW_WEBHOOK_CA_FILE"),
            ({"webhook_plain_http": True}, "WINNOW_WEBHOOK_PLAIN_HTTP"),
        ],
    )
    def test_settings_that_do_not_go_together(self, settings: dict[str, Any], named: str) -> None:
        finding = doctor.check_settings(Settings.model_validate(settings))
        assert finding.status == "warn"
        assert named in finding.detail

    def test_the_defaults_go_together(self) -> None:
        assert doctor.check_settings(Settings()).status == "ok"
