"""Traces by OpenTelemetry, from a request to the shards it sets to work; off by default.

The standard variables of OpenTelemetry say where spans go; its own SDK reads them, so they are no
settings of Winnow's. Without an endpoint the SDK is not even imported.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
FLUSH_SECONDS = 2.0
QUIET_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})

log = structlog.get_logger()

# at most one: every span of a process goes the same way
_providers: "list[TracerProvider]" = []
_exporters: "list[OTLPSpanExporter]" = []


def start_tracing(service: str) -> "TracerProvider | None":
    """Begin to export spans if an endpoint is set; return what makes them, or None.

    Args:
        service: the part of Winnow that this process is, unless OTEL_SERVICE_NAME says otherwise.
    """
    # ruff: noqa: PLC0415  nothing is imported unless it is used
    if _providers:
        return _providers[0]
    is_disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if is_disabled or not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("tracing_not_installed", install="pip install 'winnow[tracing]'")
        return None
    from app.version import VERSION

    named = os.environ.get("OTEL_SERVICE_NAME") or f"winnow-{service}"
    resource = Resource.create({SERVICE_NAME: named, SERVICE_VERSION: VERSION})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(_without_queries())
    exporter = OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _providers.append(provider)
    _exporters.append(exporter)
    return provider


def _without_queries() -> Any:  # noqa: ANN401  the class cannot be named before it is imported
    """Return what keeps query strings out of spans: they may search for a tenant's texts."""
    from opentelemetry.sdk.trace import SpanProcessor

    class WithoutQueries(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:  # noqa: ANN401, ARG002
            if "url.query" in (span.attributes or {}):
                span.set_attribute("url.query", "REDACTED")

    return WithoutQueries()


def stop_tracing() -> None:
    """Send what is left, without waiting long for it."""
    while _providers:
        stopping = threading.Thread(target=_providers.pop().shutdown, daemon=True)
        exporter = _exporters.pop()
        stopping.start()
        stopping.join(FLUSH_SECONDS)
        if stopping.is_alive():  # its receiver does not answer; it would try again and again
            exporter.shutdown()  # type: ignore[no-untyped-call]


def of_requests(provider: "TracerProvider | None") -> Mapping[str, Any]:
    """Return how FastAPI traces requests: one span each, with the route and no query or body."""
    return {
        "tracing": provider is not None,
        "tracer_provider": provider,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": lambda scope: scope.get("path") in QUIET_PATHS,
    }


def current_traceparent() -> str | None:
    """Return the span that this code runs in, as W3C's traceparent; None without tracing."""
    if not _providers:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def note_failure(code: str) -> None:
    """Mark the span that this code runs in as failed."""
    if not _providers:
        return
    from opentelemetry.trace import Status, StatusCode, get_current_span

    get_current_span().set_status(Status(StatusCode.ERROR, code))


@contextmanager
def span(name: str, *, traceparent: str | None = None, **attributes: str | int) -> Iterator[None]:
    """Trace a block as the child of a span of any process; does nothing without tracing.

    Args:
        name: of the span.
        traceparent: the parent, as `current_traceparent` returned it.
        attributes: of the span; `winnow.` is put before their names.
    """
    if not _providers:
        yield
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract({"traceparent": traceparent or ""})
    tracer = _providers[0].get_tracer("winnow")
    named = {f"winnow.{key}": value for key, value in attributes.items()}
    with tracer.start_as_current_span(name, context=parent, attributes=named):
        yield
