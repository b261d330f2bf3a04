"""What effort fast finds beside effort exact: the same audits of `benchmarks.detection`, twice.

MiniLM with LoRA, and for `grammars` SmolLM2-135M with completions that were exchanged; of every
data set the AUC-NDR × 100 of what Winnow chooses by itself, of the
consensus, of the best configuration in hindsight and of the loss, and the CPU seconds of the stage
of gradients (with the embedded database and torch on one thread).

    .venv/bin/python -m benchmarks.effort [--sets sst2 trec …] [--seeds 0]
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.work.models import Stage
from benchmarks import language_model
from benchmarks.detection import MODEL, SETS, Options, draw
from benchmarks.local_worker import LocalWorker, local_worker

EFFORTS = ("exact", "fast")
ESTIMATORS = ["grad_dot", "grad_cosine", "datainf", "gauss_newton", "ekfac"]
CONSENSUS = {"estimator": "consensus", "layers": "auto", "aggregation": "auto"}
GRAMMARS = "grammars"
BASELINES = {"loss", "random", "oracle", "confidence"}


def main() -> None:
    """Run the audits and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=[*SETS, GRAMMARS], default=[*SETS, GRAMMARS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num-train", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="keep every number here")
    options = parser.parse_args()
    run = Options(options.num_train, 500, 3, options.seeds, options.sets)
    rows: list[dict[str, Any]] = []
    with local_worker(torch_threads=1) as worker:
        for name in run.sets:
            for seed in run.seeds:
                rows.append({"set": name, "seed": seed} | _both(worker, name, seed, run))
                print(rows[-1], flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows))
    _print(rows)


def _request(worker: LocalWorker, name: str, seed: int, options: Options) -> dict[str, Any]:
    if name == GRAMMARS:
        sets = language_model.draw(name, seed, *language_model.SIZES[name])
        asked = language_model.request_of(worker, name, sets, seed=seed, epochs=2)
        return asked | {"estimators": ESTIMATORS}
    train, validation = draw(name, seed, options)
    return {
        "model": {"reference": MODEL.as_uri()},
        "train": {
            "reference": worker.table("train", train),
            "columns": {field: field for field in train},
        },
        "validation": {
            "reference": worker.table("validation", validation),
            "columns": {field: field for field in validation},
        },
        "fine_tune": {"epochs": options.epochs, "seed": seed},
        "plant_noise": None if "noise" in train else {"fraction": 0.2, "seed": seed},
        "estimators": ESTIMATORS,
        "max_tokens": 128,
        "seed": seed,
    }


def _both(worker: LocalWorker, name: str, seed: int, options: Options) -> dict[str, Any]:
    """Audit one data set with either effort."""
    request = _request(worker, name, seed, options)
    found: dict[str, Any] = {}
    for effort in EFFORTS:
        seconds = dict.fromkeys(Stage, 0.0)
        before = time.process_time()

        def after_unit(stage: Stage, seconds: dict[Stage, float] = seconds) -> None:
            nonlocal before
            now = time.process_time()
            seconds[stage] += now - before
            before = now

        audit = worker.run(request | {"effort": effort}, after_unit)
        consensus = worker.rank(audit, CONSENSUS)
        table = {
            (row["estimator"], row["layer_group"], row["aggregation"], row["correct_only"]): row[
                "detection"
            ]["auc_ndr"]
            for row in audit.summary["configurations"]
        }
        found[effort] = {
            "auto": audit.summary["detection"]["auc_ndr"],
            "consensus": consensus.summary["detection"]["auc_ndr"],
            "best": max(auc for key, auc in table.items() if key[0] not in BASELINES),
            "loss": next(auc for key, auc in table.items() if key[0] == "loss"),
            "compared": audit.summary["num_compared"],
            "gradients": seconds[Stage.GRADIENTS],
            "all stages": sum(seconds.values()),
        }
    return found


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="AUC-NDR × 100, exact / fast")
    table.add_column("data set, seed")
    measures = ("auto", "consensus", "best", "loss")
    for heading in (*measures, "compared", "gradients, CPU s", "all stages, CPU s"):
        table.add_column(heading, justify="right")
    for row in rows:
        exact, fast = (row[effort] for effort in EFFORTS)
        table.add_row(
            f"{row['set']}, {row['seed']}",
            *(f"{100 * exact[name]:.1f} / {100 * fast[name]:.1f}" for name in measures),
            f"{exact['compared']} / {fast['compared']}",
            *(f"{exact[name]:.0f} / {fast[name]:.0f}" for name in ("gradients", "all stages")),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
