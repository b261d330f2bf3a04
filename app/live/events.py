"""Server-sent events: progress while a thing runs, `done` when it has ended."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request, Response
from fastapi.sse import ServerSentEvent

from app.live.answers import Done, Progress
from app.live.snapshots import Thing
from app.live.watcher import Watcher

LastEventId = Annotated[
    str | None,
    Header(max_length=100, description="The last id that the caller has seen, to go on from it."),
]

EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "An event `progress` now and at every change, with the version as its id "
        "and Progress as its data; at the end one event `done`, with Done. Comments keep the "
        "connection alive.",
        "content": {"text/event-stream": {}},
    },
    204: {"description": "It has ended, and the caller has seen `done`: nothing more will come."},
}


class NothingMore(Exception):
    """The caller has seen the last event; a browser stops asking when it is answered 204."""


def check_for_more(last_event_id: str | None, *, version: int, is_final: bool) -> None:
    """Check that there is, or will be, something to tell.

    Raises:
        NothingMore: there never will be.
    """
    if is_final and last_event_id == str(version):
        raise NothingMore


def install_end_of_streams(api: FastAPI) -> None:
    """Answer 204 where nothing more will come."""

    def no_content(_request: Request, _error: Exception) -> Response:
        return Response(status_code=HTTPStatus.NO_CONTENT)

    api.add_exception_handler(NothingMore, no_content)


async def events_of(
    watcher: Watcher, thing: Thing, last_event_id: str | None
) -> AsyncIterator[Any]:
    """Yield what a thing becomes, from behind the last event that the caller has seen.

    They are ServerSentEvents; routes say that they yield the data, which OpenAPI then describes.
    """
    async with aclosing(watcher.snapshots(thing)) as snapshots:
        async for snapshot in snapshots:
            if str(snapshot.version) == last_event_id:
                continue
            if snapshot.is_final:
                yield _event("done", Done(**dict(snapshot.progress), links=snapshot.links))
                return
            yield _event("progress", snapshot.progress)


def _event(name: str, data: Progress) -> ServerSentEvent:
    return ServerSentEvent(event=name, id=str(data.version), data=data)
