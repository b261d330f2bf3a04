"""Influence files go when their time is over, results stay, and no ranking loses its files."""

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from app.audits import folders, ranking_service
from app.audits.folders import INFLUENCE_FOLDERS, audit_folder, influence_bytes
from app.audits.models import Audit, AuditState, Ranking, RankingState
from app.audits.schemas import RankingRequest
from app.db import transaction
from app.errors import Conflict
from app.settings import Settings
from app.work import retention
from app.work.reconciler import reconcile
from app.work.retention import expire_influence
from app.work.states import enter_ranking_state
from tests.factories import TENANT, make_audit, make_ended_audit, make_finished_audit, make_ranking

DAYS = 30


@pytest.fixture
def audit(engine: Engine, settings: Settings) -> Audit:
    """A finished audit with influence files."""
    audit = make_finished_audit(engine, settings)
    fill(audit, settings)
    return audit


def fill(audit: Audit, settings: Settings) -> Path:
    folder = audit_folder(settings.data_dir, audit.id)
    for name in INFLUENCE_FOLDERS:
        (folder / name / "deep").mkdir(parents=True)
        (folder / name / "deep" / "file").write_bytes(b"x" * 100)
    return folder


def age(engine: Engine, days: float, *audits: Audit) -> None:
    """Let the audits have ended some days ago."""
    ended = datetime.now(UTC) - timedelta(days=days)
    ids = [audit.id for audit in audits]
    with transaction(engine) as session:
        session.execute(update(Audit).where(Audit.id.in_(ids)).values(finished_at=ended))


def now(engine: Engine, audit: Audit) -> Audit:
    with Session(engine) as session:
        return session.get_one(Audit, audit.id)


def test_they_go_when_their_time_is_over_and_results_stay(
    engine: Engine, settings: Settings, audit: Audit
) -> None:
    folder = audit_folder(settings.data_dir, audit.id)
    assert influence_bytes(folder) == 100 * len(INFLUENCE_FOLDERS)
    age(engine, DAYS - 0.1, audit)
    assert expire_influence(engine, settings) == []
    age(engine, DAYS + 0.1, audit)
    assert expire_influence(engine, settings) == [audit.id]
    assert [path.name for path in folder.iterdir()] == ["results"]
    found = now(engine, audit)
    assert (found.influence_bytes, found.version) == (0, audit.version + 1)
    assert found.influence_deleted_at is not None
    assert expire_influence(engine, settings) == []


def test_the_reconciler_does_it(
    engine: Engine, celery: Celery, settings: Settings, audit: Audit
) -> None:
    age(engine, DAYS + 1, audit)
    reconcile(engine, celery, settings)
    assert now(engine, audit).influence_bytes == 0


def test_what_a_failed_audit_left_goes_too(engine: Engine, settings: Settings) -> None:
    failed, running = make_ended_audit(engine, AuditState.FAILED), make_audit(engine)
    folders = [fill(audit, settings) for audit in (failed, running)]
    age(engine, DAYS + 1, failed)
    assert expire_influence(engine, settings) == [failed.id]
    assert [influence_bytes(folder) > 0 for folder in folders] == [False, True]


def test_for_ever_is_for_ever(engine: Engine, settings: Settings, audit: Audit) -> None:
    age(engine, 10_000, audit)
    assert expire_influence(engine, settings.model_copy(update={"influence_days": 0})) == []


def test_a_ranking_in_flight_keeps_its_files(
    engine: Engine, settings: Settings, audit: Audit
) -> None:
    ranking = make_ranking(engine, audit)
    age(engine, DAYS + 1, audit)
    assert expire_influence(engine, settings) == []
    assert influence_bytes(audit_folder(settings.data_dir, audit.id)) > 0
    with transaction(engine) as session:
        enter_ranking_state(session.get_one(Ranking, ranking.id), RankingState.SUCCEEDED)
    assert expire_influence(engine, settings) == [audit.id]


def test_a_ranking_that_was_asked_while_files_went_is_refused(
    engine: Engine, settings: Settings, audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the lock, with a transaction that began before, and then sees the truth."""
    age(engine, DAYS + 1, audit)
    patient = settings.model_copy(update={"influence_days": 10 * DAYS})  # would still take it
    remove = folders.remove_influence

    def ask() -> None:
        ranking_service.submit(
            engine,
            patient,
            tenant=TENANT,
            audit_id=audit.id,
            request=RankingRequest(),
            idempotency_key=None,
        )

    with ThreadPoolExecutor(1) as pool:
        asked = []

        def ask_then_remove(folder: Path) -> int:
            asked.append(pool.submit(ask))
            return remove(folder)

        monkeypatch.setattr(retention, "remove_influence", ask_then_remove)
        assert expire_influence(engine, settings) == [audit.id]
        with pytest.raises(Conflict) as refused:
            asked[0].result(20)
    assert "were deleted on" in str(refused.value.detail)


def test_an_audit_that_somebody_holds_is_left_for_the_next_round(
    engine: Engine, settings: Settings, audit: Audit
) -> None:
    other = make_finished_audit(engine, settings)
    age(engine, DAYS + 1, audit, other)
    with transaction(engine) as session:
        session.get_one(Audit, audit.id, with_for_update=True)
        assert expire_influence(engine, settings) == [other.id]
    assert expire_influence(engine, settings) == [audit.id]


def test_a_round_is_bounded(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    audits = [make_finished_audit(engine, settings) for _ in range(5)]
    age(engine, DAYS + 1, *audits)
    monkeypatch.setattr(retention, "MAX_AUDITS_PER_ROUND", 2)
    rounds = [expire_influence(engine, settings) for _ in range(4)]
    assert [len(gone) for gone in rounds] == [2, 2, 1, 0]
    assert {*chain.from_iterable(rounds)} == {audit.id for audit in audits}


def test_files_that_do_not_go_are_tried_again(
    engine: Engine, settings: Settings, audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    age(engine, DAYS + 1, audit)
    with monkeypatch.context() as patch:

        def refuse(*_arguments: object, **_options: object) -> None:
            raise PermissionError("no")

        patch.setattr(os, "unlink", refuse)
        assert expire_influence(engine, settings) == []
    found = now(engine, audit)
    assert (found.influence_bytes, found.influence_deleted_at) == (1_000, None)
    assert expire_influence(engine, settings) == [audit.id]
