"""From influence to the ranking: scores, metrics, and the publication in one transaction."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func
from sqlalchemy.orm import Session
from torch import Tensor

from app.audits.folders import influence_bytes
from app.audits.models import Ranking, RankingState
from workers.influence.layer_groups import UnknownLayers
from workers.pipeline.arms import plan_verification
from workers.pipeline.cancelling import describe_cancellation
from workers.pipeline.checkpoints import finite_at_checkpoints
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.estimating import estimators_of
from workers.pipeline.evidence import find_evidence
from workers.pipeline.failures import AuditRefused
from workers.pipeline.findings import Findings
from workers.pipeline.non_finite import check_share, name_rows, no_samples, warn_of
from workers.pipeline.publish import RANKING_SUMMARY, copy_rows, write_files
from workers.pipeline.ranking import make_ranking
from workers.pipeline.runtime import forget_runtime
from workers.pipeline.samples import SampleSet
from workers.pipeline.splitting import split_warning
from workers.pipeline.tokenise import truncation_warnings
from workers.pipeline.training_facts import TrainingFacts


def aggregate(context: StageContext) -> StageOutput:
    """Rank the training samples and publish: files first, then rows and state together."""
    artifacts, request = context.artifacts, context.request
    forget_runtime()  # the audit needs its model no more
    findings = Findings.open(context)
    train, facts, validation = findings.train, findings.facts, findings.validation
    validation_facts = findings.validation_facts
    check_share(context, facts.is_finite_T, name="training")
    scorer = findings.scorer(context)
    estimators = estimators_of(context)
    try:
        made = make_ranking(
            context, findings, scorer, estimators=estimators, aggregations=request.aggregations
        )
    except UnknownLayers as error:
        raise AuditRefused("unknown_layers", str(error), field="ranking.layers") from error
    ranked = made.rows
    provenance = {}
    if request.verify is not None:
        plan = plan_verification(
            context,
            request.verify,
            train=train,
            facts=facts,
            scorer=scorer,
            estimators=estimators,
            score_T=ranked.group_scores[ranked.layers],
            lead=made.choice.lead,
            suggested_T=ranked.judgement.suggested_T if ranked.judgement else None,
            table=made.summary["configurations"],
        )
        provenance["num_trainings"] = len(plan.trainings)
    evidence = find_evidence(context, findings, ranked.group_scores[ranked.layers])
    context.hold.keep_alive()
    # of the unit, so that a second try writes the same files to the same place
    ranking_id = f"rnk_{context.claim.unit_id.partition('_')[2]}"
    files = write_files(ranked, artifacts.results(ranking_id))
    context.hold.keep_alive()  # who lost the lease leaves the files to the heir
    context.remove_scratch()

    def write(session: Session) -> None:
        session.add(own_ranking(context, ranking_id, output.columns["summary"]))
        session.flush()
        copy_rows(
            session,
            audit_id=context.claim.audit_id,
            ranking_id=ranking_id,
            ranked=ranked,
            evidence=evidence,
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
                **made.summary,
                "ranking_id": ranking_id,
                "labels": findings.labels,
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
                "num_compared": len(facts.compared_F),
                "warnings": [
                    *made.summary["warnings"],
                    *warn_of(facts.is_finite_T, name="training"),
                    *warn_of(is_finite_V, name="validation"),
                    *_warn_of_checkpoints(context, facts),
                    *truncation_warnings(context.provenance),
                    *_warn_of_split(context),
                    *(preflight or {}).get("warnings", ()),
                ],
                "files": files,
                **describe_cancellation(
                    facts,
                    findings.layout,
                    expressions=(*(request.layer_groups or ()), made.choice.lead.layers),
                ),
                "projection": context.provenance.get("projection"),
                "preflight": preflight,
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
        flag=context.request.stored()["flag"],
        state=RankingState.SUCCEEDED,
        progress=1.0,
        finished_at=func.now(),
        summary={name: summary[name] for name in RANKING_SUMMARY if name in summary},
        folder=Ranking.folder_of(ranking_id),
    )


def _warn_of_split(context: StageContext) -> list[str]:
    count = context.provenance.get("num_split", 0)
    return [split_warning(count)] if count else []


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
