"""Without keys, a server answers its own machine alone."""

import pytest
from celery import Celery
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.main import create_app
from app.settings import Settings


@pytest.fixture
def keyless(settings: Settings, engine: Engine, celery: Celery) -> TestClient:
    api = create_app(settings.model_copy(update={"require_keys": False}), engine, celery)
    return TestClient(api, base_url="http://127.0.0.1:8000")


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:8000", "127.8.0.1"])
def test_calls_to_this_machine_are_answered(keyless: TestClient, host: str) -> None:
    assert keyless.get("/v1/audits", headers={"Host": host}).status_code == 200
    origin = {"Host": host, "Origin": f"http://{host}"}
    assert keyless.get("/v1/audits", headers=origin).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[x"]
)
def test_a_name_that_was_rebound_to_this_machine_is_refused(keyless: TestClient, host: str) -> None:
    response = keyless.get("/v1/audits", headers={"Host": host})
    assert response.status_code == 403
    assert response.headers["content-type"] == "application/problem+json"
    assert "localhost" in response.json()["detail"]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://["])
def test_another_web_site_cannot_send_forms(keyless: TestClient, origin: str) -> None:
    files = {"file": ("a.csv", "text,label\na,x\nb,y\n")}
    response = keyless.post("/v1/datasets", files=files, headers={"Origin": origin})
    assert response.status_code == 403


def test_with_keys_any_name_is_answered(client: TestClient) -> None:
    assert client.get("/v1/audits", headers={"Host": "winnow.example"}).status_code == 200
