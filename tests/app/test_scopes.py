"""What a key may do: nothing beyond its scopes, on every route there is."""

from collections.abc import Callable

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.keys.scopes import ALL_SCOPES, NoSuchArea, Scope, read_scopes, scope_of
from app.keys.service import create_key
from app.settings import Settings
from tests.app.walking import OPEN, call, every_route, make_things

SAME = {"Sec-Fetch-Site": "same-origin"}
CATALOGUE = {"/v1/estimators", "/v1/aggregations"}

WithScopes = Callable[[frozenset[Scope]], TestClient]


@pytest.fixture
def with_scopes(api: FastAPI, engine: Engine) -> WithScopes:
    """Makes clients of the default tenant whose keys have some scopes alone."""

    def make(scopes: frozenset[Scope]) -> TestClient:
        key = create_key(engine, tenant="default", name="narrow", valid_days=1, scopes=scopes)
        headers = {"Authorization": f"Bearer {key.secret}"}
        return TestClient(
            api, headers=headers, follow_redirects=False, raise_server_exceptions=False
        )

    return make


def guarded(api: FastAPI) -> list[tuple[str, str, Scope]]:
    """Return the routes that need a scope; a new route without one is found here."""
    routes = [route for route in every_route(api) if route not in OPEN]
    scopes = [(method, path, scope_of(method, path)) for method, path in routes]
    assert {path for _, path, scope in scopes if scope is None} == CATALOGUE
    return [(method, path, scope) for method, path, scope in scopes if scope is not None]


def test_every_route_refuses_a_key_without_its_scope_and_names_it(
    api: FastAPI,
    client: TestClient,
    engine: Engine,
    settings: Settings,
    with_scopes: WithScopes,
) -> None:
    ids = make_things(client, engine, settings)[0]
    without = {scope: with_scopes(ALL_SCOPES - {scope}) for scope in Scope}
    seen = set()
    for method, path, scope in guarded(api):
        response = call(without[scope], method, path, ids)
        named = f"{method} {path}: {response.status_code} {response.text}"
        assert response.status_code == 403, named
        if path.startswith("/v1/") and method != "HEAD":
            problem = response.json()
            assert problem["type"] == "urn:winnow:problem:missing-scope", named
            assert problem["scope"] == scope, named
        assert scope in response.text or method == "HEAD", named
        seen.add(scope)
    assert seen == ALL_SCOPES


def test_every_route_opens_with_its_scope_alone(
    api: FastAPI,
    client: TestClient,
    engine: Engine,
    settings: Settings,
    with_scopes: WithScopes,
) -> None:
    """No route asks for a second scope in passing; what else it answers is not looked at."""
    ids = make_things(client, engine, settings)[0]
    alone = {scope: with_scopes(frozenset({scope})) for scope in Scope}
    for method, path, scope in guarded(api):
        if not path.endswith("/events"):
            response = call(alone[scope], method, path, ids)
            assert response.status_code not in {401, 403}, f"{method} {path}: {response.text}"


def test_a_key_without_scopes_has_all(client: TestClient) -> None:
    assert client.get("/v1/trail").status_code == 200
    assert client.get("/v1/audits").status_code == 200


def test_a_path_that_has_no_scope_is_closed() -> None:
    with pytest.raises(NoSuchArea):
        scope_of("GET", "/v1/something-new")


def test_scopes_are_read_as_people_write_them() -> None:
    assert read_scopes("audits:read, decisions:write") == {
        Scope.AUDITS_READ,
        Scope.DECISIONS_WRITE,
    }
    for wrong in ("audits:rite", "", " , "):
        with pytest.raises(ValueError, match="there are audits:read"):
            read_scopes(wrong)


def test_the_openapi_document_names_the_scope_of_every_call(api: FastAPI) -> None:
    document = api.openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if (method.upper(), path) not in OPEN:
                scope = scope_of(method.upper(), path)
                assert operation["security"] == [{"HTTPBearer": [scope] if scope else []}]
                assert {"401", "403", "429"} <= set(operation["responses"]), path
    assert (
        "`decisions:write`: "
        in document["components"]["securitySchemes"]["HTTPBearer"]["description"]
    )


class TestPages:
    def signed_in(self, api: FastAPI, engine: Engine, *scopes: Scope) -> TestClient:
        key = create_key(engine, tenant="default", name="anna", valid_days=1, scopes=scopes)
        browser = TestClient(api, follow_redirects=False, headers=SAME)
        self.answer = browser.post("/sign-in", data={"key": key.secret})
        return browser

    def test_a_key_that_may_not_look_is_not_let_in(self, api: FastAPI, engine: Engine) -> None:
        self.signed_in(api, engine, Scope.DATASETS_READ)
        assert self.answer.status_code == 403
        assert "lacks the scope audits:read" in self.answer.text
        assert "set-cookie" not in self.answer.headers

    def test_who_may_only_look_sees_no_buttons_that_change_something(
        self, api: FastAPI, engine: Engine, client: TestClient, settings: Settings
    ) -> None:
        finished, _, queued = (ids["audit_id"] for ids in make_things(client, engine, settings))
        buttons = {
            "/": ['data-open="new-audit"', 'id="new-audit"'],
            f"/audits/{queued}": ["data-cancel"],
            f"/audits/{finished}": ["data-act", "data-all", "data-undo"],
        }
        reader = self.signed_in(api, engine, Scope.AUDITS_READ)
        reviewer = self.signed_in(api, engine, *ALL_SCOPES)
        for path, marks in buttons.items():
            for mark in marks:
                assert mark not in reader.get(path).text, f"{path} {mark}"
                assert mark in reviewer.get(path).text, f"{path} {mark}"
        assert "may look, but not decide" in reader.get(f"/audits/{finished}").text

    def test_who_may_only_look_is_told_so_when_it_tries(
        self, api: FastAPI, engine: Engine, client: TestClient, settings: Settings
    ) -> None:
        audit_id = make_things(client, engine, settings)[0]["audit_id"]
        reader = self.signed_in(api, engine, Scope.AUDITS_READ)
        body = {"action": "keep", "indices": [1]}
        answer = reader.post(f"/v1/audits/{audit_id}/decisions", json=body)
        assert answer.status_code == 403
        assert "lacks the scope decisions:write" in answer.json()["detail"]
