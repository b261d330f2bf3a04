"""Clean and retrain: what a second fine-tuning without the first suspects adds to a ranking.

The consensus ranks; the model is fine-tuned again without the lowest 15 %, and every training
sample's loss under the new model is fused with the consensus. The service does it: the second
fine-tuning is an arm of `verify`, and its test set is the training set itself.

Run it: `OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.retraining --json retraining.json`
(an hour on one core; `--tasks sst2 --seeds 0` for less); the data lie in ../shared/data.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from app.audits.models import Audit
from benchmarks.choosing import TASKS, Row, percent, request
from benchmarks.local_worker import LocalWorker, local_worker, minutes_since
from workers.influence.fusion import fuse_by_rank
from workers.influence.noise import flip_labels, swap_completions
from workers.pipeline.artifacts import read_tensors
from workers.pipeline.samples import SampleSet
from workers.pipeline.scores import detection

DEFAULT_TASKS = ("sst2", "trec", "mrpc", "human_ratings", "smollm2_sst2")
FRACTION = 0.15
NOISE = 0.2


def main() -> None:
    """Run the audits and print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(DEFAULT_TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="keep every number here")
    options = parser.parse_args()
    rows: list[Row] = []
    started = time.monotonic()
    with local_worker() as worker:
        for task in options.tasks:
            for seed in options.seeds:
                audit = worker.run(with_retraining(worker, request(worker, task, seed)))
                rows.append({"task": task, "seed": seed, **compare(worker, audit)})
                print(f"<!-- {task} {seed}: {minutes_since(started)} -->", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows))
    print_table(rows)


def with_retraining(worker: LocalWorker, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the request with a consensus, and a verification that answers for the training set.

    Noise is planted here and not by the service, so that the test set has the same wrong targets.
    """
    path = worker.folder / "train.parquet"
    columns = pq.read_table(path).to_pydict()
    planted = asked["plant_noise"]
    if planted:
        field = "completion" if "completion" in columns else "label"
        columns[field], columns["noise"] = plant(columns[field], field, seed=planted["seed"])
    train, test = (
        {
            "reference": worker.table(name, {field: columns[field] for field in fields}),
            "columns": {field: field for field in fields},
        }
        for name, fields in (("noisy", list(columns)), ("again", columns.keys() - {"noise"}))
    )
    return asked | {
        "train": train,
        "test": test,
        "plant_noise": None,
        "ranking": {"estimator": "consensus"},
        "verify": {"arms": ["filtered"], "fraction": FRACTION, "seeds": [asked["seed"]]},
    }


def plant(values: list[Any], field: str, *, seed: int) -> tuple[list[Any], list[bool]]:
    """Return the values with a fifth of them wrong, and which."""
    classes = sorted(set(values))
    place = {value: number for number, value in enumerate(classes)}
    value_T = torch.tensor([place[value] for value in values])
    if field == "label":
        wrong_T, is_noisy_T = flip_labels(
            value_T, num_classes=len(classes), fraction=NOISE, seed=seed
        )
        return [classes[number] for number in wrong_T.tolist()], is_noisy_T.tolist()
    source_T, is_noisy_T = swap_completions(value_T, fraction=NOISE, seed=seed)
    return [values[number] for number in source_T.tolist()], is_noisy_T.tolist()


def compare(worker: LocalWorker, audit: Audit) -> Row:
    """Return the AUC-NDR of the rankings before and after."""
    artifacts = worker.artifacts(audit)
    table = pq.read_table(
        artifacts.results(audit.summary["ranking_id"]) / "suspects.parquet",
        columns=["index", "score", "loss"],
    ).sort_by("index")
    consensus_T, before_T = (
        torch.from_numpy(np.array(table[name], dtype=np.float32)) for name in ("score", "loss")
    )
    after_T = read_tensors(artifacts.outcome(0))["loss"]
    rankings = {
        "loss": -before_T,
        "consensus": consensus_T,
        "new loss": -after_T,
        "consensus + new loss": fuse_by_rank([consensus_T, -after_T], [1, 1]),
        "consensus + loss + new loss": fuse_by_rank([consensus_T, -before_T, -after_T], [1, 1, 1]),
        "2 x consensus + new loss": fuse_by_rank([consensus_T, -after_T], [2, 1]),
    }
    is_noisy_T = SampleSet(artifacts.train).is_noisy_T
    found = {name: detection(score_T, is_noisy_T) for name, score_T in rankings.items()}
    return {name: measured["auc_ndr"] for name, measured in found.items() if measured}


def print_table(rows: list[Row]) -> None:
    """Print a row for every audit, and the means."""
    names = [name for name in rows[0] if name not in {"task", "seed"}]
    print(f"\n| task, seed | {' | '.join(names)} |")
    print("|---" * (1 + len(names)) + "|")
    for row in rows:
        cells = " | ".join(percent(row[name]) for name in names)
        print(f"| {row['task']}, {row['seed']} | {cells} |")
    means = " | ".join(percent(statistics.mean(row[name] for row in rows)) for name in names)
    print(f"| mean | {means} |")


if __name__ == "__main__":
    main()
