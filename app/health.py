"""HTTP: is this process alive, and is the service ready to work."""

import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from celery import Celery
from fastapi import APIRouter, Response
from kombu.exceptions import OperationalError
from pydantic import BaseModel, Field
from redis.exceptions import RedisError
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.dependencies import CeleryDep, ServiceEngineDep, SettingsDep
from app.errors import NotReady
from app.jobs import CPU_QUEUE_NAME, FETCH_QUEUE_NAME, QUEUE_NAME, QUEUES, queue_length
from app.settings import Settings
from app.shared_files import bucket_of
from app.storage import LEAST_FREE_BYTES
from app.version import VERSION
from app.work.models import WorkerHeartbeat

if TYPE_CHECKING:
    from app.bucket import Bucket

BROKER_PATIENCE_SECONDS = 2.0
WORK_OF_QUEUE = {
    QUEUE_NAME: "audits",
    CPU_QUEUE_NAME: "rankings",
    FETCH_QUEUE_NAME: "what audits begin with (their files)",
}

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    """This process answers."""

    status: str = "alive"
    version: str = VERSION


class Check(BaseModel):
    """One part that the service needs."""

    ok: bool
    detail: str = Field(description="What was found and, when it is not right, what to do.")


class Readiness(BaseModel):
    """Whether audits can be submitted and will be worked on."""

    ready: bool
    checks: dict[str, Check]


@router.get("/healthz", summary="Alive?")
def healthz() -> Alive:
    """Answer while the process lives; looks at nothing else."""
    return Alive()


@router.get(
    "/readyz",
    summary="Ready?",
    responses={503: {"model": Readiness, "description": "Some part is not ready."}},
)
def readyz(
    response: Response, engine: ServiceEngineDep, celery: CeleryDep, settings: SettingsDep
) -> Readiness:
    """Look at the database, the broker, the workers, the disk and, where one is set, the bucket.

    Submitting needs the database and the disk alone; an accepted audit waits for the rest.
    """
    checks = {
        "database": _checked(lambda: _database(engine)),
        "broker": check_broker(celery),
        "worker": check_worker(engine, settings),
        "storage": check_storage(settings),
    }
    bucket = bucket_of(settings)
    if bucket is not None:
        checks["bucket"] = _checked(lambda: _bucket(bucket))
    readiness = Readiness(ready=all(check.ok for check in checks.values()), checks=checks)
    if not readiness.ready:
        response.status_code = 503
        response.headers["Retry-After"] = "5"
    return readiness


def check_broker(celery: Celery) -> Check:
    """Say whether the broker answers."""
    return _checked(lambda: _broker(celery))


def check_worker(engine: Engine, settings: Settings) -> Check:
    """Say whether workers that take all work were seen of late."""
    return _checked(lambda: _worker(engine, settings))


def check_storage(settings: Settings) -> Check:
    """Say whether the data directory can be written, and has room."""
    return _checked(lambda: _storage(settings))


def _checked(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except NotReady as error:
        return Check(ok=False, detail=str(error.detail))
    except SQLAlchemyError:
        return Check(
            ok=False,
            detail="The database does not answer, or lacks its tables. Is PostgreSQL running at "
            "WINNOW_DATABASE_URL, and was `winnow migrate` run?",
        )
    except (OperationalError, RedisError, OSError):
        return Check(
            ok=False,
            detail="The broker does not answer. Is Redis or Valkey running at WINNOW_BROKER_URL? "
            "Audits are accepted meanwhile and sent later.",
        )


def _database(engine: Engine) -> Check:
    with Session(engine) as session:
        session.scalar(select(1))
    return Check(ok=True, detail="It answers.")


def _broker(celery: Celery) -> Check:
    waiting = queue_length(celery, timeout=BROKER_PATIENCE_SECONDS)
    return Check(ok=True, detail=f"It answers; {waiting} messages wait.")


def _worker(engine: Engine, settings: Settings) -> Check:
    stale = timedelta(seconds=settings.worker_stale_seconds)
    statement = select(WorkerHeartbeat.queues).where(WorkerHeartbeat.seen_at > func.now() - stale)
    with Session(engine) as session:
        served = list(session.scalars(statement))
    missing = set(QUEUES).difference(*served)
    if served and missing:
        what = " and ".join(WORK_OF_QUEUE[queue] for queue in QUEUES if queue in missing)
        return Check(
            ok=False,
            detail=f"{len(served)} at work, but none that takes {what}. Start one with `winnow "
            "worker`, which takes all.",
        )
    if missing:
        return Check(
            ok=False,
            detail=f"No worker was seen in the last {settings.worker_stale_seconds:g} s. Start one "
            "with `winnow worker`, or look into its log.",
        )
    return Check(ok=True, detail=f"{len(served)} at work.")


def _storage(settings: Settings) -> Check:
    folder = settings.data_dir
    if not os.access(folder, os.W_OK | os.X_OK):
        return Check(
            ok=False,
            detail="The data directory (WINNOW_DATA_DIR) is missing or not writable for the API.",
        )
    free = shutil.disk_usage(folder).free
    return Check(
        ok=free >= LEAST_FREE_BYTES,
        detail=f"{free / 1024**3:.1f} GiB are free"
        + ("." if free >= LEAST_FREE_BYTES else "; delete audits or datasets, or add room."),
    )


def _bucket(bucket: "Bucket") -> Check:
    bucket.check()
    return Check(ok=True, detail="The bucket (WINNOW_ARTIFACTS) answers.")
