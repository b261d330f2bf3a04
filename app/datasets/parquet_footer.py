"""What a Parquet file says of its parts and pages, read by ourselves and believed in nothing.

Arrow allocates what a page says it unfolds to: a megabyte may hold a page of a gigabyte. And a
damaged footer makes pyarrow's accessors of a part of a column end the whole process (pyarrow 26,
`RowGroupMetaData.column`), so they are not called.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from app.datasets.thrift import BadThrift, CompactReader

_MAGIC = b"PAR1"
_TAIL_BYTES = 8
_MAX_FOOTER_BYTES = 16 * 1024**2
_MAX_PAGE_BYTES = 128 * 1024**2
_MAX_PAGES = 1_000_000
_MAX_PAGE_HEADER_BYTES = 1024**2  # it may hold statistics: the least and the greatest text
_CODECS = {0: "NONE", 1: "SNAPPY", 2: "GZIP", 4: "BROTLI", 5: "LZ4", 6: "ZSTD", 7: "LZ4"}
_DICTIONARY_PAGE = 2
# Numbers of fields in parquet.thrift.
_GROUPS_OF_FILE, _CHUNKS_OF_GROUP, _CONTENT_OF_CHUNK = 4, 1, 3
_PATH, _CODEC, _NUM_VALUES, _NUM_BYTES, _DATA, _DICTIONARY = 3, 4, 5, 7, 9, 11
_TYPE_OF_PAGE, _UNFOLDED, _PACKED = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Chunk:
    """A row group's part of one column.

    Attributes:
        path: the names that lead to the column, with dots.
        codec: as pyarrow calls it.
        start: where its first page begins.
        num_bytes: of all its pages, packed.
    """

    path: str
    codec: str
    num_values: int
    start: int
    num_bytes: int


def read_chunks(file: BinaryIO) -> list[list[Chunk]]:
    """Return the parts of the columns, by row group.

    Raises:
        BadThrift: the file is no Parquet file, or its footer is damaged or too large.
    """
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
    file.seek(size - _TAIL_BYTES - length)
    reader = CompactReader(file, limit=length)
    groups: list[list[Chunk]] = []
    for number, kind in reader.fields():
        if number == _GROUPS_OF_FILE:
            groups = [list(_chunks_of_group(reader)) for _ in range(reader.num_items())]
        else:
            reader.skip(kind)
    return groups


def _chunks_of_group(reader: CompactReader) -> Iterator[Chunk]:
    for number, kind in reader.fields():
        if number == _CHUNKS_OF_GROUP:
            for _ in range(reader.num_items()):
                yield _chunk(reader)
        else:
            reader.skip(kind)


def _chunk(reader: CompactReader) -> Chunk:
    found = None
    for number, kind in reader.fields():
        if number == _CONTENT_OF_CHUNK:
            found = _content(reader)
        else:
            reader.skip(kind)
    if found is None:
        raise BadThrift("a column has no content")
    return found


def _content(reader: CompactReader) -> Chunk:
    path = ""
    numbers: dict[int, int] = {}
    for number, kind in reader.fields():
        if number == _PATH:
            path = ".".join(reader.text() for _ in range(reader.num_items()))
        elif number in {_CODEC, _NUM_VALUES, _NUM_BYTES, _DATA, _DICTIONARY}:
            numbers[number] = reader.integer()
        else:
            reader.skip(kind)
    start, dictionary = numbers.get(_DATA, 0), numbers.get(_DICTIONARY, 0)
    return Chunk(
        path=path,
        codec=_CODECS.get(numbers.get(_CODEC, 0), "NONE"),
        num_values=numbers.get(_NUM_VALUES, 0),
        start=dictionary if 0 < dictionary < start else start,
        num_bytes=numbers.get(_NUM_BYTES, 0),
    )


def check_pages(file: BinaryIO, groups: list[list[Chunk]]) -> int:
    """Go through the pages of all columns.

    Returns:
        The bytes of the largest dictionaries of a row group: what a single row may unfold to,
        beside what the pages themselves hold.

    Raises:
        BadThrift: a page unfolds to more than what is held at once, or there are too many.
    """
    num_pages = largest = 0
    for group in groups:
        num_bytes = 0
        for chunk in group:
            for is_dictionary, unfolded in _pages(file, chunk):
                num_pages += 1
                num_bytes += unfolded if is_dictionary else 0
                if num_pages > _MAX_PAGES:
                    raise BadThrift(f"it has more than {_MAX_PAGES:,} pages; write larger ones")
        largest = max(largest, num_bytes)
    return largest


def _pages(file: BinaryIO, chunk: Chunk) -> Iterator[tuple[bool, int]]:
    """Yield of every page whether it is a dictionary, and how many bytes it unfolds to."""
    position = chunk.start
    end = position + (chunk.num_bytes if chunk.num_values else 0)
    if position < 0:
        raise BadThrift(f"column {chunk.path!r} begins nowhere")
    while position < end:
        file.seek(position)
        reader = CompactReader(file, limit=min(end - position, _MAX_PAGE_HEADER_BYTES))
        numbers: dict[int, int] = {}
        for number, kind in reader.fields():
            if number in {_TYPE_OF_PAGE, _UNFOLDED, _PACKED}:
                numbers[number] = reader.integer()
            else:
                reader.skip(kind)
        unfolded, packed = numbers.get(_UNFOLDED, -1), numbers.get(_PACKED, -1)
        if packed < 0 or unfolded < 0:
            raise BadThrift(f"a page of column {chunk.path!r} has no size")
        if unfolded > _MAX_PAGE_BYTES:
            raise BadThrift(
                f"a page of column {chunk.path!r} unfolds to {unfolded:,} bytes; write pages of at "
                f"most {_MAX_PAGE_BYTES:,}"
            )
        yield numbers.get(_TYPE_OF_PAGE) == _DICTIONARY_PAGE, unfolded
        position = file.tell() + packed
