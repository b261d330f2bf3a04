"""Answers about datasets."""

from datetime import datetime
from typing import Any

from winnow.results.base import FileFormat, Result


class Dataset(Result):
    """An uploaded, checked table; pass `reference` to an audit."""

    id: str
    reference: str
    name: str
    format: FileFormat
    columns: dict[str, str | None]
    num_rows: int
    num_bytes: int
    sha256: str
    summary: dict[str, Any]
    created_at: datetime
    links: dict[str, str]
