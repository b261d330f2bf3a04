"""Everything that is done to the service, each by a name that the report counts."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from app.jobs import QUEUE_NAME, TASK_NAME
from tests.chaos.cluster import LEASE_SECONDS, Cluster

UNIT_POINTS = (
    *("unit.claimed", "file.written", "file.renamed"),
    *("unit.before_commit", "unit.after_commit"),
)
TAKEN_WITHIN = 12.0


class NotNow(Exception):
    """There is nothing to be hit at this moment."""


@dataclass(frozen=True)
class Fault:
    """One kind of trouble.

    Attributes:
        name: as it is counted.
        inject: does it, and returns when the rest may go on; raises NotNow.
    """

    name: str
    inject: Callable[[Cluster, random.Random], None]


# -- processes -------------------------------------------------------------------------------


def at_failpoint(point: str, action: str) -> Fault:
    """The first process that comes to a point dies there, or its parent does."""

    def inject(cluster: Cluster, _: random.Random) -> None:
        _wait_until_taken(cluster, cluster.order(point, action))

    return Fault(f"{action} at {point}", inject)


def frozen_at(point: str) -> Fault:
    """A worker is frozen at a point until its lease is over and another has gone on."""

    def inject(cluster: Cluster, _: random.Random) -> None:
        pid = _wait_until_taken(cluster, cluster.order(point, "stop"))
        time.sleep(LEASE_SECONDS + 2.5)  # a round of the reconciler, and the heir is at it
        _continue(pid)

    return Fault(f"stop past the lease at {point}", inject)


def _wait_until_taken(cluster: Cluster, order: Path) -> int:
    end = time.monotonic() + TAKEN_WITHIN
    while time.monotonic() < end:
        pid = cluster.taken_by(order)
        if pid is not None:
            return pid
        time.sleep(0.02)
    with suppress(FileNotFoundError):
        order.unlink()
        raise NotNow
    pid = cluster.taken_by(order)
    assert pid is not None
    return pid


def _continue(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def kill_worker_child(cluster: Cluster, chance: random.Random) -> None:
    worker = chance.choice(cluster.workers)
    children = worker.children()
    if not children:
        raise NotNow
    with suppress(psutil.NoSuchProcess):
        chance.choice(children).kill()


def kill_worker_parent(cluster: Cluster, chance: random.Random) -> None:
    chance.choice(cluster.workers).kill()


def terminate_worker(cluster: Cluster, chance: random.Random) -> None:
    """Drain, as a new version's rollout does."""
    chance.choice(cluster.workers).process.terminate()


def kill_api(cluster: Cluster, _: random.Random) -> None:
    cluster.api.kill()


def freeze_worker(cluster: Cluster, chance: random.Random) -> None:
    """Parent, child and all, wherever they are, past the lease."""
    worker = chance.choice(cluster.workers)
    worker.end_group(signal.SIGSTOP)
    time.sleep(LEASE_SECONDS + 2.5)
    worker.end_group(signal.SIGCONT)


def freeze_api(cluster: Cluster, chance: random.Random) -> None:
    cluster.api.end_group(signal.SIGSTOP)
    time.sleep(chance.uniform(1, 4))
    cluster.api.end_group(signal.SIGCONT)


# -- the broker ------------------------------------------------------------------------------


def kill_broker(cluster: Cluster, chance: random.Random) -> None:
    cluster.kill_broker()
    time.sleep(chance.uniform(0, 2))
    cluster.start_broker()


def flush_broker(cluster: Cluster, _: random.Random) -> None:
    with cluster.redis() as client:
        client.flushall()


def freeze_broker(cluster: Cluster, chance: random.Random) -> None:
    cluster.stop_broker(seconds=chance.uniform(1, 3))


def freeze_broker_connections(cluster: Cluster, chance: random.Random) -> None:
    cluster.proxy.freeze()
    time.sleep(chance.uniform(1, 3))
    cluster.proxy.thaw()


def cut_broker_connections(cluster: Cluster, _: random.Random) -> None:
    cluster.proxy.cut()


def send_odd_messages(cluster: Cluster, chance: random.Random) -> None:
    """Messages of other versions: unknown ids and tasks, other arguments, no arguments."""
    forms: tuple[dict[str, Any], ...] = (
        {"args": ["wrk_of_nobody"]},
        {"args": []},
        {"args": ["a", "b"]},
        {"args": [{"unit": 1}]},
        {"kwargs": {"unit": "wrk_1", "version": 2}},
        {"task": "winnow.shard", "args": ["wrk_1"]},
    )
    with cluster.redis() as client:
        for form in forms:
            client.lpush(QUEUE_NAME, message(**form))


def message(
    task: str = TASK_NAME, args: object = (), kwargs: object = None, **headers: object
) -> bytes:
    """Return a message as Celery writes it."""
    tag = random.randbytes(8).hex()
    properties = {
        "correlation_id": tag,
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": QUEUE_NAME},
        "priority": 0,
        "body_encoding": "utf-8",
        "delivery_tag": tag,
    }
    return orjson.dumps(
        {
            "body": orjson.dumps([args, kwargs or {}, {}]).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"lang": "py", "task": task, "id": tag, "root_id": tag, **headers},
            "properties": properties,
        }
    )


# -- the database ----------------------------------------------------------------------------


def restart_database(cluster: Cluster, chance: random.Random) -> None:
    cluster.restart_database("fast", pause=chance.uniform(0, 1))


def crash_database(cluster: Cluster, chance: random.Random) -> None:
    cluster.restart_database("immediate", pause=chance.uniform(0, 1))


def kill_backend(cluster: Cluster, _: random.Random) -> None:
    cluster.kill_backend()


def drop_database_connections(cluster: Cluster, _: random.Random) -> None:
    cluster.drop_connections()


FAULTS = (
    *(at_failpoint(point, "kill") for point in UNIT_POINTS),
    at_failpoint("unit.claimed", "kill-parent"),
    at_failpoint("unit.before_commit", "kill-parent"),
    at_failpoint("reconcile.before_commit", "kill"),
    at_failpoint("reconcile.after_commit", "kill"),
    at_failpoint("send.sent", "kill"),
    frozen_at("unit.claimed"),
    frozen_at("file.renamed"),
    frozen_at("unit.before_commit"),
    Fault("kill worker child", kill_worker_child),
    Fault("kill worker parent", kill_worker_parent),
    Fault("SIGTERM to worker", terminate_worker),
    Fault("stop whole worker past the lease", freeze_worker),
    Fault("kill API", kill_api),
    Fault("stop API", freeze_api),
    Fault("kill broker", kill_broker),
    Fault("FLUSHALL", flush_broker),
    Fault("stop broker", freeze_broker),
    Fault("freeze broker connections", freeze_broker_connections),
    Fault("cut broker connections", cut_broker_connections),
    Fault("odd messages", send_odd_messages),
    Fault("restart database", restart_database),
    Fault("crash database", crash_database),
    Fault("kill database backend", kill_backend),
    Fault("drop database connections", drop_database_connections),
)

# Points that only a caller's request, or an end, leads to: their orders wait for it.
WAITING = tuple(
    (point, "kill")
    for point in (
        "upload.renamed",
        "submit.before_commit@audit",
        "submit.after_commit@audit",
        "submit.before_commit@ranking",
        "submit.after_commit@ranking",
        "unit.before_commit@rank",
        "unit.after_commit@rank",
        "unit.before_commit@conclude",
        "unit.claimed@verify",
        "unit.claimed@aggregate",
        "unit.before_commit@aggregate",
        "webhook.claimed",
        "webhook.called",
    )
)
