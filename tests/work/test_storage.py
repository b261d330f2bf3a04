"""A full disk: work waits for room without losing a try, and goes on by itself."""

import errno
from collections.abc import Callable
from functools import partial

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from psycopg.errors import DiskFull
from safetensors import SafetensorError
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app import storage
from app.audits.models import Audit, AuditState, Ranking
from app.settings import Settings
from app.storage import is_disk_full
from app.work import repository as work
from app.work.models import UnitState, WorkUnit
from app.work.reconciler import reconcile
from tests.app.conftest import api, client, new_client
from tests.factories import (
    CSV_TABLE,
    experiment_body,
    make_audit,
    make_finished_audit,
    make_ranking,
    request_body,
)

__all__ = ["api", "client", "new_client"]


@pytest.fixture
def need_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets work need so much room to begin: more than there is, or less."""
    return partial(monkeypatch.setattr, storage, "LEAST_FREE_BYTES")


def unit_of(engine: Engine, owner: Audit | Ranking) -> WorkUnit:
    with Session(engine) as session:
        column = WorkUnit.audit_id if isinstance(owner, Audit) else WorkUnit.ranking_id
        return session.query(WorkUnit).filter(column == owner.id).one()


def find_full(engine: Engine, unit_id: str) -> None:
    """Be the worker that claims a unit and finds the disk full."""
    claim = work.claim(engine, unit_id, owner="worker", lease_seconds=60)
    assert claim is not None
    work.release(engine, claim, reason="full", count_attempt=False, waiting=storage.WAITING)


class TestWaiting:
    def test_a_unit_waits_for_room_and_keeps_its_tries(
        self, api: FastAPI, client: TestClient, need_bytes: Callable[[int], None]
    ) -> None:
        engine, celery, settings = api.state.engine, api.state.celery, api.state.settings
        audit = make_audit(engine)
        unit = unit_of(engine, audit)
        version = client.get(f"/v1/audits/{audit.id}").headers["ETag"]
        find_full(engine, unit.id)
        answer = client.get(f"/v1/audits/{audit.id}")
        assert answer.json()["waiting"] == "storage"
        assert answer.headers["ETag"] != version  # who watches is told
        need_bytes(2**60)
        assert reconcile(engine, celery, settings) == []
        need_bytes(1)
        assert reconcile(engine, celery, settings) == [unit.id]

        claim = work.claim(engine, unit.id, owner="worker", lease_seconds=60)
        assert claim is not None
        assert claim.attempts == 1
        assert client.get(f"/v1/audits/{audit.id}").json()["waiting"] is None

    def test_a_ranking_waits_likewise(
        self, engine: Engine, settings: Settings, client: TestClient
    ) -> None:
        audit = make_finished_audit(engine, settings)
        ranking = make_ranking(engine, audit)
        find_full(engine, unit_of(engine, ranking).id)
        path = f"/v1/audits/{audit.id}/rankings/{ranking.id}"
        assert client.get(path).json()["waiting"] == "storage"

    def test_an_audit_that_waits_can_be_cancelled(self, engine: Engine, client: TestClient) -> None:
        audit = make_audit(engine)
        find_full(engine, unit_of(engine, audit).id)
        answer = client.post(f"/v1/audits/{audit.id}/cancel").json()
        assert (answer["state"], answer["waiting"]) == (AuditState.CANCELLED, None)
        assert unit_of(engine, audit).state == UnitState.CANCELLED


class TestSubmitting:
    def test_without_room_nothing_new_is_taken(
        self,
        engine: Engine,
        settings: Settings,
        client: TestClient,
        need_bytes: Callable[[int], None],
    ) -> None:
        finished = make_finished_audit(engine, settings)
        first = client.post("/v1/audits", json=request_body(), headers={"Idempotency-Key": "k"})
        need_bytes(2**60)
        ranking = {"estimator": "grad_cosine", "layers": "all", "aggregation": "mean"}
        answers = [
            client.post("/v1/audits", json=request_body()),
            client.post("/v1/experiments", json=experiment_body()),
            client.post(f"/v1/audits/{finished.id}/rankings", json=ranking),
            client.post("/v1/datasets", files={"file": ("a.csv", CSV_TABLE)}),
        ]
        for answer in answers:
            assert answer.status_code == 507, answer.text
            assert answer.json()["type"] == "urn:winnow:problem:storage-full"
            assert answer.headers["Retry-After"] == "60"
        # what was accepted before is told again
        again = client.post("/v1/audits", json=request_body(), headers={"Idempotency-Key": "k"})
        assert again.json()["id"] == first.json()["id"]


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("Error while serializing: No space left on device (os error 28)"), True),
        (OperationalError("COPY", {}, DiskFull("could not extend file")), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (RuntimeError("something else"), False),
    ],
)
def test_however_a_library_says_it(error: Exception, is_full: bool) -> None:
    assert is_disk_full(error) == is_full
    wrapped = ValueError("the library failed")
    wrapped.__cause__ = error
    assert is_disk_full(wrapped) == is_full
