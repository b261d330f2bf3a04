"""Datasets behind https:// addresses: fetched once, whole, from public addresses only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import httpx2
from pydantic.networks import IPvAnyNetwork

from app.references import WebReference
from workers.sources.errors import SourceError, SourceErrorCode
from workers.sources.fetched import keep_dataset
from workers.sources.guarded import AddressRefused, PlainHttpRefused, guarded_client
from workers.sources.local import ResolvedDataset

_CHUNK_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class Web:
    """Where https:// references lead.

    Attributes:
        is_allowed: whether this server takes such references at all.
        networks: that may be called although they are not public.
        ca_file: certificates in place of the public ones.
    """

    is_allowed: bool = False
    networks: Sequence[IPvAnyNetwork] = ()
    ca_file: Path | None = None

    def fetch(self, reference: WebReference, *, cache_dir: Path, max_bytes: int) -> ResolvedDataset:
        """Download a table file and return where it lies; its revision is its SHA-256.

        Raises:
            SourceError: not_permitted, not_found, too_large, unsupported_dataset, source_error or
                source_unreachable.
        """
        if not self.is_allowed:
            raise _refusal(
                f"{reference}: this server fetches nothing from https:// addresses; its operator "
                "allows them with WINNOW_HTTPS_DATASETS",
                "not_permitted",
            )
        with (
            _web_errors(reference),
            guarded_client(networks=self.networks, ca_file=self.ca_file) as client,
            # nothing that unfolds: what is counted is what is kept
            client.stream("GET", reference.url, headers={"Accept-Encoding": "identity"}) as answer,
        ):
            _check_answer(reference, answer)
            return keep_dataset(
                answer.iter_raw(_CHUNK_BYTES),
                source=str(reference),
                name=reference.name,
                cache_dir=cache_dir,
                max_bytes=max_bytes,
            )


NO_WEB = Web()
"""The web of a server that fetches nothing."""


def _check_answer(reference: WebReference, answer: httpx2.Response) -> None:
    status = answer.status_code
    if status != HTTPStatus.OK:
        is_missing = status in {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}
        is_forbidden = status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
        raise _refusal(
            f"{reference}: the server answered with status {status}",
            "not_found" if is_missing else "not_permitted" if is_forbidden else "source_error",
            transient=status >= HTTPStatus.INTERNAL_SERVER_ERROR
            or status == HTTPStatus.TOO_MANY_REQUESTS,
        )
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise _refusal(
            f"{reference}: the server sends it compressed although that was not asked for; name "
            "the file itself",
            "unsupported_dataset",
        )


@contextmanager
def _web_errors(reference: WebReference) -> Iterator[None]:
    """Turn what goes wrong on the way into sentences for the person who sent the reference."""
    try:
        yield
    except (AddressRefused, PlainHttpRefused) as error:
        raise _refusal(f"{reference}: {error}", "not_permitted") from error
    except httpx2.TooManyRedirects as error:
        raise _refusal(f"{reference}: too many redirects", "source_error") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise _refusal(
            f"{reference}: it could not be fetched: {error or type(error).__name__}",
            "source_unreachable",
            transient=True,
        ) from error


def _refusal(message: str, code: SourceErrorCode, *, transient: bool = False) -> SourceError:
    return SourceError(message, code=code, field="dataset", transient=transient)
