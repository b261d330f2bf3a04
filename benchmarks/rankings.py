"""How long a further ranking of a finished audit takes, and how much memory: every aggregation.

Made-up influence files of 20,000 training samples × 24 modules × 500 validation samples lie in a
temporary folder. Each ranking runs in a process of its own, as a worker ranks: scores of every
layer group, the related validation samples, the files. Rows in the database are not counted; COPY
of 20,000 takes a second. CPU seconds are those of all threads: on a machine that does other things
they say more than the clock does.

    .venv/bin/python -m benchmarks.rankings [--aggregations rank vote] [--json rankings.json]

With `--constants` each aggregation runs at four sizes instead: one, and that with twice the
training samples, twice the modules, twice the validation samples. The table has CPU nanoseconds a
cell (a sample, a module and a validation sample), which would stay the same if time were linear in
all three, and what the costliest of the four makes of 1,000,000 × 24 × 500.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from app.audits.schemas import Configuration
from app.catalogue import AggregationName
from workers.celery_app import LIBRARIES
from workers.influence.estimators import ESTIMATORS
from workers.pipeline.artifacts import Artifacts, write_tensors
from workers.pipeline.layout import ModelLayout
from workers.pipeline.publish import RankedSet, write_files
from workers.pipeline.samples import SCHEMA, SampleSet, write_samples
from workers.pipeline.scores import Scorer
from workers.pipeline.training_facts import TrainingFacts
from workers.pipeline.validation_choice import ValidationChoice

ESTIMATOR = "grad_cosine"
SAMPLES_PER_SHARD = 1000
BANDS = 4
BASE = {"num_train": 10_000, "num_modules": 12, "num_validation": 250}
MILLION = (1_000_000, 24, 500)


def make_layout(num_modules: int) -> dict[str, Any]:
    """Return the layout of a model of query and value projections, two a block, and no head."""
    blocks = num_modules // 2
    layers = [module // 2 for module in range(num_modules)]
    step = -(-blocks // BANDS)
    bands = {
        f"{first:02d}-{min(first + step, blocks) - 1:02d}": [
            module for module, layer in enumerate(layers) if first <= layer < first + step
        ]
        for first in range(0, blocks, step)
    }
    return {
        "modules": [f"module.{module}" for module in range(num_modules)],
        "layers": layers,
        "groups": {"all": list(range(num_modules)), **bands},
        "blocks": blocks,
        "word_embedding": None,
    }


def make_audit(
    artifacts: Artifacts, *, num_train: int, num_modules: int, num_validation: int
) -> None:
    """Write what an audit leaves behind: samples, facts and influence by shard."""
    draw = torch.Generator().manual_seed(0)
    rows = [
        {
            "text": f"a text of some words, number {index}, as people write them in reviews",
            "text_pair": None,
            "label": index % 2,
            "is_noisy": index % 5 == 0,
            "input_ids": [1, 2, 3],
            "completion_start": None,
        }
        for index in range(num_train)
    ]
    batch = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
    write_samples(artifacts.train, iter([batch]), tick=lambda _: None)
    order_T = torch.randperm(num_train, generator=draw)
    for shard, index in enumerate(order_T.split(SAMPLES_PER_SHARD)):
        facts = {
            "index": index,
            "loss": torch.rand(len(index), generator=draw),
            "predicted": torch.zeros(len(index), dtype=torch.int32),
            "predicted_probability": torch.ones(len(index)),
            "given_probability": torch.ones(len(index)),
            "squared_norm": torch.rand(num_modules, len(index), generator=draw),
            "is_finite": torch.ones(len(index), dtype=torch.bool),
        }
        write_tensors(artifacts.facts(shard), facts)
        influence = torch.randn(num_modules, num_validation, len(index), generator=draw)
        write_tensors(artifacts.influence(ESTIMATOR, shard), {"influence": influence})


def rank(
    folder: Path, shape: dict[str, int], aggregation: str, *, correct_only: bool
) -> dict[str, Any]:
    """Make one ranking and return seconds by step, and the peak of the memory."""
    torch.set_num_threads(2)
    artifacts = Artifacts(folder, "aud_1")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu_started = time.perf_counter(), time.process_time()
    train = SampleSet(artifacts.train)
    facts = TrainingFacts(artifacts, -(-shape["num_train"] // SAMPLES_PER_SHARD))
    num_validation = shape["num_validation"]
    every = torch.ones(num_validation, dtype=torch.bool)
    scorer = Scorer(
        artifacts,
        facts,
        layout=ModelLayout.of(make_layout(shape["num_modules"])),
        validation=ValidationChoice(every, torch.arange(num_validation) % 5 > 0, every.long()),
        is_noisy_T=train.is_noisy_T,
    )
    ranking = Configuration(estimator=ESTIMATOR, aggregation=aggregation, correct_only=correct_only)
    estimator = ESTIMATORS[ESTIMATOR]
    scored = scorer.score_all([estimator], aggregations=[], ranking=ranking)
    scored_at = time.perf_counter()
    related = scorer.find_related(estimator, layers=ranking.layers)
    related_at = time.perf_counter()
    ranked = RankedSet(
        samples=train,
        facts=facts,
        labels=["neg", "pos"],
        group_scores=scored.group_scores,
        layers=ranking.layers,
        num_flagged=len(train) // 10,
        related=related,
    )
    files = write_files(ranked, artifacts.results(f"rnk_{aggregation}"))
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "aggregation": f"{aggregation}{' -c' if correct_only else ''}",
        "seconds": ended - started,
        "cpu": time.process_time() - cpu_started,
        "scores": scored_at - started,
        "related": related_at - scored_at,
        "files": ended - related_at,
        "peak_mb": peak / 1000,
        "above_imports_mb": (peak - before) / 1000,
        "sha256": files["jsonl"]["sha256"],
    }


def in_process(
    folder: Path, shape: dict[str, int], aggregation: str, *, correct_only: bool
) -> dict[str, Any]:
    """Rank in a fresh process: the peak of its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        keywords = {"correct_only": correct_only}
        row: dict[str, Any] = pool.apply(rank, (folder, shape, aggregation), keywords)
    return row


def print_constants(aggregations: Sequence[str]) -> None:
    """Print nanoseconds a cell at four sizes, and what they make of a million samples."""
    shapes = {"base": BASE} | {f"2 × {name[4:]}": BASE | {name: 2 * BASE[name]} for name in BASE}
    seconds: dict[str, list[float]] = {name: [] for name in aggregations}
    for shape in shapes.values():
        with tempfile.TemporaryDirectory(prefix="winnow-benchmark-") as name:
            folder = Path(name)
            make_audit(Artifacts(folder, "aud_1"), **shape)
            for aggregation in aggregations:
                row = in_process(folder, shape, aggregation, correct_only=False)
                seconds[aggregation].append(row["cpu"] / math.prod(shape.values()))
    print(f"| ns a cell | {' | '.join(shapes)} | 1 M × 24 × 500, CPU min |")
    print("|---" * (len(shapes) + 2) + "|")
    for aggregation, per_cell in seconds.items():
        cells = " | ".join(f"{1e9 * value:.1f}" for value in per_cell)
        minutes = max(per_cell) * math.prod(MILLION) / 60
        print(f"| {aggregation} | {cells} | {minutes:.0f} |", flush=True)


def main() -> None:
    """Make the files, rank by every aggregation, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-train", type=int, default=20_000)
    parser.add_argument("--num-modules", type=int, default=24)
    parser.add_argument("--num-validation", type=int, default=500)
    parser.add_argument(
        "--aggregations", nargs="*", default=[name.value for name in AggregationName]
    )
    parser.add_argument("--correct-only", action="store_true")
    parser.add_argument("--constants", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.update(LIBRARIES)  # as in a worker; the children inherit it
    if options.constants:
        print_constants(options.aggregations)
        return
    shape = {
        name: getattr(options, name) for name in ("num_train", "num_modules", "num_validation")
    }
    table = []
    with tempfile.TemporaryDirectory(prefix="winnow-benchmark-") as name:
        folder = Path(name)
        make_audit(Artifacts(folder, "aud_1"), **shape)
        print("| aggregation | seconds | CPU s | scores | related | files | peak MB | its own MB |")
        print("|---|---|---|---|---|---|---|---|")
        for aggregation in options.aggregations:
            row = in_process(folder, shape, aggregation, correct_only=options.correct_only)
            table.append(row)
            print(
                f"| {row['aggregation']} | {row['seconds']:.1f} | {row['cpu']:.1f} | "
                f"{row['scores']:.1f} | {row['related']:.1f} | {row['files']:.1f} | "
                f"{row['peak_mb']:.0f} | {row['above_imports_mb']:.0f} |",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
