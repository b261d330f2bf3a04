"""What requests from the OpenAPI document found, each fault as it was."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.settings import Settings
from tests.app.conftest import api, client, new_client

__all__ = ["api", "client", "new_client"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/audits", "GET, POST"),
        ("PATCH", "/v1/audits/aud_1", "DELETE, GET"),
        ("DELETE", "/v1/audits/aud_1/suspects.csv", "GET, HEAD"),
        ("POST", "/healthz", "GET"),
    ],
)
def test_a_refused_method_is_told_all_that_are_allowed(
    client: TestClient, method: str, path: str, allowed: str
) -> None:
    """RFC 9110, 10.2.1: not those of the first route with the path alone."""
    answer = client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("value", ["0", "0.5", "1700000000", "-1"])
def test_a_time_is_no_number(client: TestClient, value: str) -> None:
    answer = client.get("/v1/audits", params={"created_after": value})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "query.created_after"
    assert "2026-11-28T08:00:00Z" in answer.json()["detail"]


@pytest.mark.parametrize("body", [b"\xff\xfe", b"\x00", b"[", b"\xed\xa0\x80", b"{" * 100_000])
def test_a_body_that_cannot_be_read_is_a_problem(client: TestClient, body: bytes) -> None:
    kind = {"Content-Type": "application/json"}
    answer = client.post("/v1/audits", content=body, headers=kind)
    assert answer.status_code in {400, 422}
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def test_calls_with_a_body_say_that_it_may_be_unreadable_or_too_large(
    document: dict[str, Any],
) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            documented = {"400", "413"} <= operation["responses"].keys()
            assert documented == ("requestBody" in operation), (method, path)


def test_links_lead_from_an_answer_to_the_calls_that_take_its_ids(
    document: dict[str, Any],
) -> None:
    def links(method: str, path: str, status: str) -> dict[str, Any]:
        found: dict[str, Any] = document["paths"][path][method]["responses"][status]["links"]
        return {of["operationId"].partition("_v1_")[0]: of["parameters"] for of in found.values()}

    submitted = links("post", "/v1/audits", "202")
    assert submitted["get_audit"] == {"audit_id": "$response.body#/id"}
    assert {"cancel_audit", "delete_audit", "list_suspects", "submit_ranking"} <= submitted.keys()
    ranking = links("post", "/v1/audits/{audit_id}/rankings", "202")["get_ranking"]
    assert ranking == {"audit_id": "$request.path.audit_id", "ranking_id": "$response.body#/id"}
    assert links("get", "/v1/datasets", "200")["get_dataset"] == {
        "dataset_id": "$response.body#/data/0/id"
    }
    known = {of["operationId"] for of in _operations(document)}
    for operation in _operations(document):
        for response in operation["responses"].values():
            for link in response.get("links", {}).values():
                assert link["operationId"] in known


def _operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [of for operations in document["paths"].values() for of in operations.values()]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("https://127.0.0.1/train.csv", "not a public address"),
        ("https://localhost/train.csv", "not a public address"),
        ("https://[::1]/train.csv", "not a public address"),
        ("https://0x7f.1/train.csv", "not a public address"),
        ("https://169.254.169.254/latest/meta-data/iam", "not a public address"),
        ("http://example.com/train.csv", "not a reference"),
        ("https://example.com:25/train.csv", "port 25 is not called"),
        ("s3://bucket/train.csv", "WINNOW_S3_ROOTS"),
    ],
)
def test_an_address_inside_is_refused_when_it_is_submitted(
    client: TestClient, reference: str, message: str
) -> None:
    answer = client.post("/v1/audits", json=_request(reference))
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["pointer"] == "#/train/reference"
    assert message in error["detail"]


def test_a_public_address_is_taken_unless_the_operator_says_no(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    assert client.post("/v1/audits", json=_request("https://example.com/a.csv")).status_code == 202
    client.app.state.settings = settings.model_copy(update={"https_datasets": False})  # type: ignore[attr-defined]
    refused = client.post("/v1/audits", json=_request("https://example.com/a.csv"))
    assert refused.status_code == 422
    assert "WINNOW_HTTPS_DATASETS" in refused.json()["detail"]


def _request(reference: str) -> dict[str, Any]:
    hub = "hf://datasets/org/texts@main?split=validation"
    return {
        "model": {"reference": "hf://org/model@main"},
        "train": {"reference": reference},
        "validation": {"reference": hub},
        "fine_tune": {"epochs": 1},
    }
