"""Who did what: one entry for every change, in the change's own transaction."""

from datetime import timedelta

from celery import Celery
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from app.db import of_tenant, transaction
from app.keys.models import ApiKey
from app.keys.service import create_key, revoke_key, rotate_key
from app.limits.quotas import set_limits
from app.settings import Settings
from app.trail.models import TrailEntry
from app.trail.service import Actor, TrailAction, acting, record
from app.work.reconciler import reconcile
from tests.app.walking import call, changing_routes, make_things
from tests.factories import make_audit, request_body

SAME = {"Sec-Fetch-Site": "same-origin"}
AT_THE_COMMAND_LINE = {
    *(
        TrailAction.KEY_CREATE,
        TrailAction.KEY_ROTATE,
        TrailAction.KEY_REVOKE,
        TrailAction.LIMITS_SET,
    )
}


def entries(engine: Engine) -> list[TrailEntry]:
    with Session(engine) as session:
        return list(session.scalars(select(TrailEntry).order_by(TrailEntry.id)))


def test_every_changing_route_leaves_one_entry(
    api: FastAPI, client: TestClient, engine: Engine, settings: Settings
) -> None:
    """Deletions come last; a call that is refused leaves none."""
    with Session(engine) as session:
        key = session.scalars(select(ApiKey)).one()
    routes = sorted(changing_routes(api), key=lambda route: route[0] == "DELETE")
    seen = set()
    for method, path in routes:
        before = {entry.id for entry in entries(engine)}
        if path == "/sign-in":
            secret = client.headers["authorization"].removeprefix("Bearer ")
            response = client.post(path, data={"key": secret}, headers=SAME, follow_redirects=False)
            ids = [{"key_id": key.id}]
        else:
            ids = make_things(client, engine, settings)
            before = {entry.id for entry in entries(engine)}
            for of_one in ids:
                response = call(client, method, path, of_one)
                if response.status_code < 400:
                    break
                assert {entry.id for entry in entries(engine)} == before, f"{method} {path}"
        assert response.status_code < 400, f"{method} {path}: {response.text}"
        made = [entry for entry in entries(engine) if entry.id not in before]
        assert len(made) == 1, f"{method} {path}: {[entry.action for entry in made]}"
        (entry,) = made
        assert (entry.tenant, entry.key_id, entry.actor) == ("default", key.id, "test")
        assert entry.request_id == response.headers["x-request-id"]
        known = {value for of_one in ids for value in of_one.values()}
        if response.headers.get("content-type") == "application/json" and "{" not in path:
            known.add(response.json()["id"])
        if path.endswith(("/rankings", "/decisions")):
            known.add(response.json()["id"])
        assert entry.object_id in known, f"{method} {path}"
        seen.add(entry.action)
    assert seen == set(TrailAction) - AT_THE_COMMAND_LINE


def test_what_changed_nothing_leaves_no_entry(client: TestClient, engine: Engine) -> None:
    header = {"Idempotency-Key": "once"}
    made = [client.post("/v1/audits", json=request_body(), headers=header) for _ in range(2)]
    audit_id = made[1].json()["id"]
    for _ in range(2):
        client.post(f"/v1/audits/{audit_id}/cancel")
    actions = [entry.action for entry in entries(engine) if entry.object_id == audit_id]
    assert actions == [TrailAction.AUDIT_SUBMIT, TrailAction.AUDIT_CANCEL]


def test_an_entry_is_gone_with_a_change_that_is_rolled_back(engine: Engine) -> None:
    ours = acting(of_tenant(engine, "default"), Actor("anna", "key_1", "req_1"))
    audit = make_audit(engine)
    with Session(ours) as session:
        record(session, TrailAction.AUDIT_CANCEL, audit.id, tenant="default")
        session.flush()
        session.rollback()
    assert entries(engine) == []


def test_what_the_operator_does_is_noted_too(engine: Engine) -> None:
    key = create_key(engine, tenant="one", name="k", valid_days=1)
    rotate_key(engine, key.id, valid_days=1, overlap_hours=1)
    for _ in range(2):
        revoke_key(engine, key.id)
    set_limits(engine, "one", {"max_open_audits": 3})
    found = [(entry.actor, entry.key_id, entry.action, entry.tenant) for entry in entries(engine)]
    assert found == [
        ("operator", None, action, "one")
        for action in ("key.create", "key.rotate", "key.revoke", "limits.set")
    ]


class TestReading:
    def test_the_newest_come_first_page_by_page(self, client: TestClient, engine: Engine) -> None:
        for _ in range(5):
            client.post("/v1/audits", json=request_body())
        pages, path = [], "/v1/trail?limit=2"
        while path:
            page = client.get(path).json()
            pages.append(page["data"])
            path = page["has_more"] and f"/v1/trail?limit=2&cursor={page['next_cursor']}"
        assert [len(page) for page in pages] == [2, 2, 2]  # with the key's making
        ids = [entry["id"] for page in pages for entry in page]
        assert ids == [entry.id for entry in reversed(entries(engine))]

    def test_it_can_be_narrowed(self, client: TestClient) -> None:
        audits = [client.post("/v1/audits", json=request_body()).json()["id"] for _ in range(2)]
        client.post(f"/v1/audits/{audits[0]}/cancel")
        cancels = client.get("/v1/trail?action=audit.cancel").json()["data"]
        assert [entry["object_id"] for entry in cancels] == audits[:1]
        of_one = client.get(f"/v1/trail?object_id={audits[0]}").json()["data"]
        assert [entry["action"] for entry in of_one] == ["audit.cancel", "audit.submit"]
        key_id = cancels[0]["key_id"]
        assert len(client.get(f"/v1/trail?key_id={key_id}").json()["data"]) == 3
        assert client.get("/v1/trail?created_before=2020-01-01T00:00:00Z").json()["data"] == []
        assert client.get("/v1/trail?action=audit.eat").status_code == 422


def test_entries_are_kept_as_long_as_the_setting_says(
    engine: Engine, celery: Celery, settings: Settings
) -> None:
    for name in ("old", "new"):
        create_key(engine, tenant="one", name=name, valid_days=1)
    with transaction(engine) as session:
        old = session.scalars(select(TrailEntry).order_by(TrailEntry.id).limit(1)).one()
        aged = update(TrailEntry).where(TrailEntry.id == old.id)
        session.execute(aged.values(at=func.now() - timedelta(days=366)))
    reconcile(engine, celery, settings.model_copy(update={"trail_days": 0}))
    assert len(entries(engine)) == 2
    reconcile(engine, celery, settings)
    assert [entry.id for entry in entries(engine)] != [old.id]
    assert len(entries(engine)) == 1
