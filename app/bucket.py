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
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from app.errors import NotReady
from app.shared_files import WHOLE

_CHUNK_BYTES = 1024**2
_MAX_DELETED = 1000  # in one call

log = structlog.get_logger()


@dataclass(frozen=True)
class _Patience:
    """How long the store may take, and how often it is asked."""

    connect_seconds: float
    read_seconds: float
    attempts: int


_PATIENT = _Patience(connect_seconds=10, read_seconds=60, attempts=5)
_BRIEF = _Patience(connect_seconds=2, read_seconds=3, attempts=1)


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
        self._clients: dict[_Patience, Any] = {}
        self._options = {
            "endpoint_url": endpoint,
            "region_name": region,
            "aws_access_key_id": access_key,
            "aws_secret_access_key": secret_key,
        }
        self._addressing_style = "path" if endpoint else "auto"

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
            start = f"{self._key(folder)}/"
            names = [item["Key"].removeprefix(start) for item in self._below(folder)]
            if WHOLE not in names:
                return False
            staging = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.partial")
            try:
                for name in names:
                    if name != WHOLE:
                        answer = self._s3.get_object(Bucket=self._name, Key=start + name)
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
            whole = self._key(folder / WHOLE)
            if once and any(item["Key"] == whole for item in self._below(folder)):
                return
            for path in sorted(folder.rglob("*")):
                if path.is_file() and path.name not in without:
                    self._s3.upload_file(str(path), self._name, self._key(path))
            self._s3.put_object(Bucket=self._name, Key=whole, Body=b"")

    def num_bytes(self, folder: Path) -> int:
        """Return how much the objects of a folder take.

        Raises:
            NotReady: as `fetch`.
        """
        with self._trouble():
            return sum(item["Size"] for item in self._below(folder))

    def remove(self, folder: Path) -> bool:
        """Remove the objects of a folder, and return whether all are gone."""
        try:
            with self._trouble():
                keys = [item["Key"] for item in self._below(folder)]
                for first in range(0, len(keys), _MAX_DELETED):
                    self._delete(self._s3, keys[first : first + _MAX_DELETED])
        except NotReady as error:
            log.warning("objects_not_removed", folder=str(folder), error=str(error.detail))
            return False
        return True

    def subfolders(self, folder: Path) -> list[Path]:
        """Return the folders in a folder.

        Raises:
            NotReady: as `fetch`.
        """
        start = f"{self._key(folder)}/"
        with self._trouble():
            pages = self._s3.get_paginator("list_objects_v2")
            return [
                folder / found["Prefix"].removeprefix(start).rstrip("/")
                for page in pages.paginate(Bucket=self._name, Prefix=start, Delimiter="/")
                for found in page.get("CommonPrefixes", ())
            ]

    def last_written(self, folder: Path) -> float:
        """Return when an object of a folder was put last; 0 if it has none.

        Raises:
            NotReady: as `fetch`.
        """
        with self._trouble():
            times = (item["LastModified"].timestamp() for item in self._below(folder))
            return max(times, default=0.0)

    def save_folder(self, folder: Path, target: Path) -> tuple[int, int]:
        """Write all objects of a folder into another one; return how many, and their bytes.

        What vanishes meanwhile is left out.

        Raises:
            NotReady: as `fetch`.
        """
        num_files = num_bytes = 0
        start = f"{self._key(folder)}/"
        with self._trouble():
            for item in self._below(folder):
                name = item["Key"].removeprefix(start)
                if name.endswith("/"):  # a folder, as consoles make them
                    continue
                try:
                    answer = self._s3.get_object(Bucket=self._name, Key=item["Key"])
                except ClientError as error:
                    if _status(error) == HTTPStatus.NOT_FOUND:
                        continue
                    raise
                _save(answer, target / name)
                num_files, num_bytes = num_files + 1, num_bytes + answer["ContentLength"]
        return num_files, num_bytes

    def load_folder(self, source: Path, folder: Path) -> None:
        """Put all files below a folder as the objects of another one.

        Raises:
            NotReady: as `fetch`.
        """
        with self._trouble():
            for path in source.rglob("*"):
                if path.is_file():
                    key = self._key(folder / path.relative_to(source))
                    self._s3.upload_file(str(path), self._name, key)

    def check(self) -> None:
        """Ask for a name, and wait for a few seconds at most.

        Raises:
            NotReady: as `fetch`.
        """
        start = f"{self._prefix}/" if self._prefix else ""
        with self._trouble():
            self._client(_BRIEF).list_objects_v2(Bucket=self._name, Prefix=start, MaxKeys=1)

    def try_out(self) -> None:
        """Do once all that files need: list, write, read and delete.

        Raises:
            NotReady: as `fetch`; it says what was not done.
        """
        self.check()
        s3, content = self._client(_BRIEF), secrets.token_bytes(16)
        key = self._key(self._data_dir / f".tried-{content.hex()}")
        with self._trouble():
            s3.put_object(Bucket=self._name, Key=key, Body=content)
            try:
                s3.get_object(Bucket=self._name, Key=key)["Body"].read()
            finally:
                self._delete(s3, [key])

    @property
    def _s3(self) -> Any:  # noqa: ANN401  boto3 makes its classes at run time
        return self._client(_PATIENT)

    def _client(self, patience: _Patience) -> Any:  # noqa: ANN401  as above
        with self._connecting:  # a client may be used by many threads, and made by one at a time
            if patience not in self._clients:
                config = Config(
                    connect_timeout=patience.connect_seconds,
                    read_timeout=patience.read_seconds,
                    retries={"mode": "standard", "total_max_attempts": patience.attempts},
                    s3={"addressing_style": self._addressing_style},
                )
                self._clients[patience] = boto3.client("s3", config=config, **self._options)
            return self._clients[patience]

    def _delete(self, s3: Any, keys: list[str]) -> None:  # noqa: ANN401  as above
        objects = [{"Key": key} for key in keys]
        answer = s3.delete_objects(Bucket=self._name, Delete={"Objects": objects, "Quiet": True})
        for refused in answer.get("Errors", ()):  # the status is 200 all the same
            raise ClientError({"Error": refused}, "DeleteObjects")

    def _key(self, path: Path) -> str:
        name = path.relative_to(self._data_dir).as_posix()
        return f"{self._prefix}/{name}" if self._prefix else name

    def _below(self, folder: Path) -> Iterator[dict[str, Any]]:
        pages = self._s3.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._name, Prefix=f"{self._key(folder)}/"):
            yield from page.get("Contents", ())

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
        except (ClientError, BotoCoreError, Boto3Error) as error:
            # one of an upload names the file, and has the store's as its context
            reason = error.__context__ if isinstance(error, Boto3Error) else error
            raise NotReady(
                f"The bucket {self._name} (WINNOW_ARTIFACTS) does not do what it must: "
                f"{_explained(reason or error)}",
                headers={"Retry-After": "10"},
            ) from error


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


def _explained(error: BaseException) -> str:
    """Say what went wrong and what to look at, without an address or a key."""
    if isinstance(error, ClientError):
        code = error.response["Error"].get("Code", "")
        said = f"{error.operation_name} is answered with {code}."
        if code in {"NoSuchBucket", "404"}:
            return f"{said} Make it, or correct WINNOW_ARTIFACTS."
    else:
        said = f"{type(error).__name__}."
        if not isinstance(error, (NoCredentialsError, PartialCredentialsError)):
            return f"{said} Is its store at WINNOW_S3_ENDPOINT, and can it be reached from here?"
    return (
        f"{said} Look at WINNOW_S3_ACCESS_KEY, WINNOW_S3_SECRET_KEY and WINNOW_S3_REGION, and at "
        "what the key, or this machine's role, may do there: list, read, write and delete."
    )


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
