"""Check a table file (Parquet, JSONL or CSV) row by row and read it in one form.

Everything streams: memory is bounded by a batch of rows, never by the file. Nothing in a file is
trusted: sizes are looked at before values, and every refusal says where and what to change.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from app.datasets.columns import (
    Column,
    ColumnField,
    ColumnNames,
    DatasetError,
    DatasetErrorCode,
    DatasetKind,
    DatasetLimits,
    normalise_label,
    normalise_noise,
    normalise_text,
)
from app.datasets.messages import normalise_messages, read_messages
from app.datasets.readers import open_table
from app.datasets.tables import FileColumn, FileFormat, RawTable

__all__ = [
    "ColumnNames",
    "DatasetError",
    "DatasetErrorCode",
    "DatasetLimits",
    "DatasetSummary",
    "FileColumn",
    "FileFormat",
    "guess_format",
    "inspect_dataset",
    "read_dataset",
    "write_normalised_parquet",
]

_BATCHES_PER_ROW_GROUP = 8
_PARQUET_MAGIC = b"PAR1"
_ARCHIVE_MAGICS = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc")
_FORMAT_OF_SUFFIX: dict[str, FileFormat] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}


class DatasetSummary(BaseModel):
    """What a checked dataset holds."""

    model_config = ConfigDict(frozen=True)

    kind: DatasetKind = "classification"
    num_rows: int
    label_type: Literal["integer", "string"] | None = Field(
        description="None for prompts with completions and for chats."
    )
    labels: tuple[int, ...] | tuple[str, ...] = Field(description="Every label, in sorted order.")
    label_counts: dict[str, int] = Field(description="Rows of each label, in the same order.")
    has_text_pair: bool
    num_noisy: int | None = Field(description="Rows marked as known noise, if a column marks them.")
    longest_text_chars: int = Field(
        description="Characters of the longest text, prompt, completion or chat."
    )
    mean_text_chars: float = Field(description="Mean characters of a row's texts together.")
    columns: tuple[FileColumn, ...] = Field(description="All columns of the file and their types.")


def guess_format(filename: str, head: bytes) -> FileFormat:
    """Tell a file's format from its first bytes, and from its name where those do not tell.

    Args:
        filename: only its ending counts.
        head: the first bytes; four are enough, some hundred are better.

    Raises:
        DatasetError: unknown_format, with the formats there are.
    """
    of_suffix = _FORMAT_OF_SUFFIX.get(Path(filename).suffix.lower())
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(_PARQUET_MAGIC):
        return "parquet"
    if head.startswith(_ARCHIVE_MAGICS):
        raise DatasetError(
            f"{filename!r} is compressed or an archive; send the Parquet, JSONL or CSV file itself",
            code="unknown_format",
        )
    if of_suffix == "parquet":
        raise DatasetError(
            f"{filename!r} is named .parquet but is not a Parquet file", code="unknown_format"
        )
    if start.startswith(b"[") and of_suffix != "csv":
        raise DatasetError(
            f"{filename!r} is a JSON array; write one JSON object per line (JSONL)",
            code="unknown_format",
        )
    if of_suffix is not None:
        return of_suffix
    if start.startswith(b"{"):
        return "jsonl"
    raise DatasetError(
        f"{filename!r} has no known format: name it .parquet, .jsonl or .csv", code="unknown_format"
    )


def inspect_dataset(
    path: Path,
    *,
    format: FileFormat,  # noqa: A002 — the word of the API
    columns: ColumnNames,
    limits: DatasetLimits,
) -> DatasetSummary:
    """Check the whole file and return what it holds.

    Raises:
        DatasetError: the first thing that is wrong with it.
    """
    table = open_table(path, format=format, columns=columns, limits=limits)
    tally = _Tally(columns=columns, limits=limits)
    for batch in _normalised_batches(table, columns=columns, limits=limits):
        tally.add(batch)
    return tally.summary(table.columns)


def read_dataset(
    path: Path,
    *,
    format: FileFormat,  # noqa: A002 — the word of the API
    columns: ColumnNames,
    limits: DatasetLimits,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows in the normalised form, checking each as `inspect_dataset` does.

    What only the whole file can tell (the number of labels, that there are rows) is not checked.

    Returns:
        Batches of text string, text_pair string, label string or int64, is_noisy bool; rows in
        the file's order. What there is no column for is null. Prompts are texts and completions
        their pairs; a chat is a text: JSON that `read_messages` reads.

    Raises:
        DatasetError: on opening, or while iterating.
    """
    table = open_table(path, format=format, columns=columns, limits=limits)
    return _normalised_batches(table, columns=columns, limits=limits)


def write_normalised_parquet(
    path: Path,
    target: Path,
    *,
    format: FileFormat,  # noqa: A002 — the word of the API
    columns: ColumnNames,
    limits: DatasetLimits,
) -> DatasetSummary:
    """Check a file and write its normalised form as Parquet, in one pass.

    `target` appears whole or not at all: it is written under a temporary name and renamed.

    Raises:
        DatasetError: as `inspect_dataset` does; no file is left behind then.
    """
    table = open_table(path, format=format, columns=columns, limits=limits)
    tally = _Tally(columns=columns, limits=limits)
    temporary = target.with_name(f"{target.name}.partial")
    batches = _normalised_batches(table, columns=columns, limits=limits)
    try:
        writer: pq.ParquetWriter | None = None
        try:
            while group := list(islice(batches, _BATCHES_PER_ROW_GROUP)):
                for batch in group:
                    tally.add(batch)
                if writer is None:
                    writer = pq.ParquetWriter(temporary, group[0].schema, compression="zstd")
                writer.write_table(pa.Table.from_batches(group))
            summary = tally.summary(table.columns)
        finally:
            if writer is not None:
                writer.close()
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return summary


def _normalised_batches(
    table: RawTable, *, columns: ColumnNames, limits: DatasetLimits
) -> Iterator[pa.RecordBatch]:
    names = columns.by_field()
    num_rows = num_bytes = 0
    for raw in table.batches:
        if num_rows + raw.num_rows > limits.max_rows:
            raise DatasetError(
                f"the file has more than {limits.max_rows:,} rows, the most this server takes",
                code="too_many_rows",
            )
        column = {
            field: Column(raw.column(name), name=name, field=field, first_row=num_rows + 1)
            for field, name in names.items()
        }
        batch = pa.record_batch(_normalised(column, kind=columns.kind, limits=limits))
        num_bytes += batch["text"].nbytes + batch["text_pair"].nbytes
        if num_bytes > limits.max_bytes:
            raise DatasetError(
                f"row {num_rows + raw.num_rows:,}: the texts up to here have more than "
                f"{limits.max_bytes:,} bytes, the most this server takes",
                code="too_large",
            )
        yield batch
        num_rows += raw.num_rows


def _normalised(
    column: dict[ColumnField, Column], *, kind: DatasetKind, limits: DatasetLimits
) -> dict[str, pa.Array]:
    def texts(field: ColumnField) -> pa.Array:
        return normalise_text(column[field], limits=limits)

    pair = label = noise = None
    match kind:
        case "classification":
            text, pair = texts("text"), texts("text_pair") if "text_pair" in column else None
            label = normalise_label(column["label"], limits=limits)
        case "completion":
            text, pair = texts("prompt"), texts("completion")
        case "chat":
            text = normalise_messages(column["messages"], limits=limits)
    if "noise" in column:
        noise = normalise_noise(column["noise"])
    nulls = pa.nulls(len(text))
    return {
        "text": text,
        "text_pair": nulls.cast(pa.string()) if pair is None else pair,
        "label": nulls.cast(pa.string()) if label is None else label,
        "is_noisy": nulls.cast(pa.bool_()) if noise is None else noise,
    }


class _Tally:
    """Counts what the summary tells, batch by batch."""

    def __init__(self, *, columns: ColumnNames, limits: DatasetLimits) -> None:
        self._columns = columns
        self._limits = limits
        self._num_rows = 0
        self._num_chars = 0
        self._longest = 0
        self._num_noisy = 0
        self._count_of_label: Counter[int | str] = Counter()

    def add(self, batch: pa.RecordBatch) -> None:
        self._num_rows += batch.num_rows
        for num_chars in self._lengths(batch):
            self._num_chars += pc.sum(num_chars, min_count=0).as_py()
            self._longest = max(self._longest, pc.max(num_chars).as_py() or 0)
        self._num_noisy += pc.sum(batch.column("is_noisy"), min_count=0).as_py()
        if self._columns.kind != "classification":
            return
        for item in pc.value_counts(batch.column("label")):
            self._count_of_label[item["values"].as_py()] += item["counts"].as_py()
        if len(self._count_of_label) > self._limits.max_labels:
            raise DatasetError(
                f"column {self._columns.label!r} has more than {self._limits.max_labels:,} "
                "distinct labels; is it the right column?",
                code="too_many_labels",
                field="label",
            )

    def _lengths(self, batch: pa.RecordBatch) -> list[pa.Array]:
        """Return the characters of every text, and of every pair."""
        if self._columns.kind == "chat":
            chats = [read_messages(text.as_py()) for text in batch["text"]]
            return [pa.array([sum(len(of["content"]) for of in chat) for chat in chats])]
        return [pc.utf8_length(batch[name]) for name in ("text", "text_pair")]

    def summary(self, columns: tuple[FileColumn, ...]) -> DatasetSummary:
        if self._num_rows == 0:
            raise DatasetError("the file has no rows", code="no_rows")
        labels = sorted(self._count_of_label)
        is_labelled = self._columns.kind == "classification"
        if is_labelled and len(labels) < self._limits.min_labels:
            raise DatasetError(
                f"column {self._columns.label!r} has only the label {labels[0]!r}; at least "
                f"{self._limits.min_labels} distinct labels are needed",
                code="too_few_labels",
                field="label",
            )
        label_type: Literal["integer", "string"] | None = None
        if is_labelled:
            label_type = "integer" if isinstance(labels[0], int) else "string"
        return DatasetSummary(
            kind=self._columns.kind,
            num_rows=self._num_rows,
            label_type=label_type,
            labels=tuple(labels),
            label_counts={str(label): self._count_of_label[label] for label in labels},
            has_text_pair=self._columns.text_pair is not None,
            num_noisy=None if self._columns.noise is None else self._num_noisy,
            longest_text_chars=self._longest,
            mean_text_chars=self._num_chars / self._num_rows,
            columns=columns,
        )
