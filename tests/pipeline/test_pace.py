"""Shards follow the speed that was measured, and no result follows the shards."""

import math
import time
from datetime import timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, func

from app.db import transaction
from app.jobs import CPU_QUEUE_NAME, QUEUE_NAME
from app.work.models import Stage, WorkerHeartbeat
from tests.pipeline.conftest import Models
from tests.pipeline.workplace import Workplace, results
from workers.pipeline.memory import BatchLimits, plan_shards
from workers.pipeline.pace import (
    LEAST_SECONDS,
    MAX_SHARDS,
    MOST_SAMPLES_PER_SHARD,
    Pace,
    count_workers,
    largest_shard,
    plan_tokens,
)


def plan(num_tokens: int, *, num_workers: int = 1, pace: float = 100.0) -> int:
    return plan_tokens(
        num_tokens, tokens_per_second=pace, shard_seconds=45, num_workers=num_workers
    )


def test_a_large_audit_has_shards_of_the_asked_time() -> None:
    assert plan(10_000_000) == 45 * 100
    assert plan(10_000_000, pace=20_000) == 45 * 20_000


def test_a_small_one_is_cut_for_the_workers_there_are() -> None:
    """4 shards for each, but none of less than 5 s."""
    assert plan(8_000) == 45 * 100  # one worker waits for nobody
    assert plan(16_000, num_workers=2) == 16_000 // 8
    assert plan(16_000, num_workers=50) == LEAST_SECONDS * 100
    assert plan(300, num_workers=2) == LEAST_SECONDS * 100


def test_a_huge_one_has_larger_shards_rather_than_more() -> None:
    assert plan(10**9) == 10**9 // MAX_SHARDS


def test_a_shard_has_so_many_samples_at_most_however_fast_a_worker_is() -> None:
    assert largest_shard(10**6) == MOST_SAMPLES_PER_SHARD
    assert largest_shard(10**9) == 10**9 // MAX_SHARDS


def test_the_pace_is_the_median_of_what_went_well() -> None:
    pace = Pace()
    assert pace.tokens_per_second is None
    for seconds in (0.2, 0.01, 0.01):  # the first one warms up
        with pace.measure(1):
            time.sleep(seconds)
    with pytest.raises(MemoryError), pace.measure(10**9):
        raise MemoryError
    assert 20 < (pace.tokens_per_second or 0) <= 100


@given(
    length_T=st.lists(st.integers(1, 40), min_size=1, max_size=120).map(torch.tensor),
    tokens=st.integers(1, 2000),
    samples=st.integers(1, 130),
)
def test_shards_have_as_many_tokens_each_and_can_be_cut_again_from_the_plan(
    length_T: torch.Tensor, tokens: int, samples: int
) -> None:
    limits = BatchLimits(96)
    shards = plan_shards(length_T, limits, samples_per_shard=samples, tokens_per_shard=tokens)
    largest_batch, total = 96, int(length_T.sum())
    even = total / math.ceil(total / tokens)
    assert all(int(length_T[shard].sum()) <= even + largest_batch for shard in shards)
    if samples >= len(length_T):
        assert all(int(length_T[shard].sum()) >= even - largest_batch for shard in shards)
        assert len(shards) <= math.ceil(total / tokens)
    most = min(samples, max(map(len, shards)))  # what is kept of the plan
    again = plan_shards(length_T, limits, samples_per_shard=most, tokens_per_shard=tokens)
    assert [shard.tolist() for shard in again] == [shard.tolist() for shard in shards]


def test_an_audit_is_cut_by_its_own_pace_and_has_the_same_files(
    workplace: Workplace, models: Models
) -> None:
    def audit(**changes: float) -> tuple[int, dict[str, str]]:
        place = workplace.with_settings(samples_per_shard=0, **changes)
        done = place.succeed(
            place.submit(models.classifier, **place.reviews(), estimators=["ekfac", "grad_dot"])
        )
        units = [unit for unit in place.units(done.id) if unit.stage == Stage.GRADIENTS]
        assert len(units) == done.provenance["num_shards"]
        assert done.provenance["tokens_per_second"] > 0
        return len(units), results(done)

    whole, expected = audit()
    short, found = audit(shard_seconds=1e-4)
    assert whole < short
    assert found == expected


def test_only_live_workers_of_shards_are_counted(engine: Engine) -> None:
    with transaction(engine) as session:
        for name, queues, age in (
            ("gpu", [QUEUE_NAME], 1),
            ("all", [QUEUE_NAME, CPU_QUEUE_NAME], 1),
            ("rankings", [CPU_QUEUE_NAME], 1),
            ("gone", [QUEUE_NAME], 600),
        ):
            seen = func.now() - timedelta(seconds=age)
            session.add(
                WorkerHeartbeat(
                    name=name, device="cpu", queues=queues, engine_version="1", seen_at=seen
                )
            )
    assert count_workers(engine, stale_seconds=60) == 2


def test_the_estimate_counts_shards_and_not_samples_where_pace_decides(
    workplace: Workplace, models: Models
) -> None:
    """What every shard keeps is estimated for a handful of them, as it is when a number is set."""
    data = workplace.reviews(num_train=60)
    told = []
    for size in (0, 1000):
        place = workplace.with_settings(samples_per_shard=size)
        audit = place.succeed(place.submit(models.classifier, **data, estimators=["ekfac"]))
        told.append(audit.provenance["estimate"]["disk_bytes"])
    assert told[0] == told[1]
