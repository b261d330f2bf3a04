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
from tests.app.deciding import Desk
from tests.factories import (
    make_audit,
    make_ended_audit,
    make_finished_audit,
    make_ranking,
)


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


def test_reviewers_need_not_know_of_one_another(
    new_client: Callable[[str], TestClient], finished: Audit
) -> None:
    """Another tenant finds nothing, whatever it does."""
    desk = Desk(new_client("stranger"), finished)
    assert desk.post("keep", indices=[1]).status_code == 404
