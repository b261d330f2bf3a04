"""Datasets: taken in whole and checked, or not at all."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import structlog
from pydantic import BaseModel
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.audits.idempotency import KeyedCall
from app.audits.repository import uses_dataset
from app.datasets import repository
from app.datasets.columns import ColumnField
from app.datasets.files import (
    DatasetError,
    DatasetLimits,
    guess_format,
    inspect_dataset,
)
from app.datasets.models import Dataset
from app.datasets.readers import read_header
from app.datasets.schemas import UploadOptions
from app.datasets.storage import upload_path
from app.db import new_id, transaction
from app.errors import Conflict, InvalidRequest, NotFound
from app.failpoints import reach
from app.limits.quotas import check_room
from app.references import UploadReference
from app.settings import Settings
from app.shared_files import publish, remove_folder
from app.storage import require_room
from app.trail.service import TrailAction, record
from app.work.leftovers import note_leftover

HEAD_BYTES = 4096
CHUNK_BYTES = 1024**2

_POINTER_OF_FIELD: dict[ColumnField | None, str] = {
    "text": "#/text_column",
    "text_pair": "#/text_pair_column",
    "label": "#/label_column",
    "prompt": "#/prompt_column",
    "completion": "#/completion_column",
    "messages": "#/messages_column",
    "noise": "#/noise_column",
    None: "#/file",
}

log = structlog.get_logger()


class Storing(NamedTuple):
    """A stored dataset, and whether an earlier call with the same key stored it."""

    dataset: Dataset
    is_replay: bool


class _Upload(BaseModel):
    """What an idempotency key stands for."""

    filename: str
    sha256: str
    options: UploadOptions


def dataset_limits(settings: Settings) -> DatasetLimits:
    """Return the largest dataset that this server takes."""
    return DatasetLimits(
        max_rows=settings.max_rows,
        max_bytes=settings.max_upload_bytes,
        max_text_chars=settings.max_text_chars,
    )


def store_dataset(
    engine: Engine,
    settings: Settings,
    *,
    tenant: str,
    file: BinaryIO,
    filename: str,
    options: UploadOptions,
    idempotency_key: str | None = None,
) -> Storing:
    """Check an uploaded file and keep it.

    The file is written under a temporary name, flushed to disk and renamed before its row is
    committed: a row always has its file, and a refusal leaves nothing. A caller who lost the answer
    and sends the file again, under the same key, gets the dataset that is there.

    Raises:
        InvalidRequest: what is wrong with the file, and where; or the key came with another file.
        Conflict: the key's dataset was deleted.
        QuotaExceeded: it has no room beside the tenant's others.
        StorageFull: the data directory has no room.
        OSError: the disk became full meanwhile (the error handlers make it a 507).
    """
    require_room(settings)
    dataset_id = new_id("ds")
    with _refusals_as_problems():
        file_format = options.format or guess_format(filename, file.read(HEAD_BYTES))
        file.seek(0)
        final = upload_path(settings.data_dir, dataset_id, file_format)
        with _staging_beside(final.parent) as staging:
            path = staging / final.name
            sha256 = _write(file, path)
            limits = dataset_limits(settings)
            header = read_header(path, format=file_format, limits=limits)
            columns = options.columns([column.name for column in header])
            summary = inspect_dataset(path, format=file_format, columns=columns, limits=limits)
            dataset = Dataset(
                id=dataset_id,
                tenant=tenant,
                name=options.name or filename,
                format=file_format,
                columns=columns.model_dump(),
                num_rows=summary.num_rows,
                num_bytes=path.stat().st_size,
                sha256=sha256,
                summary=summary.model_dump(mode="json"),
            )
            _sync(staging)
            with transaction(engine) as session:  # should this process die before the next one
                note_leftover(session, settings, final.parent)
            staging.rename(final.parent)
            reach("upload.renamed")
    call = None
    if idempotency_key is not None:
        upload = _Upload(filename=filename, sha256=sha256, options=options)
        route = "POST /v1/datasets"
        call = KeyedCall.of(
            upload, tenant=tenant, route=route, key=idempotency_key, thing="dataset"
        )
    first = None
    try:
        _sync(final.parent.parent)
        publish(final)
        with transaction(engine) as session:
            if call is not None and not call.claim(session, dataset_id):
                first = _first_answer(session, call)
            else:
                check_room(
                    session,
                    settings,
                    tenant=tenant,
                    num_rows=dataset.num_rows,
                    num_bytes=dataset.num_bytes,
                )
                session.add(dataset)
                record(session, TrailAction.DATASET_UPLOAD, dataset_id, tenant=tenant)
    except BaseException:
        remove_folder(final.parent)
        raise
    if first is not None:
        remove_folder(final.parent)
        return Storing(first, is_replay=True)
    log.info("dataset_stored", dataset_id=dataset_id, num_rows=summary.num_rows)
    return Storing(dataset, is_replay=False)


def _first_answer(session: Session, call: KeyedCall) -> Dataset:
    """Return the dataset that a key was given before."""
    dataset_id = call.first_answer(session) or ""  # it was not free, so it has one
    dataset = repository.find_dataset(session, call.tenant, dataset_id)
    if dataset is None:
        raise call.is_gone(dataset_id)
    return dataset


def get_dataset(engine: Engine, *, tenant: str, dataset_id: str) -> Dataset:
    """Return a tenant's dataset.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    with Session(engine) as session:
        return _existing(repository.find_dataset(session, tenant, dataset_id), dataset_id)


def list_datasets(
    engine: Engine, *, tenant: str, limit: int, before_id: str | None, sha256: str | None = None
) -> list[Dataset]:
    """Return a tenant's datasets, the newest first, one more than `limit` when there are more."""
    with Session(engine) as session:
        return repository.list_datasets(
            session, tenant, limit=limit, before_id=before_id, sha256=sha256
        )


def delete_dataset(engine: Engine, settings: Settings, *, tenant: str, dataset_id: str) -> None:
    """Remove a dataset and its file.

    Raises:
        NotFound: there is none, or it is another tenant's.
        Conflict: an audit that has not ended reads it.
    """
    with transaction(engine) as session:
        dataset = _existing(
            repository.find_dataset(session, tenant, dataset_id, lock=True), dataset_id
        )
        if uses_dataset(session, tenant, str(UploadReference(dataset_id))):
            raise Conflict(
                f"An audit that has not ended reads {dataset_id}. Cancel it or wait for its end, "
                "then delete the dataset."
            )
        path = upload_path(settings.data_dir, dataset_id, dataset.format)
        note_leftover(session, settings, path.parent)
        session.delete(dataset)
        record(session, TrailAction.DATASET_DELETE, dataset_id, tenant=tenant)
    remove_folder(path.parent)
    log.info("dataset_deleted", dataset_id=dataset_id)


def _existing(dataset: Dataset | None, dataset_id: str) -> Dataset:
    if dataset is None:
        raise NotFound(f"There is no dataset {dataset_id!r}.")
    return dataset


@contextmanager
def _refusals_as_problems() -> Iterator[None]:
    try:
        yield
    except DatasetError as error:
        place = {"pointer": _POINTER_OF_FIELD[error.field], "detail": error.message}
        raise InvalidRequest(
            f"The file was not taken: {error.message}",
            errors=[place],
            code=error.code,
            row=error.row,
        ) from error


@contextmanager
def _staging_beside(final: Path) -> Iterator[Path]:
    """Yield a folder that is gone at the end, unless it was renamed."""
    staging = final.with_name(f".{final.name}.partial")
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(source: BinaryIO, path: Path) -> str:
    """Copy to disk, flush, and return the SHA-256."""
    digest = hashlib.sha256()
    with path.open("xb") as target:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
