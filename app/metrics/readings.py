"""What the database, the broker and the disk say of the service, whichever process asks them.

Nothing of it belongs to a tenant: there are counts, ages and error codes, never names or texts.
"""

import shutil
from collections.abc import Iterator

from celery import Celery
from kombu.exceptions import OperationalError
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import Metric
from redis.exceptions import RedisError
from sqlalchemy import Connection, Engine, NullPool, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from app.audits.models import AuditState
from app.jobs import QUEUES, queue_lengths, stages_of_queue
from app.settings import Settings
from app.work.models import Stage, UnitState

DATABASE_SECONDS = 2
BROKER_SECONDS = 2.0
QUANTILES = (0.5, 0.95, 1.0)

Labels = tuple[str, ...]

_UNITS = text(
    "SELECT stage, state, count(*), sum(samples_per_second), "
    "count(*) FILTER (WHERE lease_until < now()), "
    "extract(epoch FROM now() - min(created_at)) "
    "FROM work_units WHERE state IN ('ready', 'running') GROUP BY stage, state"
)
_FINISHED = text(
    "SELECT stage, count(*), "
    "percentile_disc(CAST(:quantiles AS double precision[])) WITHIN GROUP "
    "(ORDER BY extract(epoch FROM finished_at - started_at)) "
    "FROM work_units WHERE finished_at > now() - interval '1 hour' GROUP BY stage"
)
_AUDITS = text("SELECT state, count(*) FROM audits GROUP BY state")
_FAILURES = text(
    "SELECT 'audit', error_code, count(*), "
    "count(*) FILTER (WHERE finished_at > now() - interval '1 hour') "
    "FROM audits WHERE error_code IS NOT NULL GROUP BY error_code "
    "UNION ALL SELECT 'ranking', error_code, count(*), "
    "count(*) FILTER (WHERE finished_at > now() - interval '1 hour') "
    "FROM rankings WHERE error_code IS NOT NULL GROUP BY error_code"
)
_DELIVERIES = text(
    "SELECT count(*) FILTER (WHERE state = 'pending'), "
    "count(*) FILTER (WHERE state = 'failed' AND finished_at > now() - interval '1 hour') "
    "FROM webhook_deliveries"
)
_WORKERS = text(
    "SELECT name, queues, gpu_memory_used, gpu_memory_total FROM worker_heartbeats "
    "WHERE seen_at > now() - make_interval(secs => :stale)"
)


def make_reading_engine(engine: Engine) -> Engine:
    """Return an engine to the same database that gives up soon, on connections of its own.

    A scrape must be answered while the database is down or frozen, and while every pooled
    connection is taken.
    """
    patience = {
        "connect_timeout": DATABASE_SECONDS,
        "options": f"-c statement_timeout={1000 * DATABASE_SECONDS}",
    }
    return create_engine(engine.url, poolclass=NullPool, connect_args=patience)


def read_database(engine: Engine, settings: Settings) -> Iterator[Metric]:
    """Yield what the tables say, or only that the database does not answer."""
    up = Gauge("winnow_database_up", "Whether the database answers with its tables.")
    try:
        with engine.connect() as connection:
            found = list(_of_tables(connection, settings))
    except SQLAlchemyError:
        up.add_metric([], 0)
        yield up
        return
    up.add_metric([], 1)
    yield up
    yield from found


def _of_tables(connection: Connection, settings: Settings) -> Iterator[Metric]:
    yield from _units(connection)
    yield from _finished_units(connection)
    yield _gauge(
        "winnow_audits",
        "Audits in the database by state.",
        ("state",),
        {(state,): 0 for state in AuditState}
        | {(state,): count for state, count in connection.execute(_AUDITS)},
    )
    failures = {(kind, code): counts for kind, code, *counts in connection.execute(_FAILURES)}
    yield _gauge(
        "winnow_failures",
        "Failed audits and rankings in the database by error code.",
        ("kind", "code"),
        {labels: counts[0] for labels, counts in failures.items()},
    )
    yield _gauge(
        "winnow_failures_last_hour",
        "Audits and rankings that failed in the last hour by error code.",
        ("kind", "code"),
        {labels: counts[1] for labels, counts in failures.items()},
    )
    owed, failed = connection.execute(_DELIVERIES).one()
    yield _gauge("winnow_webhooks_owed", "Messages of webhooks that are owed.", (), {(): owed})
    yield _gauge(
        "winnow_webhooks_failed_last_hour",
        "Messages of webhooks that were given up in the last hour.",
        (),
        {(): failed},
    )
    yield from _workers(connection, settings)


def _units(connection: Connection) -> Iterator[Metric]:
    states = (UnitState.READY, UnitState.RUNNING)
    counts: dict[Labels, float] = {(stage, state): 0 for stage in Stage for state in states}
    speeds: dict[Labels, float] = {(stage,): 0.0 for stage in Stage}
    waiting: dict[str, float] = dict.fromkeys(Stage, 0.0)
    num_expired = 0
    for stage, state, count, speed, expired, age in connection.execute(_UNITS):
        counts[stage, state] = count
        if state == UnitState.RUNNING:
            speeds[stage,] = speed or 0.0
            num_expired += expired
        else:
            waiting[stage] = float(age)
    num_running = sum(n for (_, state), n in counts.items() if state == UnitState.RUNNING)
    yield _gauge("winnow_units", "Units of work by stage.", ("stage", "state"), counts)
    yield _gauge(
        "winnow_leases",
        "Units that a worker holds, and those whose hold has run out.",
        ("state",),
        {("held",): num_running - num_expired, ("expired",): num_expired},
    )
    yield _gauge(
        "winnow_oldest_waiting_unit_seconds",
        "Age of the oldest unit that waits for a worker of a queue; 0 when none waits.",
        ("queue",),
        {(queue,): max(waiting[stage] for stage in stages_of_queue(queue)) for queue in QUEUES},
    )
    yield _gauge(
        "winnow_samples_per_second",
        "Samples a second of all workers together, by stage.",
        ("stage",),
        speeds,
    )


def _finished_units(connection: Connection) -> Iterator[Metric]:
    counts: dict[Labels, float] = {(stage,): 0 for stage in Stage}
    seconds: dict[Labels, float] = {}
    for stage, count, values in connection.execute(_FINISHED, {"quantiles": list(QUANTILES)}):
        counts[stage,] = count
        for quantile, value in zip(QUANTILES, values, strict=True):
            seconds[stage, f"{quantile:g}"] = float(value)
    yield _gauge(
        "winnow_units_finished_last_hour",
        "Units of work that ended well in the last hour.",
        ("stage",),
        counts,
    )
    yield _gauge(
        "winnow_unit_seconds",
        "From a unit's first claim to its end, over those that ended in the last hour.",
        ("stage", "quantile"),
        seconds,
    )


def _workers(connection: Connection, settings: Settings) -> Iterator[Metric]:
    stale = {"stale": settings.worker_stale_seconds}
    rows = list(connection.execute(_WORKERS, stale))
    yield _gauge(
        "winnow_workers",
        "Workers that were seen of late and serve a queue.",
        ("queue",),
        {(queue,): sum(queue in queues for _, queues, *_ in rows) for queue in QUEUES},
    )
    gpus = [(name, used, total) for name, _, used, total in rows if total is not None]
    yield _gauge(
        "winnow_gpu_memory_used_bytes",
        "Memory in use on a worker's GPU, by whatever process.",
        ("worker",),
        {(name,): used for name, used, _ in gpus},
    )
    yield _gauge(
        "winnow_gpu_memory_total_bytes",
        "Memory of a worker's GPU.",
        ("worker",),
        {(name,): total for name, _, total in gpus},
    )


def read_broker(celery: Celery) -> Iterator[Metric]:
    """Yield how many messages wait in each queue, or only that the broker does not answer."""
    up = Gauge("winnow_broker_up", "Whether the broker answers.")
    try:
        lengths = queue_lengths(celery, timeout=BROKER_SECONDS)
    except (OperationalError, RedisError, OSError):
        up.add_metric([], 0)
        yield up
        return
    up.add_metric([], 1)
    yield up
    yield _gauge(
        "winnow_queue_messages",
        "Messages that wait in the broker.",
        ("queue",),
        {(queue,): length for queue, length in lengths.items()},
    )


def read_disk(settings: Settings) -> Iterator[Metric]:
    """Yield the room of the data directory, as far as it can be seen from here."""
    try:
        usage = shutil.disk_usage(settings.data_dir)
    except OSError:
        return
    yield _gauge(
        "winnow_data_free_bytes", "Room left for the data directory.", (), {(): usage.free}
    )
    yield _gauge(
        "winnow_data_total_bytes", "Size of the data directory's disk.", (), {(): usage.total}
    )


def _gauge(name: str, about: str, labels: Labels, values: dict[Labels, float]) -> Metric:
    gauge = Gauge(name, about, labels=labels)
    for of, value in values.items():
        gauge.add_metric([str(label) for label in of], float(value))
    return gauge
