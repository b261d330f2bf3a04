"""Thrift's compact protocol, as far as the headers of Parquet need it, and never beyond a limit.

Arrow believes what a file says of its own sizes; this reads the same bytes and believes nothing
(apache/thrift, doc/specs/thrift-compact-protocol.md).
"""

from collections.abc import Iterator
from typing import BinaryIO

_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = (
    *(0, 1, 2, 3, 7, 8, 9, 10, 11, 12),
)
_INTEGERS = {4, 5, 6}
_MAX_DEPTH = 16
_MAX_SHIFT = 63
_LONG_LIST = 15


class BadThrift(Exception):
    """The bytes are not what they should be, or hold more than was allowed."""


class CompactReader:
    """Reads forward through an open file, at most `limit` bytes."""

    def __init__(self, file: BinaryIO, *, limit: int) -> None:
        self._file = file
        self._left = limit

    def fields(self) -> Iterator[tuple[int, int]]:
        """Yield number and type of every field of a structure; the caller reads or skips each."""
        number = 0
        while (head := self._byte()) != _STOP:
            number = number + (head >> 4) if head >> 4 else self.integer()
            yield number, head & 0x0F

    def integer(self) -> int:
        """Read a signed integer."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def num_items(self) -> int:
        """Read the head of a list and return how many items it has."""
        return self._items()[0]

    def text(self) -> str:
        """Read a string."""
        return self._read(self._varint()).decode()

    def _items(self) -> tuple[int, int]:
        head = self._byte()
        count = self._varint() if head >> 4 == _LONG_LIST else head >> 4
        return count, head & 0x0F

    def skip(self, kind: int, *, depth: int = 0, is_item: bool = False) -> None:
        """Read past a value; that of a boolean field stands in its type."""
        if depth > _MAX_DEPTH:
            raise BadThrift("it is nested too deeply")
        if kind in {_TRUE, _FALSE}:
            if is_item:
                self._byte()
        elif kind in _INTEGERS:
            self._varint()
        elif kind in {_BYTE, _DOUBLE, _BINARY}:
            self._advance({_BYTE: 1, _DOUBLE: 8}.get(kind) or self._varint())
        elif kind in {_LIST, _SET}:
            count, of = self._items()
            for _ in range(count):
                self.skip(of, depth=depth + 1, is_item=True)
        elif kind == _STRUCT:
            for _, of in self.fields():
                self.skip(of, depth=depth + 1)
        else:  # maps are in no header of Parquet
            raise BadThrift(f"it has a value of the type {kind}")

    def _byte(self) -> int:
        return self._read(1)[0]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:  # noqa: PLR2004  the highest bit says that more follow
                return value
            shift += 7
            if shift > _MAX_SHIFT:
                raise BadThrift("it has a number of more than 64 bits")

    def _advance(self, num_bytes: int) -> None:
        self._spend(num_bytes)
        self._file.seek(num_bytes, 1)

    def _read(self, num_bytes: int) -> bytes:
        self._spend(num_bytes)
        found = self._file.read(num_bytes)
        if len(found) != num_bytes:
            raise BadThrift("it is cut off")
        return found

    def _spend(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise BadThrift("it is longer than it says")
