"""Signing in: a key in a cookie, which no other site can make use of."""

from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.keys.cookie import local_path
from app.keys.service import NewKey, create_key, revoke_key
from app.settings import Settings
from tests.factories import make_audit, make_finished_audit, request_body

SAME = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def key(engine: Engine) -> NewKey:
    return create_key(engine, tenant="default", name="anna", valid_days=1)


@pytest.fixture
def nobody(api: FastAPI) -> Iterator[TestClient]:
    """A browser that has not signed in."""
    with TestClient(api, follow_redirects=False) as client:
        yield client


@pytest.fixture
def signed_in(nobody: TestClient, key: NewKey) -> TestClient:
    answer = nobody.post("/sign-in", data={"key": key.secret, "next": "/"}, headers=SAME)
    assert answer.status_code == 303
    return nobody


def test_pages_send_who_is_not_signed_in_to_the_form_and_back(
    nobody: TestClient, engine: Engine, key: NewKey
) -> None:
    audit = make_audit(engine)
    answer = nobody.get(f"/audits/{audit.id}?label=a%26b")
    assert answer.status_code == 303
    form = nobody.get(answer.headers["location"])
    wanted = f"/audits/{audit.id}?label=a%26b"
    assert f'value="{wanted}"' in form.text
    answer = nobody.post("/sign-in", data={"key": key.secret, "next": wanted}, headers=SAME)
    assert answer.headers["location"] == wanted
    assert nobody.get(wanted).status_code == 200


def test_the_cookie_is_out_of_reach_of_scripts_and_sites(nobody: TestClient, key: NewKey) -> None:
    answer = nobody.post("/sign-in", data={"key": f" {key.secret} "}, headers=SAME)
    cookie = answer.headers["set-cookie"].lower()
    for part in ("httponly", "samesite=strict", "path=/"):
        assert part in cookie
    assert "secure" not in cookie  # over http it would not come back


def test_over_https_the_cookie_stays_there(api: FastAPI, key: NewKey) -> None:
    with TestClient(api, base_url="https://winnow.test", follow_redirects=False) as client:
        answer = client.post("/sign-in", data={"key": key.secret}, headers=SAME)
    assert "secure" in answer.headers["set-cookie"].lower()


def test_a_wrong_key_is_refused_with_the_form(nobody: TestClient) -> None:
    answer = nobody.post("/sign-in", data={"key": "wnw_no"}, headers=SAME)
    assert answer.status_code == 401
    assert "unknown, revoked or over its date" in answer.text
    assert "set-cookie" not in answer.headers


def test_the_cookie_opens_the_api_to_our_pages_alone(
    signed_in: TestClient, engine: Engine, settings: Settings
) -> None:
    audit = make_finished_audit(engine, settings)
    path = f"/v1/audits/{audit.id}/decisions"
    body = {"action": "keep", "indices": [0]}
    assert signed_in.get(f"/v1/audits/{audit.id}").status_code == 200
    for refused in (
        {},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "https://evil.test"},
        {"Origin": "null"},
        {"Origin": "http://["},
    ):
        answer = signed_in.post(path, json=body, headers=refused)
        assert answer.status_code == 403, refused
        assert answer.json()["type"] == "urn:winnow:problem:not-permitted"
    for allowed in (SAME, {"Origin": "http://testserver"}):
        answer = signed_in.post(path, json=body, headers=allowed)
        assert answer.status_code == 201
        assert answer.json()["reviewer"] == "anna"  # the key's name, whatever the page says


def test_a_header_needs_no_page(nobody: TestClient, key: NewKey) -> None:
    headers = {"Authorization": f"Bearer {key.secret}", "Sec-Fetch-Site": "cross-site"}
    assert nobody.post("/v1/audits", json=request_body(), headers=headers).status_code == 202


def test_signing_in_and_out_are_changes_too(signed_in: TestClient, key: NewKey) -> None:
    """Else a site could sign a victim in as somebody else, and read what it uploads."""
    for path in ("/sign-in", "/sign-out"):
        answer = signed_in.post(path, data={"key": key.secret})
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers
    answer = signed_in.post("/sign-out", headers=SAME)
    assert answer.headers["location"] == "/sign-in"
    assert signed_in.get("/").status_code == 303


def test_a_key_that_is_revoked_ends_the_session(
    signed_in: TestClient, engine: Engine, key: NewKey
) -> None:
    assert signed_in.get("/").status_code == 200
    revoke_key(engine, key.id)
    assert signed_in.get("/").status_code == 303
    assert signed_in.get("/v1/audits").status_code == 401


@pytest.mark.parametrize(
    "path", ["https://evil.test/", "//evil.test", "/\\evil.test", "evil", "", "/a\r\nSet-Cookie: b"]
)
def test_no_address_leads_elsewhere(path: str) -> None:
    assert local_path(path) == "/"


def test_addresses_of_ours_stay() -> None:
    assert local_path("/audits/aud_1?label=a%26b") == "/audits/aud_1?label=a%26b"


def test_without_keys_there_is_no_form(api: FastAPI, settings: Settings) -> None:
    api.state.settings = settings.model_copy(update={"require_keys": False})
    with TestClient(api, follow_redirects=False) as client:
        assert client.get("/").status_code == 200
        assert client.get("/sign-in").headers["location"] == "/"
        assert "Sign out" not in client.get("/").text
