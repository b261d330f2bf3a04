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
            async with (
                connection.stream(f"{audit_path}/events", headers=headers) as streamed,
                aclosing(read_messages(streamed.pieces)) as messages,
            ):
                async for message in messages:
                    patience.renew()
                    if message.id is not None:
                        headers["Last-Event-ID"] = message.id
                    kind = KINDS.get(message.event)
                    if kind is not None:
                        yield kind.model_validate_json(message.data)
                    if kind is Done:
                        return
            raise httpx2.RemoteProtocolError("The events ended before the audit did")
        except WinnowError as error:
            if error.status == httpx2.codes.NOT_FOUND:
                break
            await patience.after(error)
        except httpx2.TransportError as error:
            await patience.after(error)
    async with aclosing(changes(connection, Audit, audit_path)) as audits:
        async for audit in audits:
            yield (Done if audit.done else Progress).model_validate(audit.model_dump())


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
