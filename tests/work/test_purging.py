"""Old audits go when they are meant to, with all that is theirs, and nothing else does."""

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from celery import Celery
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from app.audits.folders import audit_folder
from app.audits.models import Audit, AuditState, RankedSample, TrainingSample
from app.db import transaction
from app.experiments.models import Experiment
from app.settings import Settings
from app.work.keeping import KEEP_LOCK
from app.work.leftovers import remove_leftovers, temporary_files
from app.work.models import Leftover
from app.work.purging import SWEPT, expire_audits, purge, sweep
from app.work.reconciler import reconcile
from tests.app.conftest import api, client, new_client
from tests.buckets import MotoBucket, bucket, in_bucket
from tests.factories import (
    experiment_body,
    finish_experiment,
    long_ago,
    make_audit,
    make_finished_audit,
    make_ranking,
)

__all__ = ["api", "bucket", "client", "in_bucket", "new_client"]

DAY = 86_400


@pytest.fixture
def kept_a_week(settings: Settings) -> Settings:
    return settings.model_copy(update={"audit_days": 7})


def end(engine: Engine, days_ago: float, *audit_ids: str) -> None:
    ended = datetime.now(UTC) - timedelta(days=days_ago)
    with transaction(engine) as session:
        session.execute(update(Audit).where(Audit.id.in_(audit_ids)).values(finished_at=ended))


def ids(engine: Engine) -> set[str]:
    with Session(engine) as session:
        return set(session.scalars(select(Audit.id)))


def old_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    for one in (path, path.parent):
        os.utime(one, (time.time() - 2 * DAY,) * 2)
    return path


def test_by_default_results_stay(engine: Engine, settings: Settings) -> None:
    audit = make_finished_audit(engine, settings)
    end(engine, 10_000, audit.id)
    assert expire_audits(engine, settings) == []
    assert purge(engine, settings, days=None).audits == []
    assert ids(engine) == {audit.id}


def test_an_audit_goes_with_its_rows_and_files(
    engine: Engine, celery: Celery, kept_a_week: Settings
) -> None:
    old, young = (make_finished_audit(engine, kept_a_week) for _ in range(2))
    end(engine, 8, old.id)
    end(engine, 6, young.id)
    running = make_audit(engine)
    reconcile(engine, celery, kept_a_week)
    assert ids(engine) == {young.id, running.id}
    assert not audit_folder(kept_a_week.data_dir, old.id).exists()
    assert audit_folder(kept_a_week.data_dir, young.id).exists()
    with Session(engine) as session:
        for table in (TrainingSample, RankedSample):
            assert session.scalar(select(func.count()).select_from(table)) == 10


def test_an_audit_that_is_being_ranked_stays(engine: Engine, kept_a_week: Settings) -> None:
    audit = make_finished_audit(engine, kept_a_week)
    make_ranking(engine, audit)
    end(engine, 8, audit.id)
    assert expire_audits(engine, kept_a_week) == []


def test_an_experiment_goes_as_a_whole_or_not_at_all(
    engine: Engine, kept_a_week: Settings, client: TestClient
) -> None:
    """Its tables need every audit of it."""
    experiment_id = client.post("/v1/experiments", json=experiment_body()).json()["id"]
    finish_experiment(engine, experiment_id, [AuditState.SUCCEEDED, AuditState.FAILED])
    first, second = sorted(ids(engine))
    end(engine, 8, first)
    end(engine, 6, second)
    assert expire_audits(engine, kept_a_week) == []
    end(engine, 8, second)
    assert set(expire_audits(engine, kept_a_week)) == {first, second}
    with Session(engine) as session:
        assert session.get(Experiment, experiment_id) is None


def test_nothing_is_deleted_during_a_backup(engine: Engine, kept_a_week: Settings) -> None:
    audit = make_finished_audit(engine, kept_a_week)
    end(engine, 8, audit.id)
    partial = old_file(kept_a_week.data_dir / "audits" / "aud_x" / ".facts.7.partial")
    with transaction(engine) as session:
        session.execute(select(func.pg_advisory_xact_lock(KEEP_LOCK)))
        assert expire_audits(engine, kept_a_week) == []
        assert sweep(engine, kept_a_week) == []
    (kept_a_week.data_dir / SWEPT).unlink()
    assert partial.exists()
    assert expire_audits(engine, kept_a_week) == [audit.id]
    assert sweep(engine, kept_a_week) == [partial]


class TestLeftovers:
    """What dead processes left half written."""

    def test_only_what_nobody_has_touched_for_long(
        self, engine: Engine, settings: Settings
    ) -> None:
        data = settings.data_dir
        audit = make_finished_audit(engine, settings)
        own = old_file(audit_folder(data, audit.id) / "results" / "suspects.old")
        dead = [
            old_file(audit_folder(data, audit.id) / "facts" / ".00001.safetensors.7.partial"),
            old_file(data / "datasets" / ".ds_1.partial" / "original.csv").parent,
            old_file(data / "cache" / "models" / ".staging-abc.partial" / "content").parent,
        ]
        fresh = audit_folder(data, audit.id) / "facts" / ".00002.safetensors.8.partial"
        fresh.write_bytes(b"x")
        busy = old_file(data / "cache" / "models" / ".staging-def.partial" / "config").parent
        (busy / "weights").write_bytes(b"x")
        os.utime(busy, (0, 0))
        assert set(temporary_files(settings)) == set(dead)
        assert set(sweep(engine, settings)) == set(dead)
        assert own.exists()
        assert fresh.exists()
        assert busy.exists()

    def test_once_an_hour(self, engine: Engine, settings: Settings) -> None:
        sweep(engine, settings)
        partial = old_file(settings.data_dir / "audits" / "aud_x" / ".facts.7.partial")
        assert sweep(engine, settings) == []
        old_file(settings.data_dir / SWEPT)
        assert sweep(engine, settings) == [partial]

    def test_a_data_directory_that_is_missing_is_no_trouble_here(
        self, engine: Engine, settings: Settings
    ) -> None:
        nowhere = settings.model_copy(update={"data_dir": settings.data_dir / "no"})
        assert sweep(engine, nowhere) == []
        assert not nowhere.data_dir.exists()

    def test_folders_without_a_row_go_only_when_somebody_says_so(
        self, engine: Engine, settings: Settings
    ) -> None:
        """A service with the wrong database would take every folder for one."""
        orphan = old_file(settings.data_dir / "audits" / "aud_gone" / "file").parent
        kept = make_finished_audit(engine, settings)
        assert sweep(engine, settings) == []
        said = purge(engine, settings, days=None, dry_run=True)
        assert said.orphans == ["audits/aud_gone"]
        assert orphan.exists()
        assert purge(engine, settings, days=None).orphans == ["audits/aud_gone"]
        assert not orphan.exists()
        assert audit_folder(settings.data_dir, kept.id).exists()


class TestObjects:
    """What is in a bucket goes as what is on the disk does."""

    def test_an_expiry_that_was_cut_short(
        self,
        engine: Engine,
        in_bucket: Settings,
        bucket: MotoBucket,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The rows are gone, and nobody would know of the objects any more."""
        kept_a_week = in_bucket.model_copy(update={"audit_days": 7})
        audit = make_finished_audit(engine, kept_a_week)
        bucket.put(f"audits/{audit.id}/results/suspects.csv")
        end(engine, 8, audit.id)
        with monkeypatch.context() as patch:  # the process dies before it removes the folder
            patch.setattr("app.work.purging.remove_folder", lambda _: None)
            assert expire_audits(engine, kept_a_week) == [audit.id]
        assert bucket.names()
        with transaction(engine) as session:
            session.execute(update(Leftover).values(due_at=long_ago()))
        remove_leftovers(engine, kept_a_week)
        assert bucket.names() == []
        assert not audit_folder(kept_a_week.data_dir, audit.id).exists()

    def test_a_purge_finds_objects_without_a_row(
        self, engine: Engine, in_bucket: Settings, bucket: MotoBucket
    ) -> None:
        """A worker that was frozen for long wrote them after the deletion."""
        audit = make_finished_audit(engine, in_bucket)
        kept = f"audits/{audit.id}/results/suspects.csv"
        for name in (kept, "audits/aud_gone/facts/1", "datasets/ds_gone/original.csv"):
            bucket.put(name)
        assert purge(engine, in_bucket, days=None).orphans == []  # they are young
        later = in_bucket.model_copy(update={"leftover_seconds": 1e-3})
        expected = ["audits/aud_gone", "datasets/ds_gone"]
        assert purge(engine, later, days=None, dry_run=True).orphans == expected
        assert len(bucket.names()) == 3
        assert purge(engine, later, days=None).orphans == expected
        assert bucket.names() == [kept]


def test_a_purge_takes_what_it_is_told(engine: Engine, settings: Settings) -> None:
    old, young = (make_finished_audit(engine, settings) for _ in range(2))
    end(engine, 40, old.id)
    assert purge(engine, settings, days=30, dry_run=True).audits == [old.id]
    assert ids(engine) == {old.id, young.id}
    assert purge(engine, settings, days=30).audits == [old.id]
    assert purge(engine, settings, days=0).audits == [young.id]
