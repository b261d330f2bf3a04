"""A bucket as what all processes share, and the data directory of each as its cache.

Objects have the names of files below the data directory. An object appears whole or not at all, as
a renamed file does. What was fetched is asked after again at every reading, by its ETag: another
worker may have written it anew.
"""

import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import boto3
import structlog
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from app.errors import NotReady

WHOLE = ".whole"  # an object beside those of a folder, the last that is put
_CHUNK_BYTES = 1024**2
_CONNECT_SECONDS = 10
_READ_SECONDS = 60
_MAX_DELETED = 1000  # in one call

log = structlog.get_logger()


@dataclass(frozen=True)
class _Copy:
    """What an object was when it was fetched or put, and the file that it was then."""

    etag: str
    size: int
    changed_ns: int


class Bucket:
    """Objects below a prefix, by the paths of their copies here."""

    def __init__(
        self,
        *,
        name: str,
        prefix: str,
        data_dir: Path,
        endpoint: str | None,
        region: str | None,
        access_key: str | None,
        secret_key: str | None,
    ) -> None:
        self._name, self._prefix, self._data_dir = name, prefix, data_dir
        self._copies: dict[Path, _Copy] = {}
        self._connecting = threading.Lock()
        self._client: Any = None
        self._options = {
            "endpoint_url": endpoint,
            "region_name": region,
            "aws_access_key_id": access_key,
            "aws_secret_access_key": secret_key,
            "config": Config(
                connect_timeout=_CONNECT_SECONDS,
                read_timeout=_READ_SECONDS,
                retries={"mode": "standard", "total_max_attempts": 5},
                s3={"addressing_style": "path" if endpoint else "auto"},
            ),
        }

    def fetch(self, path: Path) -> bool:
        """Bring a file here as it is in the bucket, and return whether it is there.

        Raises:
            NotReady: the bucket cannot be reached, or refuses.
        """
        known = self._copies.get(path)
        is_same = known is not None and known == _copy_of(path, known.etag)
        condition = {"IfNoneMatch": known.etag} if known is not None and is_same else {}
        with self._trouble():
            try:
                answer = self._s3.get_object(Bucket=self._name, Key=self._key(path), **condition)
            except ClientError as error:
                status = _status(error)
                if status == HTTPStatus.NOT_MODIFIED:
                    return True
                if status == HTTPStatus.NOT_FOUND:
                    return False
                raise
            self._write(path, answer)
        return True

    def publish(self, path: Path) -> None:
        """Put a file into the bucket.

        Raises:
            NotReady: as `fetch`.
        """
        with self._trouble():
            self._s3.upload_file(str(path), self._name, self._key(path))
            answer = self._s3.head_object(Bucket=self._name, Key=self._key(path))
        copy = _copy_of(path, answer["ETag"])
        if copy is not None:
            self._copies[path] = copy

    def fetch_folder(self, folder: Path) -> bool:
        """Bring a folder here, whole or not at all, and return whether it is there.

        Raises:
            NotReady: as `fetch`.
        """
        if folder.is_dir():
            return True
        with self._trouble():
            names = [key.removeprefix(self._key(folder) + "/") for key, _ in self._below(folder)]
            if WHOLE not in names:
                return False
            staging = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.partial")
            try:
                for name in names:
                    key = f"{self._key(folder)}/{name}"
                    if name != WHOLE:
                        answer = self._s3.get_object(Bucket=self._name, Key=key)
                        _save(answer, staging / name)
                _rename(staging, folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return True

    def publish_folder(self, folder: Path, *, once: bool, without: frozenset[str]) -> None:
        """Put a folder's files into the bucket, and what links in it lead to.

        Args:
            folder: the folder.
            once: do nothing if the bucket has it.
            without: names of files that stay here.

        Raises:
            NotReady: as `fetch`.
        """
        with self._trouble():
            if once and any(key == self._key(folder / WHOLE) for key, _ in self._below(folder)):
                return
            for path in sorted(folder.rglob("*")):
                if path.is_file() and path.name not in without:
                    self._s3.upload_file(str(path), self._name, self._key(path))
            self._s3.put_object(Bucket=self._name, Key=self._key(folder / WHOLE), Body=b"")

    def num_bytes(self, folder: Path) -> int:
        """Return how much the objects of a folder take.

        Raises:
            NotReady: as `fetch`.
        """
        with self._trouble():
            return sum(size for _, size in self._below(folder))

    def remove(self, folder: Path) -> bool:
        """Remove the objects of a folder, and return whether all are gone."""
        try:
            with self._trouble():
                keys = [key for key, _ in self._below(folder)]
                for first in range(0, len(keys), _MAX_DELETED):
                    objects = [{"Key": key} for key in keys[first : first + _MAX_DELETED]]
                    self._s3.delete_objects(
                        Bucket=self._name, Delete={"Objects": objects, "Quiet": True}
                    )
        except NotReady as error:
            log.warning("objects_not_removed", folder=str(folder), error=str(error.detail))
            return False
        return True

    @property
    def _s3(self) -> Any:  # noqa: ANN401  boto3 makes its classes at run time
        with self._connecting:  # a client may be used by many threads, and made by one at a time
            if self._client is None:
                self._client = boto3.client("s3", **self._options)
            return self._client

    def _key(self, path: Path) -> str:
        name = path.relative_to(self._data_dir).as_posix()
        return f"{self._prefix}/{name}" if self._prefix else name

    def _below(self, folder: Path) -> Iterator[tuple[str, int]]:
        pages = self._s3.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._name, Prefix=f"{self._key(folder)}/"):
            yield from ((item["Key"], item["Size"]) for item in page.get("Contents", ()))

    def _write(self, path: Path, answer: dict[str, Any]) -> None:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        try:
            _save(answer, partial)
            copy = _copy_of(partial, answer["ETag"])
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        if copy is not None:
            self._copies[path] = copy

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            message = f"status {_status(error)}"
        except (BotoCoreError, Boto3Error) as error:
            message = str(error)
        else:
            return
        raise NotReady(
            f"The bucket {self._name} (WINNOW_ARTIFACTS) does not do what it must: {message}",
            headers={"Retry-After": "10"},
        )


def _save(answer: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(answer["Body"]) as body, path.open("xb") as file:
        for chunk in body.iter_chunks(_CHUNK_BYTES):
            file.write(chunk)


def _rename(staging: Path, folder: Path) -> None:
    try:
        staging.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same
            raise


def _copy_of(path: Path, etag: str) -> _Copy | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return _Copy(etag, found.st_size, found.st_mtime_ns)


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
