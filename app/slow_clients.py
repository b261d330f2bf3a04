"""Connections that end where a client keeps them open with next to nothing.

uvicorn waits for a request's head, and for a reader of its answer, as long as the client likes.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import h11
import orjson
from fastapi_problem.error import Problem
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.errors import PROBLEM_MEDIA_TYPE, PROBLEM_TYPE, HeadTooSlow
from app.settings import Settings


class _Alarm:
    """Does something when too much time has passed since it was first set."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def set(self, too_late: Callable[[], None]) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, too_late)

    def clear(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with a limit on the time for a head, and for taking some of an answer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        settings: Settings = self.config.app.state.settings  # type: ignore[union-attr]  # it is ours
        self._seconds = settings.slow_client_seconds
        self._head = _Alarm(self.loop, self._seconds)
        self._reader = _Alarm(self.loop, self._seconds)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the base class has it
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._head.set(self._refuse)

    def data_received(self, data: bytes) -> None:
        """Take bytes; the time for a head does not begin anew with each."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._head.set(self._refuse)
        else:
            self._head.clear()

    def pause_writing(self) -> None:
        """Begin to wait for the client to take what was sent."""
        super().pause_writing()
        self._reader.set(self.transport.abort)

    def resume_writing(self) -> None:
        """Go on sending."""
        super().resume_writing()
        self._reader.clear()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._head.clear()
        self._reader.clear()
        super().connection_lost(exc)

    def _refuse(self) -> None:
        """Say what was waited for in vain, and hang up."""
        if self.transport.is_closing() or self.conn.our_state is not h11.IDLE:
            return
        problem: Problem = HeadTooSlow(
            f"The request's head did not come within {self._seconds:g} s "
            "(WINNOW_SLOW_CLIENT_SECONDS)."
        )
        body = orjson.dumps(problem.marshal(uri=PROBLEM_TYPE))
        headers = [
            ("Content-Type", PROBLEM_MEDIA_TYPE),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        for event in (
            h11.Response(status_code=problem.status, headers=headers, reason=b"Request Timeout"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
