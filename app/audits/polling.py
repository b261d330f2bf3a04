"""Where an audit stands, as callers ask again and again: key and audit by one statement.

`GET /v1/audits/{id}` is most of what a busy service is asked. The ordinary way takes threads,
sessions, and a validation of what we have made ourselves. This one takes none of them, but only in
the common case: a bearer token of a key without a limit, and an audit that is there. All else,
errors first, takes the ordinary way, which alone says what it means.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import orjson
import psycopg
from fastapi import Response
from psycopg.types.json import set_json_loads
from sqlalchemy import Engine, bindparam
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.audits.assemble import assemble_audit, audit_path
from app.audits.models import Audit, AuditState
from app.audits.service import retry_after
from app.conditional import entity_tag, is_unchanged
from app.db import connect_arguments
from app.keys.models import ApiKey
from app.keys.scopes import scope_of
from app.keys.service import FIND_KEY, Caller, as_caller, digest_of
from app.settings import Settings

CONNECTIONS = 8
PATIENCE_SECONDS = 5.0
_MOST_BODIES = 64
_BEARER = "Bearer "
_POLLED = re.compile(audit_path("(?P<audit_id>aud_[0-9a-f]{32})"))


_AUDIT_COLUMNS = Audit.__mapper__.columns.items()
_found = FIND_KEY.add_columns(*(column.label(f"audit_{name}") for name, column in _AUDIT_COLUMNS))
# The tenant is the key's, by the statement itself; row-level security would take a second one.
_STATEMENT = str(
    _found.join(
        Audit, (Audit.tenant == ApiKey.tenant) & (Audit.id == bindparam("audit_id"))
    ).compile(dialect=PGDialect_psycopg())  # type: ignore[no-untyped-call]
)
_OF_KEY = [column.name for column in FIND_KEY.selected_columns]
_OF_AUDIT = [name for name, _ in _AUDIT_COLUMNS]


class Polls:
    """A few connections for the polls of one process; each is opened when it is first needed."""

    def __init__(self, engine: Engine) -> None:
        self._arguments = connect_arguments(engine)
        self._places = asyncio.Semaphore(CONNECTIONS)
        self._idle: list[psycopg.AsyncConnection[Any]] = []
        self.is_open = False

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Answer polls within the block."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False
            while self._idle:
                await self._idle.pop().close()

    async def look(self, digest: bytes, audit_id: str) -> tuple[Caller, Audit] | None:
        """Return whose key it is and the audit that it opens; None if either is missing.

        What is returned in place of an audit has its columns, and no more.

        Raises:
            psycopg.Error: the database does not answer.
            TimeoutError: too many others ask.
        """
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self._places.acquire()
        try:
            connection = self._idle.pop() if self._idle else await self._connect()
            try:
                parameters = {"digest": digest, "audit_id": audit_id}
                row = await (await connection.execute(_STATEMENT, parameters)).fetchone()
            except BaseException:  # whatever it was, the connection is in the middle of something
                await connection.close()
                raise
            self._idle.append(connection)
        finally:
            self._places.release()
        if row is None:
            return None
        key = SimpleNamespace(**dict(zip(_OF_KEY, row, strict=False)))
        audit = SimpleNamespace(**dict(zip(_OF_AUDIT, row[len(_OF_KEY) :], strict=True)))
        return None if key.is_use_to_note else (as_caller(key), cast("Audit", audit))

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        connection = await psycopg.AsyncConnection.connect(**self._arguments, autocommit=True)
        set_json_loads(orjson.loads, connection)
        return connection


class QuickPolls:
    """Answers a poll with what `Polls` finds, and lets all else pass.

    An audit is polled more often than it changes: what was made of a version serves again.
    """

    def __init__(self, app: ASGIApp, polls: Polls, settings: Settings) -> None:
        self._app = app
        self._polls = polls
        self._settings = settings
        self._bodies: dict[tuple[str, int], bytes] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._answer(scope)
        await (self._app if answer is None else answer)(scope, receive, send)

    async def _answer(self, scope: Scope) -> Response | None:
        if scope["type"] != "http" or scope["method"] != "GET" or scope["query_string"]:
            return None
        polled = _POLLED.fullmatch(scope["path"])
        authorization = Headers(scope=scope).get("authorization", "")
        if polled is None or not (
            self._polls.is_open
            and authorization.startswith(_BEARER)
            and self._settings.require_keys
        ):
            return None
        try:
            found = await self._polls.look(
                digest_of(authorization.removeprefix(_BEARER)), polled["audit_id"]
            )
        except (psycopg.Error, TimeoutError):
            return None
        if found is None or not self._may_look(scope, found[0]):
            return None
        scope["route"] = _Template
        return self._said(scope, found[1])

    def _may_look(self, scope: Scope, caller: Caller) -> bool:
        limit = caller.requests_per_minute
        is_limited = self._settings.requests_per_minute if limit is None else limit
        return not (is_limited or caller.is_ending) and (
            scope_of(scope["method"], scope["path"]) in caller.scopes
        )

    def _said(self, scope: Scope, audit: Audit) -> Response:
        headers = state_headers(audit)
        if is_unchanged(Headers(scope=scope).get("if-none-match"), headers["ETag"]):
            return Response(status_code=304, headers=headers)
        return Response(self._body(audit), media_type="application/json", headers=headers)

    def _body(self, audit: Audit) -> bytes:
        version = audit.id, audit.version
        body = self._bodies.get(version)
        if body is None:
            answer = assemble_audit(audit, influence_days=self._settings.influence_days)
            body = answer.model_dump_json().encode()
            if len(self._bodies) >= _MOST_BODIES:
                self._bodies.clear()
            self._bodies[version] = body
        return body


class _Template:
    """The route that would have answered, as metrics know it."""

    path = audit_path("{audit_id}")


def state_headers(audit: Audit) -> dict[str, str]:
    """Return what an answer about an audit says in its headers: its version, when to ask again."""
    headers = {"ETag": entity_tag(str(audit.version))}
    if not AuditState(audit.state).is_final:
        headers["Retry-After"] = str(retry_after(audit))
    return headers
