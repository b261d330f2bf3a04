"""Read Parquet, JSONL and CSV as batches of the asked columns, in the types of the file."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pyarrow as pa

from app.datasets.columns import (
    ColumnField,
    ColumnNames,
    DatasetError,
    DatasetLimits,
)
from app.datasets.messages import as_json
from app.datasets.parquet import open_parquet
from app.datasets.tables import (
    BATCH_BYTES,
    BATCH_ROWS,
    FileColumn,
    FileFormat,
    RawTable,
    check_columns,
    check_num_columns,
)

_NUM_SAMPLE_ROWS = 100
Row = TypeVar("Row")
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


def _open_jsonl(path: Path, *, names: dict[ColumnField, str], limits: DatasetLimits) -> RawTable:
    seen: dict[str, str] = {}
    for row, _ in islice(_json_rows(path, limits=limits), _NUM_SAMPLE_ROWS):
        seen = {name: _json_type(value) for name, value in row.items()} | seen
        check_num_columns(len(seen), limits=limits)
    if seen:
        check_columns(list(seen), names=names, limits=limits)
    return RawTable(
        columns=tuple(FileColumn(name=name, type=kind) for name, kind in seen.items()),
        batches=_jsonl_batches(path, names=names, limits=limits),
    )


def _json_rows(path: Path, *, limits: DatasetLimits) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield every row, and how many characters its line has."""
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
        yield row, len(line)


def _jsonl_batches(
    path: Path, *, names: dict[ColumnField, str], limits: DatasetLimits
) -> Iterator[pa.RecordBatch]:
    wanted = set(names.values())
    rows = (
        ((number, {name: row[name] for name in wanted & row.keys()}), num_chars)
        for number, (row, num_chars) in enumerate(_json_rows(path, limits=limits), start=1)
    )
    kind_of_label = "null"
    for chunk in _chunks(rows):
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
    check_columns(header, names=names, limits=limits)
    return RawTable(
        columns=tuple(FileColumn(name=name, type="string") for name in header),
        batches=_csv_batches(path, names=names, limits=limits),
    )


def _csv_rows(path: Path, *, limits: DatasetLimits) -> Iterator[list[str]]:
    """Yield the header, then every row; a quoted cell may go over several lines."""
    # The limit is the process's, so it is only ever raised; lines are capped by our own.
    csv.field_size_limit(max(csv.field_size_limit(), limits.max_line_bytes))
    size = 0  # of the row so far: many long cells are no more than one

    def lines() -> Iterator[str]:
        nonlocal size
        for _, line in _lines(path, limits=limits):
            size += len(line)
            if size > limits.max_line_bytes:
                raise csv.Error(f"it has more than {limits.max_line_bytes:,} characters")
            yield line

    reader = csv.reader(lines(), strict=True)
    num_fields: int | None = None
    first_line = 1
    try:
        for row in reader:
            size = 0
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
    cells = ([row[index] or None for index in wanted.values()] for row in rows)
    sized = ((row, sum(len(cell or "") for cell in row)) for row in cells)
    for chunk in _chunks(sized):
        arrays = {
            name: pa.array(column, pa.string())
            for name, column in zip(wanted, zip(*chunk, strict=True), strict=True)
        }
        if label is not None and has_integer_labels:
            arrays[label] = arrays[label].cast(pa.int64())
        yield pa.record_batch(arrays)


def _chunks(rows: Iterable[tuple[Row, int]]) -> Iterator[list[Row]]:
    """Yield rows in batches, by their number and by their characters together."""
    chunk: list[Row] = []
    size = 0
    for row, num_chars in rows:
        chunk.append(row)
        size += num_chars
        if len(chunk) == BATCH_ROWS or size > BATCH_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


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


_OPENERS: dict[FileFormat, Callable[..., RawTable]] = {
    "parquet": open_parquet,
    "jsonl": _open_jsonl,
    "csv": _open_csv,
}
