"""Read Parquet as batches of the asked columns; its pages are looked at before Arrow reads them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from app.datasets.columns import ColumnField, DatasetError, DatasetLimits, is_string
from app.datasets.messages import is_messages
from app.datasets.parquet_footer import Chunk, check_pages, read_chunks
from app.datasets.tables import (
    BATCH_BYTES,
    BATCH_ROWS,
    FileColumn,
    RawTable,
    check_columns,
    first_line,
)
from app.datasets.thrift import BadThrift

_BUFFER_BYTES = 1024**2
# A page of repetition levels packs millions of list items into a few bytes.
_MAX_ITEMS_PER_ROW_GROUP = 10_000_000


def open_parquet(path: Path, *, names: dict[ColumnField, str], limits: DatasetLimits) -> RawTable:
    """Open a Parquet file; `names` are the columns that are read.

    Raises:
        DatasetError: it is damaged, unfolds beyond the limits, or has not the columns.
    """
    try:
        with path.open("rb") as file:
            groups = read_chunks(file)
            check_pages(file, groups)
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
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
            wanted |= dict.fromkeys(_message_leaves(metadata.schema, groups, name), True)
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


def _message_leaves(schema: Any, groups: list[list[Chunk]], name: str) -> list[str]:  # noqa: ANN401  pyarrow carries no types
    """Return the paths of role and content in a column of messages.

    Raises:
        DatasetError: a row group has more messages than fit into memory.
    """
    leaves = []
    for index in range(len(schema)):
        path: str = schema.column(index).path
        if not path.startswith(f"{name}.") or path.rpartition(".")[2] not in {"role", "content"}:
            continue
        leaves.append(path)
        for num_items in (group[index].num_values for group in groups if index < len(group)):
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
