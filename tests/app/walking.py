"""Every route of the app with a call that fits it, and things of a tenant to call it with."""

from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import Engine

from app.audits.models import AuditState
from app.db import transaction
from app.keys.cookie import SAFE_METHODS
from app.limits.models import TenantLimits
from app.settings import Settings
from app.work import repository as work
from app.work.models import Stage
from tests.factories import (
    CSV_TABLE,
    experiment_body,
    finish_experiment,
    make_audit,
    make_finished_audit,
    make_ranking,
    request_body,
)

WEBHOOK = {"url": "https://example.com/"}
OPEN = {
    ("GET", "/healthz"): 200,
    ("GET", "/readyz"): 503,
    ("GET", "/metrics"): 403,
    ("GET", "/sign-in"): 200,
    ("POST", "/sign-in"): 403,  # no page of ours asks
    ("POST", "/sign-out"): 403,
}
"""What answers without a key, and how in a test."""
CHANGES_NOTHING = {
    ("POST", "/v1/audits/{audit_id}/decisions/preview"),
    ("POST", "/sign-out"),  # the browser's cookie goes
}
_OF_FASTAPI = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", "/static/{path}"}


def every_route(api: FastAPI) -> Iterator[tuple[str, str]]:
    """Yield method and path of every route, pages and what OpenAPI does not list included."""
    for route in _leaves(api.routes):
        path = getattr(route, "path_format", None) or route.path
        if path not in _OF_FASTAPI:
            for method in sorted(route.methods):
                yield method, path


def _leaves(routes: Iterable[Any]) -> Iterator[Any]:
    for route in routes:
        if hasattr(route, "effective_candidates"):  # of a router that was included
            yield from _leaves(route.effective_candidates())
        else:
            yield route


def changing_routes(api: FastAPI) -> Iterator[tuple[str, str]]:
    """Yield the routes that change something."""
    for method, path in every_route(api):
        if method not in SAFE_METHODS and (method, path) not in CHANGES_NOTHING:
            yield method, path


def call(
    client: TestClient, method: str, path: str, ids: dict[str, str], **options: Any
) -> Response:
    """Call a route with somebody's ids and the body that it wants."""
    url = path.format(**ids, index=0, file_format="csv")
    return client.request(method, url, **_body(method, path), **options)


def _body(method: str, path: str) -> dict[str, Any]:
    if method != "POST":
        return {}
    if path == "/v1/datasets":
        return {"files": {"file": ("a.csv", CSV_TABLE)}}
    bodies: dict[str, Any] = {
        "/v1/audits": request_body(),
        "/v1/experiments": experiment_body(),
        "/v1/webhooks": WEBHOOK,
        "/v1/audits/{audit_id}/rankings": {"estimator": "loss"},
    }
    if path in bodies:
        return {"json": bodies[path]}
    if "/decisions" in path and not path.endswith("/undo"):
        return {"json": {"action": "keep", "indices": [0]}}
    return {}


def make_things(client: TestClient, engine: Engine, settings: Settings) -> list[dict[str, str]]:
    """Make some of everything for the default tenant: audits that run and that are done, more.

    Returns:
        Ids by the names of the paths: of a finished audit with its own ranking, of the same with
        a later one, and of a queued one; with the same dataset, webhook and delivery.
    """
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
    finish_experiment(engine, experiments[0]["id"], [AuditState.FAILED, AuditState.FAILED])
    webhook = client.post("/v1/webhooks", json=WEBHOOK).json()["id"]
    delivery = client.post(f"/v1/webhooks/{webhook}/test").json()["id"]
    with transaction(engine) as session:
        session.merge(TenantLimits(tenant="default", max_open_audits=100))
        (unit_id,) = work.add_units(session, make_audit(engine).id, Stage.VALIDATION)
    assert work.claim(engine, unit_id, owner="test", lease_seconds=60)
    shared = {"dataset_id": dataset, "webhook_id": webhook, "delivery_id": delivery}
    return [
        {"audit_id": audit, "ranking_id": ranking, "batch_id": batch}
        | {"experiment_id": experiments[place % 2]["id"]}
        | shared
        for place, (audit, ranking) in enumerate(things)
    ]
