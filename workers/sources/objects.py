"""Datasets and models in an S3 store: the operator's endpoint, credentials and buckets alone."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from app.references import InvalidReference, ObjectReference, check_object
from workers.sources.errors import SourceError, SourceErrorCode, SourceField
from workers.sources.fetched import keep_dataset
from workers.sources.local import ResolvedDataset

_CHUNK_BYTES = 1024**2
_MAX_NAMES = 10_000
_CONNECT_SECONDS = 10
_READ_SECONDS = 30


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An object below a folder; `etag` is what it was when it was listed."""

    name: str
    key: str
    etag: str


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """Where s3:// references lead; nothing of it can be said by a caller.

    Attributes:
        roots: buckets, or bucket/folder, that references may name.
        endpoint: of the store; None for Amazon's.
        access_key: None leaves it to what boto3 finds in the operator's environment.
    """

    roots: Sequence[str] = ()
    endpoint: str | None = None
    region: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)

    def fetch(
        self, reference: ObjectReference, *, cache_dir: Path, max_bytes: int
    ) -> ResolvedDataset:
        """Download a table file and return where it lies; its revision is its SHA-256.

        Raises:
            SourceError: invalid_reference, not_permitted, not_found, too_large,
                unsupported_dataset, source_error or source_unreachable.
        """
        with _store_errors(reference, field="dataset"):
            check_object(reference, self.roots)
            answer = self._client().get_object(Bucket=reference.bucket, Key=reference.key)
            with closing(answer["Body"]) as body:
                return keep_dataset(
                    body.iter_chunks(_CHUNK_BYTES),
                    source=str(reference),
                    name=reference.name,
                    cache_dir=cache_dir,
                    max_bytes=max_bytes,
                )

    def files(self, reference: ObjectReference, *, field: SourceField) -> list[StoredFile]:
        """Return the objects of a folder, without those of folders in it.

        Raises:
            SourceError: as `fetch`.
        """
        prefix = f"{reference.key}/"
        found: list[StoredFile] = []
        with _store_errors(reference, field=field):
            check_object(reference, self.roots)
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=reference.bucket, Prefix=prefix, Delimiter="/"):
                found += [
                    StoredFile(item["Key"].removeprefix(prefix), item["Key"], item["ETag"])
                    for item in page.get("Contents", ())
                ]
                if len(found) > _MAX_NAMES:
                    raise SourceError(
                        f"{reference} holds more than {_MAX_NAMES:,} objects; name the model's own "
                        "folder",
                        code="too_large",
                        field=field,
                    )
        return found

    def download(
        self,
        reference: ObjectReference,
        files: Sequence[StoredFile],
        folder: Path,
        *,
        field: SourceField,
    ) -> None:
        """Write objects into a folder, as they were when they were listed.

        Raises:
            SourceError: as `fetch`; one that was exchanged meanwhile is a source_error.
        """
        client = self._client()
        for file in files:
            with _store_errors(reference, field=field):
                answer = client.get_object(Bucket=reference.bucket, Key=file.key, IfMatch=file.etag)
                with closing(answer["Body"]) as body, (folder / file.name).open("xb") as target:
                    for chunk in body.iter_chunks(_CHUNK_BYTES):
                        target.write(chunk)

    def _client(self) -> Any:  # noqa: ANN401  boto3 makes its classes at run time
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(
                connect_timeout=_CONNECT_SECONDS,
                read_timeout=_READ_SECONDS,
                retries={"mode": "standard", "total_max_attempts": 3},
                # one's own store has no names for its buckets
                s3={"addressing_style": "path" if self.endpoint else "auto"},
            ),
        )


NO_STORE = ObjectStore()
"""The store of a server that reads none."""


@contextmanager
def _store_errors(reference: ObjectReference, *, field: SourceField) -> Iterator[None]:
    """Turn what the store's client raises into sentences for the person who sent the reference."""

    def refusal(message: str, code: SourceErrorCode, *, transient: bool = False) -> SourceError:
        return SourceError(f"{reference}: {message}", code=code, field=field, transient=transient)

    try:
        yield
    except InvalidReference as error:
        raise SourceError(str(error), code="invalid_reference", field=field) from error
    except NoCredentialsError as error:
        raise refusal(
            "this server has no credentials for the store; its operator gives them with "
            "WINNOW_S3_ACCESS_KEY and WINNOW_S3_SECRET_KEY",
            "not_permitted",
        ) from error
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status == HTTPStatus.NOT_FOUND:
            raise refusal("there is no such bucket or object", "not_found") from error
        if status in {HTTPStatus.FORBIDDEN, HTTPStatus.UNAUTHORIZED}:
            raise refusal(
                "the store lets this server not read it; check bucket and key, or ask the operator",
                "not_permitted",
            ) from error
        if status == HTTPStatus.PRECONDITION_FAILED:
            raise refusal(
                "an object was exchanged while the folder was read", "source_error", transient=True
            ) from error
        raise refusal(
            f"the store answered with status {status}",
            "source_error",
            transient=status >= HTTPStatus.INTERNAL_SERVER_ERROR
            or status == HTTPStatus.TOO_MANY_REQUESTS,
        ) from error
    except BotoCoreError as error:
        raise refusal(
            f"the store could not be reached: {error}", "source_unreachable", transient=True
        ) from error
