"""The files that the API and all workers see: one data directory, or a bucket and copies here.

Whoever writes a file below the data directory publishes it, and whoever reads one fetches it
before. Where the data directory itself is shared, which is the default, both do nothing. With
WINNOW_ARTIFACTS each process, or machine, has a data directory of its own.
"""

import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from app.settings import Settings

if TYPE_CHECKING:
    from app.bucket import Bucket

WHOLE = ".whole"  # an object beside those of a folder, the last that is put
_buckets: dict[Path, "Bucket"] = {}  # by data directory; one in a process, but for tests


def share_files(settings: Settings) -> None:
    """Let this process share its files as the operator has it; to be called before any are."""
    if settings.artifacts is None or settings.data_dir in _buckets:
        return
    from app.bucket import Bucket  # noqa: PLC0415  boto3 takes long to load, and few need it

    name, _, prefix = settings.artifacts.partition("/")
    endpoint = settings.s3_endpoint
    access_key, secret_key = settings.s3_access_key, settings.s3_secret_key
    _buckets[settings.data_dir] = Bucket(
        name=name,
        prefix=prefix,
        data_dir=settings.data_dir,
        endpoint=str(endpoint).rstrip("/") if endpoint else None,
        region=settings.s3_region,
        access_key=access_key.get_secret_value() if access_key else None,
        secret_key=secret_key.get_secret_value() if secret_key else None,
    )


def bucket_of(settings: Settings) -> "Bucket | None":
    """Return the bucket by which files are shared, if they are."""
    share_files(settings)
    return _buckets.get(settings.data_dir)


def fetch(path: Path) -> bool:
    """Bring a file here as it is for all, and return whether there is one.

    Raises:
        NotReady: the bucket cannot be reached.
    """
    bucket = _bucket_of(path)
    if bucket is None:
        return path.exists()
    return bucket.fetch(path)


def fetch_once(path: Path) -> bool:
    """Do the same with a file that is named by what it is, and never written anew."""
    return path.exists() or fetch(path)


def publish(path: Path) -> None:
    """Let all have a file that was written here.

    Raises:
        NotReady: the bucket cannot be reached.
    """
    bucket = _bucket_of(path)
    if bucket is not None:
        bucket.publish(path)


def fetch_folder(folder: Path) -> bool:
    """Bring a folder here that never changes, and return whether there is one.

    Raises:
        NotReady: the bucket cannot be reached.
    """
    bucket = _bucket_of(folder)
    return folder.is_dir() if bucket is None else bucket.fetch_folder(folder)


def publish_folder(
    folder: Path, *, once: bool = False, without: frozenset[str] = frozenset()
) -> None:
    """Let all have a folder that was written here, links in it followed.

    Args:
        folder: the folder.
        once: its name says what is in it, so that nothing is to be done where all have it.
        without: names of files that are for this machine alone.

    Raises:
        NotReady: the bucket cannot be reached.
    """
    bucket = _bucket_of(folder)
    if bucket is not None:
        bucket.publish_folder(folder, once=once, without=without)


def num_bytes(folder: Path) -> int:
    """Return how much the files below a folder take.

    Raises:
        NotReady: the bucket cannot be reached.
    """
    bucket = _bucket_of(folder)
    return _bytes_in(folder) if bucket is None else bucket.num_bytes(folder)


def folders_in(folder: Path) -> set[Path]:
    """Return the folders in a folder that all have.

    Raises:
        NotReady: the bucket cannot be reached.
    """
    bucket = _bucket_of(folder)
    return set(folder.glob("*") if bucket is None else bucket.subfolders(folder))


def last_written(path: Path) -> float:
    """Return when a file, or anything in a folder, was written last; 0 for one that is gone.

    Raises:
        NotReady: the bucket cannot be reached.
    """
    bucket = _bucket_of(path)
    return max(last_written_here(path), bucket.last_written(path) if bucket else 0.0)


def last_written_here(path: Path) -> float:
    """Return the same of the copy that this machine has."""
    times = [0.0]
    for part in (path, *path.rglob("*")):
        try:
            times.append(part.lstat().st_mtime)
        except FileNotFoundError:
            continue
    return max(times)


def remove_folder(folder: Path) -> bool:
    """Remove a folder for all, as far as that can be done, and return whether it is gone.

    Copies that others have fetched go when they are old.
    """
    shutil.rmtree(folder, ignore_errors=True)
    bucket = _bucket_of(folder)
    is_gone = bucket is None or bucket.remove(folder)
    return is_gone and not folder.exists()


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # another process cleans up
        if stat.S_ISREG(status.st_mode):
            total += status.st_size
    return total


def _bucket_of(path: Path) -> "Bucket | None":
    for data_dir, bucket in _buckets.items():
        if path.is_relative_to(data_dir):
            return bucket
    return None
