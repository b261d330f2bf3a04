"""How large a shard is: what a worker does in the time that one shall take, as measured.

The pace is measured once, where the validation gradients are taken, and the plan that follows from
it is stored; results do not depend on it.

Shapes: N samples.
"""

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from sqlalchemy import Engine, func, literal, select
from sqlalchemy.orm import Session

from app.jobs import QUEUE_NAME
from app.settings import Settings
from app.work.models import WorkerHeartbeat

SHARDS_PER_WORKER = 4
"""So many at least, where there are several workers: who is done first waits for little."""
LEAST_SECONDS = 5.0
"""A shard takes at least so long, however small the audit: claiming and loading cost a part."""
SAMPLES_PER_SHARD = 1000
"""Where no pace is known."""
MOST_SAMPLES_PER_SHARD = 20_000
"""What is kept of a shard's samples until its end, some kilobytes each, stays small."""
MAX_SHARDS = 20_000
"""Beyond it shards get larger instead: the database counts a stage's units at every one's end."""


class Pace:
    """Tokens a second of passes over samples, measured batch by batch."""

    def __init__(self) -> None:
        self._measured: list[float] = []

    @contextmanager
    def measure(self, num_tokens: int) -> Iterator[None]:
        """Measure the block as a pass over so many tokens; one that raises does not count."""
        started = time.perf_counter()
        yield
        self._measured.append(num_tokens / max(time.perf_counter() - started, 1e-9))

    @property
    def tokens_per_second(self) -> float | None:
        """The median: the first batches warm up. None where nothing was measured."""
        return statistics.median(self._measured) if self._measured else None


def most_samples(num_samples: int, settings: Settings, *, is_measured: bool = True) -> int:
    """Return how many samples a shard may have at most.

    Args:
        num_samples: of all shards together.
        settings: may say so.
        is_measured: whether shards are cut by the pace.
    """
    if settings.samples_per_shard:
        return settings.samples_per_shard
    return largest_shard(num_samples) if is_measured else SAMPLES_PER_SHARD


def largest_shard(num_samples: int) -> int:
    """Return how many of some samples a shard that is cut by the pace may have."""
    return max(MOST_SAMPLES_PER_SHARD, math.ceil(num_samples / MAX_SHARDS))


def plan_tokens(
    num_tokens: int, *, tokens_per_second: float, shard_seconds: float, num_workers: int
) -> int:
    """Return how many tokens a shard shall have.

    Args:
        num_tokens: of all samples.
        tokens_per_second: of one worker.
        shard_seconds: how long a shard shall take.
        num_workers: that share the work.
    """
    seconds = shard_seconds
    if num_workers > 1:
        fair = num_tokens / tokens_per_second / (SHARDS_PER_WORKER * num_workers)
        seconds = min(shard_seconds, max(LEAST_SECONDS, fair))
    return max(1, math.ceil(max(seconds * tokens_per_second, num_tokens / MAX_SHARDS)))


def count_workers(engine: Engine, *, stale_seconds: float) -> int:
    """Return how many workers take shards; who was silent for so long is none."""
    alive = select(func.count()).where(
        WorkerHeartbeat.seen_at > func.now() - timedelta(seconds=stale_seconds),
        literal(QUEUE_NAME) == func.any(WorkerHeartbeat.queues),
    )
    with Session(engine) as session:
        return session.scalar(alive) or 0
