"""The simulation of many workers, where what comes out can be said by a formula."""

import math
from dataclasses import replace

import pytest

from benchmarks.simulation import Constants, Outcome, num_units, simulate

EVEN = Constants(samples_per_second=100.0, spread=0.0)
NUM_SAMPLES = 1_000_000


def run(constants: Constants, *, workers: int, samples: int = NUM_SAMPLES) -> Outcome:
    return simulate(constants, num_samples=samples, num_workers=workers)


@pytest.mark.parametrize("workers", [1, 2, 7, 1000])
def test_without_overhead_workers_take_rounds_of_equal_shards(workers: int) -> None:
    found = run(EVEN, workers=workers)
    rounds = math.ceil(found.num_units / workers)
    of_one = NUM_SAMPLES / 100.0 / found.num_units
    assert found.stage_seconds == pytest.approx(rounds * of_one)
    assert found.efficiency == pytest.approx(found.num_units / (rounds * workers))
    assert (found.database, found.store) == (0.0, 0.0)


def test_one_worker_waits_for_nobody_but_itself() -> None:
    """Each shard is claimed, computed, put and ended, one after the other."""
    constants = Constants(
        samples_per_second=100.0,
        spread=0.0,
        bytes_per_sample=1000.0,
        bytes_per_second=1e6,
        call_seconds=0.25,
        heartbeat_seconds=math.inf,
    )
    found = run(constants, workers=1)
    assert found.stage_seconds == pytest.approx(
        NUM_SAMPLES / 100.0 + NUM_SAMPLES * 1000.0 / 1e6 + found.num_units * 2 * 0.25
    )


def test_a_slow_store_is_what_is_waited_for() -> None:
    constants = Constants(1e9, spread=0.0, bytes_per_sample=1000.0, bytes_per_second=1e6)
    found = run(constants, workers=100, samples=10**9)
    assert found.stage_seconds == pytest.approx(10**9 * 1000 / 1e6, rel=0.01)
    assert found.store == pytest.approx(1.0, abs=0.01)
    assert found.limit == "the store"


def test_a_slow_database_is_what_is_waited_for() -> None:
    """A claim and an end for each shard, however many workers there are."""
    constants = Constants(100.0, spread=0.0, call_seconds=10.0, heartbeat_seconds=math.inf)
    found = run(constants, workers=1000)
    assert found.stage_seconds == pytest.approx(found.num_units * 2 * 10.0, rel=0.05)
    assert found.database == pytest.approx(1.0, abs=0.05)
    assert found.limit == "the database"


def test_signs_of_life_alone_can_fill_the_database() -> None:
    """1,000 workers that need 10 ms every 3 s are more than it has; one report a second is not."""
    constants = Constants(100.0, call_seconds=0.01, beat_seconds=0.01)
    assert run(constants, workers=100, samples=10**7).database < 0.5
    assert run(constants, workers=1000, samples=10**7).database > 3
    assert run(replace(constants, beat_seconds=0.0), workers=1000, samples=10**7).database < 1


def test_shards_are_cut_as_the_service_cuts_them() -> None:
    assert num_units(EVEN, 45 * 100 * 80, 1) == 80
    assert num_units(EVEN, 45 * 100 * 80, 100) == 400  # four for each worker
    assert num_units(EVEN, 10**9, 1000) == 20_000
