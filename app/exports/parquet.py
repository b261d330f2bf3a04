"""Parquet with some rows changed: the schema with its metadata and the compression stay."""

import io
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from app.datasets.columns import ColumnNames, is_string
from app.datasets.parquet_footer import check_pages, read_chunks
from app.exports.changes import Change, Changes
from app.exports.lines import Difference
from app.exports.values import NotWritable, changed_value, relabelled, target_column

_BATCH_ROWS = 4096
_BATCH_BYTES = 1024**3  # at the worst: if every row had all that a dictionary holds
_GROUP_ROWS = 65_536
_GROUP_BYTES = 64 * 1024**2


class _Outlet(io.RawIOBase):
    """What a writer writes, until it is taken away."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:  # noqa: ANN401  any buffer
        part = bytes(data)
        self._parts.append(part)
        self._size += len(part)
        return len(part)

    def tell(self) -> int:
        return self._size

    def take(self) -> bytes:
        """Return what was written since the last time."""
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


class ParquetTable:
    """A Parquet file, read and written batch by batch.

    Args:
        file: the open file.
        columns: which columns hold what.
    """

    def __init__(self, file: BinaryIO, columns: ColumnNames) -> None:
        self._groups = read_chunks(file)
        unfolded = check_pages(file, self._groups)
        self._batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, unfolded)))
        file.seek(0)
        self._file = pq.ParquetFile(pa.PythonFile(file, mode="r"))
        self._kind = columns.kind
        self.column = target_column(columns)
        self._type = self._file.schema_arrow.field(self.column).type

    def rewritten(self, changes: Changes) -> Iterator[bytes]:
        """Yield the file with the changes."""
        outlet = _Outlet()
        schema = self._file.schema_arrow
        with pq.ParquetWriter(outlet, schema, compression=self._compression()) as writer:
            group: list[pa.RecordBatch] = []
            for batch, of_batch in self._batches(changes):
                group += self._changed(batch, of_batch) if of_batch else [batch]
                if _is_full(group):
                    writer.write_table(pa.Table.from_batches(group, schema))
                    group = []
                    yield outlet.take()
            if group:
                writer.write_table(pa.Table.from_batches(group, schema))
        yield outlet.take()

    def differences(self, changes: Changes) -> Iterator[Difference]:
        """Yield what the changes come to, in the order of the rows."""
        first = 0
        for batch, of_batch in self._batches(changes, columns=[self.column]):
            for place, change in of_batch.items():
                if change.kind == "drop":
                    yield Difference(first + place, change)
                    continue
                before = batch.column(0)[place].as_py()
                after = changed_value(before, change, self._kind)
                if after != before:
                    yield Difference(first + place, change, before, after)
            first += batch.num_rows

    def check(self, changes: Changes) -> None:
        """Check that every label can be written, before anything is.

        Raises:
            NotWritable: the label that cannot.
        """
        kind = self._type.value_type if pa.types.is_dictionary(self._type) else self._type
        example: object = ""
        if pa.types.is_boolean(kind):
            example = False
        elif not is_string(kind):
            example = 0.0 if pa.types.is_floating(kind) else 0
        for label in changes.labels():
            try:
                pa.scalar(relabelled(example, label), kind)
            except (pa.ArrowInvalid, OverflowError) as error:
                raise NotWritable(label) from error

    def _batches(
        self, changes: Changes, *, columns: list[str] | None = None
    ) -> Iterator[tuple[pa.RecordBatch, Mapping[int, Change]]]:
        first = 0
        for batch in self._file.iter_batches(batch_size=self._batch_rows, columns=columns):
            yield batch, changes.within(first, batch.num_rows)
            first += batch.num_rows

    def _changed(
        self, batch: pa.RecordBatch, changes: Mapping[int, Change]
    ) -> list[pa.RecordBatch]:
        """Return a batch with its changes, in parts between the rows that are left out."""
        kept = {place: change for place, change in changes.items() if change.kind != "drop"}
        if kept:
            number = batch.schema.get_field_index(self.column)
            column = batch.column(number)
            values = [
                changed_value(column[place].as_py(), change, self._kind)
                for place, change in kept.items()
            ]
            replaced = _replaced(column, list(kept), values)
            batch = batch.set_column(number, batch.schema.field(number), replaced)
        dropped = [place for place in changes if place not in kept]
        return list(_between(batch, dropped))

    def _compression(self) -> dict[str, str]:
        return {chunk.path: chunk.codec for chunk in self._groups[0]}


def _is_full(group: list[pa.RecordBatch]) -> bool:
    num_rows = sum(batch.num_rows for batch in group)
    num_bytes: int = sum(batch.nbytes for batch in group)
    return num_rows >= _GROUP_ROWS or num_bytes >= _GROUP_BYTES


def _between(rows: Any, places: list[int]) -> Iterator[Any]:  # noqa: ANN401  an array or a batch
    """Yield the runs of rows between some places, empty ones too, in slices.

    Arrow cuts and joins every type; it does not pick single rows of all of them.
    """
    start = 0
    for place in places:
        yield rows.slice(start, place - start)
        start = place + 1
    yield rows.slice(start)


def _replaced(column: pa.Array, places: list[int], values: list[Any]) -> pa.Array:
    """Return a column with new values at some places."""
    if pa.types.is_dictionary(column.type):
        kind = column.type
        new = pa.array(values, kind.value_type)
        is_known = pc.is_in(new, value_set=column.dictionary)
        dictionary = pa.concat_arrays([column.dictionary, new.filter(pc.invert(is_known)).unique()])
        codes = pc.index_in(new, value_set=dictionary).cast(kind.index_type)
        indices = _replaced(column.indices, places, codes.to_pylist())
        return pa.DictionaryArray.from_arrays(indices, dictionary, ordered=kind.ordered)
    new = pa.array(values, column.type)
    first, *rest = _between(column, places)
    parts = [first]
    for number, run in enumerate(rest):
        parts += [new.slice(number, 1), run]
    return pa.concat_arrays(parts)
