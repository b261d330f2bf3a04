"""How many requests this process answered, and how fast, by the route's template."""

import time
from http import HTTPStatus

from prometheus_client import CollectorRegistry, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestCounts:
    """Counts and times; the number of series is bounded whatever callers send."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "winnow_http_request_seconds",
            "From a request's arrival to the end of its answer, in this process.",
            labelnames=("route", "method", "status"),
            buckets=BUCKETS,
            registry=registry,
        )

    def observe(self, *, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request."""
        known = method if method in METHODS else "other"
        self._seconds.labels(route, known, str(status)).observe(seconds)


class RequestMetrics:
    """Times every request; the outermost middleware, so that refusals count too."""

    def __init__(self, app: ASGIApp, counts: RequestCounts) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        ended: float | None = None
        status = int(HTTPStatus.INTERNAL_SERVER_ERROR)

        async def watched_send(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                ended = time.perf_counter()  # background work may go on behind the answer

        try:
            await self._app(scope, receive, watched_send)
        finally:
            self._counts.observe(
                route=_template(scope),
                method=scope["method"],
                status=status,
                seconds=(ended or time.perf_counter()) - started,
            )


def _template(scope: Scope) -> str:
    """Return the path with names in place of ids."""
    route = scope.get("route")
    if route is not None:
        return str(route.path)
    mount = scope.get("app_root_path") is not None and scope["path"].startswith("/static/")
    return "/static" if mount else "none"
