"""HTTP: the metrics, for Prometheus."""

import hmac
from typing import cast

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool

from app.dependencies import SettingsDep
from app.errors import NotAuthenticated, NotPermitted, problem_responses
from app.metrics.registry import Metrics
from app.middleware import is_loopback_host
from app.settings import Settings

FORWARDING_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip", "via")

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    summary="Metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        **problem_responses(NotAuthenticated, NotPermitted),
    },
)
async def metrics(request: Request, settings: SettingsDep) -> Response:
    """Answer in Prometheus's text format; docs/operations.md lists what is in it.

    It is answered while database or broker are down, and says so. With WINNOW_METRICS_TOKEN it
    takes that token as a bearer token; without, it answers callers on its own machine alone.
    """
    _let_in(request, settings)
    registry = cast("Metrics", request.app.state.metrics).registry
    content = await run_in_threadpool(generate_latest, registry)
    return Response(content, media_type=CONTENT_TYPE_LATEST)


def _let_in(request: Request, settings: Settings) -> None:
    if settings.metrics_token:  # an empty one is none
        _, _, sent = request.headers.get("authorization", "").partition(" ")
        token = settings.metrics_token.get_secret_value()
        if not hmac.compare_digest(sent.encode(), token.encode()):
            raise NotAuthenticated(
                "Send the server's WINNOW_METRICS_TOKEN as 'Authorization: Bearer …'."
            )
        return
    # A proxy on this machine is on loopback too, and whom it serves is not.
    is_proxied = any(name in request.headers for name in FORWARDING_HEADERS)
    if is_proxied or request.client is None or not is_loopback_host(request.client.host):
        raise NotPermitted(
            "Without WINNOW_METRICS_TOKEN this server tells its metrics to its own machine alone. "
            "Set that token, and send it as a bearer token."
        )
