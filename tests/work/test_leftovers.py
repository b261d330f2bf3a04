"""What a killed process leaves on disk is gone some time later, and nothing else is."""

import os
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
from tests.factories import CSV_TABLE, long_ago, make_finished_audit, make_ranking

__all__ = ["api", "client", "new_client"]


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


def test_old_copies_go_where_a_bucket_has_the_files(settings: Settings) -> None:
    """Where the data directory is all there is, none is a copy."""
    for name, age in (("old", 25), ("young", 23)):
        file = settings.data_dir / "audits" / name / "facts" / "1"
        file.parent.mkdir(parents=True)
        file.touch()
        then = time.time() - age * 3600
        for path in (file, file.parent, file.parent.parent):
            os.utime(path, (then, then))
    assert forget_copies(settings) == []
    shared = settings.model_copy(update={"artifacts": "bucket"})
    assert [path.name for path in forget_copies(shared)] == ["old"]
    assert [path.name for path in (settings.data_dir / "audits").iterdir()] == ["young"]
