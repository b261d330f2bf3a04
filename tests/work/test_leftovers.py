"""What a killed process leaves on disk is gone some time later, and nothing else is."""

import os
import shutil
import time

import pytest
from celery import Celery
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from app.audits.folders import audit_folder
from app.audits.models import Ranking
from app.db import transaction
from app.settings import Settings
from app.work.leftovers import forget_copies, note_leftover, remove_leftovers
from app.work.models import Leftover
from app.work.purging import sweep
from app.work.reconciler import reconcile
from tests.app.conftest import api, client, new_client
from tests.buckets import MotoBucket, bucket, in_bucket
from tests.factories import CSV_TABLE, long_ago, make_finished_audit, make_ranking

__all__ = ["api", "bucket", "client", "in_bucket", "new_client"]


def make_due(engine: Engine) -> None:
    with transaction(engine) as session:
        session.execute(update(Leftover).values(due_at=long_ago()))


def noted(engine: Engine) -> list[str]:
    with Session(engine) as session:
        return list(session.scalars(select(Leftover.path)))


class TestFoldersOfThings:
    def test_an_audit_whose_deletion_was_cut_short(
        self,
        engine: Engine,
        settings: Settings,
        client: TestClient,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        audit = make_finished_audit(engine, settings)
        folder = audit_folder(settings.data_dir, audit.id)
        with monkeypatch.context() as patch:  # the process dies before it removes the folder
            patch.setattr("app.audits.service.remove_folder", lambda _: None)
            assert client.delete(f"/v1/audits/{audit.id}").status_code == 204
        assert remove_leftovers(engine, settings) == []  # not before it is due
        assert folder.exists()
        make_due(engine)
        assert remove_leftovers(engine, settings) == [f"audits/{audit.id}"]
        assert not folder.exists()

    def test_what_is_due_goes_with_a_round_of_the_reconciler(
        self, engine: Engine, celery: Celery, settings: Settings, client: TestClient
    ) -> None:
        """A worker that was still at it wrote there after the deletion."""
        audit = make_finished_audit(engine, settings)
        ranking = make_ranking(engine, audit, settings=settings)
        client.delete(f"/v1/audits/{audit.id}/rankings/{ranking.id}")
        folder = audit_folder(settings.data_dir, audit.id)
        late = folder / Ranking.folder_of(ranking.id)
        late.mkdir(parents=True)
        make_due(engine)
        reconcile(engine, celery, settings)
        assert not late.exists()
        assert folder.exists()  # the audit is still there
        assert noted(engine) == []

    def test_an_upload_that_was_stored_is_never_taken_for_a_leftover(
        self, engine: Engine, settings: Settings, client: TestClient
    ) -> None:
        dataset_id = client.post("/v1/datasets", files={"file": ("a.csv", CSV_TABLE)}).json()["id"]
        assert noted(engine) == [f"datasets/{dataset_id}"]
        make_due(engine)
        assert remove_leftovers(engine, settings) == []
        assert (settings.data_dir / "datasets" / dataset_id).exists()
        assert noted(engine) == []

    def test_an_upload_whose_row_never_came(self, engine: Engine, settings: Settings) -> None:
        folder = settings.data_dir / "datasets" / "ds_lost"
        folder.mkdir(parents=True)
        with transaction(engine) as session:
            note_leftover(session, settings, folder)
        make_due(engine)
        assert remove_leftovers(engine, settings) == ["datasets/ds_lost"]
        assert not folder.exists()

    def test_folders_that_the_database_does_not_know_stay(
        self, engine: Engine, settings: Settings
    ) -> None:
        """They may belong to another database: to a backup that is being restored."""
        folder = audit_folder(settings.data_dir, "aud_of_another_database")
        folder.mkdir(parents=True)
        remove_leftovers(engine, settings)
        sweep(engine, settings)
        assert folder.exists()


class TestCopies:
    """What a machine has of the files that are in a bucket."""

    def test_where_the_data_directory_is_all_there_is_none_is_a_copy(
        self, engine: Engine, settings: Settings
    ) -> None:
        of_old(settings, "audits/old")
        assert forget_copies(engine, settings) == []

    def test_old_ones_go_as_they_can_be_fetched_again(
        self, engine: Engine, in_bucket: Settings, bucket: MotoBucket
    ) -> None:
        for audit in (make_finished_audit(engine, in_bucket) for _ in range(2)):
            bucket.put(f"audits/{audit.id}/facts/1")
        of_old(in_bucket, f"audits/{audit.id}")
        assert [path.name for path in forget_copies(engine, in_bucket)] == [audit.id]
        assert len(list((in_bucket.data_dir / "audits").iterdir())) == 1

    def test_what_another_machine_deleted_goes_here_too(
        self, engine: Engine, in_bucket: Settings, client: TestClient
    ) -> None:
        """A dataset that was audited here is somebody's text."""
        kept = client.post("/v1/datasets", files={"file": ("a.csv", CSV_TABLE)}).json()["id"]
        for name in ("audits/aud_gone", "datasets/ds_gone", f"datasets/{kept}"):
            of_old(in_bucket, name)
        assert [path.name for path in forget_copies(engine, in_bucket)] == ["aud_gone", "ds_gone"]
        assert (in_bucket.data_dir / "datasets" / kept).exists()

    def test_what_was_here_before_the_bucket_stays(
        self, engine: Engine, in_bucket: Settings
    ) -> None:
        """It is no copy: nobody else has it."""
        audit = make_finished_audit(engine, in_bucket)
        of_old(in_bucket, f"audits/{audit.id}")
        assert forget_copies(engine, in_bucket) == []
        assert audit_folder(in_bucket.data_dir, audit.id).exists()


def of_old(settings: Settings, name: str) -> None:
    """Let a folder, with a file in it, be as if nothing was written there for 25 hours."""
    folder = settings.data_dir / name
    (folder / "facts").mkdir(parents=True, exist_ok=True)
    (folder / "facts" / "1").touch()
    then = time.time() - 25 * 3600
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (then, then))


class TestObjects:
    """Folders in a bucket, which no machine may have any more."""

    def test_a_deletion_that_was_cut_short(
        self,
        engine: Engine,
        in_bucket: Settings,
        bucket: MotoBucket,
        client: TestClient,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        audit, other = (make_finished_audit(engine, in_bucket) for _ in range(2))
        for one in (audit, other):
            bucket.put(f"audits/{one.id}/results/suspects.csv")
        with monkeypatch.context() as patch:  # the process dies before it removes the folder
            patch.setattr("app.audits.service.remove_folder", lambda _: None)
            assert client.delete(f"/v1/audits/{audit.id}").status_code == 204
        shutil.rmtree(audit_folder(in_bucket.data_dir, audit.id))  # with its machine
        make_due(engine)
        remove_leftovers(engine, in_bucket)
        assert bucket.names() == [f"audits/{other.id}/results/suspects.csv"]
        assert noted(engine) == []

    def test_a_store_that_refuses_is_asked_again(
        self, engine: Engine, in_bucket: Settings, bucket: MotoBucket
    ) -> None:
        bucket.put("audits/aud_gone/facts/1")
        with transaction(engine) as session:
            note_leftover(session, in_bucket, in_bucket.data_dir / "audits" / "aud_gone")
        make_due(engine)
        with bucket.refusing("s3:DeleteObject"):
            remove_leftovers(engine, in_bucket)
        assert noted(engine) == ["audits/aud_gone"]
        remove_leftovers(engine, in_bucket)
        assert bucket.names() == []
        assert noted(engine) == []
