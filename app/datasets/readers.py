"""Read Parquet, JSONL and CSV as batches of the asked columns, in the types of the file."""

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from app.datasets.columns import (
    ColumnField,
    ColumnNames,
    DatasetError,
    DatasetLimits,
    is_string,
)
from app.datasets.messages import as_json, is_messages

FileFormat = Literal["parquet", "jsonl", "csv"]

_BATCH_ROWS = 1024
_BUFFER_BYTES = 1024**2
_MAX_NAMES_IN_MESSAGE = 20
_NUM_SAMPLE_ROWS = 100
# A page of repetition levels packs millions of list items into a few bytes.
_MAX_ITEMS_PER_ROW_GROUP = 10_000_000
# Without sign or leading zeros that a class name would lose by becoming a number.
_CANONICAL_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}", re.ASCII)


_TEXT = {"string", "null"}
_JSON_TYPES: dict[ColumnField, set[str]] = {
    "text": _TEXT,
    "text_pair": _TEXT,
    "label": {"string", "number", "boolean", "null"},
    "prompt": _TEXT,
    "completion": _TEXT,
    "messages": {"array", "string", "null"},
    "noise": {"boolean", "number", "string", "null"},
}


class FileColumn(BaseModel):
    """A column as the file has it."""

    model_config = ConfigDict(frozen=True)

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class RawTable:
    """A file that was opened: all its columns, and batches of those that were asked for."""

    columns: tuple[FileColumn, ...]
    batches: Iterator[pa.RecordBatch]


def open_table(
    path: Path,
    *,
    format: FileFormat,  # noqa: A002 — the word of the API
    columns: ColumnNames,
    limits: DatasetLimits,
) -> RawTable:
    """Open a file, check its header, footer or first rows, and return its batches.

    This is quick however large the file is; the rows are read while iterating.

    Raises:
        DatasetError: the file cannot be read, or has not the columns.
    """
    return _OPENERS[format](path, names=columns.by_field(), limits=limits)


def read_header(
    path: Path,
    *,
    format: FileFormat,  # noqa: A002 — the word of the API
    limits: DatasetLimits,
) -> tuple[FileColumn, ...]:
    """Return all columns of a file; those of JSONL as its first rows have them.

    Raises:
        DatasetError: the file cannot be read.
    """
    return _OPENERS[format](path, names={}, limits=limits).columns


def _open_parquet(path: Path, *, names: dict[ColumnField, str], limits: DatasetLimits) -> RawTable:
    try:
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"the file is not a readable Parquet file: {_first_line(error)}", code="unreadable_file"
        ) from error
    _check_columns(schema.names, names=names, limits=limits)
    if metadata.num_rows > limits.max_rows:
        raise DatasetError(
            f"the file has {metadata.num_rows:,} rows; this server takes at most "
            f"{limits.max_rows:,}",
            code="too_many_rows",
        )
    wanted: dict[str, bool] = {}  # the columns that are read, and whether they hold strings
    for field, name in names.items():
        kind = schema.field(name).type
        if field == "messages" and is_messages(kind):
            wanted |= dict.fromkeys(_message_leaves(metadata, name), True)
        elif pa.types.is_nested(kind):
            plain = "messages with role and content" if field == "messages" else "plain ones"
            raise DatasetError(
                f"column {name!r} holds {kind} values, not {plain}", code="wrong_type", field=field
            )
        else:
            wanted[name] = is_string(kind)
    return RawTable(
        columns=tuple(FileColumn(name=item.name, type=str(item.type)) for item in schema),
        batches=_parquet_batches(path, wanted=wanted),
    )


def _message_leaves(metadata: pq.FileMetaData, name: str) -> list[str]:
    """Return the paths of role and content in a column of messages.

    Raises:
        DatasetError: a row group has more messages than fit into memory.
    """
    leaves = []
    for index in range(metadata.num_columns):
        path: str = metadata.schema.column(index).path
        if not path.startswith(f"{name}.") or path.rpartition(".")[2] not in {"role", "content"}:
            continue
        leaves.append(path)
        for number in range(metadata.num_row_groups):
            num_items = metadata.row_group(number).column(index).num_values
            if num_items > _MAX_ITEMS_PER_ROW_GROUP:
                raise DatasetError(
                    f"column {name!r} has {num_items:,} messages in a row group; write row groups "
                    f"of at most {_MAX_ITEMS_PER_ROW_GROUP:,}",
                    code="text_too_long",
                    field="messages",
                )
    return leaves


def _parquet_batches(path: Path, *, wanted: dict[str, bool]) -> Iterator[pa.RecordBatch]:
    try:
        file = pq.ParquetFile(
            path,
            # Dictionary-encoded, so that the sizes of texts can be looked at before they unfold.
            read_dictionary=[name for name, is_text in wanted.items() if is_text],
            buffer_size=_BUFFER_BYTES,  # else a row group's columns are read at once
        )
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(wanted)):
            if batch.num_rows:
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"the Parquet file is damaged: {_first_line(error)}", code="unreadable_file"
        ) from error


def _open_jsonl(path: Path, *, names: dict[ColumnField, str], limits: DatasetLimits) -> RawTable:
    sample = list(islice(_json_rows(path, limits=limits), _NUM_SAMPLE_ROWS))
    seen = {name: _json_type(value) for row in reversed(sample) for name, value in row.items()}
    if sample:
        _check_columns(list(seen), names=names, limits=limits)
    return RawTable(
        columns=tuple(FileColumn(name=name, type=kind) for name, kind in seen.items()),
        batches=_jsonl_batches(path, names=names, limits=limits),
    )


def _json_rows(path: Path, *, limits: DatasetLimits) -> Iterator[dict[str, Any]]:
    for number, line in _lines(path, limits=limits):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise DatasetError(
                f"line {number:,} is not valid JSON: {error.msg} (character {error.colno})",
                code="malformed_row",
            ) from error
        if not isinstance(row, dict):
            raise DatasetError(
                f"line {number:,} is a JSON {_json_type(row)}; every line must be one object, "
                'such as {"text": "…", "label": 0}',
                code="malformed_row",
            )
        yield row


def _jsonl_batches(
    path: Path, *, names: dict[ColumnField, str], limits: DatasetLimits
) -> Iterator[pa.RecordBatch]:
    rows = enumerate(_json_rows(path, limits=limits), start=1)
    kind_of_label = "null"
    while chunk := list(islice(rows, _BATCH_ROWS)):
        for number, row in chunk:
            kind = _check_json_row(row, row_number=number, names=names)
            if "null" not in {kind, kind_of_label} and kind != kind_of_label:
                raise DatasetError(
                    f"row {number:,}: column {names['label']!r} is a {kind}, in the rows before a "
                    f"{kind_of_label}; write all labels the same way",
                    code="mixed_labels",
                    field="label",
                    row=number,
                )
            kind_of_label = kind if kind != "null" else kind_of_label
        yield _batch_of_rows(chunk, names=names)


def _check_json_row(row: dict[str, Any], *, row_number: int, names: dict[ColumnField, str]) -> str:
    """Raise unless every value has a type its column may have; return the label's type."""
    for field, name in names.items():
        kind = _json_type(row.get(name))
        if kind not in _JSON_TYPES[field]:
            expected = {
                "label": "an integer or a string",
                "noise": "true or false",
                "messages": "a list of messages",
            }.get(field, "a string")
            raise DatasetError(
                f"row {row_number:,}: column {name!r} is a JSON {kind}; it must be {expected}",
                code="wrong_type",
                field=field,
                row=row_number,
            )
    return _json_type(row.get(names["label"])) if "label" in names else "null"


def _batch_of_rows(
    rows: list[tuple[int, dict[str, Any]]], *, names: dict[ColumnField, str]
) -> pa.RecordBatch:
    arrays: dict[str, pa.Array] = {}
    for field, name in names.items():
        values = [row.get(name) for _, row in rows]
        try:
            if field == "noise":  # true, 1 and "1" may stand side by side
                values = [None if value is None else str(value) for value in values]
            elif field == "messages":
                values = [as_json(row.get(name), name=name, row=number) for number, row in rows]
            arrays[name] = pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            raise DatasetError(
                f"column {name!r} holds a number that does not fit into 64 bits",
                code="wrong_type",
                field=field,
            ) from error
    return pa.record_batch(arrays)


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")


def _open_csv(path: Path, *, names: dict[ColumnField, str], limits: DatasetLimits) -> RawTable:
    header = next(_csv_rows(path, limits=limits), None)
    if header is None:
        raise DatasetError("the file has no rows", code="no_rows")
    _check_columns(header, names=names, limits=limits)
    return RawTable(
        columns=tuple(FileColumn(name=name, type="string") for name in header),
        batches=_csv_batches(path, names=names, limits=limits),
    )


def _csv_rows(path: Path, *, limits: DatasetLimits) -> Iterator[list[str]]:
    """Yield the header, then every row; a quoted cell may go over several lines."""
    # The limit is the process's, so it is only ever raised; lines are capped by our own.
    csv.field_size_limit(max(csv.field_size_limit(), limits.max_line_bytes))
    reader = csv.reader((line for _, line in _lines(path, limits=limits)), strict=True)
    num_fields: int | None = None
    first_line = 1
    try:
        for row in reader:
            if row:
                if num_fields is None:
                    num_fields = len(row)
                elif len(row) != num_fields:
                    raise DatasetError(
                        f"line {first_line:,} has {len(row)} fields where the header has "
                        f"{num_fields}; put cells that hold commas, quotes or line breaks in "
                        "double quotes",
                        code="malformed_row",
                    )
                yield row
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise DatasetError(
            f"line {first_line:,} is not valid CSV: {error}", code="malformed_row"
        ) from error


def _csv_batches(
    path: Path, *, names: dict[ColumnField, str], limits: DatasetLimits
) -> Iterator[pa.RecordBatch]:
    """Yield strings, the labels as integers if all of them are: a pass over the file tells."""
    rows = _csv_rows(path, limits=limits)
    header = next(rows)
    label = names.get("label")
    has_integer_labels = label is not None and all(
        _CANONICAL_INTEGER.fullmatch(row[header.index(label)]) for row in rows
    )
    rows = _csv_rows(path, limits=limits)
    next(rows)
    wanted = {name: header.index(name) for name in names.values()}
    while chunk := list(islice(rows, _BATCH_ROWS)):
        arrays = {
            name: pa.array([row[index] or None for row in chunk], pa.string())
            for name, index in wanted.items()
        }
        if label is not None and has_integer_labels:
            arrays[label] = arrays[label].cast(pa.int64())
        yield pa.record_batch(arrays)


def _lines(path: Path, *, limits: DatasetLimits) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its ending) of a UTF-8 file, no line without bound."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(limits.max_line_bytes + 1):
                number += 1
                if len(line) > limits.max_line_bytes:
                    raise DatasetError(
                        f"line {number:,} has more than {limits.max_line_bytes:,} bytes",
                        code="text_too_long",
                    )
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise DatasetError(
            f"the file cannot be read: {error.strerror or error}", code="unreadable_file"
        ) from error
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"line {number:,} is not valid UTF-8 (byte {error.start + 1}); save the file as UTF-8",
            code="bad_encoding",
        ) from error


def _check_columns(
    present: list[str], *, names: dict[ColumnField, str], limits: DatasetLimits
) -> None:
    if len(present) > limits.max_columns:
        raise DatasetError(
            f"the file has {len(present):,} columns; this server takes at most "
            f"{limits.max_columns:,}",
            code="too_many_columns",
        )
    for field, name in names.items():
        count = present.count(name)
        if count == 0:
            listed = ", ".join(repr(item) for item in present[:_MAX_NAMES_IN_MESSAGE]) or "none"
            more = ", …" if len(present) > _MAX_NAMES_IN_MESSAGE else ""
            raise DatasetError(
                f"there is no column {name!r} for the {field}; the file has: {listed}{more}",
                code="missing_column",
                field=field,
            )
        if count > 1:
            raise DatasetError(
                f"there are {count} columns named {name!r}; give each its own name",
                code="missing_column",
                field=field,
            )


_OPENERS: dict[FileFormat, Callable[..., RawTable]] = {
    "parquet": _open_parquet,
    "jsonl": _open_jsonl,
    "csv": _open_csv,
}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
