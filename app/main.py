"""The API as an ASGI application."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

from celery import Celery
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from sqlalchemy import Engine

import app.tables  # noqa: F401  registers every table
from app import catalogue_routes, health
from app.audits import ranking_routes
from app.audits import routes as audit_routes
from app.audits.polling import Polls, QuickPolls
from app.datasets import routes as dataset_routes
from app.db import make_engine
from app.decisions import routes as decision_routes
from app.errors import (
    InvalidRequest,
    MissingScope,
    NotAuthenticated,
    RateExceeded,
    install_error_handlers,
    problem_responses,
)
from app.experiments import routes as experiment_routes
from app.exports import routes as export_routes
from app.jobs import Sender, make_celery
from app.keys.described import describe_scopes
from app.limits.rates import Rates
from app.limits.uploads import UploadSlots
from app.links import describe_links
from app.live.events import install_end_of_streams
from app.live.watcher import Watcher
from app.metrics import routes as metrics_routes
from app.metrics.registry import Metrics
from app.metrics.requests import RequestMetrics
from app.middleware import BodyLimit, LoopbackOnly, RequestContext
from app.settings import Settings
from app.shared_files import share_files
from app.tracing import of_requests, start_tracing, stop_tracing
from app.trail import routes as trail_routes
from app.version import VERSION
from app.web import report_routes
from app.web import routes as page_routes
from app.web.own_files import OwnFiles
from app.web.queries import CountsCache
from app.webhooks import routes as webhook_routes
from app.webhooks.sender import WebhookSender
from app.work.reconciler import Reconciler

DESCRIPTION = """\
Winnow audits the training data of language models: it measures how each training sample
influenced a fine-tuned model's behaviour on a trusted validation set, layer by layer, and ranks
the samples that most likely carry a wrong label.

1. `POST /v1/datasets`: upload the training set and a small validation set.
2. `POST /v1/audits`: name the model and both sets; the answer's `Location` is the audit.
3. `GET` it until `done`; `Retry-After` says when to look again.
4. `GET /v1/audits/{id}/suspects`: the ranking, the most suspect first.

`POST /v1/experiments` compares estimators, layers and aggregations over tasks and seeds.

Positive influence is helpful; **the lowest score is the most suspect**, everywhere. Every error is
a problem document (RFC 9457) whose `detail` says what to change.
"""

TAGS = [
    {"name": "audits", "description": "Submit an audit and follow it."},
    {"name": "results", "description": "What a finished audit found; the lowest score is suspect."},
    {"name": "rankings", "description": "Further rankings of a finished audit, in seconds."},
    {"name": "decisions", "description": "What reviewers decide on samples, one or all of them."},
    {
        "name": "experiments",
        "description": "Compare estimators, layer groups and aggregations over tasks and seeds.",
    },
    {"name": "datasets", "description": "Upload labelled texts once, use them in many audits."},
    {"name": "webhooks", "description": "Be told when something has ended, by signed messages."},
    {"name": "trail", "description": "Who changed what, and when."},
    {"name": "catalogue", "description": "What this server can compute."},
    {"name": "health", "description": "For load balancers and operators."},
]


def create_app(
    settings: Settings, engine: Engine | None = None, celery: Celery | None = None
) -> FastAPI:
    """Return the application.

    Args:
        settings: of this process.
        engine: the database; by default its own, from the settings.
        celery: the queue; by default its own, from the settings.
    """
    the_engine = engine or make_engine(settings.require_database_url())
    the_celery = celery or make_celery(settings)
    share_files(settings)

    @asynccontextmanager
    async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
        reconciler = Reconciler(the_engine, the_celery, settings)
        webhook_sender = WebhookSender(the_engine, settings)
        reconciler.start()
        webhook_sender.start()
        try:
            async with api.state.polls.opened():
                yield
        finally:
            webhook_sender.stop()
            reconciler.stop()
            stop_tracing()
            if engine is None:
                the_engine.dispose()

    telemetry = of_requests(start_tracing("api"))
    api = FastAPI(
        title="Winnow",
        version=VERSION,
        summary="Find the training samples that harm a language model.",
        description=DESCRIPTION,
        openapi_tags=TAGS,
        lifespan=lifespan,
        telemetry=cast("TelemetryConfig", telemetry),
    )
    api.state.settings = settings
    api.state.engine = the_engine
    api.state.celery = the_celery
    api.state.sender = Sender(the_engine, the_celery)
    api.state.counts = CountsCache()
    api.state.polls = Polls(the_engine)
    api.state.watcher = Watcher(the_engine)
    api.state.rates = Rates(settings.require_broker_url())
    api.state.upload_slots = UploadSlots(settings.max_concurrent_uploads)
    api.state.metrics = Metrics(settings, the_engine, the_celery)
    api.include_router(health.router)
    api.include_router(metrics_routes.router)
    for router in (
        audit_routes.router,
        audit_routes.results_router,
        ranking_routes.router,
        report_routes.router,
        decision_routes.router,
        export_routes.router,
        experiment_routes.router,
        dataset_routes.router,
        webhook_routes.router,
        trail_routes.router,
        catalogue_routes.router,
    ):
        errors = problem_responses(NotAuthenticated, MissingScope, InvalidRequest, RateExceeded)
        api.include_router(router, responses=errors)
    api.include_router(page_routes.router)
    api.mount("/static", OwnFiles(), name="static")
    # The last one added is the outermost.
    api.add_middleware(BodyLimit, settings=settings)
    if not telemetry["tracing"]:  # a request that is traced takes the way that has spans
        api.add_middleware(QuickPolls, polls=api.state.polls, settings=settings)
    if not settings.require_keys:
        api.add_middleware(LoopbackOnly)
    api.add_middleware(RequestContext)
    api.add_middleware(RequestMetrics, counts=api.state.metrics.requests)
    install_error_handlers(api)
    _extend_document(api, describe_scopes, describe_links)
    install_end_of_streams(api)
    return api


def _extend_document(api: FastAPI, *extensions: Callable[[dict[str, Any]], None]) -> None:
    """Let the OpenAPI document say more than FastAPI knows."""
    described = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            for extend in extensions:
                extend(described())  # which keeps what it made
        return described()

    api.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it
