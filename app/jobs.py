"""Hand committed work to the queue, by task name: a message only says "look at unit X"."""

from typing import Any

import structlog
from anyio import CapacityLimiter, to_thread
from celery import Celery
from celery.app.amqp import AMQP
from kombu import Connection, Queue
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError
from sqlalchemy import Engine, func, select, update
from sqlalchemy.exc import SQLAlchemyError

from app.db import transaction
from app.failpoints import reach
from app.settings import Settings
from app.work.models import Stage, UnitState, WorkUnit

TASK_NAME = "winnow.work"
QUEUE_NAME = "winnow"
CPU_QUEUE_NAME = "winnow-cpu"
FETCH_QUEUE_NAME = "winnow-fetch"
QUEUES = (QUEUE_NAME, CPU_QUEUE_NAME, FETCH_QUEUE_NAME)
_OWN_QUEUES = {
    Stage.RANK: CPU_QUEUE_NAME,  # needs no GPU
    Stage.PREPARE: FETCH_QUEUE_NAME,  # the one that reads from the network
}
MAX_SENDERS = 2
MAX_PAUSE = 5.0

log = structlog.get_logger()


class _Connection(Connection):  # type: ignore[misc]  # Celery has no types
    """Looks for a broker that is away every few seconds, however long it was away.

    By default the pause grows to 30 seconds; work shall flow within 30 after the broker's return.
    """

    def ensure_connection(self, *arguments: Any, **options: Any) -> Connection:
        return super().ensure_connection(*arguments, **{"interval_max": MAX_PAUSE, **options})


class _Amqp(AMQP):  # type: ignore[misc]  # likewise
    Connection = _Connection


def make_celery(settings: Settings) -> Celery:
    """Return the Celery application that API and workers share (SERVICE.md, section 3)."""
    broker = settings.require_broker_url()
    celery = Celery("winnow", broker=broker, amqp=_Amqp, set_as_current=False)
    celery.conf.update(
        broker_transport_options={
            "visibility_timeout": 900,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            "socket_timeout": 15,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_acks_late=True,
        task_acks_on_failure=True,
        task_acks_on_timeout=True,
        # The database decides on retries: the broker's own would run a poison unit for ever.
        task_reject_on_worker_lost=False,
        task_retry_on_worker_lost=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        task_ignore_result=True,
        result_backend=None,
        worker_pool="prefork",
        worker_concurrency=1,
        worker_pool_start_method="spawn",  # CUDA cannot be used after fork
        # A spawned child imports the service before it answers. The default of 4 s killed it on a
        # busy machine, and every one after it.
        worker_proc_alive_timeout=300,
        worker_max_tasks_per_child=200,
        worker_soft_shutdown_timeout=60,
        worker_enable_soft_shutdown_on_idle=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        task_publish_retry_policy={
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0.1,
            "interval_max": 0.1,
        },
        task_serializer="json",
        accept_content=["json"],
        task_create_missing_queues=False,
        task_queues=[Queue(name) for name in QUEUES],
        task_default_queue=QUEUE_NAME,
    )
    return celery


def queue_of(stage: Stage) -> str:
    """Return where the units of a stage wait."""
    return _OWN_QUEUES.get(stage, QUEUE_NAME)


def stages_of_queue(queue: str) -> list[Stage]:
    """Return the stages whose units wait in a queue."""
    return [stage for stage in Stage if queue_of(stage) == queue]


def send_units(engine: Engine, celery: Celery, unit_ids: list[str]) -> None:
    """Send a message for each unit and note that it was sent.

    A broker that is down loses nothing: the units stay owed, and the reconciler sends them later.
    """
    sent: list[str] = []
    with transaction(engine) as session:
        stages = select(WorkUnit.id, WorkUnit.stage).where(WorkUnit.id.in_(unit_ids))
        stage_of_unit = {row.id: row.stage for row in session.execute(stages)}
    there = [unit_id for unit_id in unit_ids if unit_id in stage_of_unit]
    try:
        for unit_id in there:
            queue = queue_of(Stage(stage_of_unit[unit_id]))
            celery.send_task(TASK_NAME, args=[unit_id], queue=queue)
            sent.append(unit_id)
    except (OperationalError, RedisError, OSError) as error:
        log.warning("broker_unreachable", error=str(error), units_owed=len(there) - len(sent))
    if sent:
        reach("send.sent")
        with transaction(engine) as session:
            session.execute(
                update(WorkUnit)
                .where(WorkUnit.id.in_(sent), WorkUnit.state == UnitState.READY)
                .values(sent_at=func.now())
            )


class Sender:
    """Sends units in the background of a server, a few at a time.

    A frozen broker holds up every sender for seconds; the limit keeps it from taking the threads
    that answer callers.
    """

    def __init__(self, engine: Engine, celery: Celery) -> None:
        self._engine = engine
        self._celery = celery
        self._limiter = CapacityLimiter(MAX_SENDERS)

    async def send(self, unit_ids: list[str]) -> None:
        """Send a message for each unit; what cannot be sent stays owed."""
        try:
            await to_thread.run_sync(
                send_units, self._engine, self._celery, unit_ids, limiter=self._limiter
            )
        except SQLAlchemyError as error:
            log.warning("sent_units_not_noted", error=str(error))


def queue_length(celery: Celery, *queues: str, timeout: float = 5.0) -> int:
    """Return how many messages wait in the broker, in some queues or in all.

    Raises:
        OperationalError: the broker cannot be reached.
        RedisError: it does not answer, or refuses.
    """
    return sum(queue_lengths(celery, *queues, timeout=timeout).values())


def queue_lengths(celery: Celery, *queues: str, timeout: float = 5.0) -> dict[str, int]:
    """Return how many messages wait in each queue.

    Args:
        celery: knows the broker.
        queues: which queues; all by default.
        timeout: seconds that the broker may take for an answer.

    Raises:
        OperationalError: the broker cannot be reached.
        RedisError: it does not answer, or refuses.
    """
    patience = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    with celery.connection_for_read(transport_options=patience) as connection:
        connection.ensure_connection(max_retries=1, timeout=timeout)
        size = connection.default_channel._size  # noqa: SLF001  Redis has no passive declare
        return {queue: int(size(queue)) for queue in queues or QUEUES}
