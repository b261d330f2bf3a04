"""One audit by one worker and by two, through the real service: what the second one is worth.

An API, PostgreSQL, a broker and the workers run as processes of their own, each worker with one
thread. Shards are as large as the service makes them by itself. What is compared is the clock time
of each stage, from its first unit's claim to its last unit's end, medians of interleaved repeats.
The machine needs a processor for each worker, and nothing else to do; how much it gives to two at
once is measured beside it, by the same gradients without a service. How many workers were busy says
what the service itself loses, whatever else the machine does: waits between units, and at the end.

    .venv/bin/python -m benchmarks.scale_out [--samples 3000] [--repeats 3]
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from app.work.models import Stage
from benchmarks import memory
from benchmarks.gradients import build_model, load_samples
from tests.chaos.cluster import Cluster, running
from workers.influence.batching import collate
from workers.influence.gradients import GradientExtractor

WORKERS = (1, 2)
SHARED_OUT = (Stage.GRADIENTS, Stage.CURVATURE, Stage.INFLUENCE)
SETTINGS = {"WINNOW_DEVICE": "cpu", "WINNOW_LOG_FORMAT": "json"}
MACHINE_SECONDS = 8.0
MAX_TOKENS = 64


@dataclass(frozen=True)
class StageTimes:
    """How a stage went: clock time, and the seconds of its units, in the order of their ends."""

    wall: float
    units: list[float]

    @property
    def busy(self) -> float:
        """How many workers were at a unit, on average: what many are worth on equal machines."""
        return sum(self.units) / self.wall


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    runs: dict[int, list[dict[Stage, StageTimes]]] = {number: [] for number in WORKERS}
    machine: list[float] = []
    with tempfile.TemporaryDirectory(prefix="winnow-scale-") as name:
        folder = Path(name)
        write_files(folder / "files", options.samples, options.validation)
        for repeat in range(options.repeats):
            machine.append(machine_speed_up())
            for number in WORKERS:
                runs[number].append(audit_times(folder, f"{repeat}-{number}", number))
                tell(number, runs[number][-1])
    print_table(runs, machine)


def write_files(folder: Path, num_train: int, num_validation: int) -> None:
    """Write MiniLM, a LoRA adapter and the two tables: SST-2, or movie reviews."""
    folder.mkdir()
    copytree(memory.MINILM, folder / "model")
    memory.write_adapter(folder / "adapter")
    _, texts, labels = load_samples()
    parts = {"validation": (0, num_validation), "train": (num_validation, num_train)}
    for name, (first, count) in parts.items():
        rows = slice(first, first + count)
        table = pa.table({"text": texts[rows], "label": labels[rows]})
        pq.write_table(table, folder / f"{name}.parquet")


def audit_times(folder: Path, name: str, num_workers: int) -> dict[Stage, StageTimes]:
    """Do the audit with fresh processes, after a small one that warms them up."""
    place = folder / name
    place.mkdir()
    data_dir = place / "data"
    with running(
        place,
        data_dir=data_dir,
        files=folder / "files",
        settings=SETTINGS,
        worker_dirs=[data_dir] * num_workers,
    ) as cluster:
        finish(cluster, {"train": {"reference": reference_to(cluster, "validation")}})
        return stage_times(cluster, finish(cluster, {"estimators": ["grad_cosine", "datainf"]}))


def finish(cluster: Cluster, changes: dict[str, Any]) -> str:
    """Submit an audit, wait for its end and return its id."""
    references = {
        name: {"reference": reference_to(cluster, name)} for name in ("train", "validation")
    }
    model = {name: (cluster.files / name).as_uri() for name in ("model", "adapter")}
    body = {
        "model": {"reference": model["model"], "adapter": model["adapter"]},
        **references,
        "ranking": {"estimator": "grad_cosine", "layers": "all", "aggregation": "rank"},
        "flag": {"fraction": 0.1},
        "max_tokens": MAX_TOKENS,
        **changes,
    }
    answer = cluster.http.post("/v1/audits", json=body)
    answer.raise_for_status()
    audit_id = str(answer.json()["id"])
    while not (audit := cluster.http.get(f"/v1/audits/{audit_id}").json())["done"]:
        time.sleep(1)
    if audit["state"] != "succeeded":
        raise SystemExit(f"The audit failed: {audit}\n{cluster.tail()}")
    return audit_id


def reference_to(cluster: Cluster, name: str) -> str:
    """Return the reference to one of the tables."""
    return (cluster.files / f"{name}.parquet").as_uri()


def stage_times(cluster: Cluster, audit_id: str) -> dict[Stage, StageTimes]:
    """Return how long each stage took, as the rows of its units say."""
    rows = cluster.query(
        "SELECT stage, extract(epoch FROM started_at) AS started,"
        " extract(epoch FROM finished_at) AS finished FROM work_units"
        " WHERE audit_id = :audit ORDER BY finished_at",
        audit=audit_id,
    )
    return {
        Stage(stage): StageTimes(
            wall=float(
                max(row.finished for row in rows if row.stage == stage)
                - min(row.started for row in rows if row.stage == stage)
            ),
            units=[float(row.finished - row.started) for row in rows if row.stage == stage],
        )
        for stage in dict.fromkeys(row.stage for row in rows)
    }


def machine_speed_up() -> float:
    """Return how many times as many gradients two processes take as one, without any service."""
    context = multiprocessing.get_context("spawn")
    counts = []
    for number in WORKERS:
        with context.Pool(number) as pool:
            pool.map(_batches_taken, [1.0] * number)  # imports, and warms up
            counts.append(sum(pool.map(_batches_taken, [MACHINE_SECONDS] * number, chunksize=1)))
    return counts[1] / counts[0]


def _batches_taken(seconds: float) -> int:
    torch.set_num_threads(1)
    model = build_model()
    extractor = GradientExtractor(model)
    batch = collate([[101, *range(2000, 2030), 102]] * 64, pad_id=0, device="cpu")
    labels_B = torch.zeros(64, dtype=torch.int64)
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        extractor.extract(batch, labels_B)
        count += 1
    return count


def tell(num_workers: int, times: dict[Stage, StageTimes]) -> None:
    """Print one run, so that a long benchmark says how far it is."""
    stages = ", ".join(f"{stage} {of.wall:.1f} s" for stage, of in times.items())
    print(f"{num_workers} worker(s): {stages}", flush=True)


def print_table(runs: dict[int, list[dict[Stage, StageTimes]]], machine: Sequence[float]) -> None:
    """Print every stage with one worker and with two."""
    table = Table(title="Seconds of one audit")
    for column in ("stage", "units", "1 worker", "2 workers", "ratio", "busy of 2"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for label, stages in rows_of(runs):
        one, two = (
            [sum(run[stage].wall for stage in stages) for run in runs[number]] for number in WORKERS
        )
        busy = [
            sum(run[stage].busy * run[stage].wall for stage in stages) / clock
            for run, clock in zip(runs[2], two, strict=True)
        ]
        table.add_row(
            label,
            str(sum(len(runs[2][0][stage].units) for stage in stages)),
            f"{statistics.median(one):.1f}",
            f"{statistics.median(two):.1f}",
            f"{statistics.median(a / b for a, b in zip(one, two, strict=True)):.2f}",
            f"{statistics.median(busy):.2f}",
        )
    Console(width=100).print(table)
    print(f"two processes without a service: {statistics.median(machine):.2f} times one")


def rows_of(runs: dict[int, list[dict[Stage, StageTimes]]]) -> Iterator[tuple[str, list[Stage]]]:
    """Yield the rows of the table: every stage, those that are shared out, and all."""
    stages = list(runs[1][0])
    yield from ((stage.value, [stage]) for stage in sorted(stages, key=list(Stage).index))
    yield "shared out", [stage for stage in stages if stage in SHARED_OUT]
    yield "all", stages


if __name__ == "__main__":
    main()
