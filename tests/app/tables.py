"""Small tables as the bytes of each format, and short ways to read them back."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from app.datasets.files import (
    ColumnNames,
    DatasetLimits,
    DatasetSummary,
    FileFormat,
    inspect_dataset,
    read_dataset,
)

LIMITS = DatasetLimits(
    max_rows=3000,
    max_bytes=200_000,
    max_text_chars=100,
    max_label_chars=20,
    max_columns=10,
    max_line_bytes=1000,
    max_labels=50,
)
FORMATS: list[FileFormat] = ["parquet", "jsonl", "csv"]
ROWS: list[dict[str, Any]] = [
    {"text": "a good film", "label": 1},
    {"text": 'bad, "very"\nbad', "label": 0},
    {"text": "schön 🎬", "label": 1},
]


def encode(rows: list[dict[str, Any]], form: FileFormat) -> bytes:
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if form == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    return parquet(pa.Table.from_pylist(rows))


def parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def write(folder: Path, content: bytes, form: FileFormat) -> Path:
    path = folder / f"data.{form}"
    path.write_bytes(content)
    return path


def inspect(
    path: Path, form: FileFormat, limits: DatasetLimits = LIMITS, **columns: str
) -> DatasetSummary:
    return inspect_dataset(path, format=form, columns=ColumnNames(**columns), limits=limits)


def read(path: Path, form: FileFormat, **columns: str) -> list[dict[str, Any]]:
    batches = read_dataset(path, format=form, columns=ColumnNames(**columns), limits=LIMITS)
    return [row for batch in batches for row in batch.to_pylist()]
