"""The file that an audit was trained on: found again, and proved to be unchanged."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from sqlalchemy.orm import Session

from app.audits.models import Audit
from app.datasets.columns import ColumnNames, default_columns
from app.datasets.files import FileFormat, guess_format
from app.datasets.repository import find_dataset
from app.datasets.storage import cache_folder, fetched_path, hub_table_path, upload_path
from app.errors import Conflict
from app.references import (
    FileReference,
    HubDatasetReference,
    InvalidReference,
    ObjectReference,
    UploadReference,
    WebReference,
    parse_dataset_reference,
    resolve_file,
)
from app.settings import Settings
from app.shared_files import fetch_once

_HEAD_BYTES = 512
_SUFFIXES = {".csv", ".jsonl", ".ndjson", ".parquet"}


@dataclass(frozen=True)
class Source:
    """Where a training file should lie, and what it must be.

    Attributes:
        name: as its owner calls it.
        sha256: of the file that the audit read.
    """

    path: Path
    name: str
    sha256: str
    columns: ColumnNames

    def named(self, addition: str, suffix: str | None = None) -> str:
        """Return a file name made from the file's own."""
        name = PurePath(self.name).name
        own = PurePath(name).suffix.lower()
        stem = name[: -len(own)] if own in _SUFFIXES else name
        return f"{stem}-{addition}{suffix or (own if own in _SUFFIXES else self.path.suffix)}"


def find_source(session: Session, settings: Settings, audit: Audit) -> Source:
    """Return where the training file of an audit lies.

    Raises:
        Conflict: it is gone, or an earlier version of the service did not note what it was.
    """
    source: dict[str, Any] = audit.request["train"]
    reference = parse_dataset_reference(source["reference"])
    noted: dict[str, Any] = audit.provenance.get("train_file", {})
    sha256 = noted.get("sha256")
    if sha256 is None and not isinstance(reference, HubDatasetReference):
        sha256 = audit.provenance.get("train_revision")  # which is the SHA-256 of such files
    if sha256 is None:
        raise Conflict(
            "The audit does not say which file it read: an earlier version of the service made it. "
            "Submit the audit again to export its training set."
        )
    columns = (
        ColumnNames.model_validate(source["columns"])
        if source.get("columns") is not None
        else default_columns(audit.request.get("task", "classification"))
    )
    match reference:
        case UploadReference():
            dataset = find_dataset(session, audit.tenant, reference.id)
            if dataset is None:
                raise _is_gone(f"The upload {reference.id} was deleted")
            path = upload_path(settings.data_dir, dataset.id, dataset.format)
            return Source(path, dataset.name, sha256, columns)
        case FileReference():
            try:
                path = resolve_file(reference.path, settings.file_roots)
            except InvalidReference as error:
                raise _is_gone(str(error)) from error
            return Source(path, reference.path.name, sha256, columns)
        case HubDatasetReference():
            pinned = replace(reference, revision=audit.provenance["train_revision"])
            path = hub_table_path(cache_folder(settings.data_dir), pinned)
            name = f"{reference.repo.replace('/', '-')}-{reference.split}.parquet"
            return Source(path, name, sha256, columns)
        case WebReference() | ObjectReference():
            path = fetched_path(cache_folder(settings.data_dir), sha256, noted["format"])
            return Source(path, reference.name, sha256, columns)


def open_unchanged(source: Source) -> tuple[BinaryIO, FileFormat]:
    """Open a training file and prove that it is the one that the audit read; the caller closes it.

    What is proved and what is read then is one open file, whatever happens to its name meanwhile.

    Raises:
        Conflict: it is gone, or has changed.
    """
    fetch_once(source.path)
    try:
        file = source.path.open("rb")
    except OSError as error:
        raise _is_gone(f"The file of {source.name} is gone ({error.strerror})") from error
    try:
        is_same = hashlib.file_digest(file, "sha256").hexdigest() == source.sha256
        file.seek(0)
        head = file.read(_HEAD_BYTES)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    if not is_same:
        file.close()
        raise Conflict(
            f"{source.name} is not the file any more that the audit read: its SHA-256 is not "
            f"{source.sha256}. Put the file back as it was, or audit the new one."
        )
    return file, guess_format(source.path.name, head)


def _is_gone(what: str) -> Conflict:
    return Conflict(
        f"{what}. The training set cannot be exported without its original file; the decisions are "
        "still there: GET …/suspects?decision=any."
    )
