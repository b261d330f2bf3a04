"""Write the training set as it was sent, with what was decided; and what changed as a patch."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.audits.ranking_service import results_for
from app.datasets.files import FileFormat
from app.datasets.service import dataset_limits
from app.errors import Conflict
from app.exports.changes import Changes, Mode, read_changes
from app.exports.lines import Csv, Difference, JsonLines
from app.exports.parquet import ParquetTable
from app.exports.source import Source, find_source, open_unchanged
from app.exports.values import NotWritable
from app.settings import Settings

_BYTES_PER_PART = 64 * 1024


@dataclass(frozen=True)
class Export:
    """A file that is about to be sent.

    Attributes:
        parts: its bytes; whoever reads them to the end, or closes them, closes the training file.
    """

    name: str
    format: FileFormat
    parts: Iterator[bytes]


def export(
    engine: Engine,
    settings: Settings,
    *,
    tenant: str,
    audit_id: str,
    ranking_id: str | None,
    mode: Mode,
) -> Export:
    """Return the training set of an audit with its changes, in its own format.

    Raises:
        NotFound: there is no such audit or ranking, or it is another tenant's.
        Conflict: it has no results; or the training file is gone or has changed.
    """
    opened = _open(
        engine, settings, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id, mode=mode
    )
    name = opened.source.named("cleaned")
    return Export(name, opened.format, _sent(opened, opened.table.rewritten(opened.changes)))


def patch(
    engine: Engine,
    settings: Settings,
    *,
    tenant: str,
    audit_id: str,
    ranking_id: str | None,
    mode: Mode,
) -> Export:
    """Return what an export changes, a line of JSON for every row.

    Raises:
        NotFound, Conflict: as `export` does.
    """
    opened = _open(
        engine, settings, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id, mode=mode
    )
    column = opened.table.column
    lines = (
        orjson.dumps(_line(found, column), option=orjson.OPT_APPEND_NEWLINE)
        for found in opened.table.differences(opened.changes)
    )
    return Export(opened.source.named("patch", ".jsonl"), "jsonl", _sent(opened, lines))


@dataclass(frozen=True)
class _Opened:
    """A training file that was found, with its changes."""

    source: Source
    format: FileFormat
    file: Any
    table: JsonLines | Csv | ParquetTable
    changes: Changes


def _open(
    engine: Engine,
    settings: Settings,
    *,
    tenant: str,
    audit_id: str,
    ranking_id: str | None,
    mode: Mode,
) -> _Opened:
    with Session(engine) as session:
        results = results_for(session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id)
        source = find_source(session, settings, results.audit)
        changes = read_changes(session, results.audit, results.ranking, mode)
    file, file_format = open_unchanged(source)
    try:
        table: JsonLines | Csv | ParquetTable
        match file_format:
            case "parquet":
                table = ParquetTable(file, source.columns)
            case "jsonl":
                table = JsonLines(file, source.columns, dataset_limits(settings))
            case "csv":
                table = Csv(file, source.columns, dataset_limits(settings))
        table.check(changes)
    except BaseException as error:
        file.close()
        if isinstance(error, NotWritable):
            raise Conflict(
                f"The class {error} cannot be written into the column {source.columns.label!r}, "
                "whose values are of another type. Decide otherwise on the samples that get it."
            ) from error
        raise
    return _Opened(source, file_format, file, table, changes)


def _line(found: Difference, column: str) -> dict[str, Any]:
    change = found.change
    is_drop = change.kind == "drop"
    return {
        "index": found.index,
        "change": change.kind,
        "column": None if is_drop else column,
        "before": found.before,
        "after": found.after,
        "reviewer": change.reviewer,
        "decided_at": change.decided_at,
    }


def _sent(opened: _Opened, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the pieces in parts of some size, and close the file in the end."""
    with closing(opened.file):
        part: list[bytes] = []
        size = 0
        for piece in pieces:
            part.append(piece)
            size += len(piece)
            if size >= _BYTES_PER_PART:
                yield b"".join(part)
                part, size = [], 0
        yield b"".join(part)
