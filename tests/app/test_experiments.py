"""Experiments over HTTP: what is accepted and refused, where they stand, and how they end."""

from typing import Any

import pytest
from celery import Celery
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.audits.folders import audit_folder
from app.audits.models import Audit, AuditState, IdempotencyKey
from app.db import transaction
from app.experiments.models import Experiment
from app.jobs import queue_length
from app.settings import Settings
from app.work import repository as work
from app.work.models import Stage, WorkUnit
from tests.app.experimenting import audits_of, number_of, post
from tests.factories import CSV_TABLE, experiment_body, experiment_task, finish_experiment


class TestSubmitting:
    def test_an_experiment_is_an_audit_for_every_task_and_seed(
        self, client: TestClient, engine: Engine, celery: Celery
    ) -> None:
        tasks = [experiment_task("reviews"), experiment_task("questions")]
        response = post(client, experiment_body(tasks=tasks, seeds=[3, 5], metadata={"run": "7"}))

        assert response.status_code == 202, response.text
        made = response.json()
        assert response.headers["Location"] == f"/v1/experiments/{made['id']}"
        assert response.headers["Retry-After"] == "15"
        assert (made["state"], made["done"], made["progress"]) == ("running", False, 0.0)
        assert (made["num_audits"], made["num_ended"]) == (4, 0)
        assert made["metadata"] == {"run": "7"}
        assert [(audit["task"], audit["seed"]) for audit in made["audits"]] == [
            *(("reviews", 3), ("reviews", 5)),
            *(("questions", 3), ("questions", 5)),
        ]
        audits = audits_of(engine, made["id"])
        assert [audit.id for audit in audits] == [audit["id"] for audit in made["audits"]]
        with Session(engine) as session:
            units = session.scalars(select(WorkUnit)).all()
            assert {unit.audit_id for unit in units} == {audit.id for audit in audits}
            assert {unit.stage for unit in units} == {Stage.PREPARE}
        assert queue_length(celery) == 4

    def test_one_seed_decides_everything_of_an_audit(
        self, client: TestClient, engine: Engine
    ) -> None:
        body = experiment_body(seeds=[3, 5], noise_fraction=0.1, verify={"fraction": 0.25})
        made = post(client, body).json()
        for seed, audit in zip((3, 5), audits_of(engine, made["id"]), strict=True):
            request = audit.request
            assert request["plant_noise"] == {"fraction": 0.1, "seed": seed}
            assert request["fine_tune"]["seed"] == seed
            assert request["seed"] == seed
            assert request["verify"]["seeds"] == [seed]
            assert request["verify"]["fraction"] == 0.25
            assert request["verify"]["arms"] == ["full", "random", "oracle"]
            assert request["verify"]["configurations"]["correct_only"] == [False]

    def test_its_audits_are_ordinary_ones(self, client: TestClient) -> None:
        made = post(client, experiment_body()).json()
        audit = client.get(made["audits"][0]["href"]).json()
        assert audit["experiment_id"] == made["id"]
        assert audit["request"]["estimators"] == ["grad_dot", "grad_cosine", "datainf"]
        listed = client.get("/v1/audits").json()["data"]
        assert {item["id"] for item in listed} == {item["id"] for item in made["audits"]}
        refused = client.delete(f"/v1/audits/{audit['id']}")
        assert refused.status_code == 409

    def test_the_same_key_makes_one_experiment(self, client: TestClient, engine: Engine) -> None:
        first, again = (post(client, experiment_body(), key="k") for _ in range(2))
        assert first.json() == again.json()
        assert again.headers["Idempotent-Replayed"] == "true"
        assert number_of(engine, Experiment) == 1
        assert number_of(engine, Audit) == 2
        other = post(client, experiment_body(seeds=[9]), key="k")
        assert other.status_code == 422
        assert "another body" in other.json()["detail"]

    def test_nothing_of_a_refused_one_stays(self, client: TestClient, engine: Engine) -> None:
        train = {"reference": "upload:ds_0"}
        tasks = [experiment_task("one"), experiment_task("two", train=train)]
        response = post(client, experiment_body(tasks=tasks), key="k")
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == "#/tasks/1/train/reference"
        for table in (Experiment, Audit, WorkUnit, IdempotencyKey):
            assert number_of(engine, table) == 0

    def test_uploads_in_use_cannot_be_deleted(self, client: TestClient) -> None:
        dataset = client.post("/v1/datasets", files={"file": ("a.csv", CSV_TABLE)}).json()
        task = experiment_task("reviews", train={"reference": dataset["reference"]})
        assert post(client, experiment_body(tasks=[task])).status_code == 202
        assert client.delete(f"/v1/datasets/{dataset['id']}").status_code == 409

    @pytest.mark.parametrize(
        ("changes", "pointer", "words"),
        [
            ({"tasks": []}, "#/tasks", "at least 1"),
            ({"seeds": [1, 1]}, "#/seeds/1", "twice"),
            ({"estimators": ["datainf", "datainf"]}, "#/estimators/1", "twice"),
            ({"aggregations": ["mean", "mean"]}, "#/aggregations/1", "twice"),
            ({"correct_only": [True, True]}, "#/correct_only/1", "twice"),
            ({"layer_groups": ["all", "all"]}, "#/layer_groups/1", "twice"),
            ({"layer_groups": ["03-02"]}, "#/layer_groups/0", "write 02-03"),
            ({"layer_groups": ["WE"]}, "#/layer_groups/0", "word_embeddings"),
            ({"layer_groups": "bands"}, "#/layer_groups", "valid list"),
            ({"layer_groups": ["bands"]}, "#/layer_groups/0", "pattern"),
            ({"tasks": [experiment_task("a")] * 2}, "#/tasks/1/name", "twice"),
            (
                {"tasks": [experiment_task("a", fine_tune={"seed": 1})]},
                "#/tasks/0/fine_tune/seed",
                "name them in seeds",
            ),
            (
                {"tasks": [experiment_task("a", test=None)]},
                "#/tasks/0/test",
                "name one in test",
            ),
            ({"verify": None}, "#/tasks/0/test", "only verify reads"),
            (
                {
                    "tasks": [experiment_task("a", fine_tune={"epochs": 1})],
                    "estimators": ["tracin"],
                },
                "#/estimators/0",
                "2 checkpoints",
            ),
            (
                {"estimators": ["grad_dot"], "verify": {"estimators": ["datainf"]}},
                "#/verify/estimators/0",
                "does not compute datainf",
            ),
            (
                {"aggregations": ["mean"], "verify": {"aggregations": ["vote"]}},
                "#/verify/aggregations/0",
                "does not compute vote",
            ),
            ({"noise_fraction": None}, "#/noise_fraction", "known noise"),
            (
                {
                    "tasks": [
                        experiment_task(
                            "a",
                            train={"reference": "hf://datasets/a/b", "columns": {"noise": "n"}},
                        )
                    ]
                },
                "#/noise_fraction",
                "use one of",
            ),
            (
                {"tasks": [experiment_task("a", model={"reference": "file:///etc"})]},
                "#/tasks/0/model/reference",
                "outside",
            ),
            (
                {"tasks": [experiment_task(f"t{n}") for n in range(21)], "seeds": list(range(10))},
                "#/seeds",
                "210 audits",
            ),
            (
                {
                    "tasks": [experiment_task(f"t{n}") for n in range(10)],
                    "seeds": list(range(20)),
                    "estimators": ["grad_dot", "datainf", "lissa", "ekfac"],
                    "aggregations": ["mean", "rank", "vote", "min", "median", "trimmed_mean"],
                    "correct_only": [False, True],
                },
                "#/verify",
                "trainings",
            ),
            ({"epochs": 1}, "#/epochs", "Extra inputs"),
        ],
    )
    def test_what_does_not_fit_is_refused_with_its_field(
        self,
        client: TestClient,
        engine: Engine,
        changes: dict[str, Any],
        pointer: str,
        words: str,
    ) -> None:
        response = post(client, experiment_body(**changes))
        assert response.status_code == 422, response.text
        assert response.json()["errors"][0]["pointer"] == pointer
        assert words in response.json()["errors"][0]["detail"]
        assert number_of(engine, Experiment) == 0

    def test_known_noise_needs_no_planting(self, client: TestClient, engine: Engine) -> None:
        train = {"reference": "hf://datasets/a/b", "columns": {"noise": "wrong"}}
        task = experiment_task("raters", train=train)
        response = post(client, experiment_body(tasks=[task], noise_fraction=None))
        assert response.status_code == 202, response.text
        for audit in audits_of(engine, response.json()["id"]):
            assert audit.request["plant_noise"] is None


class TestStanding:
    def test_progress_is_the_mean_and_changes_are_told(
        self, client: TestClient, engine: Engine
    ) -> None:
        path = post(client, experiment_body()).headers["Location"]
        first = client.get(path)
        unchanged = client.get(path, headers={"If-None-Match": first.headers["ETag"]})
        assert unchanged.status_code == 304
        with transaction(engine) as session:
            audit = session.get_one(Audit, first.json()["audits"][0]["id"])
            audit.progress = 0.5
            audit.version += 1
        second = client.get(path, headers={"If-None-Match": first.headers["ETag"]})
        assert (second.status_code, second.json()["progress"]) == (200, 0.25)

    @pytest.mark.parametrize(
        ("states", "expected"),
        [
            ([AuditState.SUCCEEDED, AuditState.QUEUED], "running"),
            ([AuditState.FAILED, AuditState.QUEUED], "running"),
            ([AuditState.SUCCEEDED, AuditState.SUCCEEDED], "succeeded"),
            ([AuditState.SUCCEEDED, AuditState.FAILED], "failed"),
            ([AuditState.FAILED, AuditState.CANCELLED], "cancelled"),
        ],
    )
    def test_its_state_is_that_of_its_audits(
        self,
        client: TestClient,
        engine: Engine,
        states: list[AuditState],
        expected: str,
    ) -> None:
        path = post(client, experiment_body()).headers["Location"]
        finish_experiment(engine, path.rpartition("/")[2], states)
        found = client.get(path).json()
        assert found["state"] == expected
        assert found["done"] == (expected != "running")
        assert (found["finished_at"] is not None) == found["done"]
        assert found["num_ended"] == sum(state.is_final for state in states)
        assert ("Retry-After" in client.get(path).headers) == (not found["done"])
        for audit, state in zip(found["audits"], states, strict=True):
            assert (audit["error"] is not None) == (state is AuditState.FAILED)

    def test_they_are_listed_the_newest_first(self, client: TestClient) -> None:
        made = [post(client, experiment_body()).json()["id"] for _ in range(3)]
        page = client.get("/v1/experiments", params={"limit": 2}).json()
        assert [item["id"] for item in page["data"]] == [made[2], made[1]]
        rest = client.get("/v1/experiments", params={"cursor": page["next_cursor"]}).json()
        assert [item["id"] for item in rest["data"]] == [made[0]]
        assert not rest["has_more"]

    def test_there_is_none(self, client: TestClient) -> None:
        for path in ("", "/results", "/results.csv"):
            response = client.get(f"/v1/experiments/exp_0{path}")
            assert response.status_code == 404
            assert "There is no experiment 'exp_0'" in response.json()["detail"]


class TestEnding:
    def test_cancelling_ends_what_has_not_ended(self, client: TestClient, engine: Engine) -> None:
        path = post(client, experiment_body()).headers["Location"]
        finish_experiment(engine, path.rpartition("/")[2], [AuditState.SUCCEEDED, None])
        response = client.post(f"{path}/cancel")
        assert response.status_code == 202
        found = client.get(path).json()
        assert found["state"] == "cancelled"
        assert found["cancel_requested_at"] is not None
        assert [audit["state"] for audit in found["audits"]] == ["succeeded", "cancelled"]
        assert client.post(f"{path}/cancel").status_code == 202

    def test_an_audit_at_work_ends_with_its_worker(
        self, client: TestClient, engine: Engine
    ) -> None:
        made = post(client, experiment_body()).json()
        with Session(engine) as session:
            unit_id = session.scalars(
                select(WorkUnit.id).where(WorkUnit.audit_id == made["audits"][0]["id"])
            ).one()
        claim = work.claim(engine, unit_id, owner="w", lease_seconds=60)
        assert claim is not None
        path = f"/v1/experiments/{made['id']}"
        assert client.post(f"{path}/cancel").json()["state"] == "running"
        assert client.delete(path).status_code == 409
        work.stop_for_cancel(engine, claim)
        assert client.get(path).json()["state"] == "cancelled"

    def test_what_has_ended_cannot_be_cancelled(self, client: TestClient, engine: Engine) -> None:
        path = post(client, experiment_body()).headers["Location"]
        finish_experiment(engine, path.rpartition("/")[2], [AuditState.SUCCEEDED] * 2)
        response = client.post(f"{path}/cancel")
        assert response.status_code == 409
        assert response.json()["state"] == "succeeded"

    def test_deleting_removes_the_audits_and_their_files(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        kept = post(client, experiment_body()).json()
        made = post(client, experiment_body()).json()
        path = f"/v1/experiments/{made['id']}"
        folders = [audit_folder(settings.data_dir, audit["id"]) for audit in made["audits"]]
        for folder in folders:
            folder.mkdir(parents=True)
        refused = client.delete(path)
        assert refused.status_code == 409
        assert "Cancel it" in refused.json()["detail"]
        finish_experiment(engine, made["id"], [AuditState.SUCCEEDED, AuditState.FAILED])
        assert client.delete(path).status_code == 204
        assert client.get(path).status_code == 404
        assert not any(folder.exists() for folder in folders)
        with Session(engine) as session:
            left = set(session.scalars(select(Audit.id)))
        assert left == {audit["id"] for audit in kept["audits"]}
