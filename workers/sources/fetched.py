"""Keep what is fetched from outside as a file of our own, named by its content."""

import hashlib
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from app.datasets.files import DatasetError, guess_format
from app.datasets.storage import fetched_path
from workers.sources.errors import SourceError
from workers.sources.local import ResolvedDataset

_HEAD_BYTES = 512
# Slower than this, after a first minute, is as good as nothing: a sender that drips must not hold
# a worker.
_GRACE_SECONDS = 60.0
_LEAST_BYTES_PER_SECOND = 32 * 1024


def keep_dataset(
    chunks: Iterable[bytes], *, source: str, name: str, cache_dir: Path, max_bytes: int
) -> ResolvedDataset:
    """Write a table file to the cache while it comes, and return it; its revision is its SHA-256.

    Args:
        chunks: the bytes.
        source: what to call it in a message.
        name: the file's; its ending may tell the format.
        cache_dir: where resolved datasets are kept.
        max_bytes: more is refused while it comes.

    Raises:
        SourceError: too_large, unsupported_dataset, or source_unreachable if it comes too slowly.
    """
    folder = cache_dir / "datasets"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="staging-") as staging:
        partial = Path(staging) / "file"
        sha256 = _write(chunks, partial, source=source, max_bytes=max_bytes)
        with partial.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        try:
            file_format = guess_format(name, head)
        except DatasetError as error:
            raise SourceError(
                f"{source}: {error.message}", code="unsupported_dataset", field="dataset"
            ) from error
        path = fetched_path(cache_dir, sha256, file_format)
        partial.replace(path)
    return ResolvedDataset(path=path, format=file_format, revision=sha256)


def _write(chunks: Iterable[bytes], path: Path, *, source: str, max_bytes: int) -> str:
    """Write what comes, within limits of size and time, and return its SHA-256."""
    sha256 = hashlib.sha256()
    num_bytes, started = 0, time.monotonic()
    with path.open("xb") as file:
        for chunk in chunks:
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise SourceError(
                    f"{source} has more than {max_bytes:,} bytes, the most that this server takes",
                    code="too_large",
                    field="dataset",
                )
            patience = _GRACE_SECONDS + num_bytes / _LEAST_BYTES_PER_SECOND
            if time.monotonic() - started > patience:
                raise SourceError(
                    f"{source} comes too slowly, {num_bytes:,} bytes so far; try again later",
                    code="source_unreachable",
                    field="dataset",
                    transient=True,
                )
            sha256.update(chunk)
            file.write(chunk)
    return sha256.hexdigest()
