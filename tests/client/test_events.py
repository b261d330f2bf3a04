"""Events of an audit: as the service sends them, resumed, or by polling."""

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Engine
from starlette.responses import Response, StreamingResponse
from winnow import Client, Done, ServiceUnreachable, WinnowError
from winnow.results import Progress

from app.audits.models import AuditState
from app.db import transaction
from app.settings import Settings
from app.work.states import finish
from tests.client.answers import audit, problem
from tests.client.conftest import ScriptedService
from tests.factories import make_audit, make_ended_audit, make_finished_audit


def stream(*pieces: bytes) -> Response:
    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return StreamingResponse(body(), media_type="text/event-stream")


def event(version: int, *, progress: float = 0.5, done: bool = False) -> bytes:
    """Return an event with a comment before it, both kinds of line ends and data on two lines."""
    name, links = ("done", ', "links": {}') if done else ("progress", "")
    return (
        f": ping\n\nevent: {name}\r\nid: {version}\r\n"
        'data: {"id": "aud_1", "state": "computing",\n'
        f'data: "done": {str(done).lower()}, "progress": {progress}, "version": {version}{links}}}'
        "\n\n"
    ).encode()


def test_events_come_from_the_service(client: Client, engine: Engine, settings: Settings) -> None:
    ended = make_finished_audit(engine, settings)
    (last,) = client.events(ended.id)
    assert isinstance(last, Done)
    assert (last.state, last.progress) == ("succeeded", 1.0)
    assert "suspects" in last.links


def test_an_audit_that_ends_meanwhile_ends_the_events(client: Client, engine: Engine) -> None:
    running = make_audit(engine)
    events = client.events(running.id)
    first = next(events)
    assert (first.state, first.done) == ("queued", False)
    with transaction(engine) as session:
        finish(session.merge(running), AuditState.CANCELLED)
    (last,) = events
    assert isinstance(last, Done)
    assert last.state == "cancelled"


def test_an_unknown_audit_is_said_to_be_none(client: Client) -> None:
    with pytest.raises(WinnowError, match="There is no audit"):
        list(client.events("aud_none"))


def test_pieces_need_not_end_where_lines_do(service: ScriptedService) -> None:
    whole = event(1, progress=0.25) + event(2, done=True)
    service.answers(stream(*(whole[place : place + 7] for place in range(0, len(whole), 7))))
    with Client(service.url) as client:
        seen = list(client.events("aud_1"))
    assert [(type(now), now.progress, now.version) for now in seen] == [
        (Progress, 0.25, 1),
        (Done, 0.5, 2),
    ]


def test_a_broken_stream_goes_on_behind_the_last_event(service: ScriptedService) -> None:
    service.answers(
        stream(event(1), event(2), b"event: progress\nid: 3\nda"),
        problem(503, retry_after="0"),
        stream(event(3, done=True)),
    )
    with Client(service.url) as client:
        assert [now.version for now in client.events("aud_1")] == [1, 2, 3]
    known = [request.headers.get("last-event-id") for request in service.requests]
    assert known == [None, "2", "2"]


def test_a_stream_that_brings_nothing_is_given_up(service: ScriptedService) -> None:
    service.answers(stream())
    with Client(service.url, attempts=2) as client, pytest.raises(ServiceUnreachable):
        list(client.events("aud_1"))
    assert len(service.requests) == 2


def test_a_service_without_events_is_polled(service: ScriptedService) -> None:
    service.answers(
        problem(404),
        audit(progress=0.5, retry_after="0.01"),
        audit(etag='"2"', state="failed", done=True),
    )
    with Client(service.url) as client:
        seen = list(client.events("aud_1"))
    assert [(now.state, now.progress, now.done) for now in seen] == [
        ("queued", 0.5, False),
        ("failed", 0.0, True),
    ]


def test_a_failed_audit_is_done_too(client: Client, engine: Engine) -> None:
    failed = make_ended_audit(engine, AuditState.FAILED, message="Use another model.")
    assert [now.state for now in client.events(failed.id)] == ["failed"]
