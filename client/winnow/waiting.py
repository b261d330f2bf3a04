"""Wait for what runs at the service."""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

import httpx2

from winnow.connection import Connection, parse
from winnow.errors import NotDoneInTime, seconds_of
from winnow.results import Audit, Experiment, Ranking

POLL_SECONDS = 2.0

Awaited = TypeVar("Awaited", Audit, Experiment, Ranking)


async def wait_until_done(
    connection: Connection,
    kind: type[Awaited],
    path: str,
    *,
    progress: Callable[[Awaited], None] | None = None,
    poll_seconds: float | None = None,
    timeout: float | None = None,  # noqa: ASYNC109  of the service's work, not of this coroutine
) -> Awaited:
    """Return what stands at a path when it is done.

    Raises:
        NotDoneInTime: the timeout passed.
    """
    looks = changes(connection, kind, path, poll_seconds=poll_seconds, timeout=timeout)
    async with aclosing(looks):
        async for answer in looks:
            if progress is not None:
                progress(answer)
    return answer


async def changes(
    connection: Connection,
    kind: type[Awaited],
    path: str,
    *,
    poll_seconds: float | None = None,
    timeout: float | None = None,  # noqa: ASYNC109  of the whole wait
) -> AsyncGenerator[Awaited, None]:
    """Yield what stands at a path, at first and whenever it has changed, until it is done.

    Raises:
        NotDoneInTime: the timeout passed.
    """
    give_up_at = None if timeout is None else time.monotonic() + timeout
    headers: dict[str, str] = {}
    while True:
        response = await connection.call("GET", path, headers=headers)
        if response.status_code != httpx2.codes.NOT_MODIFIED:
            answer = parse(kind, response)
            headers = {"If-None-Match": response.headers.get("etag", "")}
            yield answer
            if answer.done:
                return
        asked = seconds_of(response.headers.get("retry-after"))
        pause = poll_seconds if poll_seconds is not None else asked or POLL_SECONDS
        if give_up_at is not None and time.monotonic() + pause > give_up_at:
            name = path.rpartition("/")[2]
            raise NotDoneInTime(
                "Not done in time", detail=f"{name} is still running after {timeout:g} s."
            )
        await connection.sleep(pause)
