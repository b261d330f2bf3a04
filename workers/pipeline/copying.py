r"""Load columns into a table by PostgreSQL's COPY, written by Arrow: no row passes through Python.

The text format, not CSV: before PostgreSQL 18 a line `\.` within a quoted CSV value ends the data.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.compute as pc

Columns = Mapping[str, Any]
"""Values of some rows by column, as lists or Arrow arrays."""

_TEXT = pa.large_string()
_ESCAPES = (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r"))
_NULL = "\\N"


def copy_columns(
    cursor: psycopg.Cursor[Any],
    table: str,
    schema: pa.Schema,
    chunks: Iterable[Columns],
) -> None:
    """Load chunks of rows into a table, each being made while the database takes the one before.

    Args:
        cursor: of the transaction.
        table: which.
        schema: the columns that are loaded, in any order.
        chunks: some rows each; columns beside those of the schema do not count.
    """
    columns = ", ".join(schema.names)
    with cursor.copy(f"COPY {table} ({columns}) FROM STDIN") as copy:
        for text in _ahead(_texts(schema, chunks)):
            copy.write(text)


def _texts(schema: pa.Schema, chunks: Iterable[Columns]) -> Iterator[bytes]:
    for chunk in chunks:
        yield copy_text(pa.table({name: chunk[name] for name in schema.names}, schema))


def _ahead(texts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield what comes, while a thread makes the next one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, texts, None)
        while (text := coming.result()) is not None:
            coming = thread.submit(next, texts, None)
            yield text


def copy_text(rows: pa.Table) -> bytes:
    """Return rows as COPY reads them: strings, numbers, booleans, and lists of numbers."""
    if not rows.num_rows:
        return b""
    cells = [_cells(column.combine_chunks()) for column in rows.columns]
    lines = _joined(_joined(*cells, by="\t"), "\n")
    # An array of strings keeps them one behind the other, which is just the text.
    _, offsets, text = lines.buffers()
    ends = memoryview(offsets).cast("q")
    first, last = ends[lines.offset], ends[lines.offset + len(lines)]
    written: bytes = text.slice(first, last - first).to_pybytes()
    return written


def _cells(column: pa.Array) -> pa.Array:
    if pa.types.is_list(column.type):
        numbers = pa.ListArray.from_arrays(
            column.offsets, column.values.cast(pa.string()), mask=column.is_null()
        )
        joined = pc.binary_join(numbers, ",").cast(_TEXT)
        cells = _joined("{", joined, "}")
    else:
        cells = column.cast(_TEXT)
        if pa.types.is_string(column.type):
            for raw, escaped in _ESCAPES:
                cells = pc.replace_substring(cells, raw, escaped)
    return pc.fill_null(cells, _NULL)


def _joined(*parts: pa.Array | str, by: str = "") -> pa.Array:
    texts = [pa.scalar(part, _TEXT) if isinstance(part, str) else part for part in (*parts, by)]
    return pc.binary_join_element_wise(*texts)
