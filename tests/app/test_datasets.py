"""Uploading datasets: taken in whole and checked, or not at all."""

import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from app.audits.models import AuditState
from app.datasets.models import Dataset
from app.main import create_app
from app.settings import Settings
from tests.factories import CAUSAL_LM_REQUEST, CSV_TABLE, make_audit, make_ended_audit


def upload(
    client: TestClient, content: str | bytes = CSV_TABLE, name: str = "a.csv", **fields: Any
) -> httpx2.Response:
    return client.post("/v1/datasets", files={"file": (name, content)}, data=fields)


def leftovers(settings: Settings) -> list[str]:
    """Return all files under the data directory, relative to it."""
    root = settings.data_dir
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_an_upload_is_kept_as_it_came(client: TestClient, settings: Settings) -> None:
    response = upload(client, name="reviews.csv")

    assert response.status_code == 201
    dataset = response.json()
    assert response.headers["Location"] == f"/v1/datasets/{dataset['id']}"
    assert dataset["reference"] == f"upload:{dataset['id']}"
    assert (dataset["name"], dataset["format"], dataset["num_rows"]) == ("reviews.csv", "csv", 3)
    assert dataset["sha256"] == hashlib.sha256(CSV_TABLE.encode()).hexdigest()
    assert dataset["summary"]["label_counts"] == {"neg": 1, "pos": 2}
    assert leftovers(settings) == [f"datasets/{dataset['id']}/original.csv"]
    assert client.get(response.headers["Location"]).json() == dataset


def test_every_format_is_taken(client: TestClient, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in (("a.jsonl", lines), ("a.parquet", (tmp_path / "a").read_bytes())):
        dataset = upload(client, content, name).json()
        assert dataset["format"] == name.removeprefix("a.")
        assert dataset["summary"]["labels"] == [0, 1]
    assert upload(client, lines, "nameless", format="jsonl").json()["format"] == "jsonl"


def test_columns_may_have_any_name(client: TestClient) -> None:
    table = "q,r,y,bad\na,b,1,0\nc,d,0,1\n"
    fields = {"text_column": "q", "text_pair_column": "r", "label_column": "y"}
    dataset = upload(client, table, noise_column="bad", name_="", **fields)
    assert dataset.status_code == 422  # name_ is no field
    dataset = upload(client, table, noise_column="bad", **fields)
    columns = {field: name for field, name in dataset.json()["columns"].items() if name}
    assert columns == {"text": "q", "text_pair": "r", "label": "y", "noise": "bad"}
    assert dataset.json()["summary"]["num_noisy"] == 1


@pytest.mark.parametrize(
    ("content", "fields", "pointer", "words"),
    [
        ("text,lab\na,b\n", {}, "#/label_column", "'text', 'lab'"),
        ("text,label\na,x\n,y\n", {}, "#/text_column", "row 2"),
        ("text,label\na,x\nb,x\n", {}, "#/label_column", "only the label"),
        ("text,label\n", {}, "#/file", "no rows"),
        ("text,label,n\na,x,1\nb,y,7\n", {"noise_column": "n"}, "#/noise_column", "row 2"),
        (CSV_TABLE, {"format": "parquet"}, "#/file", "Parquet"),
        (CSV_TABLE, {"format": "xls"}, "#/format", "should be"),
        (CSV_TABLE, {"label": "x"}, "#/label", "Extra inputs"),
        (CSV_TABLE, {"text_column": ""}, "#/text_column", "at least 1"),
        (b"\xff\xfe\x00", {}, "#/file", ""),
    ],
)
def test_a_refusal_names_the_place_and_leaves_nothing(
    *,
    client: TestClient,
    engine: Engine,
    settings: Settings,
    content: str | bytes,
    fields: dict[str, str],
    pointer: str,
    words: str,
) -> None:
    response = upload(client, content, **fields)
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/problem+json"
    error = response.json()["errors"][0]
    assert error["pointer"] == pointer
    assert words in error["detail"]
    assert leftovers(settings) == []
    with Session(engine) as session:
        assert session.scalar(select(func.count()).select_from(Dataset)) == 0


def test_a_body_that_is_no_form_is_refused(client: TestClient) -> None:
    for response in (
        client.post("/v1/datasets", json={"file": "a"}),
        client.post("/v1/datasets", data={"file": "a"}),
        client.post("/v1/datasets"),
    ):
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == "#/file"
    broken = client.post(
        "/v1/datasets", content=b"--x", headers={"content-type": "multipart/form-data"}
    )
    assert broken.status_code == 400
    assert broken.headers["content-type"] == "application/problem+json"


def test_a_full_disk_is_said_and_nothing_stays(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    response = upload(client)
    assert response.status_code == 507
    assert response.json()["type"] == "urn:winnow:problem:storage-full"
    assert leftovers(settings) == []


def test_too_many_bytes_are_refused_while_they_come(
    settings: Settings, engine: Engine, client: TestClient
) -> None:
    small = settings.model_copy(update={"max_upload_bytes": 1000})
    limited = TestClient(create_app(small, engine), headers=dict(client.headers))

    def chunks() -> Any:
        for _ in range(100):
            yield b"x" * 100

    form = {"content-type": "multipart/form-data; boundary=b"}
    for response in (
        upload(limited, "x" * 2000),
        limited.post("/v1/datasets", content=chunks(), headers=form),
    ):
        assert response.status_code == 413
        assert response.headers["content-type"] == "application/problem+json"
        assert "1,000 bytes" in response.json()["detail"]
    assert upload(limited).status_code == 201


def test_a_caller_without_a_key_uploads_nothing(client: TestClient) -> None:
    """The key is checked before the body is read."""
    read = 0

    def chunks() -> Any:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield b"x" * 100_000

    stranger = TestClient(client.app)
    response = stranger.post(
        "/v1/datasets",
        content=chunks(),
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    assert response.status_code == 401
    assert read < 10
    assert response.headers["www-authenticate"] == "Bearer"


def test_lists_go_by_pages_the_newest_first(client: TestClient) -> None:
    made = [upload(client, name=f"{number}.csv").json()["id"] for number in range(5)]
    url, seen = "/v1/datasets?limit=2", []
    while url:
        response = client.get(url)
        seen += [dataset["id"] for dataset in response.json()["data"]]
        url = response.links.get("next", {}).get("url", "")
    assert seen == made[::-1]


class TestSentAgain:
    """A caller who lost the answer sends the file again, under the same key."""

    KEY = {"Idempotency-Key": "nightly"}  # noqa: RUF012

    def send(self, client: TestClient, content: str = CSV_TABLE, **fields: str) -> httpx2.Response:
        files = {"file": ("a.csv", content)}
        return client.post("/v1/datasets", files=files, data=fields, headers=self.KEY)

    def test_it_is_one_dataset(self, client: TestClient, settings: Settings) -> None:
        first, again = self.send(client), self.send(client)
        assert (first.status_code, again.status_code) == (201, 201)
        assert again.json() == first.json()
        assert "Idempotent-Replayed" not in first.headers
        assert again.headers["Idempotent-Replayed"] == "true"
        assert leftovers(settings) == [f"datasets/{first.json()['id']}/original.csv"]

    def test_two_at_once_are_one_dataset(self, client: TestClient, settings: Settings) -> None:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: self.send(client).json(), range(4)))
        assert len({answer["id"] for answer in answers}) == 1
        assert len(leftovers(settings)) == 1

    def test_another_file_or_other_options_are_refused(self, client: TestClient) -> None:
        self.send(client)
        for refused in (self.send(client, CSV_TABLE * 2), self.send(client, name="b")):
            assert refused.status_code == 422
            assert refused.json()["errors"][0]["pointer"] == "header.Idempotency-Key"

    def test_a_deleted_dataset_does_not_come_back(
        self, client: TestClient, settings: Settings
    ) -> None:
        client.delete(self.send(client).json()["links"]["self"])
        assert self.send(client).status_code == 409
        assert leftovers(settings) == []

    def test_a_file_is_found_by_its_sha256(self, client: TestClient) -> None:
        made = [upload(client).json(), upload(client, name="b.csv").json()]
        upload(client, CSV_TABLE * 2)
        found = client.get("/v1/datasets", params={"sha256": made[0]["sha256"]}).json()["data"]
        assert [each["id"] for each in found] == [made[1]["id"], made[0]["id"]]
        assert client.get("/v1/datasets", params={"sha256": "0" * 64}).json()["data"] == []
        assert client.get("/v1/datasets", params={"sha256": "abc"}).status_code == 422


class TestDelete:
    def test_row_and_file_go(self, client: TestClient, settings: Settings) -> None:
        dataset_id = upload(client).json()["id"]
        assert client.delete(f"/v1/datasets/{dataset_id}").status_code == 204
        assert leftovers(settings) == []
        assert client.get(f"/v1/datasets/{dataset_id}").status_code == 404
        assert client.delete(f"/v1/datasets/{dataset_id}").status_code == 404

    @pytest.mark.parametrize("role", ["train", "validation"])
    def test_not_while_an_audit_reads_it(
        self, client: TestClient, engine: Engine, role: str
    ) -> None:
        dataset = upload(client).json()
        changes: dict[str, Any] = {role: {"reference": dataset["reference"]}}
        audit = make_audit(engine, **changes)
        make_ended_audit(engine, AuditState.FAILED)
        make_audit(engine, **CAUSAL_LM_REQUEST)  # it has no validation set
        response = client.delete(f"/v1/datasets/{dataset['id']}")
        assert response.status_code == 409
        assert "Cancel it" in response.json()["detail"]
        client.post(f"/v1/audits/{audit.id}/cancel")
        assert client.delete(f"/v1/datasets/{dataset['id']}").status_code == 204
