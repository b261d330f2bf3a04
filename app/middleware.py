"""What every request passes: an id, a log line, a limit on the body."""

import time
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.db import new_id
from app.errors import BodyTooLarge
from app.settings import Settings

QUIET_PATHS = frozenset({"/healthz", "/readyz"})

log = structlog.get_logger()


class RequestContext:
    """Give each request an id, bind it to the logs, and write one line when it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                if scope["path"] not in QUIET_PATHS:
                    log.info(
                        "request",
                        method=scope["method"],
                        path=scope["path"],
                        status=status,
                        milliseconds=round(1000 * (time.perf_counter() - started), 1),
                    )


class BodyLimit:
    """Refuse bodies over the limit, by their declared and by their real length."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"].rstrip("/") == "/v1/datasets"
        limit = self._settings.max_upload_bytes if is_upload else self._settings.max_body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        is_declared_too_large = declared.isdigit() and int(declared) > limit
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            if is_declared_too_large:
                raise BodyTooLarge(limit)
            message: dict[str, Any] = dict(await receive())
            received += len(message.get("body", b""))
            if received > limit:
                raise BodyTooLarge(limit)
            return message

        await self._app(scope, limited_receive, send)
