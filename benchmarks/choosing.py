"""What Winnow chooses by itself, beside every fixed configuration: auto, consensus, and the cut.

(a) Seven tasks: MiniLM with LoRA on SST-2, TREC, MRPC and CoLA with 20 % of the labels flipped, on
    human_ratings with the errors that people made; SmolLM2-135M on SST-2 with flips, and on the
    sentence transformations with exchanged completions. One audit a task and seed computes all
    candidates, what auto chooses, and the consensus; AUC-NDR of each, beside the best fixed
    configuration in hindsight and cleanlab's ranking.
(b) The cut: SST-2 and TREC with no noise, 5, 10, 20 and 40 %: the estimated share and its interval,
    and how often a sample was wrong at each stated probability.
(c) The cost: CPU time of a whole audit of SST-2 with one fixed configuration, and of auto.

Whole audits by the service's own stages.

Run it: `.venv/bin/python -m pip install -c constraints.txt 'cleanlab>=2.9'`, then
`.venv/bin/python -m benchmarks.choosing --json choosing.json` (two hours on two cores; `--part cut`
or `--tasks sst2 --seeds 0` for less); the data lie in ../shared/data.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from app.audits.models import Audit
from benchmarks import detection, language_model
from benchmarks.local_worker import LocalWorker, local_worker, minutes_since
from workers.pipeline.samples import SampleSet
from workers.pipeline.scores import detection as measure

ESTIMATORS = ["grad_dot", "grad_cosine", "datainf", "gauss_newton", "ekfac", "self_influence"]
TASKS = (*detection.SETS, "smollm2_sst2", "smollm2_grammars")
SIZES = {"smollm2_sst2": (600, 120), "smollm2_grammars": (450, 60)}
NUM_TRAIN, NUM_VALIDATION = 1500, 300
LEVELS = (0.0, 0.05, 0.1, 0.2, 0.4)
CUT_TASKS = ("sst2", "trec")
FIXED = {"ranking": {"estimator": "grad_dot", "layers": "all", "aggregation": "mean"}}
CUT_TRAIN, CUT_VALIDATION = 1000, 500
NUM_BINS = 5
BASELINES = {"loss", "random", "oracle", "confidence"}
Row = dict[str, Any]


def main() -> None:
    """Run the audits and print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--part", choices=["all", "choice", "cut", "cost"], default="all")
    parser.add_argument("--json", type=Path, help="keep every number here")
    parser.add_argument("--from-json", type=Path, help="print the tables of an earlier run")
    options = parser.parse_args()
    if options.from_json:
        print_tables(json.loads(options.from_json.read_text()))
        return
    found: dict[str, list[Row]] = {"choice": [], "cut": [], "cost": []}
    started = time.monotonic()

    def keep(part: str, row: Row) -> None:
        found[part].append(row)
        print(f"<!-- {part} {row['task']} {row['seed']}: {minutes_since(started)} -->", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found))

    with local_worker() as worker:
        for task in options.tasks if options.part in {"all", "choice"} else ():
            for seed in options.seeds:
                keep(
                    "choice", describe(worker, task, seed, worker.run(request(worker, task, seed)))
                )
        for task in CUT_TASKS if options.part in {"all", "cut"} else ():
            for level in LEVELS:
                keep("cut", cut(worker, task, options.seeds[0], level))
        for seed in options.seeds if options.part in {"all", "cost"} else ():
            keep("cost", cost(worker, "sst2", seed))
    print_tables(found)


def request(worker: LocalWorker, task: str, seed: int) -> dict[str, Any]:
    """Return the audit of one task: everything that can be chosen, and the consensus."""
    chosen: dict[str, Any] = {
        "estimators": ESTIMATORS,
        "probes": {"fraction": 0.2, "seed": seed},
        "seed": seed,
    }
    if task in SIZES:
        name = task.removeprefix("smollm2_")
        sets = language_model.draw(name, seed, *SIZES[task])
        is_causal = name == "grammars"
        fields = ("prompt", "completion") if is_causal else ("text", "label")
        return chosen | {
            "task": "causal_lm" if is_causal else "classification",
            "model": {"reference": language_model.MODEL.as_uri()},
            **sources(worker, ({field: each[field] for field in fields} for each in sets)),
            "fine_tune": {"epochs": 2, "seed": seed, "batch_size": 8},
            "plant_noise": {"fraction": 0.2, "seed": seed},
            "max_tokens": 96,
        }
    drawn = detection.draw(
        task, seed, detection.Options(NUM_TRAIN, NUM_VALIDATION, 3, [seed], [task])
    )
    return chosen | {
        "model": {"reference": detection.MODEL.as_uri()},
        **sources(worker, drawn),
        "fine_tune": {"epochs": 3, "seed": seed},
        "plant_noise": None if "noise" in drawn[0] else {"fraction": 0.2, "seed": seed},
        "max_tokens": 128,
    }


def sources(worker: LocalWorker, sets: Iterable[dict[str, list[Any]]]) -> dict[str, Any]:
    """Write both sets and return the request's parts that name them."""
    return {
        name: {"reference": worker.table(name, columns), "columns": {key: key for key in columns}}
        for name, columns in zip(("train", "validation"), sets, strict=True)
    }


def describe(worker: LocalWorker, task: str, seed: int, audit: Audit) -> Row:
    """Return what an audit chose beside what there was."""
    summary = audit.summary
    fixed = {
        key(row["estimator"], row["layer_group"], row["aggregation"], row["correct_only"]): row[
            "detection"
        ]["auc_ndr"]
        for row in summary["configurations"]
    }
    auto = audit.summary["choice"]["members"][0]
    consensus = worker.rank(audit, {"estimator": "consensus"})
    row: Row = {
        "task": task,
        "seed": seed,
        "fixed": fixed,
        "auto": name_of(auto),
        "members": consensus.summary["choice"]["members"],
        "consensus": consensus.summary["detection"]["auc_ndr"],
        "share": summary["noise"],
        "noise": summary["num_noisy"] / audit.num_train if audit.num_train else None,
        "timings": audit.timings,
        "reliability": reliability(worker, audit),
    }
    if audit.request["task"] == "classification":
        samples = SampleSet(worker.artifacts(audit).train)
        score_T = torch.from_numpy(detection.cleanlab_scores(samples)).float()
        measured = measure(score_T, samples.is_noisy_T)
        row["cleanlab"] = measured["auc_ndr"] if measured else None
    return row


def key(estimator: str, layers: str, aggregation: str | None, correct_only: bool) -> str:  # noqa: FBT001
    """Return the name of a configuration."""
    return " ".join([estimator, layers, aggregation or "", "-c" if correct_only else ""]).strip()


def name_of(row: Row) -> str:
    """Return the name of a configuration that the probes chose."""
    aggregation = "" if row["estimator"] in BASELINES else row["aggregation"]
    return key(row["estimator"], row["layers"], aggregation, row["correct_only"])


def reliability(worker: LocalWorker, audit: Audit) -> list[Row]:
    """Return how often samples were wrong, by stated probability, in bins of equal width."""
    folder = worker.artifacts(audit).results(audit.summary["ranking_id"])
    table = pq.read_table(
        folder / "suspects.parquet", columns=["noise_probability", "is_noisy"]
    ).to_pydict()
    pairs = [
        (probability, noisy)
        for probability, noisy in zip(table["noise_probability"], table["is_noisy"], strict=True)
        if probability is not None and noisy is not None
    ]
    bins = []
    for place in range(NUM_BINS):
        inside = [
            (probability, noisy)
            for probability, noisy in pairs
            if min(NUM_BINS - 1, int(probability * NUM_BINS)) == place
        ]
        if inside:
            bins.append(
                {
                    "count": len(inside),
                    "stated": statistics.mean(probability for probability, _ in inside),
                    "found": statistics.mean(noisy for _, noisy in inside),
                }
            )
    return bins


def cut(worker: LocalWorker, task: str, seed: int, level: float) -> Row:
    """Return how much noise an audit finds at a known level."""
    drawn = detection.draw(
        task, seed, detection.Options(CUT_TRAIN, CUT_VALIDATION, 3, [seed], [task])
    )
    audit = worker.run(
        {
            "model": {"reference": detection.MODEL.as_uri()},
            **sources(worker, drawn),
            "fine_tune": {"epochs": 3, "seed": seed},
            "plant_noise": {"fraction": level, "seed": seed} if level else None,
            "ranking": {"estimator": "grad_cosine", "layers": "all", "aggregation": "rank"},
            "max_tokens": 128,
            "seed": seed,
        }
    )
    return {
        "task": task,
        "seed": seed,
        "level": level,
        "share": audit.summary["noise"],
        "flagged": audit.summary["num_flagged"] / (audit.num_train or 1),
        "reliability": reliability(worker, audit) if level else [],
    }


def cost(worker: LocalWorker, task: str, seed: int) -> Row:
    """Return the CPU seconds of an audit with one fixed configuration, and with auto."""
    row: Row = {"task": task, "seed": seed}
    import_module("workers.pipeline.rank")  # what a worker imports once is no audit's cost
    for name, choice in (("fixed", FIXED), ("auto", {})):
        asked = {**request(worker, task, seed), "estimators": "auto", **choice}
        started = time.process_time()
        audit = worker.run(asked)
        row[name] = time.process_time() - started
        row[f"{name}_timings"] = audit.timings
    return row


def print_tables(found: dict[str, list[Row]]) -> None:
    """Print everything in Markdown."""
    if found["choice"]:
        print_choice(found["choice"])
    if found["cut"]:
        print_cut(found["cut"])
    for row in found.get("cost", []):
        print(
            f"{row['task']}, seed {row['seed']}: {row['fixed']:.0f} CPU s with a fixed "
            f"configuration, {row['auto']:.0f} with auto: {row['auto'] / row['fixed']:.2f} x\n"
        )
    if reliable := [*found["choice"], *found["cut"]]:
        print_reliability(reliable)


def print_choice(rows: list[Row]) -> None:
    """Print what was chosen beside what there was."""
    print("| task, seed | loss | confidence | cleanlab | best fixed | auto | of it | consensus |")
    print("|---" * 8 + "|")
    columns: dict[str, list[float]] = {}
    for row in rows:
        fixed = {name: value for name, value in row["fixed"].items() if name != "oracle all"}
        best = max(fixed, key=lambda name: fixed[name])
        values = {
            "loss": fixed["loss all"],
            "confidence": fixed.get("confidence all"),
            "cleanlab": row.get("cleanlab"),
            "best": fixed[best],
            "auto": fixed[row["auto"]],
            "share": fixed[row["auto"]] / fixed[best],
            "consensus": row["consensus"],
        }
        for name, value in values.items():
            columns.setdefault(name, []).extend([] if value is None else [value])
        print(
            f"| {row['task']}, {row['seed']} | {percent(values['loss'])} | "
            f"{percent(values['confidence'])} | {percent(values['cleanlab'])} | "
            f"{percent(values['best'])} ({best}) | {percent(values['auto'])} ({row['auto']}) | "
            f"{percent(values['share'])} % | {percent(values['consensus'])} |"
        )
    means = {name: statistics.mean(found) if found else None for name, found in columns.items()}
    print(
        f"| mean | {percent(means['loss'])} | {percent(means['confidence'])} | "
        f"{percent(means['cleanlab'])} | {percent(means['best'])} | {percent(means['auto'])} | "
        f"{percent(means['share'])} % | {percent(means['consensus'])} |\n"
    )
    named = set.intersection(*(set(row["fixed"]) for row in rows)) - {"oracle all"}
    ranked = sorted(
        ((statistics.mean(row["fixed"][name] for row in rows), name) for name in named),
        reverse=True,
    )
    print("Fixed configurations that every task has, by their mean:", end=" ")
    print(", ".join(f"{name} {percent(value)}" for value, name in ranked[:5]), end=".\n\n")


def print_cut(rows: list[Row]) -> None:
    """Print the estimated shares."""
    print("| task | planted | estimated | interval | flagged |")
    print("|---" * 5 + "|")
    for row in rows:
        share = row["share"] or {"share": None, "low": None, "high": None}
        print(
            f"| {row['task']} | {percent(row['level'])} % | {percent(share['share'])} % | "
            f"{percent(share['low'])} to {percent(share['high'])} % | {percent(row['flagged'])} % |"
        )
    print()


def print_reliability(rows: list[Row]) -> None:
    """Print how often a sample was wrong at each stated probability, over all audits."""
    print("| stated probability | samples | were wrong |")
    print("|---|---|---|")
    for place in range(NUM_BINS):
        bins = [
            each
            for row in rows
            for each in row["reliability"]
            if min(NUM_BINS - 1, int(each["stated"] * NUM_BINS)) == place
        ]
        if not bins:
            continue
        count = sum(each["count"] for each in bins)
        stated, wrong = (
            sum(each["count"] * each[name] for each in bins) / count for name in ("stated", "found")
        )
        print(f"| {percent(stated)} % | {count:,} | {percent(wrong)} % |")
    print()


def percent(value: float | None) -> str:
    """Return a share in percent."""
    return "–" if value is None or value != value else f"{100 * value:.1f}"  # noqa: PLR0124 - NaN


if __name__ == "__main__":
    main()
