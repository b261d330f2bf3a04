"""The last stage: scores, metrics, the ranking, and its publication in one transaction."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from app.audits.models import Ranking
from app.db import new_id
from workers.pipeline.artifacts import read_json, read_tensors
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.prepare import Prepared
from workers.pipeline.publish import RankedSet, copy_rows, write_files
from workers.pipeline.samples import SampleSet
from workers.pipeline.scores import TrainingFacts, detection, find_related, score_all
from workers.pipeline.validation import estimators_of


def aggregate(context: StageContext) -> StageOutput:
    """Rank the training samples and publish: files first, then rows and state together."""
    artifacts, request = context.artifacts, context.request
    ranking = request.ranking
    prepared = Prepared.read(artifacts.prepared)
    labels = [str(label) for label in prepared.labels]
    train, validation = SampleSet(artifacts.train), SampleSet(artifacts.validation)
    facts = TrainingFacts(artifacts, context.provenance["num_shards"])
    validation_facts = read_tensors(artifacts.validation_facts)
    is_correct_V = validation_facts["predicted"] == validation.label_T
    layout: Mapping[str, Any] = read_json(artifacts.modules)
    groups: dict[str, list[int]] = layout["groups"]
    scored = score_all(
        artifacts,
        facts,
        estimators=estimators_of(context),
        ranking=ranking,
        groups=groups,
        is_correct_V=is_correct_V,
        is_noisy_T=train.is_noisy_T,
        seed=request.seed,
        tick=context.hold.tick,
    )
    num_flagged = request.flag.number(len(train))
    ranked = RankedSet(
        samples=train,
        facts=facts,
        labels=labels,
        group_scores=scored.group_scores,
        layers=ranking.layers,
        num_flagged=num_flagged,
        related=find_related(
            artifacts, facts, estimator=ranking.estimator, modules=groups[ranking.layers]
        ),
    )
    context.hold.keep_alive()
    files = write_files(ranked, artifacts.results)
    artifacts.remove_scratch()
    ranking_id = new_id("rnk")
    audit_id, tenant = context.claim.audit_id, context.tenant
    specification = ranking.model_dump(mode="json")

    def write(session: Session) -> None:
        session.add(
            Ranking(id=ranking_id, audit_id=audit_id, tenant=tenant, specification=specification)
        )
        session.flush()
        copy_rows(
            session,
            audit_id=audit_id,
            ranking_id=ranking_id,
            ranked=ranked,
            validation=validation,
            validation_facts=validation_facts,
        )

    noisy_T = train.is_noisy_T
    return StageOutput(
        columns={
            "summary": {
                "ranking_id": ranking_id,
                "num_flagged": num_flagged,
                "labels": labels,
                "validation_accuracy": float(is_correct_V.double().mean()),
                "train_accuracy": float((facts.predicted_T == train.label_T).double().mean()),
                "num_noisy": int(noisy_T.sum()) if noisy_T is not None else None,
                "warnings": scored.warnings,
                "files": files,
                "detection": detection(scored.group_scores[ranking.layers], noisy_T),
                "group_order": list(scored.group_scores),
                "layer_groups": {
                    group: [layout["modules"][module] for module in members]
                    for group, members in groups.items()
                },
                "configurations": scored.configurations,
            }
        },
        write=write,
    )
