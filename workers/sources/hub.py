"""The Hugging Face hub, at one endpoint: pin a revision, list files, download some of them."""

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.request import getproxies

import httpx2
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._http import default_client_factory, hf_request_event_hook
from pydantic.networks import IPvAnyNetwork

from app.references import HubDatasetReference, HubModelReference
from workers.sources.errors import SourceError, SourceField
from workers.sources.guarded import AddressRefused, GuardedTransport

RepositoryType = Literal["model", "dataset"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_FIRST_SERVER_ERROR = 500
_TOO_MANY_REQUESTS = 429


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository; `path` is relative, with slashes."""

    path: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Hub:
    """Where hf:// references are resolved.

    The endpoint is an argument everywhere; HF_ENDPOINT and a token that lies on the machine are
    never looked at.

    Attributes:
        networks: that the hub may send on to although they are not public.
    """

    endpoint: str
    cache_dir: Path
    token: str | None = field(default=None, repr=False)
    networks: Sequence[IPvAnyNetwork] = ()

    @property
    def _api(self) -> HfApi:
        _guard(self.endpoint, tuple(self.networks))
        return HfApi(
            endpoint=self.endpoint.rstrip("/"),
            token=self.token or False,
            library_name="winnow",
        )

    def commit(
        self, reference: HubModelReference | HubDatasetReference, *, field: SourceField
    ) -> str:
        """Return the commit that the reference means now; a full commit is returned unasked.

        Raises:
            SourceError: not_found, not_permitted, hub_unreachable or hub_error.
        """
        if _COMMIT.fullmatch(reference.revision):
            return reference.revision
        with _hub_errors(reference, field=field):
            info = self._api.repo_info(
                reference.repo, repo_type=_type_of(reference), revision=reference.revision
            )
        if not info.sha or not _COMMIT.fullmatch(info.sha):
            raise SourceError(
                f"{reference}: the hub named no commit for this revision",
                code="hub_error",
                field=field,
            )
        return str(info.sha)

    def files(
        self,
        reference: HubModelReference | HubDatasetReference,
        *,
        commit: str,
        recursive: bool,
        field: SourceField,
    ) -> list[HubFile]:
        """Return the repository's files at a commit, the top folder's alone or all.

        Raises:
            SourceError: as `commit`.
        """
        with _hub_errors(reference, field=field):
            entries = list(
                self._api.list_repo_tree(
                    reference.repo,
                    repo_type=_type_of(reference),
                    revision=commit,
                    recursive=recursive,
                )
            )
        return [
            HubFile(path=entry.path, num_bytes=entry.size)
            for entry in entries
            if isinstance(entry, RepoFile)
        ]

    def download(
        self,
        reference: HubModelReference | HubDatasetReference,
        *,
        commit: str,
        paths: Sequence[str],
        field: SourceField,
    ) -> dict[str, Path]:
        """Return where the asked files of a commit lie in the cache, downloading what is not there.

        Raises:
            SourceError: as `commit`.
        """
        with _hub_errors(reference, field=field):
            return {
                path: Path(
                    self._api.hf_hub_download(
                        reference.repo,
                        path,
                        repo_type=_type_of(reference),
                        revision=commit,
                        cache_dir=self.cache_dir,
                    )
                )
                for path in paths
            }


_guarded: ContextVar[tuple[str, tuple[IPvAnyNetwork, ...]] | None] = ContextVar(
    "guarded", default=None
)


def _guard(endpoint: str, networks: tuple[IPvAnyNetwork, ...]) -> None:
    """Let the hub's client call its endpoint, and where it sends on only what is public.

    The library has one client in a process. Where the operator's environment names a proxy, the
    proxy looks names up, and its rules count.
    """
    if _guarded.get() == (endpoint, networks):
        return
    url = httpx2.URL(endpoint)
    port = url.port or {"http": 80, "https": 443}.get(url.scheme, 0)
    trusted = frozenset({(url.host, port)})
    # it speaks to its storage through a library of its own, where no address can be checked
    constants.HF_HUB_DISABLE_XET = True

    def make() -> httpx2.Client:
        if getproxies().keys() & {"http", "https", "all"}:
            default: httpx2.Client = default_client_factory()
            return default
        return httpx2.Client(
            transport=GuardedTransport(networks=networks, trusted=trusted, trust_env=True),
            event_hooks={"request": [hf_request_event_hook]},
            follow_redirects=True,
            timeout=None,  # the library says its own at every call
        )

    set_client_factory(make)
    _guarded.set((endpoint, networks))


def _type_of(reference: HubModelReference | HubDatasetReference) -> RepositoryType:
    return "model" if isinstance(reference, HubModelReference) else "dataset"


@contextmanager
def _hub_errors(
    reference: HubModelReference | HubDatasetReference, *, field: SourceField
) -> Iterator[None]:
    """Turn what the hub's client raises into sentences for the person who sent the reference."""
    try:
        yield
    except AddressRefused as error:
        raise _not_public(reference, error, field=field) from error
    except GatedRepoError as error:
        raise SourceError(
            f"{reference}: the repository is gated; accept its terms on the hub and give the "
            "server a token that may read it (WINNOW_HUB_TOKEN)",
            code="not_permitted",
            field=field,
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{reference}: there is no such {_type_of(reference)} repository, or this server's "
            "token may not read it; check owner and name",
            code="not_found",
            field=field,
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(
            f"{reference}: the repository has no branch, tag or commit {reference.revision!r}",
            code="not_found",
            field=field,
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise SourceError(
            f"{reference}: the hub answered with status {status}",
            code="hub_error",
            field=field,
            transient=status >= _FIRST_SERVER_ERROR or status == _TOO_MANY_REQUESTS,
        ) from error
    except (httpx2.TransportError, LocalEntryNotFoundError) as error:
        if isinstance(error.__cause__, AddressRefused):
            raise _not_public(reference, error.__cause__, field=field) from error
        raise SourceError(
            f"{reference}: the hub could not be reached; try again later",
            code="hub_unreachable",
            field=field,
            transient=True,
        ) from error
    except (OSError, RevisionResolutionError, XetDownloadError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # the operator's matter, not the reference's
        raise SourceError(
            f"{reference}: the download failed: {error}",
            code="hub_error",
            field=field,
            transient=True,
        ) from error


def _not_public(
    reference: HubModelReference | HubDatasetReference,
    error: AddressRefused,
    *,
    field: SourceField,
) -> SourceError:
    return SourceError(
        f"{reference}: the hub sends on to another server: {error}",
        code="not_permitted",
        field=field,
    )
