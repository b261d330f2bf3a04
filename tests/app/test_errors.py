"""Every error is a problem document, whoever makes it."""

import ast
import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.datasets.files import DatasetErrorCode
from app.db import make_engine
from app.errors import AppError
from app.main import create_app
from app.settings import Settings
from tests.factories import request_body
from workers.sources.errors import SourceErrorCode

JSON = {"content-type": "application/json"}
ROOT = Path(__file__).parents[2]
CODE = re.compile(r"[a-z]+(_[a-z]+)*")


def problem_of(response: Any, status: int) -> dict[str, Any]:
    """Return the problem document of a response."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"].startswith("req_")
    problem: dict[str, Any] = response.json()
    assert problem["type"].startswith("urn:winnow:problem:")
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return problem


def test_unknown_paths_and_methods(client: TestClient) -> None:
    problem_of(client.get("/v2/audits"), 404)
    problem_of(client.patch("/v1/audits"), 405)


@pytest.mark.parametrize(
    "body", [b"{", b"[1, 2", b"nul", b'{"model": }', b"", b"[]", b"3", b'"text"', b"\xff\xfe"]
)
def test_bodies_that_are_no_request(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/audits", content=body, headers=JSON)
    assert response.status_code in {400, 422}
    problem = problem_of(response, response.status_code)
    if response.status_code == 422:
        assert problem["errors"][0]["pointer"] == "#"


def test_broken_json_is_told_with_the_place_where_it_breaks(client: TestClient) -> None:
    response = client.post("/v1/audits", content=b'{"model": }', headers=JSON)
    (error,) = problem_of(response, 422)["errors"]
    assert error["detail"] == "not JSON at character 10: Expecting value"


def test_a_body_of_another_type(client: TestClient) -> None:
    headers = {"content-type": "text/plain"}
    problem_of(client.post("/v1/audits", content=b"{}", headers=headers), 422)


def test_deep_nesting_breaks_nothing(client: TestClient) -> None:
    body = b'{"model":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    response = client.post("/v1/audits", content=body, headers=JSON)
    assert response.status_code in {400, 422}
    problem_of(response, response.status_code)


@pytest.mark.parametrize("text", ["\x00", "\ud800"])
def test_text_that_no_database_stores(client: TestClient, text: str) -> None:
    body = json.dumps(request_body(metadata={"a": text}))
    response = client.post("/v1/audits", content=body, headers=JSON)
    problem_of(response, 422)


def test_paths_that_no_database_stores(client: TestClient) -> None:
    assert client.get("/v1/audits/%00").status_code in {404, 422}
    assert client.get("/v1/audits?model=%00").status_code == 422


def test_bodies_over_the_limit(client: TestClient, settings: Settings) -> None:
    """By the declared length, and by the real one where none is declared."""

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 64 * 1024

    too_large = b" " * (settings.max_body_bytes + 1)
    for content in (too_large, chunks()):
        response = client.post("/v1/audits", content=content, headers=JSON)
        assert "1,048,576 bytes" in problem_of(response, 413)["detail"]


def test_a_database_that_is_down_is_said_and_may_be_back_soon(settings: Settings) -> None:
    engine = make_engine("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    client = TestClient(create_app(settings, engine), raise_server_exceptions=False)
    response = client.get("/v1/audits", headers={"Authorization": "Bearer x"})
    assert "Nothing was stored" in problem_of(response, 503)["detail"]
    assert response.headers["Retry-After"] == "5"


@pytest.fixture
def failing(api: FastAPI) -> TestClient:
    @api.get("/fails")
    def fails(number: int) -> None:
        if number:
            raise OSError(number, "of the test")
        raise ZeroDivisionError("the secret is swordfish")

    return TestClient(api, raise_server_exceptions=False)


def test_our_own_mistakes_tell_no_secrets(failing: TestClient, engine: Engine) -> None:
    response = failing.get("/fails?number=0")
    problem = problem_of_server(response)
    assert "swordfish" not in response.text
    assert problem["request_id"].startswith("req_")
    problem_of_server(failing.get(f"/fails?number={errno.EACCES}"))


def problem_of_server(response: Any) -> dict[str, Any]:
    """Return the problem of a 500; the outermost layer makes it."""
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["type"] == "urn:winnow:problem:internal-error"
    return problem


def test_a_full_disk_is_507(failing: TestClient) -> None:
    assert "disk is full" in problem_of(failing.get(f"/fails?number={errno.ENOSPC}"), 507)["detail"]


class TestOpenApi:
    def test_every_route_is_described(self, client: TestClient) -> None:
        document = client.get("/openapi.json").json()
        tags = {tag["name"] for tag in document["tags"]}
        for path, methods in document["paths"].items():
            for method, route in methods.items():
                named = f"{method} {path}"
                assert route["summary"], named
                assert route["description"], named
                assert set(route["tags"]) <= tags, named
                if path.startswith("/v1"):
                    problems = {"application/problem+json": None}
                    assert route["responses"]["401"]["content"].keys() == problems.keys(), named

    def test_every_reference_leads_somewhere(self, client: TestClient) -> None:
        document = client.get("/openapi.json").json()

        def references(node: Any) -> Iterator[str]:
            if isinstance(node, dict):
                if isinstance(node.get("$ref"), str):
                    yield node["$ref"]
                for child in node.values():
                    yield from references(child)
            elif isinstance(node, list):
                for child in node:
                    yield from references(child)

        for reference in set(references(document)):
            node = document
            for part in reference.removeprefix("#/").split("/"):
                node = node[part]

    def test_the_example_of_a_request_is_one(self, client: TestClient) -> None:
        document = client.get("/openapi.json").json()
        example = document["components"]["schemas"]["AuditRequest"]["examples"][0]
        problem = client.post("/v1/audits", json=example).json()
        assert problem["errors"][0]["pointer"] in {"#/model/reference", "#/train/reference"}

    def test_the_pages_for_people_are_there(self, client: TestClient) -> None:
        assert client.get("/docs").status_code == 200


def test_the_documentation_lists_every_error() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    for error in AppError.__subclasses__():
        assert f"| `urn:winnow:problem:{error.type_}` | {int(error.status)} |" in text
    listed = {
        code
        for line in text.partition("## Why an audit failed")[2].splitlines()
        if line.startswith("| `")
        for code in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert listed == codes_in_the_source()


def codes_in_the_source() -> set[str]:
    """Return every code that an audit can fail with, as the source spells it out."""
    codes: set[str] = {*get_args(DatasetErrorCode), *get_args(SourceErrorCode)}
    for folder in ("app", "workers", "migrations"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            codes |= {
                value.value
                for node in ast.walk(ast.parse(path.read_text()))
                for value in where_codes_stand(node)
                if isinstance(value, ast.Constant)
                and isinstance(value.value, str)
                and CODE.fullmatch(value.value)
            }
    return codes - {"influence_error"}  # that of a base class, which nobody raises


def where_codes_stand(node: ast.AST) -> list[ast.expr]:
    """Return what may be an error's code: of calls, of constants, of a migration's columns."""
    match node:
        case ast.Call(func=ast.Name(id="AuditRefused" | "Failure")):
            named = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            return [*node.args[:1], *named]
        case ast.Call(func=ast.Attribute(attr="refuse")):
            return node.args[:2]
        case ast.Assign(targets=[ast.Name(id="code" | "INTERNAL_ERROR")]):
            return [node.value]
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return [
                value
                for key, value in pairs
                if isinstance(key, ast.Constant) and key.value == "error_code"
            ]
    return []
