"""Calls over HTTP: tried again where that can help, errors as the service said them."""

import ipaddress
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, TypeVar

import httpx2
import stamina
from pydantic import TypeAdapter, ValidationError

from winnow.errors import ServiceUnreachable, WinnowError, error_of

Outcome = TypeVar("Outcome")
Answer = TypeVar("Answer")

TRY_LATER = frozenset({429, 503})
LONGEST_WAIT_SECONDS = 30.0

# Nothing reached the service: any call may be tried again.
_NOT_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
# The service may have acted already: only a call that may run twice is tried again.
_MAYBE_SENT = (httpx2.NetworkError, httpx2.TimeoutException, httpx2.RemoteProtocolError)


class Connection:
    """One service, as seen over HTTP.

    Args:
        base_url: where the service is.
        api_key: sent with every call when given.
        timeout: seconds without a byte after which a try is given up.
        attempts: tries of one call, the first included.
    """

    def __init__(
        self, base_url: str, *, api_key: str | None, timeout: float, attempts: int
    ) -> None:
        url = httpx2.URL(base_url)
        headers = {"User-Agent": f"winnow-client/{version('winnow-client')}"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._base_url = str(url)
        self._attempts = attempts
        self._http = httpx2.Client(
            base_url=url,
            headers=headers,
            timeout=timeout,
            trust_env=not _is_loopback(url.host),  # no proxy can reach this machine's loopback
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def call(self, method: str, path: str, **options: Any) -> httpx2.Response:  # noqa: ANN401
        """Make a call that may run twice and return its answer; options are httpx2's own.

        Raises:
            WinnowError: the service refused.
            ServiceUnreachable: no answer came.
        """
        return self.retry(lambda: self.send(method, path, **options))

    def retry(self, action: Callable[[], Outcome], *, may_run_twice: bool = True) -> Outcome:
        """Return what `action` returns, tried again with growing pauses while that can help.

        Args:
            action: makes one try with `send` or `stream`.
            may_run_twice: whether to try again when an answer was lost on its way.

        Raises:
            WinnowError: the service refused.
            ServiceUnreachable: no answer came.
        """
        passing = _NOT_SENT + _MAYBE_SENT if may_run_twice else _NOT_SENT

        def pause(error: Exception) -> bool | float:
            if isinstance(error, WinnowError) and error.status in TRY_LATER:
                return min(error.retry_after or 0.0, LONGEST_WAIT_SECONDS) or True
            return isinstance(error, passing)

        try:
            for attempt in stamina.retry_context(
                on=pause, attempts=self._attempts, timeout=None, wait_initial=0.2, wait_jitter=0.2
            ):
                with attempt:
                    return action()
        except httpx2.TransportError as error:
            raise ServiceUnreachable(
                f"No answer from {self._base_url}",
                detail=f"{error or type(error).__name__}. Is the service running there?",
            ) from error
        raise AssertionError("there is at least one attempt")

    def send(self, method: str, path: str, **options: Any) -> httpx2.Response:  # noqa: ANN401
        """Make one try; an answer that is neither a success nor 304 is raised as WinnowError."""
        response = self._http.request(method, path, **options)
        if not (response.is_success or response.status_code == httpx2.codes.NOT_MODIFIED):
            raise error_of(response)
        return response

    @contextmanager
    def stream(self, path: str) -> Iterator[httpx2.Response]:
        """Make one try of a GET whose body the caller reads piece by piece."""
        headers = {"Accept-Encoding": "identity"}  # the checksum is of the file as it is
        with self._http.stream("GET", path, headers=headers) as response:
            if not response.is_success:
                response.read()
                raise error_of(response)
            yield response


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
