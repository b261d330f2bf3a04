"""Where the design breaks: up to 1,000 workers and 10^9 samples, with measured constants.

A discrete-event simulation of one audit's gradient stage, from the claim of its first shard to the
end of its last, and the parts before and after it that one worker does alone. Workers claim a
shard, compute, put its files where all see them, and say that it is done. Claims, ends and signs
of life wait for each other at the audit's row in the database; files share one store's bandwidth.

The constants are measured in the same run: calls of the database with some thousand units
(`benchmarks.claims`), and an audit of MiniLM with LoRA by one worker with one thread: its
gradients, the bytes that it leaves, and what it takes to prepare and to rank, all in seconds of
the processor. Two are assumed: a
store of 1 GB/s, and by --samples-per-second what a worker with a GPU does.

    .venv/bin/python -m benchmarks.simulation [--samples-per-second 2000]
"""

import argparse
import heapq
import itertools
import math
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from app.audits.folders import audit_folder
from app.work.models import Stage
from benchmarks import claims, memory
from benchmarks.gradients import load_samples
from benchmarks.local_worker import local_worker
from workers.lease import REPORTS_PER_HEARTBEAT
from workers.pipeline.pace import largest_shard, plan_tokens

SAMPLES = (10**6, 10**7, 10**8, 10**9)
WORKERS = (1, 10, 100, 1_000)
STORE_BYTES_PER_SECOND = 1e9
FULL = 0.9  # a queue that is hardly ever empty
MEASURED = {"num_train": 2_000, "num_validation": 100}


@dataclass(frozen=True)
class Constants:
    """What was measured, or is assumed.

    Attributes:
        samples_per_second: gradients of one worker.
        spread: standard deviation of the logarithm of a shard's time.
        shard_seconds: how long a shard shall take.
        bytes_per_sample: of the files that the gradient stage leaves.
        bytes_per_second: of the store, all workers together.
        call_seconds: of the database, for a claim, a report or an end each, without units.
        call_seconds_per_unit: and for each unit of the stage, which they count.
        beat_seconds: of a sign of life without a report.
        heartbeat_seconds: between two signs of life of a worker; a third of it between reports.
        serial_seconds_per_sample: of one worker: to prepare a sample before, and to score it after.
    """

    samples_per_second: float
    spread: float = 0.05
    shard_seconds: float = 45.0
    bytes_per_sample: float = 0.0
    bytes_per_second: float = math.inf
    call_seconds: float = 0.0
    call_seconds_per_unit: float = 0.0
    beat_seconds: float = 0.0
    heartbeat_seconds: float = 3.0
    serial_seconds_per_sample: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How an audit went.

    Attributes:
        num_units: shards.
        stage_seconds: from the first claim to the last end.
        efficiency: computing time of all workers, over what they were there for.
        database: how busy the audit's row was, signs of life included; above 1 they come too late.
        store: how busy the store was.
        serial_seconds: what one worker does alone, before and after.
    """

    num_units: int
    stage_seconds: float
    efficiency: float
    database: float
    store: float
    serial_seconds: float

    @property
    def limit(self) -> str:
        """What holds it back most."""
        if self.serial_seconds > self.stage_seconds:
            return "preparing and ranking, by one worker"
        if self.database > FULL:
            return "the database"
        if self.store > FULL:
            return "the store"
        return "computing"


class Queue:
    """A server that does one thing after the other."""

    def __init__(self, *, slowness: float = 1.0) -> None:
        self._slowness = slowness
        self._free_at = 0.0
        self.busy = 0.0

    def serve(self, at: float, seconds: float) -> float:
        """Return when something that comes at a time and takes some seconds is done."""
        took = seconds * self._slowness
        self.busy += took
        self._free_at = max(at, self._free_at) + took
        return self._free_at


def simulate(constants: Constants, *, num_samples: int, num_workers: int, seed: int = 0) -> Outcome:
    """Simulate one audit."""
    units = num_units(constants, num_samples, num_workers)
    computing = num_samples / constants.samples_per_second / units
    call = constants.call_seconds + units * constants.call_seconds_per_unit
    reports = min(num_workers, units, REPORTS_PER_HEARTBEAT) / constants.heartbeat_seconds
    beats = min(num_workers, units) / constants.heartbeat_seconds - reports
    beating = reports * call + beats * constants.beat_seconds
    database = Queue(slowness=1 / max(1e-3, 1 - beating))  # what signs of life leave of it
    store = Queue()
    put = num_samples * constants.bytes_per_sample / units / constants.bytes_per_second
    draw = random.Random(seed)
    # a worker's next step and when: claim, files, end
    order = itertools.count()
    events = [(0.0, next(order), "claim") for _ in range(min(num_workers, units))]
    heapq.heapify(events)
    claimed, ended, computed = 0, 0.0, 0.0
    while events:
        now, _, step = heapq.heappop(events)
        if step == "claim":
            if claimed == units:
                continue
            claimed += 1
            took = computing * draw.lognormvariate(0.0, constants.spread)
            computed += took
            after = (database.serve(now, call) + took, next(order), "files")
        elif step == "files":
            after = (store.serve(now, put), next(order), "end")
        else:
            ended = database.serve(now, call)
            after = (ended, next(order), "claim")
        heapq.heappush(events, after)
    return Outcome(
        num_units=units,
        stage_seconds=ended,
        efficiency=computed / (num_workers * ended),
        database=beating + database.busy * (1 - min(beating, 1 - 1e-3)) / ended,
        store=store.busy / ended,
        serial_seconds=num_samples * constants.serial_seconds_per_sample,
    )


def num_units(constants: Constants, num_samples: int, num_workers: int) -> int:
    """Return into how many shards the service cuts an audit (`workers.pipeline.pace`)."""
    a_shard = plan_tokens(
        num_samples,  # of one token each
        tokens_per_second=constants.samples_per_second,
        shard_seconds=constants.shard_seconds,
        num_workers=num_workers,
    )
    return math.ceil(num_samples / min(a_shard, largest_shard(num_samples)))


def measured() -> Constants:
    """Return the constants of this machine."""
    with claims.database() as url:
        few, many = (claims.measure(url, units=units, claimers=1) for units in (1_000, 10_000))
    calls = [(of.claim + of.renew + of.complete) / 3 for of in (few, many)]
    per_unit = max(0.0, (calls[1] - calls[0]) / (many.units - few.units))
    _, texts, labels = load_samples()
    with local_worker(torch_threads=1) as worker:
        memory.write_adapter(worker.folder / "adapter")
        tables, first = {}, 0
        for name, number in (("train", "num_train"), ("validation", "num_validation")):
            rows = slice(first, first + MEASURED[number])
            tables[name] = worker.table(name, {"text": texts[rows], "label": labels[rows]})
            first += MEASURED[number]
        seconds: dict[Stage, float] = defaultdict(float)
        before = time.process_time()

        def count(stage: Stage) -> None:
            nonlocal before
            now = time.process_time()
            seconds[stage] += now - before
            before = now

        audit = worker.run(
            {
                "model": {
                    "reference": memory.MINILM.as_uri(),
                    "adapter": (worker.folder / "adapter").as_uri(),
                },
                **{name: {"reference": reference} for name, reference in tables.items()},
                "estimators": ["grad_cosine"],
                "ranking": {"estimator": "grad_cosine", "layers": "all", "aggregation": "rank"},
                "flag": {"fraction": 0.1},
                "max_tokens": 64,
            },
            after_unit=count,
        )
        folder = audit_folder(worker.settings.data_dir, audit.id)
        parts = [*(folder / "influence").rglob("*.*"), *(folder / "facts").rglob("*.*")]
        num_bytes = sum(path.stat().st_size for path in parts)
    num_train = MEASURED["num_train"]
    return Constants(
        samples_per_second=num_train / seconds[Stage.GRADIENTS],
        bytes_per_sample=num_bytes / num_train,
        bytes_per_second=STORE_BYTES_PER_SECOND,
        call_seconds=max(0.0, calls[0] - few.units * per_unit),
        call_seconds_per_unit=per_unit,
        beat_seconds=few.beat,
        serial_seconds_per_sample=(seconds[Stage.PREPARE] + seconds[Stage.AGGREGATE]) / num_train,
    )


def main() -> None:
    """Measure, simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples-per-second", type=float, help="Of a worker; else measured.")
    parser.add_argument("--heartbeat-seconds", type=float, default=3.0)
    options = parser.parse_args()
    constants = replace(measured(), heartbeat_seconds=options.heartbeat_seconds)
    print(constants)
    if options.samples_per_second:
        constants = replace(constants, samples_per_second=options.samples_per_second)
    print_table(constants, SAMPLES, WORKERS)


def print_table(constants: Constants, samples: Sequence[int], workers: Sequence[int]) -> None:
    """Print what each size of audit takes with each number of workers."""
    table = Table(title=f"{constants.samples_per_second:,.0f} samples a second and worker")
    for column in ("samples", "workers", "shards", "hours", "efficiency", "database", "store"):
        table.add_column(column, justify="right")
    table.add_column("alone, hours", justify="right")
    table.add_column("held back by")
    for num_samples, num_workers in itertools.product(samples, workers):
        found = simulate(constants, num_samples=num_samples, num_workers=num_workers)
        table.add_row(
            f"{num_samples:.0e}",
            f"{num_workers:,}",
            f"{found.num_units:,}",
            # a queue that only grows comes to no end, and a simulation of it says no time
            f"{found.stage_seconds / 3600:.2f}" if found.database <= 1 else "never",
            f"{found.efficiency:.2f}",
            f"{found.database:.2f}",
            f"{found.store:.2f}",
            f"{found.serial_seconds / 3600:.2f}",
            found.limit,
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
