"""One way to write a call for two kinds of clients: with blocking HTTP, and with async.

Every call of the client is written once, as a coroutine over a Transport. AsyncClient awaits it.
Client gives it a transport that does everything at once and never suspends, so that `run` ends it
with a single step and needs no event loop.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import httpx2

Parameters = ParamSpec("Parameters")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Streamed:
    """An answer whose body is read piece by piece; `content` is there when it was refused."""

    response: httpx2.Response
    pieces: AsyncGenerator[bytes, None]


class Transport(Protocol):
    """What the calls need of HTTP and of time."""

    async def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Make one request; options are httpx2's own."""
        ...

    def stream(self, path: str, **options: Any) -> AbstractAsyncContextManager[Streamed]:
        """Make one GET; the body of an answer that is no success is read already."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class AsyncTransport:
    """HTTP under an event loop."""

    def __init__(self, **options: Any) -> None:
        self._http = httpx2.AsyncClient(**options)

    async def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        return await self._http.request(method, path, **options)

    @asynccontextmanager
    async def stream(self, path: str, **options: Any) -> AsyncGenerator[Streamed, None]:
        async with self._http.stream("GET", path, **options) as response:
            if not response.is_success:
                await response.aread()

            async def pieces() -> AsyncGenerator[bytes, None]:
                async for piece in response.aiter_bytes():
                    yield piece

            yield Streamed(response, pieces())

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self._http.aclose()


class BlockingTransport:
    """HTTP without an event loop: coroutines that never suspend."""

    def __init__(self, **options: Any) -> None:
        self._http = httpx2.Client(**options)

    async def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        return self._http.request(method, path, **options)

    @asynccontextmanager
    async def stream(self, path: str, **options: Any) -> AsyncGenerator[Streamed, None]:
        with self._http.stream("GET", path, **options) as response:
            if not response.is_success:
                response.read()

            async def pieces() -> AsyncGenerator[bytes, None]:
                for piece in response.iter_bytes():
                    yield piece

            yield Streamed(response, pieces())

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  it runs in no event loop

    async def close(self) -> None:
        self._http.close()


class HasCalls(Protocol):
    """A blocking client: it has an asynchronous one over a BlockingTransport."""

    @property
    def calls(self) -> Any:  # noqa: ANN401  of no public type
        """The asynchronous client."""
        ...


def run(steps: Coroutine[Any, Any, Outcome]) -> Outcome:
    """Return the outcome of a coroutine over a BlockingTransport."""
    try:
        steps.send(None)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome
    raise AssertionError("a blocking transport never suspends")


def blocking(
    call: Callable[Concatenate[Any, Parameters], Coroutine[Any, Any, Outcome]],
) -> Callable[Concatenate[HasCalls, Parameters], Outcome]:
    """Return an asynchronous client's method as one of a blocking client."""

    @wraps(call)
    def method(
        self: HasCalls, /, *arguments: Parameters.args, **options: Parameters.kwargs
    ) -> Outcome:
        return run(call(self.calls, *arguments, **options))

    return method


def iterating(
    call: Callable[Concatenate[Any, Parameters], AsyncGenerator[Outcome, None]],
) -> Callable[Concatenate[HasCalls, Parameters], Iterator[Outcome]]:
    """Return an asynchronous iterator's method as one of a blocking client."""

    @wraps(call)
    def method(
        self: HasCalls, /, *arguments: Parameters.args, **options: Parameters.kwargs
    ) -> Iterator[Outcome]:
        items = call(self.calls, *arguments, **options)
        try:
            while True:
                try:
                    item = run(items.__anext__())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            run(items.aclose())

    return method
