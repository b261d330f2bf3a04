"""What every request passes: an id, a log line, a limit on the body."""

import ipaddress
import time
from typing import Any
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.db import new_id
from app.errors import BodyTooLarge, NotPermitted, problem_response
from app.settings import Settings

QUIET_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})

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
        answered: float | None = None
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status = int(message["status"])
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                answered = time.perf_counter()  # background work may go on behind the answer

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                if scope["path"] not in QUIET_PATHS:
                    ended = answered or time.perf_counter()
                    log.info(
                        "request",
                        method=scope["method"],
                        path=scope["path"],
                        status=status,
                        milliseconds=round(1000 * (ended - started), 1),
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


class LoopbackOnly:
    """Refuse what a web page could send to a server that asks for no keys.

    A page whose name was rebound to 127.0.0.1 comes with its own name as Host; a page of another
    site comes with its own Origin.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if not is_loopback_host(_hostname(f"//{headers.get('host', '')}")) or (
                origin is not None and not is_loopback_host(_hostname(origin))
            ):
                problem = NotPermitted(
                    "This server asks for no API keys, so it answers only calls to localhost or "
                    "127.0.0.1 that no other web site made."
                )
                await problem_response(problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_loopback_host(host: str | None) -> bool:
    """Return whether a host name or address stands for this machine alone."""
    if host is None:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # brackets that hold no address
        return None
