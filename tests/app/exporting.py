"""Finished audits whose training file is there, and what an export of it should hold."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fastapi.testclient import TestClient
from sqlalchemy import Engine, case, update
from sqlalchemy.orm import Session

from app.audits.models import Audit, RankedSample, TrainingSample
from app.datasets.files import FileFormat
from app.db import transaction
from app.settings import Settings
from tests.factories import make_finished_audit, suggest_labels


@dataclass
class Exported:
    """An audit of an uploaded file."""

    client: TestClient
    path: str
    dataset_id: str
    ranking_id: str

    def decide(self, action: str, *indices: int, **body: Any) -> dict[str, Any]:
        named = {"indices": list(indices)} if indices else {}
        answer = self.client.post(
            f"{self.path}/decisions", json={"action": action, **named, **body}
        )
        assert answer.status_code == 201, answer.text
        batch: dict[str, Any] = answer.json()
        return batch

    def export(self, **query: Any) -> bytes:
        answer = self.client.get(f"{self.path}/export", params=query)
        assert answer.status_code == 200, answer.text
        return bytes(answer.content)

    def patch(self, **query: Any) -> list[dict[str, Any]]:
        answer = self.client.get(f"{self.path}/export/patch", params=query)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/jsonl"
        return [json.loads(line) for line in answer.content.splitlines()]


def audited(
    client: TestClient,
    engine: Engine,
    settings: Settings,
    content: bytes,
    name: str,
    *,
    num_rows: int = 10,
    labels: tuple[str, str] = ("neg", "pos"),
    is_causal: bool = False,
    plants: bool = False,
    **options: str,
) -> Exported:
    """Upload a file and insert a finished audit of it.

    Row i is at rank num_rows - 1 - i; even rows have the second of the labels.
    """
    answer = client.post("/v1/datasets", files={"file": (name, content)}, data=options)
    assert answer.status_code == 201, answer.text
    dataset = answer.json()
    audit = make_finished_audit(engine, settings, num_train=num_rows, has_labels=not is_causal)
    ranking_id = audit.summary["ranking_id"]
    if not is_causal:
        suggest_labels(engine, ranking_id)
        _rename(engine, audit, labels)
    with transaction(engine) as session:
        stored = session.get_one(Audit, audit.id)
        train = {"reference": dataset["reference"], "columns": dataset["columns"]}
        planted = {"fraction": 0.2, "seed": 0} if plants else None
        stored.request = {**stored.request, "train": train, "plant_noise": planted}
        stored.provenance = {**stored.provenance, "train_revision": dataset["sha256"]}
        stored.summary = {**stored.summary, "labels": [] if is_causal else list(labels)}
    return Exported(client, f"/v1/audits/{audit.id}", dataset["id"], ranking_id)


def _rename(engine: Engine, audit: Audit, labels: tuple[str, str]) -> None:
    named = dict(zip(("neg", "pos"), labels, strict=True))
    ranking_id = audit.summary["ranking_id"]
    with Session(engine) as session, session.begin():
        for table, column, is_meant in (
            (TrainingSample, "given_label", TrainingSample.audit_id == audit.id),
            (RankedSample, "given_label", RankedSample.ranking_id == ranking_id),
            (RankedSample, "suggested_label", RankedSample.ranking_id == ranking_id),
        ):
            value = case(named, value=getattr(table, column), else_=None)
            session.execute(update(table).where(is_meant).values({column: value}))


def rows_of(content: bytes, name: str) -> list[dict[str, Any]]:
    """Read a table the plain way."""
    if name.endswith("csv"):
        return list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    if name.endswith("jsonl"):
        return [
            json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()
        ]
    table: pa.Table = pq.read_table(io.BytesIO(content))
    return list(table.to_pylist())


Make = Callable[..., Exported]


def table(labels: tuple[Any, Any] = ("neg", "pos"), num_rows: int = 10) -> list[dict[str, Any]]:
    """Ten rows with columns before and behind; even ones have the second label."""
    return [
        {"id": i * 7, "text": f"sample {i}", "label": labels[i % 2 == 0], "source": f"=web,{i}"}
        for i in range(num_rows)
    ]


def in_format(rows: list[dict[str, Any]], form: FileFormat) -> list[dict[str, Any]]:
    """Return rows as a reader of the format has them."""
    if form != "csv":
        return rows
    return [{name: str(value) for name, value in row.items()} for row in rows]
