"""A worker that fetches and one that computes, as real processes: each takes its own queue."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import Celery
from redis import Redis

from app.health import check_worker
from app.jobs import FETCH_QUEUE_NAME, QUEUE_NAME, TASK_NAME
from app.work.models import UnitState
from tests.pipeline.conftest import Models
from tests.pipeline.workplace import Workplace

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SECONDS = 120
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(workplace: Workplace) -> Iterator[Start]:
    """Starts workers on the servers of this test, and ends them."""
    settings = workplace.settings
    environment = {
        "WINNOW_DATABASE_URL": settings.require_database_url(),
        "WINNOW_BROKER_URL": settings.require_broker_url(),
        "WINNOW_DATA_DIR": str(settings.data_dir),
        "WINNOW_FILE_ROOTS": ":".join(map(str, settings.file_roots)),
        "WINNOW_RECONCILE_SECONDS": "3600",  # what is shown here is not its doing
        "WINNOW_DEVICE": "cpu",
    }
    running: list[subprocess.Popen[bytes]] = []

    def worker(*options: str, **more: str) -> subprocess.Popen[bytes]:
        with (workplace.files / f"{len(running)}.log").open("wb") as log:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "app", "worker", *options],
                    env=os.environ | environment | more,
                    stdout=log,
                    stderr=log,
                )
            )
        return running[-1]

    yield worker
    for process in running:
        process.terminate()
    for process in running:
        process.wait(60)


def wait_for(is_there: Callable[[], bool], logs: Path) -> None:
    end = time.monotonic() + SECONDS
    while not is_there():
        tails = [log.read_text()[-2000:] for log in logs.glob("*.log")]
        assert time.monotonic() < end, "\n\n".join(["not in time", *tails])
        time.sleep(0.1)


def test_each_takes_its_own_and_hands_on_what_came_astray(
    start: Start,
    workplace: Workplace,
    models: Models,
    celery: Celery,
    broker: Redis,
) -> None:
    """A message by the old queue, as a version before sent it, finds the worker with a network."""
    audit_id = workplace.submit(models.classifier, **workplace.reviews())
    (unit,) = workplace.units(audit_id)
    celery.send_task(TASK_NAME, args=[unit.id], queue=QUEUE_NAME)

    start("--gpu", "--offline", HF_HUB_OFFLINE="1")
    wait_for(lambda: broker.llen(FETCH_QUEUE_NAME) == 1, workplace.files)
    (unit,) = workplace.units(audit_id)
    assert (unit.state, unit.attempts) == (UnitState.READY, 0)
    readiness = check_worker(workplace.engine, workplace.settings)
    assert "none that takes rankings and what audits begin with" in readiness.detail

    start("--fetch")
    wait_for(lambda: workplace.audit(audit_id).finished_at is not None, workplace.files)
    audit = workplace.audit(audit_id)
    assert audit.state == "succeeded", audit.error_message
    assert broker.llen(QUEUE_NAME) == broker.llen(FETCH_QUEUE_NAME) == 0
