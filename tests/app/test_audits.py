"""Looking at audits, cancelling and deleting them."""

from datetime import timedelta

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from app.audits.models import Audit, AuditState, RankedSample, TrainingSample
from app.db import transaction
from app.settings import Settings
from app.work import repository as work
from app.work.claims import Claim
from app.work.models import UnitState, WorkUnit
from tests.factories import make_audit, make_ended_audit, make_finished_audit


def claim_of(engine: Engine, audit: Audit) -> Claim:
    """Take an audit's unit of work, as a worker does."""
    with Session(engine) as session:
        unit_id = session.scalars(select(WorkUnit.id).where(WorkUnit.audit_id == audit.id)).one()
    claim = work.claim(engine, unit_id, owner="test", lease_seconds=60)
    assert claim is not None
    return claim


class TestGet:
    def test_a_running_audit_says_how_far_it_is_and_when_to_look_again(
        self, client: TestClient, engine: Engine
    ) -> None:
        audit = make_audit(engine)
        claim = claim_of(engine, audit)
        work.renew(engine, claim, lease_seconds=60, done=50, total=100, samples_per_second=12.5)

        response = client.get(f"/v1/audits/{audit.id}")

        body = response.json()
        assert (body["state"], body["stage"]) == ("preparing", "prepare")
        assert 0 < body["progress"] < 1
        assert body["samples_per_second"] == 12.5
        assert 1 <= int(response.headers["Retry-After"]) <= 15
        assert list(body["state_times"]) == ["queued", "preparing"]
        assert body["links"]["cancel"] == f"/v1/audits/{audit.id}/cancel"
        assert body["results"] is body["error"] is None

    @pytest.mark.parametrize(("eta", "seconds"), [(0.2, 2), (30, 5), (100, 10), (9000, 15)])
    def test_the_pause_follows_the_time_that_is_left(
        self, client: TestClient, engine: Engine, eta: float, seconds: int
    ) -> None:
        audit = make_audit(engine)
        values = {"state": AuditState.COMPUTING, "eta_seconds": eta}
        with transaction(engine) as session:
            session.execute(update(Audit).values(values))
        assert client.get(f"/v1/audits/{audit.id}").headers["Retry-After"] == str(seconds)

    def test_a_finished_audit_has_its_results(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings)
        response = client.get(f"/v1/audits/{audit.id}")
        body = response.json()
        assert (body["done"], body["error"], body["progress"]) == (True, None, 1.0)
        assert body["results"]["num_flagged"] == 2
        assert body["results"]["score_order"].startswith("ascending: the lowest score is the most")
        assert "Retry-After" not in response.headers
        for name in ("parquet", "csv", "jsonl"):
            file = body["results"]["files"][name]
            assert len(client.get(file["href"]).content) == file["bytes"]
        for name, href in body["links"].items():
            assert client.get(href).status_code == 200, name

    def test_a_failed_audit_says_why(self, client: TestClient, engine: Engine) -> None:
        audit = make_ended_audit(engine, AuditState.FAILED, message="Name another model.")
        body = client.get(f"/v1/audits/{audit.id}").json()
        assert body["error"] == {
            "code": "unsupported_model",
            "message": "Name another model.",
            "field": "model.reference",
        }
        assert body["results"] is None

    def test_an_unchanged_audit_is_not_sent_again(self, client: TestClient, engine: Engine) -> None:
        audit = make_audit(engine)
        etag = client.get(f"/v1/audits/{audit.id}").headers["ETag"]

        def look(tags: str) -> int:
            response = client.get(f"/v1/audits/{audit.id}", headers={"If-None-Match": tags})
            if response.status_code == 304:
                assert response.content == b""
                assert response.headers["ETag"] == etag
                assert response.headers["Retry-After"] == "2"
            return response.status_code

        assert look(etag) == look(f'"old", W/{etag}') == look("*") == 304
        assert look('"old"') == 200
        claim_of(engine, audit)
        assert look(etag) == 200

    def test_an_unknown_audit_is_not_found(self, client: TestClient) -> None:
        response = client.get("/v1/audits/aud_nope")
        assert response.status_code == 404
        assert response.json()["detail"] == "There is no audit 'aud_nope'."


class TestList:
    def ids(self, client: TestClient, query: str = "") -> list[str]:
        response = client.get(f"/v1/audits?{query}")
        assert response.status_code == 200, response.text
        return [audit["id"] for audit in response.json()["data"]]

    def test_the_newest_is_first(self, client: TestClient, engine: Engine) -> None:
        made = [make_audit(engine).id for _ in range(3)]
        assert self.ids(client) == made[::-1]

    def test_filters(self, client: TestClient, engine: Engine) -> None:
        plain = make_audit(engine)
        failed = make_ended_audit(engine, AuditState.FAILED)
        other = make_audit(
            engine,
            model={"reference": "hf://org/other"},
            train={"reference": "upload:ds_1"},
        )
        assert self.ids(client, "state=failed") == [failed.id]
        assert self.ids(client, "model=hf://org/other") == [other.id]
        assert self.ids(client, "dataset=upload:ds_1") == [other.id]
        middle = failed.created_at.isoformat().replace("+", "%2B")
        assert self.ids(client, f"created_before={middle}") == [plain.id]
        assert self.ids(client, f"created_after={middle}") == [other.id, failed.id]
        assert client.get("/v1/audits?state=lost").status_code == 422
        assert client.get("/v1/audits?created_after=2026-01-01T00:00:00").status_code == 422

    def test_pages_stay_whole_while_audits_come_and_go(
        self, client: TestClient, engine: Engine
    ) -> None:
        """Audits that come between two pages shift nothing; one that goes leaves no gap."""
        made = [make_audit(engine).id for _ in range(7)][::-1]
        seen: list[str] = []
        url = "/v1/audits?limit=2"
        while url:
            response = client.get(url)
            page = response.json()
            seen += [audit["id"] for audit in page["data"]]
            url = response.links.get("next", {}).get("url", "")
            assert page["has_more"] == bool(url) == (page["next_cursor"] is not None)
            make_audit(engine)
            with transaction(engine) as session:
                session.delete(session.get_one(Audit, seen[-1]))  # where the cursor stands
        assert seen == made

    def test_a_made_up_cursor_is_refused(self, client: TestClient) -> None:
        for cursor in ("x", "%00", "MQ", "bnVsbA"):
            response = client.get(f"/v1/audits?cursor={cursor}")
            assert response.status_code == 422
            assert response.json()["errors"][0]["pointer"] == "query.cursor"


class TestCancel:
    def test_a_queued_audit_ends_at_once(self, client: TestClient, engine: Engine) -> None:
        audit = make_audit(engine)
        response = client.post(f"/v1/audits/{audit.id}/cancel")
        assert response.status_code == 202
        assert response.json()["state"] == "cancelled"
        assert response.json()["finished_at"] is not None
        with Session(engine) as session:
            assert session.scalars(select(WorkUnit)).one().state == UnitState.CANCELLED

    def test_a_running_audit_ends_when_its_worker_lets_go(
        self, client: TestClient, engine: Engine
    ) -> None:
        audit = make_audit(engine)
        claim = claim_of(engine, audit)
        response = client.post(f"/v1/audits/{audit.id}/cancel")
        assert response.json()["state"] == "preparing"
        assert response.json()["cancel_requested_at"] is not None
        assert work.renew(engine, claim, lease_seconds=60, done=0, total=1)
        work.stop_for_cancel(engine, claim)
        assert client.get(f"/v1/audits/{audit.id}").json()["state"] == "cancelled"

    def test_asking_again_changes_nothing(self, client: TestClient, engine: Engine) -> None:
        audit = make_audit(engine)
        first = client.post(f"/v1/audits/{audit.id}/cancel")
        again = client.post(f"/v1/audits/{audit.id}/cancel")
        assert again.status_code == 202
        assert again.json() == first.json()
        assert again.headers["ETag"] == first.headers["ETag"]

    def test_an_ended_audit_cannot_be_cancelled(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        for audit in (
            make_finished_audit(engine, settings),
            make_ended_audit(engine, AuditState.FAILED),
        ):
            response = client.post(f"/v1/audits/{audit.id}/cancel")
            assert response.status_code == 409
            assert response.json()["state"] == audit.state


class TestDelete:
    def test_rows_and_files_go(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings)
        kept = make_finished_audit(engine, settings, num_train=3)
        assert client.delete(f"/v1/audits/{audit.id}").status_code == 204
        assert client.get(f"/v1/audits/{audit.id}").status_code == 404
        assert [path.name for path in (settings.data_dir / "audits").iterdir()] == [kept.id]
        with Session(engine) as session:
            for table in (RankedSample, TrainingSample):
                assert session.scalar(select(func.count()).select_from(table)) == 3
        assert client.delete(f"/v1/audits/{audit.id}").status_code == 404

    def test_a_running_audit_is_not_deleted(self, client: TestClient, engine: Engine) -> None:
        audit = make_audit(engine)
        response = client.delete(f"/v1/audits/{audit.id}")
        assert response.status_code == 409
        assert "Cancel it" in response.json()["detail"]
        assert response.headers["Retry-After"] == "2"


def test_times_are_utc_and_in_order(client: TestClient, engine: Engine, settings: Settings) -> None:
    audit = make_finished_audit(engine, settings)
    assert audit.created_at.utcoffset() == timedelta(0)
    body = client.get(f"/v1/audits/{audit.id}").json()
    assert body["created_at"].endswith("Z")
    assert body["created_at"] < body["finished_at"]
