"""What a process of its own does with a stranger's table file."""

from pathlib import Path
from typing import Any

from app.datasets.columns import columns_by_header
from app.datasets.files import DatasetError, DatasetLimits, guess_format, inspect_dataset
from app.datasets.readers import read_header


def inspect(path: str) -> dict[str, Any]:
    """Check a file as an upload is checked; a dataset that is taken is told with its rows."""
    file = Path(path)
    limits = DatasetLimits()
    try:
        with file.open("rb") as opened:
            file_format = guess_format(file.name, opened.read(4096))
        header = read_header(file, format=file_format, limits=limits)
        columns = columns_by_header([column.name for column in header])
        summary = inspect_dataset(file, format=file_format, columns=columns, limits=limits)
    except DatasetError as error:
        return {
            "code": error.code,
            "message": error.message,
            "field": error.field,
            "row": error.row,
        }
    return {"code": None, "num_rows": summary.num_rows}
