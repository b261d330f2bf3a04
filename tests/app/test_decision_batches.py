"""Batches of decisions: taken back, listed, made once under a key, and how precise they are."""

from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.settings import Settings
from tests.app.deciding import Desk
from tests.factories import (
    make_finished_audit,
    make_ranking,
    suggest_labels,
)


class TestUndo:
    def test_what_stood_before_stands_again(self, desk: Desk) -> None:
        desk.decide("keep", 1, 2)
        batch = desk.decide("drop", 2, 3)
        undone = desk.undo(batch)
        assert desk.decided() == {1: ("keep", None), 2: ("keep", None)}
        assert undone["undone_at"] is not None
        assert (undone["undone_by"], undone["num_skipped"]) == ("test", 0)
        assert (undone["decision_version"], desk.audit()["decision_version"]) == (3, 3)
        assert desk.audit()["num_decided"] == 2
        decision = desk.suspects(decision="keep")[0]["decision"]
        assert decision["version"] == 1, "it is the decision of then"

    def test_what_was_decided_again_since_stays(self, desk: Desk) -> None:
        first = desk.decide("drop", 1, 2, 3)
        desk.decide("keep", 2)
        assert desk.undo(first)["num_skipped"] == 1
        assert desk.decided() == {2: ("keep", None)}

    def test_an_undone_batch_does_not_come_back(self, desk: Desk) -> None:
        """It is taken out of what a later batch found, too."""
        desk.decide("accept", 2)
        first = desk.decide("drop", 2, 3)
        second = desk.decide("keep", 2, 3)
        desk.undo(first)
        desk.undo(second)
        assert desk.decided() == {2: ("accept", "pos")}

    def test_a_clear_is_undone_too(self, desk: Desk) -> None:
        desk.decide("drop", 1, 2)
        desk.undo(desk.decide("clear", filter={}))
        assert desk.decided() == {1: ("drop", None), 2: ("drop", None)}
        assert desk.audit()["num_decided"] == 2

    def test_a_second_undo_is_a_conflict(self, desk: Desk) -> None:
        batch = desk.decide("drop", 1)
        desk.undo(batch)
        response = desk.client.post(f"{desk.path}/decisions/{batch['id']}/undo")
        assert response.status_code == 409
        assert "test took this batch back already" in response.json()["detail"]

    def test_a_batch_is_undone_in_its_own_audit_only(
        self, desk: Desk, engine: Engine, settings: Settings
    ) -> None:
        batch = desk.decide("drop", 1)
        other = make_finished_audit(engine, settings)
        response = desk.client.post(f"/v1/audits/{other.id}/decisions/{batch['id']}/undo")
        assert response.status_code == 404


class TestList:
    def test_the_newest_comes_first_page_by_page(self, desk: Desk) -> None:
        batches = [desk.decide("keep", index) for index in range(5)]
        desk.undo(batches[2])
        url, seen = f"{desk.path}/decisions?limit=2", []
        while url:
            response = desk.client.get(url)
            seen += response.json()["data"]
            url = response.links.get("next", {}).get("url", "")
        assert [batch["id"] for batch in seen] == [batch["id"] for batch in reversed(batches)]
        assert [batch["undone_at"] is not None for batch in seen] == [*(0, 0, 1, 0, 0)]
        assert seen[0] == batches[-1]


class TestIdempotency:
    def test_the_same_key_decides_once(self, desk: Desk) -> None:
        headers = {"Idempotency-Key": "k"}
        first, again = (desk.post("drop", indices=[1], headers=headers) for _ in range(2))
        assert (first.status_code, again.status_code) == (201, 201)
        assert first.json() == again.json()
        assert again.headers["Idempotent-Replayed"] == "true"
        assert desk.audit()["decision_version"] == 1
        other = desk.post("keep", indices=[1], headers=headers)
        assert other.status_code == 422

    def test_the_same_key_undoes_once(self, desk: Desk) -> None:
        batch = desk.decide("drop", 1)
        path = f"{desk.path}/decisions/{batch['id']}/undo"
        answers = [desk.client.post(path, headers={"Idempotency-Key": "k"}) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json() == answers[1].json()
        assert "Idempotent-Replayed" not in answers[0].headers


class TestPrecision:
    def test_it_is_of_the_decided_samples_among_the_lowest(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings, num_train=40)
        suggest_labels(engine, audit.summary["ranking_id"])
        desk = Desk(client, audit)
        desk.decide("accept", 39, 38, 30)  # ranks 0, 1 and 9; the last keeps its own label
        desk.decide("keep", 37)
        desk.decide("drop", 25)
        desk.decide("edit", 24, label="pos")  # as it was
        answer = client.get(f"{desk.path}/decisions/precision").json()
        assert answer["ranking_id"] == audit.summary["ranking_id"]
        assert answer["at"] == [
            {"k": 10, "num_decided": 4, "num_wrong": 2, "precision": 0.5},
            {"k": 20, "num_decided": 6, "num_wrong": 3, "precision": 0.5},
        ]
        other = make_ranking(engine, audit, settings=settings)
        answer = client.get(f"{desk.path}/decisions/precision?ranking_id={other.id}").json()
        assert answer["at"][0] == {"k": 10, "num_decided": 0, "num_wrong": 0, "precision": None}
