"""Who may see what: a key opens its own tenant's things, and nothing tells of the others'."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from sqlalchemy import Engine, Executable, delete, func, insert, select, update
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from app.audits.models import Audit, AuditState, Ranking
from app.datasets.models import Dataset
from app.db import Base, of_tenant, transaction
from app.decisions.models import DecisionBatch
from app.experiments.models import Experiment
from app.keys.models import ApiKey
from app.keys.service import create_key, revoke_key
from app.settings import Settings
from app.web.rendering import PageRoute
from app.webhooks.models import Webhook, WebhookDelivery
from tests.factories import (
    CSV_TABLE,
    experiment_body,
    experiment_task,
    finish_experiment,
    long_ago,
    make_audit,
    make_finished_audit,
    make_ranking,
    request_body,
)

PUBLIC = {"/healthz", "/readyz", "/metrics"}
NOT_ABOUT_A_THING = {"/v1/estimators", "/v1/aggregations"}
MAKES_THINGS = {("POST", path) for path in ("/v1/audits", "/v1/experiments", "/v1/webhooks")}
OF_NO_TENANT = {"api_keys", "worker_heartbeats"}
WEBHOOK = {"url": "https://example.com/"}


def routes(api: FastAPI) -> Iterator[tuple[str, str]]:
    """Return method and path of every route of the API, however it was included."""
    document = api.openapi()
    for path, methods in document["paths"].items():
        for method in methods:
            yield method.upper(), path


@pytest.fixture
def owned(client: TestClient, engine: Engine, settings: Settings) -> list[dict[str, str]]:
    """Ids of one tenant's things: audits that run and that are done, a dataset."""
    dataset = client.post("/v1/datasets", files={"file": ("a.csv", CSV_TABLE)}).json()["id"]
    finished = make_finished_audit(engine, settings)
    batch = client.post(
        f"/v1/audits/{finished.id}/decisions", json={"action": "keep", "indices": [0]}
    ).json()["id"]
    later = make_ranking(engine, finished, settings=settings)
    things = [
        (finished.id, finished.summary["ranking_id"]),
        (finished.id, later.id),
        (make_audit(engine).id, "rnk_none"),
    ]
    experiments = [client.post("/v1/experiments", json=experiment_body()).json() for _ in range(2)]
    states = [AuditState.SUCCEEDED, AuditState.FAILED]
    finish_experiment(engine, experiments[0]["id"], states)
    ids = [
        {"audit_id": audit, "ranking_id": ranking, "dataset_id": dataset, "batch_id": batch}
        for audit, ranking in things
    ]
    webhook = client.post("/v1/webhooks", json=WEBHOOK).json()["id"]
    delivery = client.post(f"/v1/webhooks/{webhook}/test").json()["id"]
    shared = {"webhook_id": webhook, "delivery_id": delivery}
    names = [experiments[place % 2]["id"] for place in range(len(ids))]
    return [each | shared | {"experiment_id": name} for each, name in zip(ids, names, strict=True)]


def everything(engine: Engine) -> list[set[tuple[str, str]]]:
    with Session(engine) as session:
        rows = [(row.id, row.state) for row in (*session.query(Audit), *session.query(Ranking))]
        rows += [(row.id, row.secret) for row in session.query(Webhook)]
        rows += [(row.id, row.state) for row in session.query(WebhookDelivery)]
        things = [*session.query(Dataset), *session.query(Experiment)]
        batches = {(batch.id, str(batch.undone_at)) for batch in session.query(DecisionBatch)}
        return [set(rows), {(thing.id, "") for thing in things}, batches]


def call(client: TestClient, method: str, path: str, ids: dict[str, str]) -> tuple[int, str]:
    url = path.format(**ids, index=0, file_format="csv")
    body = {"json": request_body()} if path == "/v1/audits" and method == "POST" else {}
    if path == "/v1/experiments" and method == "POST":
        body = {"json": experiment_body()}
    if path == "/v1/webhooks" and method == "POST":
        body = {"json": WEBHOOK}
    if path.endswith("/rankings") and method == "POST":
        body = {"json": {"estimator": "grad_cosine"}}
    if "/decisions" in path and method == "POST" and not path.endswith("/undo"):
        body = {"json": {"action": "keep", "indices": [0]}}
    response = client.request(method, url, **body)  # type: ignore[arg-type]
    return response.status_code, response.text


def test_a_stranger_walks_every_route_and_sees_nothing(
    api: FastAPI,
    engine: Engine,
    new_client: Callable[[str], TestClient],
    owned: list[dict[str, str]],
) -> None:
    stranger = new_client("stranger")
    before = everything(engine)
    walked = [
        (method, path, *call(stranger, method, path, ids))
        for ids in owned
        for method, path in routes(api)
        if (method, path) not in MAKES_THINGS
    ]
    assert len(walked) >= 3 * 33
    for method, path, status, text in walked:
        named = f"{method} {path}: {status} {text}"
        if "{" in path:
            assert status == 404, named
        elif path not in PUBLIC | NOT_ABOUT_A_THING and method == "GET":
            assert '"data":[]' in text, named
        for ids in owned:
            if "{" not in path:
                assert not any(thing in text for thing in ids.values()), named
    assert everything(engine) == before


def test_a_strangers_404_is_the_same_as_for_nothing_at_all(
    new_client: Callable[[str], TestClient], owned: list[dict[str, str]]
) -> None:
    stranger = new_client("stranger")
    theirs = owned[0]["audit_id"]
    nothing = "aud_" + "0" * 32
    answers = [stranger.get(f"/v1/audits/{audit_id}").text for audit_id in (theirs, nothing)]
    assert answers[0].replace(theirs, "X") == answers[1].replace(nothing, "X")


def test_without_a_key_every_route_asks_for_one(
    api: FastAPI, engine: Engine, owned: list[dict[str, str]]
) -> None:
    before = everything(engine)
    nobody = TestClient(api)
    for method, path in routes(api):
        status, text = call(nobody, method, path, owned[0])
        expected = {"/healthz": 200, "/readyz": 503, "/metrics": 403}.get(path, 401)
        assert status == expected, f"{method} {path}: {status} {text}"
    assert everything(engine) == before


def test_the_walks_cover_every_route(api: FastAPI) -> None:
    """A route that OpenAPI does not list is a way in that no walk would try.

    Pages have a walk of their own (tests/web/test_pages.py).
    """
    listed = {path for _, path in routes(api)}
    unlisted = [
        route
        for route in api.routes
        if isinstance(route, APIRoute)
        and not isinstance(route, PageRoute)
        and route.path_format not in listed
    ]
    assert unlisted == []


def test_a_query_that_forgets_the_tenant_still_sees_its_rows_alone(
    engine: Engine, owned: list[dict[str, str]]
) -> None:
    """Row-level security is under every table that has a tenant; keys and workers have none."""
    tables = [table for table in Base.metadata.sorted_tables if table.name not in OF_NO_TENANT]
    theirs: dict[str, dict[str, int]] = {}
    for name, tenant in (("owner", "default"), ("stranger", "stranger")):
        with transaction(of_tenant(engine, tenant)) as session:
            theirs[name] = {
                table.name: session.scalars(select(func.count()).select_from(table)).one()
                for table in tables
            }
    with Session(engine) as session:
        there = {
            table.name: session.scalars(select(func.count()).select_from(table)).one()
            for table in tables
        }
    assert theirs["owner"] == there
    assert min(there[name] for name in there if name != "idempotency_keys") > 0
    assert set(theirs["stranger"].values()) == {0}


def test_a_tenant_cannot_write_into_anothers_rows(
    engine: Engine, owned: list[dict[str, str]]
) -> None:
    stranger = of_tenant(engine, "stranger")
    with transaction(stranger) as session:
        for table in (Audit, Ranking, Dataset, Webhook, Experiment):
            changed = update(table).values(tenant="stranger").returning(table.id)
            assert session.scalars(changed).all() == []
            assert session.scalars(delete(table).returning(table.id)).all() == []
    refused: list[tuple[Executable, str]] = [
        (insert(Audit).values(id="aud_x", tenant="default", request={}), "row-level security"),
        (select(ApiKey), "permission denied"),
    ]
    for statement, reason in refused:
        with pytest.raises(ProgrammingError, match=reason), transaction(stranger) as session:
            session.execute(statement)


def test_the_limit_ends_with_the_transaction(engine: Engine, owned: list[dict[str, str]]) -> None:
    """The connections are shared with the reconciler, which must see everything."""
    with engine.connect() as connection:
        connection.execution_options(winnow_tenant="stranger")
        with connection.begin():
            assert connection.scalar(select(func.count()).select_from(Audit)) == 0
        connection.execution_options(winnow_tenant=None)
        with connection.begin():
            assert connection.scalar(select(func.count()).select_from(Audit))


def test_a_ranking_is_found_under_its_own_audit_only(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    audits = [make_finished_audit(engine, settings) for _ in range(2)]
    ranking = make_ranking(engine, audits[0], settings=settings)
    for rest in ("", "/suspects", "/suspects.csv", "/samples/0", "/layers"):
        answers = [
            client.get(f"/v1/audits/{audit.id}/rankings/{ranking.id}{rest}").status_code
            for audit in audits
        ]
        assert answers == [200, 404], rest
    assert client.delete(f"/v1/audits/{audits[1].id}/rankings/{ranking.id}").status_code == 404


def test_a_stranger_cannot_audit_an_upload(
    new_client: Callable[[str], TestClient], owned: list[dict[str, str]]
) -> None:
    train = {"reference": f"upload:{owned[0]['dataset_id']}"}
    response = new_client("stranger").post("/v1/audits", json=request_body(train=train))
    assert response.status_code == 422
    assert "There is no upload" in response.json()["detail"]


def test_a_stranger_cannot_experiment_with_an_upload(
    new_client: Callable[[str], TestClient], owned: list[dict[str, str]]
) -> None:
    train = {"reference": f"upload:{owned[0]['dataset_id']}"}
    body = experiment_body(tasks=[experiment_task(train=train)])
    response = new_client("stranger").post("/v1/experiments", json=body)
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "#/tasks/0/train/reference"


def test_tenants_do_not_share_idempotency_keys(new_client: Callable[[str], TestClient]) -> None:
    header = {"Idempotency-Key": "same"}
    ids = {
        new_client(tenant).post("/v1/audits", json=request_body(), headers=header).json()["id"]
        for tenant in ("one", "two")
    }
    assert len(ids) == 2


class TestKeys:
    def status(self, api: FastAPI, authorization: str) -> int:
        headers = {"Authorization": authorization}
        return TestClient(api).get("/v1/audits", headers=headers).status_code

    def test_a_key_opens_until_it_is_revoked(self, api: FastAPI, engine: Engine) -> None:
        key = create_key(engine, tenant="one", name="test", valid_days=1)
        assert self.status(api, f"Bearer {key.secret}") == 200
        revoke_key(engine, key.id)
        assert self.status(api, f"Bearer {key.secret}") == 401

    def test_a_key_opens_until_its_date(self, api: FastAPI, engine: Engine) -> None:
        key = create_key(engine, tenant="one", name="test", valid_days=1)
        with transaction(engine) as session:
            session.execute(update(ApiKey).values(expires_at=long_ago()))
        assert self.status(api, f"Bearer {key.secret}") == 401

    @pytest.mark.parametrize(
        "authorization",
        ["", "Bearer", "Bearer ", "Basic YTpi", "Bearer wnw_x", "wnw_x", "Bearer \x7f"],
    )
    def test_anything_else_opens_nothing(
        self, api: FastAPI, engine: Engine, authorization: str
    ) -> None:
        assert self.status(api, authorization) == 401

    def test_only_the_hash_is_kept_and_the_use_is_noted(self, api: FastAPI, engine: Engine) -> None:
        key = create_key(engine, tenant="one", name="test", valid_days=1)
        self.status(api, f"Bearer {key.secret}")
        with Session(engine) as session:
            row = session.get_one(ApiKey, key.id)
            assert len(row.sha256) == 32
            assert key.secret.encode() not in row.sha256
            assert row.last_used_at is not None
            assert (datetime.now(UTC) - row.last_used_at).total_seconds() < 60
