"""The same influence by Winnow, by other libraries and by the loop: time, memory, and the result.

MiniLM-L6 with LoRA (r = 4) on the query and value projections, SST-2's lengths; what everyone
computes is the dot product of every training with every validation sample for every LoRA factor,
the gradients of both included, in float32 on one thread, in evaluation mode. Every run is a process
of its own; runs are interleaved. Told are the CPU seconds of the work itself (no imports, no
loading), and the peak of the process's memory above what it held before. The yardstick is a plain
epoch (forward, `loss.backward()`). Each is measured with batches of every size asked for, the
yardstick too, and told at its fastest. Every result is compared with Winnow's.

Run it: `.venv/bin/python -m pip install --no-deps -r requirements-peers.txt`, then
`.venv/bin/python -m benchmarks.peers`
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import CONTENDERS, Work
from benchmarks.gradients import build_batches, build_model, load_samples

OURS, YARDSTICK, LOOP = "winnow", "plain epoch", "loop"
LOOK_SECONDS = 0.01


def main() -> None:
    """Measure and print; or, as a child, do one contender's work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-train", type=int, default=1000)
    parser.add_argument("--num-validation", type=int, default=500)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _run_one(options)
        return
    names = list(dict.fromkeys([YARDSTICK, OURS, *options.contenders]))
    runs = [
        Run(name, size)
        for name in names
        # batches are nothing to the loop
        for size in (options.batch_sizes if name != LOOP else options.batch_sizes[:1])
    ]
    figures: dict[Run, list[tuple[float, float]]] = {run: [] for run in runs}
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="winnow-peers-") as folder:
        for _ in range(options.repeats):
            for run in runs:
                figures[run].append(_measure(run, options, Path(folder)))
                if run.name != YARDSTICK:
                    errors[run.name] = max(errors.get(run.name, 0), _difference(Path(folder), run))
    _print(figures, errors, options)


@dataclass(frozen=True)
class Run:
    """A contender with batches of some size."""

    name: str
    batch_size: int


def _measure(run: Run, options: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Return CPU seconds and megabytes of one contender, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.peers", "--one", run.name]
    command += ["--result", str(_result(folder, run)), "--batch-size", str(run.batch_size)]
    command += ["--num-train", str(options.num_train)]
    command += ["--num-validation", str(options.num_validation)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        raise SystemExit(f"{run} failed:\n{child.stderr[-3000:]}")
    figures = json.loads(child.stdout.splitlines()[-1])
    return figures["seconds"], figures["megabytes"]


def _run_one(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    _, texts, labels = load_samples()
    num_used = options.num_train + options.num_validation
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:num_used]
    chosen = order.tolist()
    texts, labels = [texts[i] for i in chosen], [labels[i] for i in chosen]
    split, size = options.num_validation, options.batch_size
    work = Work(
        build_model(),
        train=build_batches(texts[split:], labels[split:], max_samples=size),
        validation=build_batches(texts[:split], labels[:split], max_samples=size),
    )
    # one batch for nothing: what is imported or set up once is not counted
    CONTENDERS[options.one](Work(build_model(), work.train[-1:], work.validation[-1:]))
    with _PeakMemory() as memory:
        start = time.process_time()
        result = CONTENDERS[options.one](work)
        seconds = time.process_time() - start
    torch.save(result, options.result)
    print(json.dumps({"seconds": seconds, "megabytes": memory.megabytes}))


class _PeakMemory:
    """Looks at the resident memory again and again: how far it rises above the beginning."""

    def __enter__(self) -> Self:
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def megabytes(self) -> float:
        return (self._peak - self._start) / 1e6

    def _look(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)


def _result(folder: Path, run: Run) -> Path:
    return folder / f"{run.name}-{run.batch_size}.pt"


def _difference(folder: Path, run: Run) -> float:
    """Return the largest difference to ours, of each factor's largest influence."""
    ours = torch.load(_result(folder, Run(OURS, run.batch_size)))
    error_F = (ours - torch.load(_result(folder, run))).abs().amax(dim=(1, 2))
    return float((error_F / ours.abs().amax(dim=(1, 2))).max())


def _print(
    figures: dict[Run, list[tuple[float, float]]],
    errors: dict[str, float],
    options: argparse.Namespace,
) -> None:
    medians = {
        run: tuple(statistics.median(values) for values in zip(*measured, strict=True))
        for run, measured in figures.items()
    }
    for run, (spent, peak) in medians.items():
        print(f"{run.name}, batches of {run.batch_size}: {spent:.1f} CPU s, {peak:.0f} MB")
    names = list(dict.fromkeys(run.name for run in figures))
    best = {
        name: min((run for run in figures if run.name == name), key=lambda run: medians[run][0])
        for name in names
    }
    seconds = {name: medians[run][0] for name, run in best.items()}
    megabytes = {name: medians[run][1] for name, run in best.items()}
    table = Table(
        title=f"{options.num_train} training × {options.num_validation} validation samples, "
        f"each at its fastest, median of {options.repeats}"
    )
    table.add_column("contender")
    for heading in (
        "batch",
        "CPU s",
        "× plain epoch",
        "× Winnow",
        "peak MB",
        "× Winnow",
        "difference",
    ):
        table.add_column(heading, justify="right")
    for name in names:
        table.add_row(
            name,
            str(best[name].batch_size) if name != LOOP else "1",
            f"{seconds[name]:.1f}",
            f"{seconds[name] / seconds[YARDSTICK]:.2f}",
            f"{seconds[name] / seconds[OURS]:.2f}",
            f"{megabytes[name]:.0f}",
            f"{megabytes[name] / megabytes[OURS]:.1f}",
            f"{errors[name]:.0e}" if name in errors else "",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
