"""Everything that one API process exposes, in a registry of its own."""

import threading
import time
from collections.abc import Iterator

from celery import Celery
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import Engine

from app.metrics.readings import make_reading_engine, read_broker, read_database, read_disk
from app.metrics.requests import RequestCounts
from app.settings import Settings
from app.version import VERSION

CACHE_SECONDS = 5.0


class Metrics:
    """The registry of one application: its requests, its process, and the service as a whole."""

    def __init__(self, settings: Settings, engine: Engine, celery: Celery) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.requests = RequestCounts(self.registry)
        ProcessCollector(registry=self.registry)
        self.registry.register(_ServiceCollector(settings, engine, celery))


class _ServiceCollector(Collector):
    """Asks the parts of the service, at most once in a few seconds however often it is scraped."""

    def __init__(self, settings: Settings, engine: Engine, celery: Celery) -> None:
        self._settings = settings
        self._engine = make_reading_engine(engine)
        self._celery = celery
        self._lock = threading.Lock()
        self._read_at = -CACHE_SECONDS
        self._read: list[Metric] = []

    def describe(self) -> Iterator[Metric]:
        """Yield nothing: making an application must not ask anybody."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Yield what was read last, or read anew."""
        with self._lock:
            if time.monotonic() - self._read_at >= CACHE_SECONDS:
                self._read = [
                    _build(),
                    *read_database(self._engine, self._settings),
                    *read_broker(self._celery),
                    *read_disk(self._settings),
                ]
                self._read_at = time.monotonic()
            yield from self._read


def _build() -> Metric:
    gauge = Gauge("winnow_build_info", "The service's version.", labels=["version"])
    gauge.add_metric([VERSION], 1)
    return gauge
