"""What webhooks are owed: written with the end that it tells of, or not at all."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from app.audits.models import Audit, AuditState
from app.db import new_id, transaction
from app.settings import Settings
from app.webhooks.models import EventType, Webhook, WebhookDelivery
from app.work import repository as work
from app.work.claims import Claim, Failure
from app.work.models import UnitState, WorkUnit
from app.work.reconciler import _forget_old_rows
from tests.factories import experiment_body, long_ago, make_audit, make_finished_audit, make_ranking

FAILURE = Failure("diverged", "Lower the learning rate.")


def make_webhook(
    engine: Engine,
    *events: EventType,
    tenant: str = "default",
    url: str = "https://example.com/",
    **columns: Any,
) -> Webhook:
    webhook = Webhook(
        id=new_id("whk"),
        tenant=tenant,
        url=url,
        events=list(events or EventType),
        secret="whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=",
        **columns,
    )
    with transaction(engine) as session:
        session.add(webhook)
    return webhook


def owed(engine: Engine) -> list[WebhookDelivery]:
    with Session(engine) as session:
        return list(session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.id)))


def claim_of(engine: Engine, audit_id: str) -> Claim:
    open_units = select(WorkUnit.id).where(
        WorkUnit.audit_id == audit_id, WorkUnit.state == UnitState.READY
    )
    with Session(engine) as session:
        unit_id = session.scalars(open_units).one()
    claim = work.claim(engine, unit_id, owner="test", lease_seconds=60)
    assert claim is not None
    return claim


def cancel(engine: Engine, audit_id: str) -> None:
    with transaction(engine) as session:
        work.request_cancel(session, work.locked_audit(session, audit_id))


def succeed(engine: Engine, audit_id: str) -> None:
    """Complete unit after unit, as workers would."""
    while True:
        with transaction(engine) as session:
            session.get_one(Audit, audit_id).provenance = {"num_shards": 1}
        claim = claim_of(engine, audit_id)
        with transaction(engine) as session:
            if not work.complete(session, claim, result={}):
                return


def test_an_audit_that_succeeds_is_told_with_its_links(engine: Engine) -> None:
    webhook = make_webhook(engine)
    audit = make_audit(engine, fine_tune=None)
    succeed(engine, audit.id)
    (delivery,) = owed(engine)
    assert (delivery.webhook_id, delivery.type) == (webhook.id, "audit.succeeded")
    payload = delivery.payload
    assert set(payload) == {"type", "timestamp", "data"}
    assert payload["type"] == "audit.succeeded"
    data = payload["data"]
    assert (data["id"], data["state"]) == (audit.id, "succeeded")
    assert data["links"]["suspects"] == f"/v1/audits/{audit.id}/suspects"
    assert "error" not in data


def test_an_audit_that_fails_says_why(engine: Engine) -> None:
    make_webhook(engine)
    audit = make_audit(engine)
    work.fail(engine, claim_of(engine, audit.id), FAILURE)
    (delivery,) = owed(engine)
    assert delivery.type == "audit.failed"
    assert delivery.payload["data"]["error"] == {"code": "diverged", "message": FAILURE.message}


def test_a_cancel_is_told_once_however_often_it_is_asked_for(engine: Engine) -> None:
    make_webhook(engine)
    waiting, running = make_audit(engine), make_audit(engine)
    claim = claim_of(engine, running.id)
    for audit in (waiting, running, running):
        cancel(engine, audit.id)
    assert [delivery.payload["data"]["id"] for delivery in owed(engine)] == [waiting.id]
    work.stop_for_cancel(engine, claim)
    assert [delivery.type for delivery in owed(engine)] == ["audit.cancelled"] * 2


def test_a_later_ranking_is_told(engine: Engine, settings: Settings) -> None:
    audit = make_finished_audit(engine, settings)
    make_webhook(engine)
    made, failed = make_ranking(engine, audit), make_ranking(engine, audit)
    with Session(engine) as session:
        units = {unit.ranking_id: unit.id for unit in session.query(WorkUnit)}
    claims = [
        work.claim(engine, units[ranking.id], owner="test", lease_seconds=60)
        for ranking in (made, failed)
    ]
    assert claims[0]
    assert claims[1]
    with transaction(engine) as session:
        work.complete(session, claims[0], result={})
    work.fail(engine, claims[1], FAILURE)
    told = owed(engine)
    assert [delivery.type for delivery in told] == ["ranking.succeeded", "ranking.failed"]
    data = told[0].payload["data"]
    assert (data["id"], data["audit_id"]) == (made.id, audit.id)
    assert data["links"]["suspects"] == f"/v1/audits/{audit.id}/rankings/{made.id}/suspects"


def test_a_transaction_that_is_rolled_back_owes_nothing(engine: Engine) -> None:
    make_webhook(engine)
    audit = make_audit(engine)
    claim = claim_of(engine, audit.id)

    class DiedBeforeCommit(Exception):
        pass

    def die() -> None:
        with transaction(engine) as session:
            work.fail_owner(session, work.locked_owner(session, claim), FAILURE)
            session.flush()
            raise DiedBeforeCommit

    with pytest.raises(DiedBeforeCommit):
        die()
    assert owed(engine) == []


def test_only_those_are_told_who_asked(engine: Engine) -> None:
    make_webhook(engine, EventType.AUDIT_SUCCEEDED, EventType.RANKING_FAILED)
    make_webhook(engine, tenant="stranger")
    make_webhook(engine, disabled_at=long_ago(), disabled_reason="410")
    asked = [make_webhook(engine, EventType.AUDIT_FAILED) for _ in range(2)]
    work.fail(engine, claim_of(engine, make_audit(engine).id), FAILURE)
    assert {each.webhook_id for each in owed(engine)} == {webhook.id for webhook in asked}
    assert len({each.id for each in owed(engine)}) == 2


class TestExperiments:
    @pytest.fixture
    def audits(self, client: TestClient) -> Sequence[str]:
        made = client.post("/v1/experiments", json=experiment_body()).json()
        return [audit["id"] for audit in made["audits"]]

    def done(self, engine: Engine) -> list[dict[str, Any]]:
        return [each.payload["data"] for each in owed(engine) if each.type == "experiment.done"]

    def test_the_last_audit_tells_of_the_experiment(
        self, engine: Engine, audits: Sequence[str]
    ) -> None:
        make_webhook(engine)
        work.fail(engine, claim_of(engine, audits[0]), FAILURE)
        assert self.done(engine) == []
        work.fail(engine, claim_of(engine, audits[1]), FAILURE)
        (data,) = self.done(engine)
        assert data["state"] == "failed"
        assert data["links"]["self"] == f"/v1/experiments/{data['id']}"
        kinds = [each.type for each in owed(engine)]
        assert kinds == ["audit.failed", "audit.failed", "experiment.done"]
        assert owed(engine)[0].payload["data"]["experiment_id"] == data["id"]

    def test_a_cancel_of_all_tells_of_it_once(
        self, client: TestClient, engine: Engine, audits: Sequence[str]
    ) -> None:
        make_webhook(engine)
        with Session(engine) as session:
            experiment_id = session.get_one(Audit, audits[0]).experiment_id
        assert client.post(f"/v1/experiments/{experiment_id}/cancel").status_code == 202
        assert [data["state"] for data in self.done(engine)] == ["cancelled"]

    @pytest.mark.parametrize("_round", range(5))
    def test_two_that_end_at_once_tell_of_it_once(
        self, engine: Engine, audits: Sequence[str], _round: int
    ) -> None:
        make_webhook(engine)
        claims = [claim_of(engine, audit_id) for audit_id in audits]
        together = threading.Barrier(2)

        def fail(claim: Claim) -> None:
            with transaction(engine) as session:
                audit = work.locked_owner(session, claim)
                together.wait()
                work.fail_owner(session, audit, FAILURE)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(fail, claims))
        assert len(self.done(engine)) == 1


def test_a_webhook_that_is_deleted_meanwhile_fails_no_audit(engine: Engine) -> None:
    webhook = make_webhook(engine)
    audit = make_audit(engine)
    claim = claim_of(engine, audit.id)
    failing = threading.Thread(target=work.fail, args=(engine, claim, FAILURE))
    with transaction(engine) as session:
        session.delete(session.get_one(Webhook, webhook.id))
        session.flush()
        failing.start()
        failing.join(0.3)
        assert failing.is_alive()  # it waits to see whether the webhook stays
    failing.join()
    assert owed(engine) == []
    with Session(engine) as session:
        assert session.get_one(Audit, audit.id).state == AuditState.FAILED


def test_old_deliveries_are_forgotten(engine: Engine, settings: Settings) -> None:
    make_webhook(engine)
    for _ in range(2):
        cancel(engine, make_audit(engine).id)
    old, new = owed(engine)
    with transaction(engine) as session:
        session.execute(
            update(WebhookDelivery)
            .where(WebhookDelivery.id == old.id)
            .values(created_at=long_ago())
        )
        _forget_old_rows(session, settings)
    assert [each.id for each in owed(engine)] == [new.id]
