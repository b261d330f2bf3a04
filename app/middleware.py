"""What every request passes: an id, a log line, a limit on the body."""

import asyncio
import ipaddress
import time
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.db import new_id
from app.errors import BodyTooLarge, BodyTooSlow, NotPermitted, problem_response
from app.settings import Settings

ANSWER_HEADERS = "answer_headers"  # of the request's state: what every answer to it carries
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
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
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
                    *state.get(ANSWER_HEADERS, ()),
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
    """Refuse bodies over the limit, by their declared and by their real length, and slow ones."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"].rstrip("/") == "/v1/datasets"
        name = "max_upload_bytes" if is_upload else "max_body_bytes"
        too_large = BodyTooLarge(getattr(self._settings, name), f"WINNOW_{name.upper()}")
        limit: int = getattr(self._settings, name)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        is_declared_too_large = declared.isdigit() and int(declared) > limit
        body = _Body(receive, self._settings)

        async def limited_receive() -> Message:
            if is_declared_too_large:
                raise too_large
            message = await body.receive()
            if body.num_bytes > limit:
                raise too_large
            return message

        await self._app(scope, limited_receive, send)


class _Body:
    """A body as it comes; a client that stops or trickles is not waited for without end.

    Only the time that was spent waiting counts, not what the server does with the parts.
    """

    def __init__(self, receive: Receive, settings: Settings) -> None:
        self._receive = receive
        self._seconds = settings.slow_client_seconds
        self._rate = settings.min_body_rate
        self._waited = 0.0
        self._is_whole = False
        self.num_bytes = 0

    async def receive(self) -> Message:
        if self._is_whole:  # what comes next is the client's going away
            return await self._receive()
        allowed = self._seconds + self.num_bytes / self._rate - self._waited
        began = time.perf_counter()
        try:
            async with asyncio.timeout(min(self._seconds, max(allowed, 0))):
                message = dict(await self._receive())
        except TimeoutError as error:
            raise BodyTooSlow(self._seconds, self._rate) from error
        self._waited += time.perf_counter() - began
        self.num_bytes += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        return message


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
