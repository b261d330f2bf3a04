"""What a file has, before anything of its rows is looked at."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from app.datasets.columns import ColumnField, DatasetError, DatasetLimits

FileFormat = Literal["parquet", "jsonl", "csv"]

BATCH_ROWS = 1024
# Rows of one batch together, unfolded: what is held at once does not depend on how long texts are.
BATCH_BYTES = 16 * 1024**2
_MAX_NAMES_IN_MESSAGE = 20


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


def check_columns(
    present: list[str], *, names: dict[ColumnField, str], limits: DatasetLimits
) -> None:
    """Raise unless a file has the asked columns, each once, and not too many of all.

    Raises:
        DatasetError: too_many_columns or missing_column.
    """
    check_num_columns(len(present), limits=limits)
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


def check_num_columns(number: int, *, limits: DatasetLimits) -> None:
    """Raise if a file has more columns than are taken.

    Raises:
        DatasetError: too_many_columns.
    """
    if number > limits.max_columns:
        raise DatasetError(
            f"the file has {number:,} columns; this server takes at most {limits.max_columns:,}",
            code="too_many_columns",
        )


def first_line(error: Exception) -> str:
    """Return what an error says, short."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
