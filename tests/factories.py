"""Builders of what tests need, with sensible values for all that a test does not care about."""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from sqlalchemy import Engine, case, func, select, update

from app.audits.folders import audit_folder
from app.audits.models import (
    Audit,
    AuditState,
    RankedSample,
    Ranking,
    RankingState,
    TrainingSample,
    ValidationSample,
)
from app.audits.schemas import AuditRequest, RankingSpecification
from app.db import new_id, transaction
from app.settings import Settings
from app.work.models import Stage, WorkUnit
from app.work.repository import add_ranking_unit, add_units
from app.work.states import enter_ranking_state, enter_state, finish

TENANT = "default"
GROUPS = {"all": ["layer.0.query", "head"], "00": ["layer.0.query"], "CL": ["head"]}
CSV_TABLE = "text,label\ngood film,pos\nbad film,neg\nfine,pos\n"
CAUSAL_LM_REQUEST: dict[str, Any] = {"task": "causal_lm", "validation": None} | {
    "estimators": ["self_influence"],
    "ranking": {"estimator": "self_influence", "layers": "all", "aggregation": "mean"},
    "flag": {"fraction": 0.1},
}


def request_body(**changes: Any) -> dict[str, Any]:
    """Return the JSON of an audit that names only the hub, and so needs no files here."""
    return {
        "model": {"reference": "hf://org/model@main"},
        "train": {"reference": "hf://datasets/org/texts@main?split=train"},
        "validation": {"reference": "hf://datasets/org/texts@main?split=validation"},
        "fine_tune": {"epochs": 1},
        **changes,
    }


def stored_request(**changes: Any) -> dict[str, Any]:
    """Return a request as the database has it; what ranks is fixed where not said."""
    fixed = {"estimator": "grad_cosine", "layers": "all", "aggregation": "rank"}
    body = request_body(**{"flag": {"fraction": 0.1}, **changes})
    ranking = {"ranking": {**fixed, **changes.get("ranking", {})}}
    return AuditRequest.model_validate(body | ranking).stored()


def make_audit(engine: Engine, *, tenant: str = TENANT, **request_changes: Any) -> Audit:
    """Insert a queued audit with its first unit of work."""
    audit = Audit(
        id=new_id("aud"),
        tenant=tenant,
        request=stored_request(**request_changes),
        metadata_={},
        state_times={},
        version=0,
    )
    enter_state(audit, AuditState.QUEUED)
    with transaction(engine) as session:
        session.add(audit)
        session.flush()
        add_units(session, audit.id, Stage.PREPARE)
    return audit


def experiment_task(name: str = "reviews", **changes: Any) -> dict[str, Any]:
    """Return the JSON of an experiment's task that names only the hub."""
    test = {"reference": "hf://datasets/org/texts@main?split=test"}
    return {"name": name, **request_body(test=test), **changes}


def experiment_body(**changes: Any) -> dict[str, Any]:
    """Return the JSON of an experiment of one task and two seeds."""
    return {"tasks": [experiment_task()], "seeds": [0, 1], **changes}


def finish_experiment(
    engine: Engine, experiment_id: str, states: Sequence[AuditState | None]
) -> None:
    """End the audits of an experiment in their order; None, or a state on the way, leaves one.

    In those that succeed datainf beats grad_dot, the head the rest, and rank the others.
    """
    statement = select(Audit).where(Audit.experiment_id == experiment_id)
    with transaction(engine) as session:
        audits = session.scalars(statement.order_by(Audit.experiment_position)).all()
        for audit, state in zip(audits, states, strict=True):
            if state is None or not state.is_final:
                continue
            if state is AuditState.FAILED:
                audit.error_code = "unsupported_model"
                audit.error_message = "It did not work."
            if state is AuditState.SUCCEEDED:
                audit.summary = experiment_summary()
                audit.progress = 1.0
            finish(audit, state)


def experiment_summary() -> dict[str, Any]:
    """Return what an audit of an experiment tells, as far as the tables read it."""
    configurations, arms = [], []
    for place, (estimator, group) in enumerate(
        product(("grad_dot", "datainf"), ("all", "CL")), start=1
    ):
        share = place / 10
        ranking = {"estimator": estimator, "aggregation": "rank", "correct_only": False}
        detection = dict.fromkeys(("ndr_10", "ndr_20", "ndr_30", "auc_ndr"), share)
        configurations.append(ranking | {"layer_group": group, "detection": detection})
        arms.append(_arm(f"{estimator}/{group}/rank", share, ranking | {"layers": group}))
    for name in ("loss", "random", "oracle"):
        baseline = {"estimator": name, "aggregation": None, "correct_only": False}
        detection = dict.fromkeys(("ndr_10", "ndr_20", "ndr_30", "auc_ndr"), 0.5)
        configurations.append(baseline | {"layer_group": "all", "detection": detection})
    arms += [_arm(name, 0.6, None) for name in ("full", "random", "oracle")]
    loss = {"estimator": "loss", "layers": "all", "aggregation": "rank", "correct_only": False}
    arms.append(_arm("loss/all/rank", 0.7, loss))
    return {
        "layer_group_order": ["all", "CL"],
        "configurations": configurations,
        "cancellation": {"all": {"l1": 2.0, "l2": 1.5}, "CL": {"l1": 3.0, "l2": 2.5}},
        "verification": {"arms": arms},
    }


def _arm(name: str, accuracy: float, ranking: dict[str, Any] | None) -> dict[str, Any]:
    values = {"accuracy": accuracy, "macro_f1": accuracy, "loss": 1 - accuracy}
    metrics = {metric: {"mean": value, "values": [value]} for metric, value in values.items()}
    return {"name": name, "ranking": ranking, "num_train": 7, "metrics": metrics}


def make_ended_audit(
    engine: Engine, state: AuditState, *, tenant: str = TENANT, message: str = "It did not work."
) -> Audit:
    """Insert an audit that failed or was cancelled."""
    audit = make_audit(engine, tenant=tenant)
    with transaction(engine) as session:
        audit = session.merge(audit)
        if state is AuditState.FAILED:
            audit.error_code = "unsupported_model"
            audit.error_message = message
            audit.error_field = "model.reference"
        finish(audit, state)
    return audit


def make_finished_audit(
    engine: Engine,
    settings: Settings,
    *,
    tenant: str = TENANT,
    num_train: int = 10,
    has_labels: bool = True,
) -> Audit:
    """Insert a finished audit with its ranking, and write its files.

    Sample i stands at rank num_train - 1 - i with score rank / 10, so that index and rank differ;
    even samples are "pos", the rest "neg"; the two most suspect are flagged, the first is noisy.
    Without labels it is one of a causal language model without a validation set, and the most
    suspect sample is not finite.
    """
    audit = make_audit(engine, tenant=tenant, **({} if has_labels else CAUSAL_LM_REQUEST))
    ranking_id = new_id("rnk")
    ranking = Ranking(
        id=ranking_id,
        audit_id=audit.id,
        tenant=tenant,
        is_own=True,
        specification=audit.request["ranking"],
        flag=audit.request["flag"],
        state=RankingState.SUCCEEDED,
        progress=1.0,
        folder=Ranking.folder_of(ranking_id),
    )
    rows = [_suspect(rank, num_train - 1 - rank) for rank in range(num_train)]
    if not has_labels:
        nothing = dict.fromkeys(("given_label", "predicted_label"))
        rows = [row | nothing | {"non_finite": row["rank"] == 0} for row in rows]
    files = _write_files(audit_folder(settings.data_dir, audit.id) / ranking.folder, rows)
    detection = {"ndr_10": 1.0, "ndr_20": 1.0, "ndr_30": 1.0, "auc_ndr": 1.0}
    with transaction(engine) as session:
        audit = session.merge(audit)
        session.add(ranking)
        ranking.finished_at = func.now()
        session.flush()
        session.add_all(_training_sample(audit.id, row) for row in rows)
        num_validation = 3 if has_labels else 0
        session.add_all(_validation_sample(audit.id, index) for index in range(num_validation))
        session.add_all(_ranked_sample(ranking.id, row) for row in rows)
        audit.num_train = num_train
        audit.num_validation = num_validation
        audit.progress = 1.0
        audit.provenance = {"engine_version": "0.1.0", "device": "cpu", "num_shards": 1}
        audit.timings = {"prepare": 0.1, "gradients": 1.5}
        audit.influence_bytes = 1_000
        audit.summary = {
            "ranking_id": ranking.id,
            "num_flagged": 2,
            "labels": ["neg", "pos"] if has_labels else [],
            "validation_accuracy": 0.75 if has_labels else None,
            "train_accuracy": 0.8,
            "num_noisy": 1,
            "warnings": [],
            "files": files,
            "detection": detection,
            "layer_groups": GROUPS,
            "group_order": list(GROUPS),
            "layer_group_order": list(GROUPS),
            "configurations": [
                {
                    "layer_group": group,
                    "estimator": "grad_cosine",
                    "aggregation": "rank",
                    "correct_only": False,
                    "detection": detection,
                }
                for group in GROUPS
            ],
        }
        ranking.summary = {
            name: audit.summary[name]
            for name in (
                *("num_flagged", "warnings", "files", "detection"),
                *("layer_groups", "group_order", "layer_group_order", "configurations"),
            )
        }
        finish(audit, AuditState.SUCCEEDED)
        session.execute(update(WorkUnit).values(state="done").where(WorkUnit.audit_id == audit.id))
    return audit


def suggest_labels(engine: Engine, ranking_id: str) -> None:
    """Give a finished ranking what an audit with `flag: auto` says of its samples.

    Ranks 0 to 5 should rather have the other label, the rest their own; rank 4 has no suggestion.
    A sample at rank r is wrong with probability 1 - r / 10.
    """
    is_wrong = RankedSample.rank <= 5
    other = case((RankedSample.given_label == "pos", "neg"), else_="pos")
    suggested = case((is_wrong, other), else_=RankedSample.given_label)
    of_ranking = update(RankedSample).where(RankedSample.ranking_id == ranking_id)
    with transaction(engine) as session:
        session.execute(
            of_ranking.values(
                suggested_label=suggested,
                suggested_probability=0.75,
                noise_probability=1 - RankedSample.rank / 10.0,
            )
        )
        session.execute(of_ranking.where(RankedSample.rank == 4).values(suggested_label=None))


def make_ranking(
    engine: Engine, audit: Audit, *, settings: Settings | None = None, **specification: Any
) -> Ranking:
    """Insert a queued ranking of a finished audit with its unit of work.

    With settings it is finished, and orders the samples by their index: sample i at rank i.
    """
    ranking_id = new_id("rnk")
    request = RankingSpecification.model_validate(
        {
            "estimator": "grad_cosine",
            "layers": "all",
            "aggregation": "mean",
            **specification,
        }
    )
    ranking = Ranking(
        id=ranking_id,
        audit_id=audit.id,
        tenant=audit.tenant,
        specification=request.model_dump(mode="json"),
        flag={"fraction": None, "count": 1},
        folder=Ranking.folder_of(ranking_id),
        version=1,
    )
    with transaction(engine) as session:
        session.add(ranking)
        session.flush()
        add_ranking_unit(session, ranking)
        if settings is None:
            return ranking
        session.execute(update(WorkUnit).values(state="done").where(WorkUnit.stage == "rank"))
        rows = [
            _suspect(rank, rank) | {"flagged": rank < 1} for rank in range(audit.num_train or 0)
        ]
        folder = audit_folder(settings.data_dir, audit.id) / ranking.folder
        ranking.summary = {
            "num_flagged": 1,
            "warnings": [],
            "files": _write_files(folder, rows),
            "detection": None,
            "layer_groups": {"all": GROUPS["all"]},
            "group_order": ["all", "00", "CL"],
            "layer_group_order": ["all"],
            "configurations": [],
        }
        session.add_all(_ranked_sample(ranking.id, row) for row in rows)
        ranking.progress, ranking.seconds = 1.0, 0.5
        enter_ranking_state(ranking, RankingState.SUCCEEDED)
    return ranking


def _suspect(rank: int, index: int) -> dict[str, Any]:
    return {
        "rank": rank,
        "index": index,
        "text": f"sample {index}",
        "text_pair": None,
        "given_label": "pos" if index % 2 == 0 else "neg",
        "predicted_label": "neg",
        "predicted_probability": 0.75,
        "given_probability": 0.25,
        "loss": 1.5,
        "score": rank / 10,
        "flagged": rank < 2,
        "is_noisy": rank == 0,
        "non_finite": False,
    }


def _training_sample(audit_id: str, row: dict[str, Any]) -> TrainingSample:
    ranked = {"rank", "score", "flagged", "index"}
    fields = {name: value for name, value in row.items() if name not in ranked}
    return TrainingSample(audit_id=audit_id, sample_index=row["index"], **fields)


def _validation_sample(audit_id: str, index: int) -> ValidationSample:
    return ValidationSample(
        audit_id=audit_id,
        sample_index=index,
        text=f"validation {index}",
        text_pair=None,
        given_label="pos",
        predicted_label="pos",
        predicted_probability=0.9,
        loss=0.1,
    )


def _ranked_sample(ranking_id: str, row: dict[str, Any]) -> RankedSample:
    return RankedSample(
        ranking_id=ranking_id,
        rank=row["rank"],
        sample_index=row["index"],
        given_label=row["given_label"],
        score=row["score"],
        flagged=row["flagged"],
        group_scores=[row["score"], 0.5, -0.5],
        group_ranks=[row["rank"], 1, 2],
        harmed_validation=[2, 0] if row["given_label"] else [],
        harmed_influence=[-0.5, -0.25] if row["given_label"] else [],
        helped_validation=[1] if row["given_label"] else [],
        helped_influence=[0.5] if row["given_label"] else [],
    )


def _write_files(folder: Path, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "suspects.parquet")
    pyarrow.csv.write_csv(table, folder / "suspects.csv")
    (folder / "suspects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        name: {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        for name in ("parquet", "csv", "jsonl")
        for content in [(folder / f"suspects.{name}").read_bytes()]
    }


def long_ago() -> datetime:
    """Return a time that every lease and every key has outlived."""
    return datetime(2020, 1, 1, tzinfo=UTC)
