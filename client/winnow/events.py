"""Server-sent events of an audit, resumed after the last one that came."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import httpx2

from winnow.connection import Connection
from winnow.errors import WinnowError
from winnow.results import Audit, Done, Progress
from winnow.waiting import changes

KINDS: dict[str, type[Progress]] = {"progress": Progress, "done": Done}


@dataclass(frozen=True)
class Message:
    """One server-sent event."""

    event: str
    data: str
    id: str | None


class _NoEvents(Exception):
    """The service sends no events, or none any more: the audit itself tells where it stands."""


async def follow(connection: Connection, audit_path: str) -> AsyncGenerator[Progress, None]:
    """Yield where an audit stands, whenever it changes; Done is the last.

    Raises:
        WinnowError: the service refused.
        ServiceUnreachable: the connection keeps breaking.
    """
    headers = {"Accept": "text/event-stream"}
    patience = connection.patience()
    while True:
        try:
            async with aclosing(_listen(connection, audit_path, headers)) as events:
                async for event in events:
                    patience.renew()
                    yield event
                    if event.done:
                        return
            raise httpx2.RemoteProtocolError("The events ended before the audit did")
        except _NoEvents:
            break
        except (WinnowError, httpx2.TransportError) as error:
            await patience.after(error)
    async with aclosing(changes(connection, Audit, audit_path)) as audits:
        async for audit in audits:
            yield (Done if audit.done else Progress).model_validate(audit.model_dump())


async def _listen(
    connection: Connection, audit_path: str, headers: dict[str, str]
) -> AsyncGenerator[Progress, None]:
    """Yield the events of one connection; the headers remember which was the last."""
    try:
        async with (
            connection.stream(f"{audit_path}/events", headers=headers) as streamed,
            aclosing(read_messages(streamed.pieces)) as messages,
        ):
            if streamed.response.status_code == httpx2.codes.NO_CONTENT:
                raise _NoEvents
            async for message in messages:
                if message.id is not None:
                    headers["Last-Event-ID"] = message.id
                if message.event in KINDS:
                    yield KINDS[message.event].model_validate_json(message.data)
    except WinnowError as error:
        if error.status == httpx2.codes.NOT_FOUND:
            raise _NoEvents from error
        raise


async def read_messages(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[Message, None]:
    """Yield the events of a stream (HTML Living Standard, section 9.2)."""
    fields: dict[str, list[str]] = {}
    last_id: str | None = None
    async with aclosing(_lines(pieces)) as lines:
        async for line in lines:
            if line:
                name, _, value = line.partition(":")
                fields.setdefault(name, []).append(value.removeprefix(" "))
                continue
            last_id = fields.get("id", [last_id])[-1]
            if "data" in fields:
                event = fields.get("event", ["message"])[-1]
                yield Message(event=event, data="\n".join(fields["data"]), id=last_id)
            fields = {}


async def _lines(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[str, None]:
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode("utf-8", "replace")
