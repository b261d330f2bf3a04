"""Submitting an audit: what is accepted, what is refused and how, and that it is never lost."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from celery import Celery
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine, delete, func, select, update
from sqlalchemy.orm import Session

from app.audits.models import Audit, IdempotencyKey
from app.datasets.models import Dataset
from app.db import transaction
from app.jobs import make_celery, queue_length
from app.keys.service import create_key
from app.main import create_app
from app.settings import Settings
from app.work.models import Stage, WorkUnit
from app.work.reconciler import reconcile
from tests.factories import CSV_TABLE, long_ago, request_body


def post(client: TestClient, body: dict[str, Any], key: str | None = None) -> httpx2.Response:
    headers = {"Idempotency-Key": key} if key else {}
    return client.post("/v1/audits", json=body, headers=headers)


def upload(client: TestClient, content: str = CSV_TABLE, **fields: str) -> str:
    """Upload a table and return its reference."""
    response = client.post("/v1/datasets", files={"file": ("a.csv", content)}, data=fields)
    assert response.status_code == 201, response.text
    return str(response.json()["reference"])


def number_of(engine: Engine, table: type[Audit | WorkUnit | IdempotencyKey]) -> int:
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_an_accepted_audit_is_in_the_database_with_its_first_unit_of_work(
    client: TestClient, engine: Engine, celery: Celery
) -> None:
    response = post(client, {**request_body(), "metadata": {"run": "7"}})

    assert response.status_code == 202
    audit = response.json()
    assert response.headers["Location"] == f"/v1/audits/{audit['id']}"
    assert response.headers["Retry-After"] == "2"
    assert (audit["state"], audit["done"], audit["metadata"]) == ("queued", False, {"run": "7"})
    assert audit["request"]["ranking"]["estimator"] == "grad_cosine"
    with Session(engine) as session:
        unit = session.scalars(select(WorkUnit)).one()
        assert (unit.audit_id, unit.stage) == (audit["id"], Stage.PREPARE)
        assert unit.sent_at is not None
    assert queue_length(celery) == 1


def test_an_audit_reads_an_upload_with_the_columns_that_it_was_checked_with(
    client: TestClient,
) -> None:
    table = "review,polarity,wrong\nfine,1,0\nawful,0,1\n"
    fields = {"text_column": "review", "label_column": "polarity", "noise_column": "wrong"}
    reference = upload(client, table, **fields)

    body = request_body(train={"reference": reference}, estimators=["oracle"])
    stored = post(client, body).json()["request"]

    columns = {"text": "review", "label": "polarity", "noise": "wrong"}
    named = {field: name for field, name in stored["train"]["columns"].items() if name}
    assert named == columns
    assert stored["validation"]["columns"]["text"] == "text"


@pytest.mark.parametrize(
    ("changes", "pointer", "words"),
    [
        ({"model": {"reference": "gpt2"}}, "#/model/reference", "is not a reference"),
        ({"model": {"reference": "upload:ds_1"}}, "#/model/reference", "names a dataset"),
        ({"train": {"reference": "hf://a/b"}}, "#/train/reference", "names a model"),
        ({"train": {"reference": "upload:ds_1"}}, "#/train/reference", "There is no upload ds_1"),
        ({"model": {"reference": "file:///etc"}}, "#/model/reference", "outside"),
        ({"validation": {"reference": "file:///etc/passwd"}}, "#/validation/reference", "outside"),
        ({"estimators": ["oracle"]}, "#/estimators/0", "needs known noise"),
        ({"ranking": {"estimator": "oracle"}}, "#/ranking/estimator", "needs known noise"),
        ({"ranking": {"estimator": "loss", "layers": "CL"}}, "#/ranking/layers", "has no layers"),
        (
            {"model": {"reference": "hf://a/b", "adapter": "hf://a/c"}},
            "#/fine_tune",
            "leave out either fine_tune or model.adapter",
        ),
        (
            {"model": {"reference": "hf://a/b", "target_modules": ["query"]}},
            "#/model/target_modules",
            "fine-tuned in full",
        ),
        (
            {
                "train": {"reference": "hf://datasets/a/b", "columns": {"noise": "n"}},
                "plant_noise": {},
            },
            "#/plant_noise",
            "use one of them",
        ),
        ({"flag": {}}, "#/flag", "either fraction or count"),
        ({"fine_tune": {"epoch": 3}}, "#/fine_tune/epoch", "Extra inputs"),
        ({"estimators": ["shapley"]}, "#/estimators/0", "should be"),
        ({"metadata": {"a/b": 1}}, "#/metadata/a~1b", "valid string"),
        ({"metadata": {str(i): "" for i in range(51)}}, "#/metadata", "more than 50"),
        ({"model": None}, "#/model", "valid dictionary"),
    ],
)
def test_a_refusal_names_the_field_and_says_what_to_change(
    client: TestClient, engine: Engine, changes: dict[str, Any], pointer: str, words: str
) -> None:
    response = post(client, {**request_body(), **changes})

    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["type"] == "urn:winnow:problem:invalid-request"
    assert problem["errors"][0]["pointer"] == pointer
    assert words in problem["errors"][0]["detail"]
    assert number_of(engine, Audit) == 0


def test_columns_that_an_upload_lacks_are_refused_with_those_that_it_has(
    client: TestClient,
) -> None:
    train = {"reference": upload(client), "columns": {"text": "review"}}
    problem = post(client, request_body(train=train)).json()
    assert problem["errors"][0]["pointer"] == "#/train/columns/text"
    assert "it has text, label" in problem["detail"]


def test_noise_cannot_be_planted_on_an_upload_that_has_known_noise(client: TestClient) -> None:
    reference = upload(client, "text,label,bad\na,x,0\nb,y,1\n", noise_column="bad")
    body = request_body(train={"reference": reference}, plant_noise={})
    assert post(client, body).json()["errors"][0]["pointer"] == "#/plant_noise"

    columns = {"text": "text", "label": "label"}
    body = request_body(train={"reference": reference, "columns": columns}, plant_noise={})
    assert post(client, body).status_code == 202


class TestFilesUnderTheRoots:
    """file:// references: looked at as far as that needs no model."""

    def refusal(self, client: TestClient, **changes: Any) -> tuple[str, str]:
        response = post(client, request_body(**changes))
        assert response.status_code == 422, response.text
        error = response.json()["errors"][0]
        return error["pointer"], error["detail"]

    def test_a_good_model_and_good_data_are_accepted(
        self, client: TestClient, settings: Settings
    ) -> None:
        root = settings.file_roots[0]
        (root / "model").mkdir()
        (root / "model" / "config.json").write_text("{}")
        (root / "model" / "model.safetensors").write_bytes(b"")
        (root / "train.csv").write_text(CSV_TABLE)
        body = request_body(
            model={"reference": f"file://{root}/model"},
            train={"reference": f"file://{root}/train.csv"},
        )
        assert post(client, body).status_code == 202

    def test_datasets(self, client: TestClient, settings: Settings, tmp_path: Path) -> None:
        root = settings.file_roots[0]
        (root / "a.csv").write_text("words,label\na,x\n")
        (root / "a.txt").write_text("hello")
        (root / "secret").symlink_to(tmp_path)
        (tmp_path / "outside.csv").write_text(CSV_TABLE)

        def refused(name: str) -> tuple[str, str]:
            return self.refusal(client, train={"reference": f"file://{root}/{name}"})

        pointer, detail = refused("a.csv")
        assert pointer == "#/train/columns/text"
        assert "'words'" in detail
        assert "no known format" in refused("a.txt")[1]
        assert "no such file" in refused("b.csv")[1]
        assert "is a folder" in refused("")[1]
        assert "outside" in refused("secret/outside.csv")[1]

    def test_models(self, client: TestClient, settings: Settings) -> None:
        root = settings.file_roots[0]
        (root / "adapter").mkdir()
        (root / "adapter" / "adapter_config.json").write_text("{}")
        (root / "pickled").mkdir()
        (root / "pickled" / "config.json").write_text("{}")
        (root / "pickled" / "pytorch_model.bin").write_bytes(b"")

        pointer, detail = self.refusal(client, model={"reference": f"file://{root}/adapter"})
        assert pointer == "#/model/reference"
        assert "the adapter in model.adapter" in detail
        model = {"reference": "hf://a/b", "adapter": f"file://{root}/pickled"}
        pointer, detail = self.refusal(client, model=model, fine_tune=None)
        assert pointer == "#/model/adapter"
        assert "It is a whole model" in detail
        assert (
            "safetensors" in self.refusal(client, model={"reference": f"file://{root}/pickled"})[1]
        )


class TestIdempotency:
    """The same key is the same audit, whatever happens in between."""

    def test_a_repeated_call_answers_the_same_audit(
        self, client: TestClient, engine: Engine
    ) -> None:
        first = post(client, request_body(), key="a")
        again = post(client, request_body(), key="a")
        assert again.status_code == 202
        assert again.headers["Idempotent-Replayed"] == "true"
        assert "Idempotent-Replayed" not in first.headers
        assert again.json()["id"] == first.json()["id"]
        assert number_of(engine, WorkUnit) == 1

    def test_the_order_of_fields_does_not_count(self, client: TestClient) -> None:
        first = post(client, request_body(), key="a")
        again = post(client, dict(reversed(request_body().items())), key="a")
        assert again.json()["id"] == first.json()["id"]

    def test_another_body_under_the_same_key_is_refused(
        self, client: TestClient, engine: Engine
    ) -> None:
        post(client, request_body(), key="a")
        response = post(client, request_body(seed=1), key="a")
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == "header.Idempotency-Key"
        assert number_of(engine, Audit) == 1

    def test_without_a_key_every_call_is_a_new_audit(self, client: TestClient) -> None:
        assert (
            post(client, request_body()).json()["id"] != post(client, request_body()).json()["id"]
        )

    def test_a_repeated_call_needs_its_uploads_no_more(
        self, client: TestClient, engine: Engine
    ) -> None:
        reference = upload(client)
        body = request_body(train={"reference": reference})
        first = post(client, body, key="a").json()
        client.post(f"/v1/audits/{first['id']}/cancel")
        assert client.delete(f"/v1/datasets/{reference.removeprefix('upload:')}").status_code == 204
        again = post(client, body, key="a")
        assert again.status_code == 202
        assert again.json()["state"] == "cancelled"

    def test_a_refused_call_leaves_its_key_free(self, client: TestClient, engine: Engine) -> None:
        post(client, request_body(estimators=["oracle"]), key="a")
        assert post(client, request_body(), key="a").status_code == 202

    def test_a_deleted_audit_is_not_made_again_by_its_key(
        self, client: TestClient, engine: Engine
    ) -> None:
        audit_id = post(client, request_body(), key="a").json()["id"]
        client.post(f"/v1/audits/{audit_id}/cancel")
        client.delete(f"/v1/audits/{audit_id}")
        response = post(client, request_body(), key="a")
        assert response.status_code == 409
        assert "deleted" in response.json()["detail"]

    def test_keys_are_forgotten_after_a_day(
        self, client: TestClient, engine: Engine, celery: Celery, settings: Settings
    ) -> None:
        first = post(client, request_body(), key="a").json()["id"]
        with transaction(engine) as session:
            session.execute(update(IdempotencyKey).values(created_at=long_ago()))
        reconcile(engine, celery, settings)
        assert post(client, request_body(), key="a").json()["id"] != first

    def test_twins_at_the_same_moment_make_one_audit(
        self, client: TestClient, engine: Engine
    ) -> None:
        """The second of two transactions blocks on the key's row and then answers the first's."""
        num_twins = 8
        together = threading.Barrier(num_twins)

        def call(_number: int) -> httpx2.Response:
            together.wait()
            return post(client, request_body(), key="twins")

        with ThreadPoolExecutor(num_twins) as pool:
            responses = list(pool.map(call, range(num_twins)))

        assert [response.status_code for response in responses] == [202] * num_twins
        assert len({response.json()["id"] for response in responses}) == 1
        assert sum("Idempotent-Replayed" not in response.headers for response in responses) == 1
        assert (number_of(engine, Audit), number_of(engine, WorkUnit)) == (1, 1)

    def test_a_twin_whose_first_rolls_back_is_accepted_itself(
        self, client: TestClient, engine: Engine
    ) -> None:
        row = {"tenant": "default", "route": "POST /v1/audits", "key": "a"}
        with Session(engine) as first, ThreadPoolExecutor(1) as pool:
            first.add(IdempotencyKey(**row, body_sha256="other", answer_id="aud_never"))
            first.flush()
            twin = pool.submit(post, client, request_body(), "a")
            time.sleep(0.3)
            assert not twin.done()
            first.rollback()
            assert twin.result(timeout=10).status_code == 202


def test_an_upload_cannot_vanish_between_check_and_commit(
    client: TestClient, engine: Engine
) -> None:
    """A deletion that holds the dataset's row makes the submit wait, and then refuse."""
    reference = upload(client)
    with Session(engine) as deletion, ThreadPoolExecutor(1) as pool:
        deletion.execute(delete(Dataset))
        body = request_body(train={"reference": reference})
        submit = pool.submit(post, client, body)
        time.sleep(0.3)
        assert not submit.done()
        deletion.commit()
        assert submit.result(timeout=10).status_code == 422


def api_on(settings: Settings, engine: Engine, broker_url: str) -> tuple[FastAPI, Celery]:
    celery = make_celery(settings.model_copy(update={"broker_url": SecretStr(broker_url)}))
    return create_app(settings, engine, celery), celery


@contextmanager
def running(api: FastAPI) -> Iterator[str]:
    """Serve over a real socket and yield the address."""
    server = uvicorn.Server(uvicorn.Config(api, port=0, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()


def test_submit_works_with_the_broker_down_and_the_unit_is_sent_later(
    settings: Settings, engine: Engine, celery: Celery, tmp_path: Path
) -> None:
    api, _ = api_on(settings, engine, f"redis+socket://{tmp_path}/nobody.sock")
    key = create_key(engine, tenant="default", name="test", valid_days=1)
    client = TestClient(api, headers={"Authorization": f"Bearer {key.secret}"})
    started = time.perf_counter()

    assert post(client, request_body()).status_code == 202

    assert time.perf_counter() - started < 5
    assert queue_length(celery) == 0
    assert len(reconcile(engine, celery, settings)) == 1
    assert queue_length(celery) == 1
    assert reconcile(engine, celery, settings) == []


def test_a_frozen_broker_delays_no_caller(
    settings: Settings, engine: Engine, tmp_path: Path
) -> None:
    """Also when more audits are submitted than the server has threads for."""
    address = tmp_path / "f.sock"
    with socket.socket(socket.AF_UNIX) as frozen:
        frozen.bind(str(address))
        frozen.listen(100)  # connections are taken by the kernel, and never answered
        api, celery = api_on(settings, engine, f"redis+socket://{address}")
        celery.conf.broker_transport_options = {"socket_timeout": 1}
        key = create_key(engine, tenant="default", name="test", valid_days=1)
        with (
            running(api) as url,
            httpx2.Client(
                base_url=url, headers={"Authorization": f"Bearer {key.secret}"}, trust_env=False
            ) as client,
        ):
            started = time.perf_counter()
            for _ in range(50):
                assert client.post("/v1/audits", json=request_body()).status_code == 202
            assert time.perf_counter() - started < 10
    assert number_of(engine, Audit) == 50
