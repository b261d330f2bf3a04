"""What each further estimator costs: time of the gradient and influence stages of whole audits.

One audit with grad_dot alone, then one for every other estimator beside it, on the same adapter of
MiniLM (LoRA, r = 4, query and value), film reviews, one thread; CPU seconds of the stages
validation to influence, the median of several rounds. Gradients are computed once however many
estimators an audit has, so the difference is what an estimator adds.

Run it: `.venv/bin/python -m benchmarks.estimators`
"""

import argparse
import csv
import random
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from app.catalogue import ESTIMATORS
from app.work.models import Stage
from benchmarks.local_worker import LocalWorker, local_worker
from benchmarks.memory import MODEL, REVIEWS, write_adapter

TIMED = {Stage.VALIDATION, Stage.GRADIENTS, Stage.CURVATURE, Stage.INFLUENCE}
BASE = "grad_dot"


def main() -> None:
    """Measure every estimator and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-train", type=int, default=1000)
    parser.add_argument("--num-validation", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=sorted(ESTIMATORS), help="these alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [
        name
        for name, estimator in ESTIMATORS.items()
        if estimator.kind != "baseline" and "checkpoints" not in estimator.needs
        if name == BASE or not options.only or name in options.only
    ]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with local_worker(torch_threads=1) as worker:
        request = prepare(worker, options.num_train, options.num_validation)
        for _ in range(options.rounds):
            for name in names:
                seconds[name].append(measure(worker, {**request, **estimators(name)}))
    base = statistics.median(seconds[BASE])
    table = Table(
        title=f"{options.num_train:,} training × {options.num_validation} validation samples, "
        f"beside {BASE}"
    )
    for heading in ("estimator", "CPU s, median", "min to max", f"relative to {BASE} alone"):
        table.add_column(heading, justify="left" if heading == "estimator" else "right")
    for name, values in seconds.items():
        median = statistics.median(values)
        table.add_row(
            name,
            f"{median:.2f}",
            f"{min(values):.2f} to {max(values):.2f}",
            f"{median / base:.2f}",
        )
    Console(width=100).print(table)


def prepare(worker: LocalWorker, num_train: int, num_validation: int) -> dict[str, Any]:
    """Write adapter and tables and return the request of the audits."""
    write_adapter(worker.folder / "adapter")
    with REVIEWS.open(newline="") as file:
        rows = [(row["text"], int(row["label"])) for row in csv.DictReader(file)]
    rows = [row for row in rows if row[0].strip()]
    random.Random(0).shuffle(rows)
    parts = {"validation": rows[:num_validation], "train": rows[num_validation:][:num_train]}
    sources = {
        name: {
            "reference": worker.table(
                name, {"text": [text for text, _ in part], "label": [label for _, label in part]}
            )
        }
        for name, part in parts.items()
    }
    return {
        "model": {
            "reference": MODEL.as_uri(),
            "adapter": (worker.folder / "adapter").as_uri(),
        },
        "max_tokens": 128,
        **sources,
    }


def estimators(name: str) -> dict[str, Any]:
    """Return the part of a request that asks for an estimator beside the base."""
    return {"estimators": [BASE, name], "ranking": {"estimator": BASE}, "aggregations": ["mean"]}


def measure(worker: LocalWorker, request: dict[str, Any]) -> float:
    """Do an audit and return the CPU seconds of the timed stages."""
    total, last = 0.0, time.process_time()

    def after(stage: Stage) -> None:
        nonlocal total, last
        now = time.process_time()
        total += (now - last) * (stage in TIMED)
        last = now

    worker.run(request, after_unit=after)
    return total


if __name__ == "__main__":
    main()
