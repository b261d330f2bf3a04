"""Decisions over HTTP: made on samples or on a whole filter, previewed, listed, taken back."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from app.audits.models import Audit, AuditState, TrainingSample
from app.db import transaction
from app.decisions.models import Decision, DecisionBatch, DecisionChange
from app.keys.service import create_key
from app.main import create_app
from app.settings import Settings
from tests.factories import (
    make_audit,
    make_ended_audit,
    make_finished_audit,
    make_ranking,
    suggest_labels,
)


@pytest.fixture
def finished(engine: Engine, settings: Settings) -> Audit:
    """Ten samples; sample i stands at rank 9 - i, even ones are pos, the rest neg."""
    audit = make_finished_audit(engine, settings)
    suggest_labels(engine, audit.summary["ranking_id"])
    return audit


class Desk:
    """Where one reviewer works on one audit."""

    def __init__(self, client: TestClient, audit: Audit, reviewer: str | None = None) -> None:
        self.client = client
        self.path = f"/v1/audits/{audit.id}"
        self.reviewer = {"reviewer": reviewer} if reviewer else {}

    def post(self, action: str, *, headers: dict[str, str] | None = None, **body: Any) -> Any:
        body = {"action": action, **self.reviewer, **body}
        return self.client.post(f"{self.path}/decisions", json=body, headers=headers)

    def decide(self, action: str, *indices: int, **body: Any) -> dict[str, Any]:
        named = {"indices": list(indices)} if indices else {}
        response = self.post(action, **{**named, **body})
        assert response.status_code == 201, response.text
        batch: dict[str, Any] = response.json()
        return batch

    def undo(self, batch: dict[str, Any]) -> dict[str, Any]:
        response = self.client.post(
            f"{self.path}/decisions/{batch['id']}/undo", json=self.reviewer or None
        )
        assert response.status_code == 200, response.text
        undone: dict[str, Any] = response.json()
        return undone

    def suspects(self, **query: Any) -> list[dict[str, Any]]:
        response = self.client.get(f"{self.path}/suspects", params={"limit": 1000, **query})
        assert response.status_code == 200, response.text
        data: list[dict[str, Any]] = response.json()["data"]
        return data

    def decided(self) -> dict[int, tuple[str, str | None]]:
        """Return action and label of every decided sample, by index."""
        return {
            of["index"]: (of["decision"]["action"], of["decision"]["label"])
            for of in self.suspects(decision="any")
        }

    def audit(self) -> dict[str, Any]:
        audit: dict[str, Any] = self.client.get(self.path).json()
        return audit


@pytest.fixture
def desk(client: TestClient, finished: Audit) -> Desk:
    return Desk(client, finished)


class TestDeciding:
    def test_a_decision_is_stored_with_who_and_when(self, desk: Desk) -> None:
        batch = desk.decide("accept", 9, 8)
        assert batch["id"].startswith("dcb_")
        assert (batch["action"], batch["reviewer"]) == ("accept", "test")  # the key's name
        assert [batch[name] for name in ("num_samples", "num_changed", "num_skipped")] == [2, 2, 0]
        assert (batch["decision_version"], batch["undone_at"]) == (1, None)
        first, second, third = desk.suspects(limit=3)
        assert first["decision"] == {
            "action": "accept",
            "label": "pos",
            "text": None,
            "reviewer": "test",
            "decided_at": batch["created_at"],
            "version": 1,
        }
        assert (second["decision"]["label"], third["decision"]) == ("neg", None)

    def test_one_sample_shows_its_decision_too(self, desk: Desk) -> None:
        desk.decide("edit", 3, label="pos")
        sample = desk.client.get(f"{desk.path}/samples/3").json()
        assert (sample["decision"]["action"], sample["decision"]["label"]) == ("edit", "pos")

    def test_the_audit_counts_them_and_its_etag_changes(self, desk: Desk) -> None:
        before = desk.client.get(desk.path)
        assert (before.json()["decision_version"], before.json()["num_decided"]) == (0, 0)
        desk.decide("keep", 1, 2)
        desk.decide("drop", 2, 3)
        after = desk.client.get(desk.path)
        assert (after.json()["decision_version"], after.json()["num_decided"]) == (2, 3)
        assert after.headers["ETag"] != before.headers["ETag"]
        desk.decide("clear", 1, 4)
        assert desk.audit()["num_decided"] == 2

    def test_a_later_decision_replaces_the_earlier(self, desk: Desk) -> None:
        desk.decide("drop", 5)
        batch = desk.decide("keep", 5)
        assert desk.decided() == {5: ("keep", None)}
        assert batch["num_changed"] == 1
        assert desk.decide("keep", 5)["num_changed"] == 0

    def test_clear_takes_back_what_is_decided(self, desk: Desk) -> None:
        desk.decide("keep", 1, 2)
        batch = desk.decide("clear", 2, 3)
        assert (batch["num_samples"], batch["num_changed"]) == (2, 1)
        assert desk.decided() == {1: ("keep", None)}

    def test_naming_a_sample_twice_is_naming_it_once(self, desk: Desk) -> None:
        assert desk.decide("keep", 5, 5, 5)["num_samples"] == 1

    def test_decisions_are_the_audits_not_the_rankings(
        self, desk: Desk, engine: Engine, settings: Settings, finished: Audit
    ) -> None:
        other = make_ranking(engine, finished, settings=settings)
        batch = desk.decide("drop", filter={"max_score": 0.1}, ranking_id=other.id)
        assert batch["ranking_id"] == other.id
        assert set(desk.decided()) == {0, 1}  # the lowest of the other ranking
        path = f"{desk.path}/rankings/{other.id}/suspects?decision=drop"
        assert [of["index"] for of in desk.client.get(path).json()["data"]] == [0, 1]
        assert desk.client.delete(f"{desk.path}/rankings/{other.id}").status_code == 204
        assert set(desk.decided()) == {0, 1}

    def test_a_completion_is_edited_as_text(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        desk = Desk(client, make_finished_audit(engine, settings, has_labels=False))
        desk.decide("edit", 2, text=" a better answer")
        assert desk.suspects(decision="edit")[0]["decision"]["text"] == " a better answer"

    def test_they_go_with_the_audit(self, desk: Desk, engine: Engine) -> None:
        batch = desk.decide("keep", 1)
        desk.decide("drop", 1)
        assert desk.client.delete(desk.path).status_code == 204
        with Session(engine) as session:
            for table in (DecisionBatch, Decision, DecisionChange):
                assert session.scalars(select(func.count()).select_from(table)).one() == 0
        response = desk.post("keep", indices=[1])
        assert (response.status_code, "no audit" in response.json()["detail"]) == (404, True)
        undo = desk.client.post(f"{desk.path}/decisions/{batch['id']}/undo")
        assert undo.status_code == 404


class TestReviewers:
    def test_without_keys_they_name_themselves(
        self, settings: Settings, engine: Engine, finished: Audit
    ) -> None:
        api = create_app(settings.model_copy(update={"require_keys": False}), engine)
        client = TestClient(api, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 5000))
        assert Desk(client, finished).decide("keep", 1)["reviewer"] == "anonymous"
        assert Desk(client, finished, "anna").decide("keep", 2)["reviewer"] == "anna"
        undone = Desk(client, finished, "ben").undo(Desk(client, finished).decide("keep", 3))
        assert (undone["reviewer"], undone["undone_by"]) == ("anonymous", "ben")

    def test_with_keys_nobody_takes_anothers_name(
        self, client: TestClient, finished: Audit
    ) -> None:
        assert Desk(client, finished, "anna").decide("keep", 1)["reviewer"] == "test"


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "pointer", "says"),
        [
            ({"action": "keep"}, "#/indices", "either indices or filter"),
            ({"action": "keep", "indices": [1], "filter": {}}, "#/indices", "either indices or"),
            ({"action": "keep", "indices": []}, "#/indices", "at least 1 item"),
            ({"action": "keep", "indices": [1, 10]}, "#/indices/1", "no sample 10; it has 10"),
            ({"action": "keep", "indices": [-1]}, "#/indices/0", "greater than or equal to 0"),
            ({"action": "burn", "indices": [1]}, "#/action", "'accept', 'keep', 'drop'"),
            ({"action": "keep", "label": "pos", "indices": [1]}, "#/label", "only edit"),
            ({"action": "edit", "indices": [1]}, "#/label", "takes a label"),
            ({"action": "edit", "label": "x", "indices": [1]}, "#/label", "it has neg, pos"),
            ({"action": "edit", "text": "x", "indices": [1]}, "#/text", "a label, not a text"),
            ({"action": "edit", "text": " ", "indices": [1]}, "#/text", "not blank"),
            ({"action": "keep", "filter": {"lable": "x"}}, "#/filter/lable", "not permitted"),
            ({"action": "keep", "filter": {"decision": ["x"]}}, "#/filter/decision/0", "'none'"),
            ({"action": "keep", "indices": [1], "as_of": 1}, "#/as_of", "decision_version is 0"),
            ({"action": "keep", "indices": [1], "reviewer": " "}, "#/reviewer", "at least 1"),
            ({"action": "accept", "indices": [9, 5]}, "#/indices", "1 sample of these 2 has no"),
        ],
    )
    def test_what_does_not_fit_is_refused_by_its_field(
        self, desk: Desk, body: dict[str, Any], pointer: str, says: str
    ) -> None:
        response = desk.client.post(f"{desk.path}/decisions", json=body)
        assert response.status_code == 422, response.text
        assert response.json()["errors"][0]["pointer"] == pointer
        assert says in response.json()["errors"][0]["detail"]
        assert desk.audit()["decision_version"] == 0

    @pytest.mark.parametrize("rest", ["", "/preview"])
    def test_an_audit_without_results_says_its_state(
        self, client: TestClient, engine: Engine, rest: str
    ) -> None:
        for audit in (make_audit(engine), make_ended_audit(engine, AuditState.FAILED)):
            path = f"/v1/audits/{audit.id}/decisions{rest}"
            response = client.post(path, json={"action": "keep", "indices": [0]})
            assert (response.status_code, response.json()["state"]) == (409, audit.state)
            assert client.get(f"/v1/audits/{audit.id}/decisions/precision").status_code == 409
            assert client.get(f"/v1/audits/{audit.id}/suspects/summary").status_code == 409

    def test_what_is_unknown_is_not_found(self, desk: Desk) -> None:
        body = {"action": "keep", "indices": [0]}
        decisions = f"{desk.path}/decisions"
        for response in (
            desk.client.post("/v1/audits/aud_nope/decisions", json=body),
            desk.client.get("/v1/audits/aud_nope/decisions"),
            desk.client.post(decisions, json={**body, "ranking_id": "rnk_nope"}),
            desk.client.post(f"{decisions}/dcb_nope/undo"),
            desk.client.get(f"{decisions}/precision?ranking_id=rnk_nope"),
            desk.client.get(f"{desk.path}/suspects?ranking_id=rnk_nope"),
            desk.client.get(f"{desk.path}/suspects/summary?ranking_id=rnk_nope"),
        ):
            assert response.status_code == 404, response.text

    def test_a_language_models_samples_have_nothing_to_accept(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        desk = Desk(client, make_finished_audit(engine, settings, has_labels=False))
        assert "have no suggested label" in desk.post("accept", indices=[1, 2]).json()["detail"]
        response = desk.post("edit", indices=[1], label="pos")
        assert "it has none: edit takes a text" in response.json()["detail"]
        batch = desk.decide("accept", filter={})
        assert (batch["num_samples"], batch["num_skipped"], batch["num_changed"]) == (10, 10, 0)

    def test_what_is_not_finite_has_no_suggestion_to_trust(
        self, desk: Desk, engine: Engine
    ) -> None:
        with transaction(engine) as session:
            is_first = TrainingSample.sample_index == 9
            session.execute(update(TrainingSample).where(is_first).values(non_finite=True))
        assert "(9)" in desk.post("accept", indices=[8, 9]).json()["detail"]
        assert desk.decide("accept", filter={})["num_skipped"] == 2


class TestWholeFilters:
    def test_all_that_match_are_decided_not_a_page(self, desk: Desk) -> None:
        batch = desk.decide("drop", filter={"label": "neg", "max_noise_probability": 0.8})
        assert batch["filter"] == {"label": "neg", "max_noise_probability": 0.8}
        assert set(desk.decided()) == {7, 5, 3, 1}
        assert batch["num_changed"] == 4

    def test_accept_skips_and_counts_what_has_no_suggestion(self, desk: Desk) -> None:
        batch = desk.decide("accept", filter={"min_noise_probability": 0.5})
        assert [batch[name] for name in ("num_samples", "num_skipped", "num_changed")] == [6, 1, 5]
        assert desk.decided() == {
            9: ("accept", "pos"),
            8: ("accept", "neg"),
            7: ("accept", "pos"),
            6: ("accept", "neg"),
            4: ("accept", "neg"),
        }

    def test_undecided_ones_alone(self, desk: Desk) -> None:
        desk.decide("keep", 9, 8)
        batch = desk.decide("drop", filter={"flagged": False, "decision": "none"})
        assert (batch["num_samples"], len(desk.decided())) == (8, 10)
        assert desk.decide("clear", filter={"decision": ["keep"]})["num_changed"] == 2
        assert desk.audit()["num_decided"] == 8

    def test_an_empty_filter_is_everything(self, desk: Desk) -> None:
        assert desk.decide("keep", filter={})["num_changed"] == 10

    def test_a_preview_counts_and_stores_nothing(self, desk: Desk) -> None:
        body = {"action": "accept", "filter": {"flagged": False}}
        preview = desk.client.post(f"{desk.path}/decisions/preview", json=body)
        assert preview.status_code == 200
        assert preview.json() == {
            "num_samples": 8,
            "num_skipped": 1,
            "num_conflicts": 0,
            "decision_version": 0,
        }
        assert desk.decided() == {}
        assert desk.client.get(f"{desk.path}/decisions").json()["data"] == []


class TestTwoReviewers:
    """Two reviewers with keys of their own names."""

    @pytest.fixture
    def desks(
        self, client: TestClient, finished: Audit, engine: Engine, api: FastAPI
    ) -> list[Desk]:
        return [self.desk(engine, api, finished, name) for name in ("anna", "ben")]

    def desk(self, engine: Engine, api: FastAPI, audit: Audit, name: str) -> Desk:
        key = create_key(engine, tenant="default", name=name, valid_days=1)
        return Desk(TestClient(api, headers={"Authorization": f"Bearer {key.secret}"}), audit)

    def test_what_somebody_else_decided_since_is_a_conflict(self, desks: list[Desk]) -> None:
        anna, ben = desks
        seen = anna.audit()["decision_version"]
        ben.decide("drop", 3, 4)
        response = anna.post("keep", indices=[2, 3, 4], as_of=seen)
        assert response.status_code == 409
        problem = response.json()
        assert problem["type"] == "urn:winnow:problem:conflict"
        assert problem["num_conflicts"] == 2
        assert problem["conflicts"] == [
            {"index": index, "reviewer": "ben", "version": 1} for index in (3, 4)
        ]
        assert "2 samples of these were decided by somebody else" in problem["detail"]
        assert set(anna.decided()) == {3, 4}, "nothing is stored"
        assert anna.decide("keep", 2, 3, 4, as_of=problem["decision_version"])["num_changed"] == 3

    def test_ones_own_decisions_are_no_conflict(self, desks: list[Desk]) -> None:
        anna, _ = desks
        anna.decide("drop", 3)
        assert anna.decide("keep", 3, as_of=0)["num_changed"] == 1

    def test_without_as_of_the_last_one_wins(self, desks: list[Desk]) -> None:
        anna, ben = desks
        ben.decide("drop", 3)
        assert anna.decide("keep", 3)["num_changed"] == 1

    def test_clearing_and_undoing_count_as_changes(self, desks: list[Desk]) -> None:
        anna, ben = desks
        batch = ben.decide("drop", 3, 4, 5)
        seen = batch["decision_version"]
        ben.decide("clear", 3)
        assert anna.post("keep", indices=[3], as_of=seen).status_code == 409
        ben.undo(batch)
        assert anna.post("keep", indices=[4], as_of=seen).status_code == 409
        body = {"action": "keep", "filter": {}, "as_of": seen}
        preview = anna.client.post(f"{anna.path}/decisions/preview", json=body).json()
        assert preview["num_conflicts"] == 3

    def test_at_once_they_come_one_after_the_other(self, desks: list[Desk], engine: Engine) -> None:
        """Each batch lies whole on all its samples, and versions have neither gap nor double."""
        start = threading.Barrier(2)
        answers: list[Any] = []

        def work(desk: Desk, action: str) -> None:
            for _ in range(8):
                start.wait()
                answers.append(desk.post(action, filter={}))

        threads = [
            threading.Thread(target=work, args=pair)
            for pair in zip(desks, ("keep", "drop"), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} == {201}
        assert sorted(answer.json()["decision_version"] for answer in answers) == [*range(1, 17)]
        assert len({action for action, _ in desks[0].decided().values()}) == 1
        assert desks[0].audit()["num_decided"] == 10

    def test_of_two_at_once_who_saw_the_same_one_is_told(self, desks: list[Desk]) -> None:
        start = threading.Barrier(2)
        codes: list[int] = []

        def work(desk: Desk) -> None:
            start.wait()
            codes.append(desk.post("keep", filter={"flagged": True}, as_of=0).status_code)

        threads = [threading.Thread(target=work, args=(desk,)) for desk in desks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(codes) == [201, 409]


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


def test_reviewers_need_not_know_of_one_another(
    new_client: Callable[[str], TestClient], finished: Audit
) -> None:
    """Another tenant finds nothing, whatever it does."""
    desk = Desk(new_client("stranger"), finished)
    assert desk.post("keep", indices=[1]).status_code == 404
