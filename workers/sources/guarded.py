"""HTTP to addresses that are not the operator's: looked up once, checked, and called by number.

Every connection passes here, those of redirects too. The address that was checked is the one that
is called, so a name server that answers otherwise the next time changes nothing; certificates are
still the name's.
"""

import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from ssl import SSLContext, create_default_context
from typing import Any

import httpcore2
import httpx2
from pydantic.networks import IPvAnyNetwork

from app.outbound import are_allowed, outbound_policy

_CONNECT_SECONDS = 10.0
_READ_SECONDS = 30.0
_MAX_REDIRECTS = 5


class AddressRefused(Exception):
    """A name stands for an address that is not called."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"{host} is not at a public address, and only those are called; the operator can "
            "allow networks by WINNOW_FETCH_NETWORKS"
        )


class PlainHttpRefused(Exception):
    """A redirect leads to an address without encryption."""

    def __init__(self, host: str) -> None:
        super().__init__(f"it leads on to http://{host}/, without encryption; only https is called")


class GuardedTransport(httpx2.HTTPTransport):
    """Connects to public addresses, to allowed networks, and to hosts that the operator named."""

    def __init__(
        self,
        *,
        networks: Sequence[IPvAnyNetwork] = (),
        trusted: frozenset[tuple[str, int]] = frozenset(),
        verify: SSLContext | bool = True,
        trust_env: bool = False,
    ) -> None:
        super().__init__(verify=verify, trust_env=trust_env)
        # the library has no public way to say how connections are made; tests/hostile watches it
        pool: Any = self._pool
        pool._network_backend = _GuardedBackend(networks=networks, trusted=trusted)  # noqa: SLF001


class _GuardedBackend(httpcore2.SyncBackend):
    def __init__(
        self, *, networks: Sequence[IPvAnyNetwork], trusted: frozenset[tuple[str, int]]
    ) -> None:
        self._policy = outbound_policy(networks)
        self._trusted = trusted

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = [host] if (host, port) in self._trusted else self._look_up(host, port)
        failure: Exception | None = None
        for address in addresses:
            try:
                return super().connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure or httpcore2.ConnectError(f"{host} has no address")

    def _look_up(self, host: str, port: int) -> list[str]:
        try:
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(str(error)) from error
        addresses = list(dict.fromkeys(str(place[4][0]) for place in found))
        if not are_allowed(self._policy, addresses):
            raise AddressRefused(host)
        return addresses


class _NoPlainHttp(httpx2.BaseTransport):
    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        raise PlainHttpRefused(request.url.host)


def guarded_client(
    *, networks: Sequence[IPvAnyNetwork] = (), ca_file: Path | None = None
) -> httpx2.Client:
    """Return a client that speaks https alone and follows a few redirects, each of them checked.

    Proxies of the environment are not asked: they would look names up again.
    """
    verify = True if ca_file is None else create_default_context(cafile=ca_file)
    return httpx2.Client(
        transport=GuardedTransport(networks=networks, verify=verify),
        mounts={"http://": _NoPlainHttp()},
        trust_env=False,
        follow_redirects=True,
        max_redirects=_MAX_REDIRECTS,
        timeout=httpx2.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
    )
