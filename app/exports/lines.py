"""JSONL and CSV with some rows changed: whatever does not change keeps its very bytes."""

import csv
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecoder
from typing import Any, BinaryIO

from app.datasets.columns import ColumnNames, DatasetLimits
from app.exports.changes import Change, Changes
from app.exports.values import changed_value, relabelled, target_column

_BOM = b"\xef\xbb\xbf"
_DECODER = JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_PLAIN_CELL = re.compile(r"[^,\r\n]*")
_NEEDS_QUOTES = re.compile(r'[",\r\n]')


@dataclass(frozen=True)
class Difference:
    """What a change comes to in the file: the cell before and after; None for a row left out."""

    index: int
    change: Change
    before: Any = None
    after: Any = None


class LineFile(ABC):
    """A file of text whose rows are one line or several.

    Args:
        file: the open file, at any place.
        columns: which columns hold what.
        limits: of the datasets that this server takes.
    """

    def __init__(self, file: BinaryIO, columns: ColumnNames, limits: DatasetLimits) -> None:
        self._file = file
        self._columns = columns
        self._limits = limits
        self.column = target_column(columns)

    @abstractmethod
    def _rows(self) -> Iterator[tuple[bytes, bool]]:
        """Yield the bytes of every part of the file, and whether the part is a row."""

    @abstractmethod
    def _cell(self, row: str) -> tuple[int, int, Any]:
        """Return where the cell that decisions are about begins and ends, and its value."""

    @abstractmethod
    def _written(self, value: object, row: str, old: str) -> str:
        """Return a cell as it is written."""

    def rewritten(self, changes: Changes) -> Iterator[bytes]:
        """Yield the file with the changes."""
        for raw, index in self._numbered():
            change = changes.at(index) if index is not None else None
            if change is None:
                yield raw
            elif change.kind != "drop":
                row = raw.decode()
                start, end, before = self._cell(row)
                after = changed_value(before, change, self._columns.kind)
                if after != before:
                    new = self._written(after, row, row[start:end])
                    yield (row[:start] + new + row[end:]).encode()
                else:
                    yield raw

    def differences(self, changes: Changes) -> Iterator[Difference]:
        """Yield what the changes come to, in the order of the rows."""
        for raw, index in self._numbered():
            change = changes.at(index) if index is not None else None
            if change is None or index is None:
                continue
            if change.kind == "drop":
                yield Difference(index, change)
                continue
            _, _, before = self._cell(raw.decode())
            after = changed_value(before, change, self._columns.kind)
            if after != before:
                yield Difference(index, change, before, after)

    def check(self, changes: Changes) -> None:
        """Check that every label can be written, before anything is.

        Raises:
            NotWritable: the label that cannot.
        """
        for raw, index in self._numbered():
            if index is not None:
                _, _, before = self._cell(raw.decode())
                for label in changes.labels():
                    relabelled(before, label)
                return

    def _numbered(self) -> Iterator[tuple[bytes, int | None]]:
        self._file.seek(0)
        index = 0
        for raw, is_row in self._rows():
            yield raw, index if is_row else None
            index += is_row


class JsonLines(LineFile):
    """One JSON object a line; blank lines are no rows."""

    def _rows(self) -> Iterator[tuple[bytes, bool]]:
        head = self._file.read(len(_BOM))
        if head == _BOM:
            yield head, False
        else:
            self._file.seek(0)
        for line in self._file:
            yield line, bool(line.strip() and line.decode().strip())

    def _cell(self, row: str) -> tuple[int, int, Any]:
        found: tuple[int, int, Any] | None = None
        place = _skip(row, row.index("{") + 1)
        while row[place] != "}":
            name, place = _DECODER.raw_decode(row, place)
            place = _skip(row, _skip(row, place) + 1)  # the colon
            value, end = _DECODER.raw_decode(row, place)
            if name == self.column:
                found = place, end, value  # of several, the last one counts
            place = _skip(row, end)
            if row[place] == ",":
                place = _skip(row, place + 1)
        assert found is not None  # noqa: S101  the audit read it
        return found

    def _written(self, value: object, row: str, old: str) -> str:
        del old
        return json.dumps(value, ensure_ascii=row.isascii())


def _skip(row: str, place: int) -> int:
    match = _SPACE.match(row, place)
    return match.end() if match else place


class Csv(LineFile):
    """Cells with commas between them; the first row names the columns."""

    def __init__(self, file: BinaryIO, columns: ColumnNames, limits: DatasetLimits) -> None:
        super().__init__(file, columns, limits)
        self._place = 0  # of the column, known when the header was read

    def _rows(self) -> Iterator[tuple[bytes, bool]]:
        # The limit is the process's, so it is only ever raised.
        csv.field_size_limit(max(csv.field_size_limit(), self._limits.max_line_bytes))
        taken: list[bytes] = []

        def lines() -> Iterator[str]:
            for number, line in enumerate(self._file):
                taken.append(line)
                yield line.decode("utf-8" if number else "utf-8-sig")

        has_header = False
        for row in csv.reader(lines(), strict=True):
            raw = b"".join(taken)
            taken.clear()
            yield raw, bool(row) and has_header
            if row and not has_header:
                self._place, has_header = row.index(self.column), True

    def _cell(self, row: str) -> tuple[int, int, Any]:
        end = -1
        for _ in range(self._place + 1):
            start = end + 1
            end = _end_of_cell(row, start)
        cell = row[start:end]
        return start, end, cell[1:-1].replace('""', '"') if cell.startswith('"') else cell

    def _written(self, value: object, row: str, old: str) -> str:
        del row
        text = str(value)
        if old.startswith('"') or not text or _NEEDS_QUOTES.search(text):
            return '"' + text.replace('"', '""') + '"'
        return text


def _end_of_cell(row: str, start: int) -> int:
    """Return where a cell ends; the row is known to be valid."""
    if row[start : start + 1] != '"':
        match = _PLAIN_CELL.match(row, start)
        return match.end() if match else start
    end = row.index('"', start + 1)
    while row[end + 1 : end + 2] == '"':
        end = row.index('"', end + 2)
    return end + 1
