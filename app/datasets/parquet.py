"""Read Parquet as batches of the asked columns; its pages are looked at before Arrow reads them.

Arrow allocates what a page says it unfolds to: a megabyte may hold a page of a gigabyte.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from app.datasets.columns import ColumnField, DatasetError, DatasetLimits, is_string
from app.datasets.messages import is_messages
from app.datasets.tables import (
    BATCH_BYTES,
    BATCH_ROWS,
    FileColumn,
    RawTable,
    check_columns,
    first_line,
)
from app.datasets.thrift import BadThrift, CompactReader

_BUFFER_BYTES = 1024**2
# A page of repetition levels packs millions of list items into a few bytes.
_MAX_ITEMS_PER_ROW_GROUP = 10_000_000
_MAGIC = b"PAR1"
_TAIL_BYTES = 8
_MAX_FOOTER_BYTES = 32 * 1024**2
_MAX_PAGE_BYTES = 128 * 1024**2
_MAX_PAGES = 1_000_000
_MAX_PAGE_HEADER_BYTES = 1024**2  # it may hold statistics: the least and the greatest text
_UNCOMPRESSED_FIELD, _COMPRESSED_FIELD = 2, 3


def open_parquet(path: Path, *, names: dict[ColumnField, str], limits: DatasetLimits) -> RawTable:
    """Open a Parquet file; `names` are the columns that are read.

    Raises:
        DatasetError: it is damaged, unfolds beyond the limits, or has not the columns.
    """
    try:
        _check_footer(path)
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        _check_pages(path, metadata)
    except (pa.ArrowException, OSError, UnicodeDecodeError, BadThrift) as error:
        raise DatasetError(
            f"the file is not a readable Parquet file: {first_line(error)}", code="unreadable_file"
        ) from error
    check_columns(schema.names, names=names, limits=limits)
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
        batches=_batches(path, wanted=wanted),
    )


def _check_footer(path: Path) -> None:
    """Raise unless the footer lies in the file and is not larger than what it may unfold to."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < len(_MAGIC) + _TAIL_BYTES:
            raise BadThrift("it is too short")
        file.seek(size - _TAIL_BYTES)
        tail = file.read(_TAIL_BYTES)
    if tail[4:] != _MAGIC:
        raise BadThrift("it does not end as one: it is cut off, or encrypted")
    length = int.from_bytes(tail[:4], "little")
    if length > min(size - len(_MAGIC) - _TAIL_BYTES, _MAX_FOOTER_BYTES):
        raise BadThrift(f"its footer has {length:,} bytes")


def _check_pages(path: Path, metadata: pq.FileMetaData) -> None:
    """Raise if a page of any column unfolds to more than what is held at once."""
    num_pages = 0
    with path.open("rb") as file:
        for group_number in range(metadata.num_row_groups):
            group = metadata.row_group(group_number)
            for number in range(group.num_columns):
                for _ in _pages(file, group.column(number)):
                    num_pages += 1
                    if num_pages > _MAX_PAGES:
                        raise BadThrift(f"it has more than {_MAX_PAGES:,} pages; write larger ones")


def _pages(file: BinaryIO, chunk: pq.ColumnChunkMetaData) -> Iterator[None]:
    """Go through the pages of a part of a column, and yield at each."""
    position = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        position = min(position, chunk.dictionary_page_offset)
    end = position + (chunk.total_compressed_size if chunk.num_values else 0)
    while position < end:
        file.seek(position)
        reader = CompactReader(file, limit=min(end - position, _MAX_PAGE_HEADER_BYTES))
        compressed = uncompressed = -1
        for number, kind in reader.fields():
            if number == _UNCOMPRESSED_FIELD:
                uncompressed = reader.integer()
            elif number == _COMPRESSED_FIELD:
                compressed = reader.integer()
            else:
                reader.skip(kind)
        if compressed < 0 or uncompressed < 0:
            raise BadThrift(f"a page of column {chunk.path_in_schema!r} has no size")
        if uncompressed > _MAX_PAGE_BYTES:
            raise BadThrift(
                f"a page of column {chunk.path_in_schema!r} unfolds to {uncompressed:,} bytes; "
                f"write pages of at most {_MAX_PAGE_BYTES:,}"
            )
        position = file.tell() + compressed
        yield


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


def _batches(path: Path, *, wanted: dict[str, bool]) -> Iterator[pa.RecordBatch]:
    try:
        file = pq.ParquetFile(
            path,
            # Dictionary-encoded, so that the sizes of texts can be looked at before they unfold.
            read_dictionary=[name for name, is_text in wanted.items() if is_text],
            buffer_size=_BUFFER_BYTES,  # else a row group's columns are read at once
        )
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(wanted)):
            if batch.num_rows:
                yield from _in_parts(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"the Parquet file is damaged: {first_line(error)}", code="unreadable_file"
        ) from error


def _in_parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yield the rows in parts that unfold to a bounded size; a single long row stays whole."""
    num_bytes = sum(_unfolded_bytes(column) for column in batch.columns)
    num_parts = min(-(-num_bytes // BATCH_BYTES), batch.num_rows) or 1
    num_rows = -(-batch.num_rows // num_parts)
    for start in range(0, batch.num_rows, num_rows):
        yield batch.slice(start, num_rows)


def _unfolded_bytes(array: pa.Array) -> int:
    """Return the bytes of a column's strings, counted at every row that has them."""
    if not pa.types.is_dictionary(array.type):
        return int(array.nbytes)
    if not is_string(array.type) or not len(array.dictionary):
        return 0
    length = pc.binary_length(array.dictionary.cast(pa.large_string()))
    return int(pc.sum(length.cast(pa.int64()).take(array.indices)).as_py() or 0)
