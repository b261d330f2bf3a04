"""The tables of a request: found, pinned, and read row by row in the normalised form."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.audits.schemas import DatasetSource
from app.datasets.columns import ColumnNames, DatasetError, default_columns
from app.datasets.files import FileFormat, read_dataset
from app.datasets.models import Dataset
from app.datasets.storage import upload_path
from app.references import parse_dataset_reference
from app.shared_files import fetch_once
from workers.pipeline.context import StageContext
from workers.pipeline.failures import AuditRefused
from workers.sources.datasets import resolve_dataset
from workers.sources.errors import SourceError
from workers.sources.local import ResolvedDataset


@dataclass(frozen=True)
class Table:
    """A dataset of the request, found and pinned.

    Attributes:
        columns: which are read.
        field: the field of the request that names it, train, validation or test.
    """

    resolved: ResolvedDataset
    columns: ColumnNames
    field: str

    @property
    def path(self) -> Path:
        """Where the file is, for as long as this table is kept."""
        return self.resolved.path

    @property
    def format(self) -> FileFormat:
        """What the file is."""
        return self.resolved.format

    @property
    def revision(self) -> str:
        """The commit (hub), or the SHA-256 of the file."""
        return self.resolved.revision


def resolve_table(context: StageContext, source: DatasetSource, *, field: str) -> Table:
    """Find a dataset and bring it here.

    Raises:
        AuditRefused: the reference leads nowhere, or the columns are not those of the task.
    """
    columns = source.columns or default_columns(context.request.task)
    if (columns.kind == "classification") != (context.request.task == "classification"):
        raise AuditRefused(
            "columns_mismatch",
            f"A {context.request.task} audit cannot read {_describe(columns)}: a classification "
            "audit reads text and label, a causal_lm audit prompt and completion, or messages.",
            field=f"{field}.columns",
        )

    def find_upload(dataset_id: str) -> ResolvedDataset:
        with Session(context.engine) as session:
            upload = session.scalars(
                select(Dataset).where(Dataset.id == dataset_id, Dataset.tenant == context.tenant)
            ).one_or_none()
        if upload is None:
            raise SourceError(
                f"the upload {dataset_id} is gone; upload the file again and use its new id",
                code="not_found",
                field="dataset",
            )
        path = upload_path(context.settings.data_dir, upload.id, upload.format)
        fetch_once(path)
        return ResolvedDataset(path, cast("FileFormat", upload.format), upload.sha256)

    try:
        resolved = resolve_dataset(
            parse_dataset_reference(source.reference),
            find_upload=find_upload,
            roots=context.settings.file_roots,
            hub=context.hub,
            cache_dir=context.cache_dir,
            limits=context.limits,
            max_bytes=context.settings.max_upload_bytes,
            web=context.web,
            store=context.store,
        )
    except SourceError as error:
        raise AuditRefused(
            error.code, error.message, field=f"{field}.reference", transient=error.transient
        ) from error
    return Table(resolved, columns, field)


def _describe(columns: ColumnNames) -> str:
    names = columns.by_field()
    return " and ".join(f"{field} ({name!r})" for field, name in names.items() if field != "noise")


def read_batches(context: StageContext, table: Table) -> Iterator[pa.RecordBatch]:
    """Yield a table's rows in the normalised form.

    Raises:
        AuditRefused: the first row that is wrong.
    """
    try:
        yield from read_dataset(
            table.path, format=table.format, columns=table.columns, limits=context.limits
        )
    except DatasetError as error:
        field = f"{table.field}.columns.{error.field}" if error.field else table.field
        raise AuditRefused(error.code, error.message, field=field) from error
