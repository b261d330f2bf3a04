"""The calls about datasets."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx2

from winnow.calls.base import Calls, given, once, path_of
from winnow.connection import parse
from winnow.requests import Columns
from winnow.results import Dataset, FileFormat, Page

UPLOAD_TIMEOUT_SECONDS = 600.0  # the service checks every row before it answers


class DatasetCalls(Calls):
    """Upload tables, list and remove them."""

    async def upload_dataset(
        self,
        data: Path | str | bytes,
        *,
        columns: Columns | None = None,
        name: str | None = None,
        file_format: FileFormat | None = None,
        idempotency_key: str | None = None,
    ) -> Dataset:
        """Upload a table; the service checks it row by row.

        A connection that breaks meanwhile is no harm: the file is sent again, and becomes one
        dataset.

        Args:
            data: the path of a Parquet, JSONL or CSV file, or its bytes.
            columns: which columns hold what; the service tells by the header by default: text
                and label, else prompt and completion, else messages.
            name: what to call it; the file's own name by default.
            file_format: parquet, jsonl or csv; the service tells by itself by default.
            idempotency_key: the same key answers the same dataset for a day; set by itself for
                one call.
        """
        filename = "dataset" if isinstance(data, bytes) else Path(data).name
        fields = {f"{field}_column": of for field, of in (columns or Columns()).body().items()}
        fields |= given({"name": name, "format": file_format})
        headers = once(idempotency_key)

        async def upload() -> httpx2.Response:
            async def send(content: Any) -> httpx2.Response:  # noqa: ANN401  bytes or an open file
                return await self._connection.send(
                    "POST",
                    path_of("datasets"),
                    files={"file": (filename, content, "application/octet-stream")},
                    data=fields,
                    headers=headers,
                    timeout=UPLOAD_TIMEOUT_SECONDS,
                )

            if isinstance(data, bytes):
                return await send(data)
            with Path(data).open("rb") as file:  # noqa: ASYNC230  see AsyncClient
                return await send(file)

        return parse(Dataset, await self._connection.retry(upload))

    async def dataset(self, dataset_id: str) -> Dataset:
        """Return what is known of a dataset: its rows, labels and columns."""
        return await self._connection.ask(Dataset, "GET", path_of("datasets", dataset_id))

    def datasets(
        self, *, sha256: str | None = None, page_size: int = 100
    ) -> AsyncGenerator[Dataset, None]:
        """Yield your datasets, the newest first.

        Args:
            sha256: only those whose file has this SHA-256.
            page_size: datasets in one call, up to 1,000.
        """
        params = {"sha256": sha256, "limit": page_size}
        return self._pages(Page[Dataset], path_of("datasets"), params)

    async def delete_dataset(self, dataset_id: str) -> None:
        """Remove a dataset with its file; not while an audit that has not ended reads it."""
        await self._delete(path_of("datasets", dataset_id))
