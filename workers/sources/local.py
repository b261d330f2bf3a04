"""A dataset that lies on the worker's disks: what is known of it, and how one is opened."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

from app.datasets.files import DatasetError, FileFormat, guess_format
from app.opening import open_resolved, path_of
from app.references import FileReference, InvalidReference, resolve_file
from workers.sources.errors import SourceError, SourceErrorCode

_HEAD_BYTES = 512


@dataclass(frozen=True, slots=True)
class ResolvedDataset:
    """A dataset that lies ready as one file; its rows are not checked yet.

    Attributes:
        path: the file.
        format: what it is.
        revision: the commit (hub), or the sha256 of the file.
        file: held open where `path` leads through it, so that no other file can come in its place.
    """

    path: Path
    format: FileFormat
    revision: str
    file: BufferedReader | None = field(default=None, compare=False, repr=False)


def resolve_local(
    reference: FileReference, *, roots: Sequence[Path], max_bytes: int
) -> ResolvedDataset:
    """Return a table file under one of the roots, opened.

    Raises:
        SourceError: invalid_reference, too_large, unsupported_dataset or not_permitted.
    """
    try:
        path = resolve_file(reference.path, roots)
        if not path.is_file():
            raise _refusal(
                f"{reference.path} is a folder; name one Parquet, JSONL or CSV file",
                "invalid_reference",
            )
        file = open_resolved(path)
        num_bytes = path_of(file, path).stat().st_size
        if num_bytes > max_bytes:
            raise _refusal(
                f"{reference.path} has {num_bytes:,} bytes or more; this server takes at most "
                f"{max_bytes:,}",
                "too_large",
            )
        file_format = guess_format(path.name, file.read(_HEAD_BYTES))
        file.seek(0)
        revision = hashlib.file_digest(file, "sha256").hexdigest()
    except InvalidReference as error:
        raise _refusal(str(error), "invalid_reference") from error
    except DatasetError as error:
        raise _refusal(error.message, "unsupported_dataset") from error
    except OSError as error:
        raise _refusal(
            f"{reference.path} cannot be read: {error.strerror or error}", "not_permitted"
        ) from error
    return ResolvedDataset(path_of(file, path), file_format, revision, file)


def _refusal(message: str, code: SourceErrorCode) -> SourceError:
    return SourceError(message, code=code, field="dataset")
