"""Calls over HTTP: tried again where that can help, errors as the service said them."""

import ipaddress
import random
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, TypeVar

import httpx2
from pydantic import TypeAdapter, ValidationError

from winnow.errors import KeyExpiresSoon, ServiceUnreachable, WinnowError, error_of
from winnow.transport import AsyncTransport, BlockingTransport, Streamed, Transport

Outcome = TypeVar("Outcome")
Answer = TypeVar("Answer")

TRY_LATER = frozenset({429, 503})
LONGEST_WAIT_SECONDS = 60.0  # a minute's rate limit is over by then
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0

# Nothing reached the service: any call may be tried again.
_NOT_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
# The service may have acted already: only a call that may run twice is tried again.
_MAYBE_SENT = (httpx2.NetworkError, httpx2.TimeoutException, httpx2.RemoteProtocolError)


class Connection:
    """One service, as seen over HTTP.

    Args:
        base_url: where the service is.
        is_blocking: whether the calls are run without an event loop.
        api_key: sent with every call when given.
        timeout: seconds without a byte after which a try is given up.
        attempts: tries of one call, the first included.
    """

    def __init__(
        self,
        base_url: str,
        *,
        is_blocking: bool,
        api_key: str | None,
        timeout: float,
        attempts: int,
    ) -> None:
        url = httpx2.URL(base_url)
        headers = {"User-Agent": f"winnow-client/{version('winnow-client')}"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._base_url = str(url)
        self._attempts = attempts
        self._has_warned = False
        make: type[BlockingTransport | AsyncTransport]
        make = BlockingTransport if is_blocking else AsyncTransport
        self._transport: Transport = make(
            base_url=url,
            headers=headers,
            timeout=timeout,
            trust_env=not _is_loopback(url.host),  # no proxy can reach this machine's loopback
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await self._transport.sleep(seconds)

    async def ask(
        self,
        kind: type[Answer],
        method: str,
        path: str,
        **options: Any,
    ) -> Answer:
        """Make a call that may run twice and return its answer, typed."""
        return parse(kind, await self.call(method, path, **options))

    async def call(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Make a call that may run twice and return its answer; options are httpx2's own.

        Raises:
            WinnowError: the service refused.
            ServiceUnreachable: no answer came.
        """
        return await self.retry(lambda: self.send(method, path, **options))

    async def retry(
        self, action: Callable[[], Awaitable[Outcome]], *, may_run_twice: bool = True
    ) -> Outcome:
        """Return what `action` returns, tried again with growing pauses while that can help.

        Args:
            action: makes one try with `send` or `stream`.
            may_run_twice: whether to try again when an answer was lost on its way.

        Raises:
            WinnowError: the service refused.
            ServiceUnreachable: no answer came.
        """
        patience = self.patience(_NOT_SENT + _MAYBE_SENT if may_run_twice else _NOT_SENT)
        while True:
            try:
                return await action()
            except (WinnowError, httpx2.TransportError) as error:
                await patience.after(error)

    def patience(
        self, passing: tuple[type[httpx2.TransportError], ...] = _NOT_SENT + _MAYBE_SENT
    ) -> "Patience":
        """Return the pauses between the tries of one call."""
        return Patience(self, passing, num_tries=self._attempts)

    async def answer(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Return an answer of any status, after tries while there is no connection.

        Raises:
            ServiceUnreachable: no answer came.
        """
        return await self.retry(lambda: self._transport.request(method, path, **options))

    async def send(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Make one try; an answer that is neither a success nor 304 is raised as WinnowError."""
        response = await self._transport.request(method, path, **options)
        self._warn_of_expiry(response)
        if not (response.is_success or response.status_code == httpx2.codes.NOT_MODIFIED):
            raise error_of(response)
        return response

    @asynccontextmanager
    async def stream(self, path: str, **options: Any) -> AsyncGenerator[Streamed, None]:
        """Make one try of a GET whose body the caller reads piece by piece."""
        async with self._transport.stream(path, **options) as streamed:
            if not streamed.response.is_success:
                raise error_of(streamed.response)
            yield streamed

    def _warn_of_expiry(self, response: httpx2.Response) -> None:
        """Warn, once, of a key that soon ends."""
        expires_at = response.headers.get("winnow-key-expires")
        if expires_at is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"This API key ends at {expires_at}. `winnow keys rotate` at the service makes a "
                "new secret.",
                KeyExpiresSoon,
                stacklevel=2,
            )

    def unreachable(self, error: httpx2.TransportError) -> ServiceUnreachable:
        """Return the error for an answer that did not come."""
        return ServiceUnreachable(
            f"No answer from {self._base_url}",
            detail=f"{error or type(error).__name__}. Is the service running there?",
        )


class Patience:
    """Growing pauses between the tries of one call, or as long as the service asks for.

    A service that asks for more than LONGEST_WAIT_SECONDS, as for a quota of the day, is not asked
    again: its error says when to.
    """

    def __init__(
        self,
        connection: Connection,
        passing: tuple[type[httpx2.TransportError], ...],
        *,
        num_tries: int,
    ) -> None:
        self._connection = connection
        self._passing = passing
        self._num_tries = num_tries
        self.renew()

    def renew(self) -> None:
        """Start to count anew, after something came."""
        self._tries_left = self._num_tries
        self._pause = FIRST_PAUSE_SECONDS

    async def after(self, error: WinnowError | httpx2.TransportError) -> None:
        """Pause before the next try, if there is one that can help.

        Raises:
            WinnowError: the service refused.
            ServiceUnreachable: no answer came.
        """
        self._tries_left -= 1
        asked: float | None = None
        if isinstance(error, WinnowError):
            asked = error.retry_after
            is_too_long = asked is not None and asked > LONGEST_WAIT_SECONDS
            if not self._tries_left or error.status not in TRY_LATER or is_too_long:
                raise error
        elif not self._tries_left or not isinstance(error, self._passing):
            raise self._connection.unreachable(error) from error
        jitter = random.uniform(0, FIRST_PAUSE_SECONDS)  # noqa: S311  no secret
        await self._connection.sleep((asked or self._pause) + jitter)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)


def parse(kind: type[Answer], response: httpx2.Response) -> Answer:
    """Return the body as `kind`.

    Raises:
        WinnowError: it is something else; most likely the address is not a Winnow service's.
    """
    try:
        return TypeAdapter(kind).validate_json(response.content)
    except ValidationError as error:
        raise WinnowError(
            "Unexpected answer",
            detail=f"{response.request.url} did not answer as a Winnow service would "
            f"({error.error_count()} fields differ). Is the address right, and the client as new "
            "as the service?",
            status=response.status_code,
            request_id=response.headers.get("x-request-id"),
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
