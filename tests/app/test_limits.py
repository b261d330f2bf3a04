"""Every limit of a request answers clearly, and names what sets it."""

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.errors import Busy, QuotaExceeded
from app.keys.service import create_key
from app.limits.uploads import UploadSlots
from app.main import create_app
from app.settings import Settings
from tests.factories import CSV_TABLE, make_finished_audit, request_body

Limited = Callable[..., TestClient]


@pytest.fixture
def limited(settings: Settings, engine: Engine, celery: Celery) -> Limited:
    def make(**limits: Any) -> TestClient:
        key = create_key(engine, tenant="default", name="test", valid_days=1)
        api = create_app(settings.model_copy(update=limits), engine, celery)
        headers = {"Authorization": f"Bearer {key.secret}"}
        return TestClient(api, headers=headers, raise_server_exceptions=False)

    return make


def upload(client: TestClient, content: str = CSV_TABLE, **fields: str) -> Any:
    return client.post("/v1/datasets", files={"file": ("a.csv", content)}, data=fields)


def table(num_columns: int) -> str:
    names = ",".join(f"c{place}" for place in range(num_columns))
    return f"text,label,{names}\n" + f"good,pos,{',' * (num_columns - 1)}\nbad,neg,{names}\n"


class TestSizes:
    @pytest.mark.parametrize("is_declared", [True, False])
    def test_a_body(self, limited: Limited, is_declared: bool) -> None:
        client = limited(max_body_bytes=1000)
        body: Any = b'{"x": "' + b"x" * 2000 + b'"}'
        content = body if is_declared else iter([body[:500], body[500:]])
        answer = client.post("/v1/audits", content=content)
        assert answer.status_code == 413
        assert "1,000 bytes" in answer.json()["detail"]
        assert "WINNOW_MAX_BODY_BYTES" in answer.json()["detail"]

    def test_an_upload(self, limited: Limited) -> None:
        answer = upload(limited(max_upload_bytes=300), CSV_TABLE * 20)
        assert answer.status_code == 413
        assert "WINNOW_MAX_UPLOAD_BYTES" in answer.json()["detail"]

    @pytest.mark.parametrize(
        ("limits", "content", "code"),
        [
            ({"max_rows": 2}, CSV_TABLE, "too_many_rows"),
            ({"max_text_chars": 5}, CSV_TABLE, "text_too_long"),
            ({}, table(5000), "too_many_columns"),
        ],
    )
    def test_a_table(
        self, limited: Limited, limits: dict[str, int], content: str, code: str
    ) -> None:
        answer = upload(limited(**limits), content)
        assert answer.status_code == 422
        assert answer.json()["code"] == code
        assert answer.json()["errors"][0]["pointer"].startswith("#/")

    def test_a_form_with_too_many_fields(self, limited: Limited) -> None:
        answer = upload(limited(), **{f"field_{place}": "x" for place in range(30)})
        assert answer.status_code == 400
        assert answer.headers["content-type"] == "application/problem+json"


class TestNumbers:
    @pytest.mark.parametrize(
        ("changes", "pointer"),
        [
            ({"metadata": {f"k{place}": "v" for place in range(51)}}, "#/metadata"),
            ({"metadata": {"k" * 101: "v"}}, "#/metadata"),
            ({"metadata": {"k": "v" * 1001}}, "#/metadata/k"),
            ({"model": {"reference": "hf://" + "o" * 3000}}, "#/model/reference"),
        ],
    )
    def test_of_a_request(self, limited: Limited, changes: dict[str, Any], pointer: str) -> None:
        answer = limited().post("/v1/audits", json=request_body(**changes))
        assert answer.status_code == 422, answer.text
        assert answer.json()["errors"][0]["pointer"].startswith(pointer)

    def test_of_decisions_in_one_call(
        self, limited: Limited, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings)
        body = {"action": "keep", "indices": list(range(100_001))}
        answer = limited().post(f"/v1/audits/{audit.id}/decisions", json=body)
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["pointer"] == "#/indices"

    def test_of_items_on_a_page_and_how_deep_it_lies(self, limited: Limited) -> None:
        client = limited()
        assert client.get("/v1/audits?limit=1001").json()["errors"][0]["pointer"] == "query.limit"
        long = client.get(f"/v1/audits?cursor={'x' * 201}")
        assert long.json()["errors"][0]["pointer"] == "query.cursor"

    def test_an_id_that_is_none(self, limited: Limited) -> None:
        client = limited()
        assert client.get(f"/v1/audits/{'a' * 30_000}").status_code == 422
        assert client.get("/v1/audits/%00").status_code == 422
        assert client.get("/v1/audits/aud_%F0%9F%A6%86").status_code == 404

    def test_of_brackets_in_a_body(self, limited: Limited) -> None:
        body = b"[" * 500_000
        answer = limited().post(
            "/v1/audits", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code in {400, 422}
        assert answer.headers["content-type"] == "application/problem+json"


class TestUploadsAtOnce:
    def test_a_tenant_may_have_half_and_the_server_no_more_than_all(self) -> None:
        slots = UploadSlots(4)
        with slots.taken("a"), slots.taken("a"):
            with pytest.raises(QuotaExceeded) as refused, slots.taken("a"):
                pass
            assert refused.value.headers == {"Retry-After": "5"}
            with slots.taken("b"), slots.taken("c"):
                with pytest.raises(Busy) as busy, slots.taken("d"):
                    pass
                assert "WINNOW_MAX_CONCURRENT_UPLOADS" in str(busy.value.detail)
        with slots.taken("a"), slots.taken("d"):
            pass

    def test_an_upload_that_is_refused_gives_its_place_back(self, limited: Limited) -> None:
        client = limited(max_concurrent_uploads=1)
        for _ in range(3):
            assert upload(client, "nonsense").status_code == 422
        assert upload(client).status_code == 201

    def test_one_more_is_refused_over_http(self, limited: Limited) -> None:
        client = limited(max_concurrent_uploads=2)
        slots: UploadSlots = client.app.state.upload_slots  # type: ignore[attr-defined]
        with slots.taken("default"):
            answer = upload(client)
        assert answer.status_code == 429
        assert answer.headers["Retry-After"] == "5"
        assert answer.json()["quota"] == "max_concurrent_uploads"
        with slots.taken("other"), slots.taken("another"):
            answer = upload(client)
        assert answer.status_code == 503
        assert answer.json()["type"] == "urn:winnow:problem:busy"
        assert upload(client).status_code == 201
