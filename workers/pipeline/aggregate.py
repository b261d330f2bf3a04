"""From influence to the ranking: scores, metrics, and the publication in one transaction."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sqlalchemy import func
from sqlalchemy.orm import Session
from torch import Tensor

from app.audits.folders import influence_bytes
from app.audits.models import Ranking, RankingState
from workers.influence.aggregation import lower_half
from workers.influence.layer_groups import UnknownLayers
from workers.pipeline.arms import plan_verification
from workers.pipeline.artifacts import read_tensors
from workers.pipeline.cancelling import describe_cancellation
from workers.pipeline.checkpoints import finite_at_checkpoints
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.estimating import estimators_of
from workers.pipeline.failures import AuditRefused
from workers.pipeline.layout import ModelLayout
from workers.pipeline.non_finite import check_share, name_rows, no_samples, warn_of
from workers.pipeline.prepare import Prepared
from workers.pipeline.publish import RANKING_SUMMARY, RankedSet, copy_rows, write_files
from workers.pipeline.samples import SampleSet
from workers.pipeline.scores import Scorer, ValidationChoice, detection
from workers.pipeline.tokenise import truncation_warnings
from workers.pipeline.training_facts import TrainingFacts


def aggregate(context: StageContext) -> StageOutput:
    """Rank the training samples and publish: files first, then rows and state together."""
    artifacts, request = context.artifacts, context.request
    ranking = request.ranking
    labels = [str(label) for label in Prepared.read(artifacts.prepared).labels]
    train = SampleSet(artifacts.train)
    validation = SampleSet(artifacts.validation) if request.validation else None
    facts = TrainingFacts(artifacts, context.provenance["num_shards"])
    check_share(context, facts.is_finite_T, name="training")
    validation_facts = read_tensors(artifacts.validation_facts) if validation else {}
    layout = ModelLayout.read(artifacts.modules)
    scorer = Scorer(
        artifacts,
        facts,
        layout=layout,
        validation=choose_validation(validation, validation_facts),
        num_checkpoints=context.provenance.get("num_checkpoints", 0),
        is_noisy_T=train.is_noisy_T,
        seed=request.seed,
        tick=context.hold.step,
    )
    estimators = estimators_of(context)
    (ranking_estimator,) = (item for item in estimators if item.name == ranking.estimator)
    try:
        scored = scorer.score_all(
            estimators,
            aggregations=request.aggregations,
            ranking=ranking,
            layer_groups=request.layer_groups,
        )
        related = scorer.find_related(ranking_estimator, layers=ranking.layers)
    except UnknownLayers as error:
        raise AuditRefused("unknown_layers", str(error), field="ranking.layers") from error
    num_flagged = request.flag.number(len(train))
    ranked = RankedSet(
        samples=train,
        facts=facts,
        labels=labels,
        group_scores=scored.group_scores,
        layers=ranking.layers,
        num_flagged=num_flagged,
        related=related,
    )
    provenance = {}
    if request.verify is not None:
        plan = plan_verification(
            context,
            request.verify,
            train=train,
            facts=facts,
            scorer=scorer,
            estimators=estimators,
            score_T=scored.group_scores[ranking.layers],
            table=scored.configurations,
        )
        provenance["num_trainings"] = len(plan.trainings)
    context.hold.keep_alive()
    # of the unit, so that a second try writes the same files to the same place
    ranking_id = f"rnk_{context.claim.unit_id.partition('_')[2]}"
    files = write_files(ranked, artifacts.results(ranking_id))
    context.hold.keep_alive()  # who lost the lease leaves the files to the heir
    artifacts.remove_scratch()

    def write(session: Session) -> None:
        session.add(own_ranking(context, ranking_id, output.columns["summary"]))
        session.flush()
        copy_rows(
            session,
            audit_id=context.claim.audit_id,
            ranking_id=ranking_id,
            ranked=ranked,
            validation=validation,
            validation_facts=validation_facts,
        )

    noisy_T = train.is_noisy_T
    preflight = context.provenance.get("preflight")
    is_finite_V = validation_facts.get("is_finite", no_samples()).bool()
    output = StageOutput(
        columns={
            "influence_bytes": influence_bytes(artifacts.root),
            "summary": {
                "ranking_id": ranking_id,
                "num_flagged": num_flagged,
                "labels": labels,
                "validation_accuracy": measure_accuracy(validation, validation_facts)
                if validation
                else None,
                "train_accuracy": measure_accuracy(
                    train,
                    {
                        "predicted": facts.predicted_T,
                        "predicted_probability": facts.predicted_probability_T,
                        "is_finite": facts.is_finite_T,
                    },
                ),
                "num_noisy": int(noisy_T.sum()) if noisy_T is not None else None,
                "num_non_finite": facts.num_non_finite,
                "num_non_finite_validation": int((~is_finite_V).sum()),
                "warnings": [
                    *scored.warnings,
                    *warn_of(facts.is_finite_T, name="training"),
                    *warn_of(is_finite_V, name="validation"),
                    *_warn_of_checkpoints(context, facts),
                    *truncation_warnings(context.provenance),
                    *(preflight or {}).get("warnings", ()),
                ],
                "files": files,
                "detection": detection(scored.group_scores[ranking.layers], noisy_T),
                **describe_cancellation(
                    facts, layout, expressions=(*(request.layer_groups or ()), ranking.layers)
                ),
                "projection": context.provenance.get("projection"),
                "preflight": preflight,
                "group_order": list(scored.group_scores),
                **name_groups(layout, scored.configurations),
                "configurations": scored.configurations,
            },
        },
        provenance=provenance,
        write=write,
    )
    return output


def own_ranking(context: StageContext, ranking_id: str, summary: Mapping[str, Any]) -> Ranking:
    """Return the row of the audit's own ranking, of which the audit's summary tells."""
    return Ranking(
        id=ranking_id,
        audit_id=context.claim.audit_id,
        tenant=context.tenant,
        is_own=True,
        specification=context.request.ranking.model_dump(mode="json"),
        flag=context.request.flag.model_dump(mode="json"),
        state=RankingState.SUCCEEDED,
        progress=1.0,
        finished_at=func.now(),
        summary={name: summary[name] for name in RANKING_SUMMARY if name in summary},
        folder=Ranking.folder_of(ranking_id),
    )


def _warn_of_checkpoints(context: StageContext, facts: TrainingFacts) -> list[str]:
    """Return a warning about samples that are finite now but were not at an earlier checkpoint.

    Raises:
        AuditRefused: they are too many.
    """
    num_checkpoints = context.provenance.get("num_checkpoints", 0)
    if not num_checkpoints:
        return []
    is_finite_T = finite_at_checkpoints(
        context.artifacts,
        num_checkpoints=num_checkpoints,
        num_shards=context.provenance["num_shards"],
        num_train=len(facts),
    )
    is_finite_T |= ~facts.is_finite_T
    check_share(context, is_finite_T, name="training")
    if bool(is_finite_T.all()):
        return []
    rows = name_rows(is_finite_T)
    return [f"At an earlier checkpoint the gradients of rows {rows} are not finite: not in tracin."]


def choose_validation(samples: SampleSet | None, facts: Mapping[str, Tensor]) -> ValidationChoice:
    """Return which validation samples count, and which of them `correct_only` keeps.

    Those that the model predicts correctly; for a causal language model the half with the lower
    loss, of those that are finite.
    """
    if samples is None:
        return ValidationChoice.nothing()
    is_finite_V = facts["is_finite"].bool()
    if samples.has_completions:
        is_correct_V = torch.zeros_like(is_finite_V)
        is_correct_V[is_finite_V] = lower_half(facts["loss"][is_finite_V])
    else:
        is_correct_V = facts["predicted"] == samples.label_T
    return ValidationChoice(is_finite_V, is_correct_V, samples.label_T)


def measure_accuracy(samples: SampleSet, facts: Mapping[str, Tensor]) -> float | None:
    """Return the share of right predictions among the finite samples, None if there are none.

    For a causal language model the mean share of completion tokens that it predicts right.
    """
    is_finite_N = facts["is_finite"].bool()
    if not bool(is_finite_N.any()):
        return None
    if samples.has_completions:
        share_N = facts["predicted_probability"]
    else:
        share_N = facts["predicted"] == samples.label_T
    return float(share_N[is_finite_N].double().mean())


def name_groups(layout: ModelLayout, configurations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the modules of every layer group of the table, and the order of the groups."""
    standard = list(layout.groups)
    found = dict.fromkeys(item["layer_group"] for item in configurations)
    order = [*(name for name in standard if name in found)]
    order += [name for name in found if name not in standard]
    return {
        "layer_groups": {
            name: [layout.modules[module] for module in layout.members(name)] for name in order
        },
        "layer_group_order": order,
    }
