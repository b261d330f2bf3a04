"""Further rankings of a finished audit over HTTP: asked for, followed, read, deleted."""

import hashlib
from datetime import datetime, timedelta
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from app.audits.folders import audit_folder
from app.audits.models import Audit, AuditState, Ranking
from app.db import transaction
from app.main import create_app
from app.settings import Settings
from app.work import repository as work
from app.work.claims import Failure
from app.work.models import Stage, WorkUnit
from tests.factories import (
    long_ago,
    make_audit,
    make_ended_audit,
    make_finished_audit,
    make_ranking,
)


@pytest.fixture
def finished(engine: Engine, settings: Settings) -> Audit:
    return make_finished_audit(engine, settings)


def path_of(audit: Audit, ranking: Ranking | None = None, *rest: str) -> str:
    parts = [f"/v1/audits/{audit.id}/rankings", *([ranking.id] if ranking else []), *rest]
    return "/".join(parts)


COSINE = {"estimator": "grad_cosine", "aggregation": "rank"}


def own(audit: Audit) -> str:
    return f"{path_of(audit)}/{audit.summary['ranking_id']}"


class TestAsking:
    def test_a_ranking_is_accepted_with_its_unit_of_work(
        self, client: TestClient, engine: Engine, finished: Audit
    ) -> None:
        response = client.post(path_of(finished), json={"estimator": "loss", "flag": {"count": 3}})
        assert response.status_code == 202
        ranking = response.json()
        assert response.headers["Location"] == f"{path_of(finished)}/{ranking['id']}"
        assert response.headers["Retry-After"] == "2"
        assert (ranking["state"], ranking["done"], ranking["is_own"]) == ("queued", False, False)
        assert ranking["request"] == {
            "estimator": "loss",
            "layers": "auto",
            "aggregation": "auto",
            "vote_fraction": 0.3,
            "trim_fraction": 0.1,
            "common_share": 0.5,
            "correct_only": None,
            "flag": {"fraction": None, "count": 3},
        }
        with Session(engine) as session:
            unit = session.scalars(select(WorkUnit).where(WorkUnit.stage == Stage.RANK)).one()
        assert (unit.audit_id, unit.ranking_id) == (finished.id, ranking["id"])
        assert client.get(response.headers["Location"]).json() == ranking

    def test_the_audits_own_flag_is_the_default(self, client: TestClient, finished: Audit) -> None:
        asked = {"estimator": "loss"}
        ranking = client.post(path_of(finished), json=asked).json()
        assert ranking["request"]["flag"] == {"fraction": 0.1, "count": None}

    @pytest.mark.parametrize(
        ("body", "pointer", "says"),
        [
            ({"estimator": "datainf"}, "#/estimator", "it has grad_cosine, loss, random, self_inf"),
            ({"estimator": "oracle"}, "#/estimator", "did not compute oracle"),
            ({"estimator": "magic"}, "#/estimator", "Input should be"),
            ({**COSINE, "layers": "03-01"}, "#/layers", "write 01-03"),
            ({"layers": "middle"}, "#/layers", "pattern"),
            ({"estimator": "loss", "layers": "CL"}, "#/layers", "set layers to all"),
            ({**COSINE, "layers": "WE"}, "#/layers", "word_embeddings to true in another audit"),
            ({"layers": "CL"}, "#/estimator", "planted no probes"),
            ({"estimator": "grad_cosine"}, "#/layers", "planted no probes"),
            ({"estimator": "consensus"}, "#/estimator", "planted no probes"),
            ({"vote_fraction": 0}, "#/vote_fraction", "greater than 0"),
            ({"flag": {}}, "#/flag", "either fraction or count"),
            ({"k": 3}, "#/k", "Extra inputs"),
        ],
    )
    def test_what_does_not_fit_is_refused_by_its_field(
        self, client: TestClient, finished: Audit, body: dict[str, Any], pointer: str, says: str
    ) -> None:
        response = client.post(path_of(finished), json=body)
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == pointer
        assert says in response.json()["errors"][0]["detail"]

    def test_the_lengths_of_all_gradients_are_there_without_being_asked(
        self, client: TestClient, finished: Audit
    ) -> None:
        body = {"estimator": "self_influence", "layers": "CL", "aggregation": "mean"}
        assert client.post(path_of(finished), json=body).status_code == 202

    def test_an_audit_that_has_not_succeeded_says_its_state(
        self, client: TestClient, engine: Engine
    ) -> None:
        queued = make_audit(engine)
        failed = make_ended_audit(engine, AuditState.FAILED)
        for audit, state in ((queued, "queued"), (failed, "failed")):
            response = client.post(path_of(audit), json={"estimator": "loss"})
            assert (response.status_code, response.json()["state"]) == (409, state)
        assert client.get(path_of(queued)).json()["data"] == []

    def test_an_unknown_audit_is_not_found(self, client: TestClient, finished: Audit) -> None:
        for response in (
            client.post("/v1/audits/aud_nope/rankings", json={"estimator": "loss"}),
            client.get("/v1/audits/aud_nope/rankings"),
            client.get(f"{path_of(finished)}/rnk_nope"),
            client.get(f"{path_of(finished)}/rnk_nope/suspects"),
            client.delete(f"{path_of(finished)}/rnk_nope"),
        ):
            assert response.status_code == 404


class TestIdempotency:
    def ask(self, client: TestClient, audit: Audit, key: str, **body: Any) -> Any:
        asked = {**COSINE, "layers": "all", **body}
        return client.post(path_of(audit), json=asked, headers={"Idempotency-Key": key})

    def test_the_same_key_is_the_same_ranking(self, client: TestClient, finished: Audit) -> None:
        first, again = (self.ask(client, finished, "k", layers="CL") for _ in range(2))
        assert first.json()["id"] == again.json()["id"]
        assert "Idempotent-Replayed" not in first.headers
        assert again.headers["Idempotent-Replayed"] == "true"

    def test_with_another_body_it_is_refused(self, client: TestClient, finished: Audit) -> None:
        self.ask(client, finished, "k", layers="CL")
        response = self.ask(client, finished, "k", layers="00")
        assert response.status_code == 422
        assert "new key for a new ranking" in response.json()["detail"]

    def test_a_key_belongs_to_one_audit(
        self, client: TestClient, engine: Engine, settings: Settings, finished: Audit
    ) -> None:
        other = make_finished_audit(engine, settings)
        ids = {self.ask(client, audit, "k").json()["id"] for audit in (finished, other)}
        assert len(ids) == 2

    def test_a_deleted_ranking_is_not_made_again(self, client: TestClient, finished: Audit) -> None:
        ranking = self.ask(client, finished, "k").json()
        assert client.delete(ranking["links"]["self"]).status_code == 204
        response = self.ask(client, finished, "k")
        assert response.status_code == 409
        assert "This key's ranking" in response.json()["detail"]


class TestFollowing:
    def test_the_audits_own_ranking_is_the_first(
        self, client: TestClient, engine: Engine, settings: Settings, finished: Audit
    ) -> None:
        later = [make_ranking(engine, finished).id for _ in range(3)]
        make_ranking(engine, make_finished_audit(engine, settings))
        url, seen = f"{path_of(finished)}?limit=3", []
        while url:
            response = client.get(url)
            seen += [(item["id"], item["is_own"]) for item in response.json()["data"]]
            url = response.links.get("next", {}).get("url", "")
        assert seen == [(finished.summary["ranking_id"], True), *((name, False) for name in later)]

    def test_the_own_ranking_says_what_the_audit_says(
        self, client: TestClient, finished: Audit
    ) -> None:
        ranking = client.get(own(finished)).json()
        results = client.get(f"/v1/audits/{finished.id}").json()["results"]
        assert (ranking["state"], ranking["done"]) == ("succeeded", True)
        for name in ("num_flagged", "detection", "warnings"):
            assert ranking["results"][name] == results[name]
        for name, file in ranking["results"]["files"].items():
            assert file["sha256"] == results["files"][name]["sha256"]
            assert (
                client.get(file["href"]).content
                == client.get(results["files"][name]["href"]).content
            )
        for rest in ("suspects", "samples/3", "layers"):
            there = client.get(f"/v1/audits/{finished.id}/{rest}").json()
            assert client.get(f"{own(finished)}/{rest}").json() == there

    def test_an_unchanged_ranking_is_not_sent_again(
        self, client: TestClient, engine: Engine, finished: Audit
    ) -> None:
        ranking = make_ranking(engine, finished)
        etag = client.get(path_of(finished, ranking)).headers["ETag"]
        headers = {"If-None-Match": etag}
        response = client.get(path_of(finished, ranking), headers=headers)
        assert (response.status_code, response.headers["Retry-After"]) == (304, "2")
        with Session(engine) as session:
            unit_id = session.scalars(
                select(WorkUnit.id).where(WorkUnit.ranking_id == ranking.id)
            ).one()
        work.claim(engine, unit_id, owner="one", lease_seconds=60)
        response = client.get(path_of(finished, ranking), headers=headers)
        assert (response.status_code, response.json()["state"]) == (200, "running")

    @pytest.mark.parametrize("rest", ["suspects", "suspects.csv", "samples/0", "layers"])
    def test_before_its_end_it_has_no_results(
        self, client: TestClient, engine: Engine, finished: Audit, rest: str
    ) -> None:
        ranking = make_ranking(engine, finished)
        response = client.get(path_of(finished, ranking, rest))
        assert (response.status_code, response.headers["Retry-After"]) == (409, "2")
        assert "is queued and has no results yet" in response.json()["detail"]

    def test_a_failed_ranking_says_what_to_change(
        self, client: TestClient, engine: Engine, finished: Audit
    ) -> None:
        ranking = make_ranking(engine, finished)
        with transaction(engine) as session:
            failure = Failure("unknown_layers", "There is no block 9.", "layers")
            work.fail_owner(session, session.get_one(Ranking, ranking.id), failure)
        answer = client.get(path_of(finished, ranking)).json()
        assert (answer["state"], answer["done"]) == ("failed", True)
        assert answer["error"] == {
            "code": "unknown_layers",
            "message": "There is no block 9.",
            "field": "layers",
        }
        response = client.get(path_of(finished, ranking, "suspects"))
        assert response.status_code == 409
        assert "There is no block 9." in response.json()["detail"]
        assert client.get(f"/v1/audits/{finished.id}").json()["state"] == "succeeded"


class TestReading:
    @pytest.fixture
    def later(self, engine: Engine, settings: Settings, finished: Audit) -> Ranking:
        """A ranking in the order of the indices; the audit's own is the other way round."""
        return make_ranking(engine, finished, settings=settings)

    def test_it_has_suspects_of_its_own(
        self, client: TestClient, finished: Audit, later: Ranking
    ) -> None:
        page = client.get(path_of(finished, later, "suspects?limit=4")).json()
        assert page["ranking_id"] == later.id
        assert [row["index"] for row in page["data"]] == [0, 1, 2, 3]
        url = path_of(finished, later, "suspects?label=pos&min_score=0.2&limit=2")
        seen = []
        while url:
            response = client.get(url)
            seen += [row["index"] for row in response.json()["data"]]
            url = response.links.get("next", {}).get("url", "")
        assert seen == [2, 4, 6, 8]
        own_page = client.get(f"/v1/audits/{finished.id}/suspects?limit=1").json()
        assert own_page["data"][0]["index"] == 9

    def test_its_files_are_its_own(
        self, client: TestClient, finished: Audit, later: Ranking
    ) -> None:
        links = client.get(path_of(finished, later)).json()["links"]
        for name in ("parquet", "csv", "jsonl"):
            response = client.get(links[f"suspects.{name}"])
            assert response.status_code == 200
            sha256 = hashlib.sha256(response.content).hexdigest()
            assert response.headers["ETag"] == f'"{sha256}"'
            assert f"{later.id}-suspects.{name}" in response.headers["content-disposition"]
            own_file = client.get(f"/v1/audits/{finished.id}/suspects.{name}")
            assert own_file.content != response.content
        part = client.get(links["suspects.csv"], headers={"Range": "bytes=0-3"})
        assert (part.status_code, part.content) == (206, b'"ran')

    def test_a_sample_and_the_layers_are_those_of_the_ranking(
        self, client: TestClient, finished: Audit, later: Ranking
    ) -> None:
        sample = client.get(path_of(finished, later, "samples/3")).json()
        assert (sample["rank"], sample["ranking_id"]) == (3, later.id)
        layers = client.get(path_of(finished, later, "layers")).json()
        assert list(layers["layer_groups"]) == ["all"]

    def test_a_file_that_is_gone_is_not_found(
        self, client: TestClient, finished: Audit, later: Ranking, settings: Settings
    ) -> None:
        folder = audit_folder(settings.data_dir, finished.id) / later.folder
        (folder / "suspects.csv").unlink()
        response = client.get(path_of(finished, later, "suspects.csv"))
        assert response.status_code == 404
        assert path_of(finished, later, "suspects") in response.json()["detail"]


class TestDeleting:
    def test_it_goes_with_its_rows_and_files(
        self, client: TestClient, engine: Engine, settings: Settings, finished: Audit
    ) -> None:
        later = make_ranking(engine, finished, settings=settings)
        folder = audit_folder(settings.data_dir, finished.id) / later.folder
        assert folder.exists()
        assert client.delete(path_of(finished, later)).status_code == 204
        assert client.get(path_of(finished, later)).status_code == 404
        assert not folder.exists()
        assert client.get(f"/v1/audits/{finished.id}/suspects.csv").status_code == 200

    def test_the_audits_own_stays(self, client: TestClient, finished: Audit) -> None:
        response = client.delete(own(finished))
        assert response.status_code == 409
        assert f"DELETE /v1/audits/{finished.id} removes both" in response.json()["detail"]
        assert client.get(own(finished)).status_code == 200

    def test_one_that_has_not_ended_is_withdrawn(
        self, client: TestClient, engine: Engine, finished: Audit
    ) -> None:
        ranking = make_ranking(engine, finished)
        assert client.delete(path_of(finished, ranking)).status_code == 204
        with Session(engine) as session:
            assert not session.scalars(select(WorkUnit).where(WorkUnit.stage == "rank")).all()

    def test_an_audit_is_not_deleted_under_a_ranking_that_is_being_made(
        self, client: TestClient, engine: Engine, finished: Audit
    ) -> None:
        ranking = make_ranking(engine, finished)
        response = client.delete(f"/v1/audits/{finished.id}")
        assert (response.status_code, response.headers["Retry-After"]) == (409, "2")
        assert ranking.id in response.json()["detail"]
        client.delete(path_of(finished, ranking))
        assert client.delete(f"/v1/audits/{finished.id}").status_code == 204

    def test_an_audit_takes_its_rankings_along(
        self, client: TestClient, engine: Engine, settings: Settings, finished: Audit
    ) -> None:
        make_ranking(engine, finished, settings=settings)
        assert client.delete(f"/v1/audits/{finished.id}").status_code == 204
        with Session(engine) as session:
            assert not session.scalars(select(Ranking)).all()
        assert not audit_folder(settings.data_dir, finished.id).exists()


class TestWhatIsKept:
    def test_the_audit_says_how_much_and_until_when(
        self, client: TestClient, engine: Engine, finished: Audit
    ) -> None:
        answer = client.get(f"/v1/audits/{finished.id}").json()
        until = datetime.fromisoformat(answer["kept"]["until"])
        assert until - datetime.fromisoformat(answer["finished_at"]) == timedelta(days=30)
        assert answer["kept"]["influence_bytes"] == 1_000
        sizes = [file["bytes"] for file in answer["results"]["files"].values()]
        assert answer["kept"]["results_bytes"] == sum(sizes)
        for audit in (make_audit(engine), make_ended_audit(engine, AuditState.FAILED)):
            assert client.get(f"/v1/audits/{audit.id}").json()["kept"] is None

    def test_without_a_time_it_stays_as_long_as_the_audit(
        self, api: FastAPI, client: TestClient, settings: Settings, engine: Engine, finished: Audit
    ) -> None:
        for_ever = settings.model_copy(update={"influence_days": 0})
        with transaction(engine) as session:
            session.execute(update(Audit).values(finished_at=long_ago()))
        app = create_app(for_ever, engine, api.state.celery)
        patient = TestClient(app, headers={"Authorization": client.headers["Authorization"]})
        assert patient.get(f"/v1/audits/{finished.id}").json()["kept"]["until"] is None
        assert patient.post(path_of(finished), json={"estimator": "loss"}).status_code == 202

    def test_when_it_is_over_no_further_ranking_is_taken(
        self, client: TestClient, engine: Engine, finished: Audit
    ) -> None:
        """Also in the moment before the files are gone."""
        with transaction(engine) as session:
            session.execute(update(Audit).values(finished_at=long_ago()))
        response = client.post(path_of(finished), json={"estimator": "loss"})
        assert response.status_code == 409
        assert "were deleted on 2020-01-31" in response.json()["detail"]
        assert "Submit the audit again" in response.json()["detail"]
        assert client.get(f"{own(finished)}/suspects").status_code == 200
