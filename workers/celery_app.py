"""The worker process: Celery's consumer, the reconciler, the sign of life."""

import os
import socket
import threading
import warnings
from collections.abc import Sequence

import structlog
from celery import Celery
from celery.exceptions import SecurityWarning
from celery.signals import worker_shutting_down
from sqlalchemy import Engine, func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import SQLAlchemyError

from app.db import make_engine, transaction
from app.jobs import QUEUES, make_celery
from app.logs import configure_logging
from app.settings import Settings, get_settings
from app.shared_files import share_files
from app.version import VERSION
from app.work.models import SIGN_OF_LIFE_SECONDS, WorkerHeartbeat
from app.work.reconciler import Reconciler
from workers.gpu import gpu_memory
from workers.tasks import DRAIN_SIGNAL

log = structlog.get_logger()

LIBRARIES = {
    # OpenMP threads that spin while they wait starve whatever shares the machine, and then
    # themselves: with one busy neighbour, training took 3.5 times as long.
    "OMP_WAIT_POLICY": "passive",
    # What Arrow gives back torch can use, and the other way round.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    # Compiled products for each shape of a batch, that is for each length, 1,024 of them by
    # default, took 250 MB; a batch needs a few, and hardly any comes again later.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
"""What libraries read when they are loaded; a worker's children inherit it."""


def make_worker_celery(settings: Settings) -> Celery:
    """Return the Celery application with the tasks; spawned children build the same one."""
    celery = make_celery(settings)
    celery.conf.include = ["workers.tasks"]
    return celery


def run_worker(queues: Sequence[str] = QUEUES) -> int:
    """Work on what waits in some queues until told to stop; return the exit code.

    SIGTERM drains: the unit at hand is left at its next batch and given back without counting an
    attempt, so another worker goes on where it was.
    """
    for name, value in LIBRARIES.items():
        os.environ.setdefault(name, value)
    settings = get_settings()
    configure_logging(settings.log_format)
    share_files(settings)
    celery = make_worker_celery(settings)
    engine = make_engine(settings.require_database_url())
    name = f"{socket.gethostname()}:{os.getpid()}"
    reconciler = Reconciler(engine, celery, settings)
    sign_of_life = _SignOfLife(engine, name, settings, queues)
    reconciler.start()
    sign_of_life.start()
    try:
        worker = celery.Worker(
            hostname=f"winnow@{name}",
            queues=list(queues),
            loglevel="INFO",
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            quiet=True,
        )

        def drain(**_: object) -> None:
            for pid in worker.pool.info["processes"]:
                os.kill(pid, DRAIN_SIGNAL)

        worker_shutting_down.connect(drain)
        # Celery warns root of pickled messages; this service accepts JSON alone
        warnings.simplefilter("ignore", SecurityWarning)
        worker.start()
        return int(worker.exitcode or 0)
    finally:
        reconciler.stop()
        sign_of_life.stop()


class _SignOfLife(threading.Thread):
    """Writes the worker's row, which /readyz reads."""

    def __init__(
        self, engine: Engine, name: str, settings: Settings, queues: Sequence[str]
    ) -> None:
        super().__init__(name="sign-of-life", daemon=True)
        self._engine = engine
        self._device = settings.device
        self._row = {
            "name": name,
            "device": settings.device,
            "queues": list(queues),
            "engine_version": VERSION,
        }
        self._stopped = threading.Event()

    def run(self) -> None:
        is_over = False
        while not is_over:
            try:
                memory = gpu_memory(self._device)
                seen = {
                    "seen_at": func.now(),
                    "gpu_memory_used": memory.used if memory else None,
                    "gpu_memory_total": memory.total if memory else None,
                }
                with transaction(self._engine) as session:
                    row = insert(WorkerHeartbeat).values(**self._row | seen)
                    session.execute(row.on_conflict_do_update(index_elements=["name"], set_=seen))
            except SQLAlchemyError as error:
                log.warning("sign_of_life_failed", error=str(error))
            is_over = self._stopped.wait(SIGN_OF_LIFE_SECONDS)

    def stop(self) -> None:
        """Remove the row: this worker is gone on purpose."""
        self._stopped.set()
        self.join(timeout=5)
        try:
            with transaction(self._engine) as session:
                row = session.get(WorkerHeartbeat, self._row["name"])
                if row is not None:
                    session.delete(row)
        except SQLAlchemyError as error:
            log.warning("sign_of_life_failed", error=str(error))
