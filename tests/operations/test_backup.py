"""A backup of a service at work, set up elsewhere: what was done is there, what was not goes on."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app import backup, verbs
from app.audits.folders import audit_folder
from app.audits.models import Audit
from app.backup import MANIFEST, BackupRefused, back_up, restore
from app.db import make_engine, transaction
from app.embedded import embedded_postgres
from app.settings import Settings, get_settings
from app.work.keeping import may_tidy
from app.work.models import WorkUnit
from tests.e2e.conftest import Service
from tests.factories import make_finished_audit
from tests.operations.collector import Collector, trace_collector
from tests.pipeline import tiny

SMALL = {
    "WINNOW_SAMPLES_PER_SHARD": "20",
    "WINNOW_TOKENS_PER_BATCH": "64",
    "WINNOW_DEVICE": "cpu",
}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with trace_collector() as receiver:
        yield receiver


@pytest.fixture
def original(tmp_path: Path, collector: Collector) -> Iterator[Service]:
    """A whole service that traces what it does."""
    (tmp_path / "root").mkdir()
    environment = SMALL | {
        "WINNOW_FILE_ROOTS": str(tmp_path / "root"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
    }
    with running(tmp_path / "original", environment) as service:
        yield service


@contextmanager
def running(data_dir: Path, environment: dict[str, str]) -> Iterator[Service]:
    """Run a service, and stop it whatever happens."""
    service = Service(data_dir, environment, data_dir.with_suffix(".log"))
    try:
        service.start()
        yield service
    finally:
        if service.process is not None and service.process.poll() is None:
            service.stop()


@pytest.fixture
def own_servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of a shell without any."""
    for name in [name for name in os.environ if name.startswith("WINNOW_")]:
        monkeypatch.delenv(name)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def request_for(root: Path) -> dict[str, Any]:
    """An audit of many shards whose curvature needs the gradients that are kept between passes."""
    model = tiny.save_encoder(root / "encoder")
    train = tiny.write_table(root / "train.parquet", tiny.reviews(900, seed=0))
    validation = tiny.write_table(root / "validation.parquet", tiny.reviews(40, seed=1))
    return {
        "model": {"reference": model.as_uri()},
        "train": {"reference": train.as_uri()},
        "validation": {"reference": validation.as_uri()},
        "fine_tune": {"epochs": 1, "learning_rate": 1e-2},
        "estimators": ["grad_cosine", "datainf"],
        "ranking": {"estimator": "datainf", "layers": "all", "aggregation": "rank"},
        "flag": {"fraction": 0.1},
        "max_tokens": 64,
    }


def check_files_and_finish(restored: Service, *, done: dict[str, Any], half_done: str) -> None:
    """The files of one audit are whole, and the other, begun before, ends with the same bytes."""
    for name, file in done["results"]["files"].items():
        answer = restored.http.get(f"/v1/audits/{done['id']}/suspects.{name}")
        assert answer.headers["etag"] == f'"{file["sha256"]}"'
        assert len(answer.content) == file["bytes"]
    ended = restored.finish(half_done)
    assert ended["state"] == "succeeded", ended
    assert hashes(ended) == hashes(done)


def hashes(audit: dict[str, Any]) -> dict[str, str]:
    return {name: file["sha256"] for name, file in audit["results"]["files"].items()}


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_service_at_work_goes_on_elsewhere_to_the_byte(
    original: Service, own_servers: None, collector: Collector, tmp_path: Path
) -> None:
    request = request_for(tmp_path / "root")
    done = original.finish(original.submit(**request))
    assert done["state"] == "succeeded", done
    suspects = original.http.get(f"/v1/audits/{done['id']}/suspects").json()
    half_done = original.submit(**request)
    original.reach(half_done, "gradients")
    manifest = verbs.back_up(
        target=tmp_path / "backup", data_dir=original.data_dir, with_cache=True
    )
    assert manifest.num_audits == 2
    assert original.stop() == 0, original.tail()

    assert verbs.restore(source=tmp_path / "backup", data_dir=tmp_path / "restored") == []
    with embedded_postgres(tmp_path / "restored") as url:
        engine = make_engine(Settings.model_validate({"database_url": url}).require_database_url())
        with Session(engine) as session:
            assert session.get_one(Audit, half_done).finished_at is None
            states = select(WorkUnit.state).where(WorkUnit.audit_id == half_done)
            assert "done" in set(session.scalars(states))
        engine.dispose()
    environment = original.environment | {"OTEL_SDK_DISABLED": "true"}
    with running(tmp_path / "restored", environment) as restored:
        assert restored.http.get(f"/v1/audits/{done['id']}/suspects").json() == suspects
        check_files_and_finish(restored, done=done, half_done=half_done)

    of_done = [span for span in collector.spans if done["id"] in span.attributes.values()]
    (submitted,) = {span.parent_id for span in of_done}
    (root,) = [span for span in collector.spans if span.span_id == submitted]
    assert (root.service, root.name) == ("winnow-api", "POST /v1/audits")
    assert {(span.service, span.trace_id) for span in of_done} == {("winnow-worker", root.trace_id)}
    assert len(of_done) > 20  # a span for every shard


class TestRefusals:
    """What would overwrite, or is not whole, is refused before anything is changed."""

    @pytest.fixture
    def taken(self, engine: Engine, settings: Settings, tmp_path: Path) -> Path:
        make_finished_audit(engine, settings)
        back_up(engine, settings, tmp_path / "backup", with_cache=True)
        return tmp_path / "backup"

    def test_a_folder_that_holds_something(
        self, engine: Engine, settings: Settings, taken: Path
    ) -> None:
        with pytest.raises(BackupRefused, match="not empty"):
            back_up(engine, settings, taken, with_cache=True)

    def test_a_database_that_is_in_use(
        self, engine: Engine, settings: Settings, taken: Path
    ) -> None:
        with pytest.raises(BackupRefused, match="has tables already"):
            restore(engine, settings, taken)

    def test_a_backup_that_was_cut_off(
        self, engine: Engine, settings: Settings, taken: Path
    ) -> None:
        (taken / MANIFEST).unlink()
        with pytest.raises(BackupRefused, match="no whole backup"):
            restore(engine, settings, taken)

    def test_a_server_that_cannot_be_dumped(
        self, engine: Engine, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The password is on no command line, and the reason is said."""
        monkeypatch.setenv("PGOPTIONS", "-c role=nobody_at_all")
        with pytest.raises(BackupRefused, match="nobody_at_all"):
            back_up(engine, settings, tmp_path / "b", with_cache=True)
        assert not (tmp_path / "b" / MANIFEST).exists()


def test_nobody_tidies_up_while_files_are_copied(
    engine: Engine, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the dump speaks of must still be there when it is copied."""
    audit = make_finished_audit(engine, settings)
    half_written = audit_folder(settings.data_dir, audit.id) / ".facts.safetensors.7.partial"
    half_written.write_bytes(b"x")
    asked: list[bool] = []

    def copy(*arguments: Any, **options: Any) -> tuple[int, int]:
        with transaction(engine) as session:
            asked.append(may_tidy(session))
        return copied(*arguments, **options)

    copied = backup._copy
    monkeypatch.setattr(backup, "_copy", copy)
    manifest = back_up(engine, settings, tmp_path / "b", with_cache=False)
    with transaction(engine) as session:
        asked.append(may_tidy(session))
    assert asked == [False, True]
    names = {path.name for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert names >= {"suspects.parquet", "database.dump", "backup.json"}
    assert half_written.name not in names
    assert json.loads((tmp_path / "b" / MANIFEST).read_text())["num_files"] == manifest.num_files
