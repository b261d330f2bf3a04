"""Run the stage that a claim is about."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from pydantic import ValidationError
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.audits.automatic import computed_estimators
from app.audits.models import Audit, Ranking
from app.audits.schemas import AuditRequest, Flag, RankingSpecification
from app.catalogue import AUTO, EstimatorName
from app.settings import Settings
from app.work.claims import Claim
from app.work.models import Stage
from workers.lease import Hold, HoldLost
from workers.pipeline.aggregate import aggregate
from workers.pipeline.checkpoints import compute_checkpoint
from workers.pipeline.conclude import conclude
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.curvature import fit_curvature
from workers.pipeline.estimate import check_fits
from workers.pipeline.failures import AuditRefused
from workers.pipeline.fine_tune import fine_tune
from workers.pipeline.gradients import compute_gradients
from workers.pipeline.influence import compute_influence
from workers.pipeline.prepare import prepare
from workers.pipeline.rank import rank
from workers.pipeline.validation import compute_validation
from workers.pipeline.verify import verify

STAGES: dict[Stage, Callable[[StageContext], StageOutput]] = {
    Stage.PREPARE: prepare,
    Stage.FINE_TUNE: fine_tune,
    Stage.VALIDATION: compute_validation,
    Stage.GRADIENTS: compute_gradients,
    Stage.PROBES: compute_gradients,
    Stage.CHECKPOINTS: compute_checkpoint,
    Stage.CURVATURE: fit_curvature,
    Stage.INFLUENCE: compute_influence,
    Stage.AGGREGATE: aggregate,
    Stage.VERIFY: verify,
    Stage.CONCLUDE: conclude,
    Stage.RANK: rank,
}


def _request_of(audit: Audit) -> AuditRequest:
    """Return the audit's request, which another version of the service may have accepted."""
    try:
        return AuditRequest.model_validate(audit.request)
    except ValidationError as error:
        first = error.errors()[0]
        raise AuditRefused(
            "invalid_request",
            f"This version of the service does not take the request: {first['msg']}. Submit it "
            "anew.",
            field=".".join(str(part) for part in first["loc"]) or None,
        ) from error


def _with_ranking(request: AuditRequest, ranking: Ranking | None) -> AuditRequest:
    """Return an audit's request with a later ranking in place of its own."""
    if ranking is None:  # it was deleted; the worker's next look at its hold tells it so
        raise HoldLost
    later = {
        # what the audit computed is what there is to choose among
        "estimators": [EstimatorName(name) for name in computed_estimators(request.stored())],
        "ranking": RankingSpecification.model_validate(ranking.specification),
        "flag": AUTO if ranking.flag == AUTO else Flag.model_validate(ranking.flag),
    }
    return request.model_copy(update=later)


def run_stage(engine: Engine, settings: Settings, claim: Claim, hold: Hold) -> StageOutput:
    """Run one unit and return what is to be saved.

    Raises:
        Stopped: the hold ended.
        Exception: what the stage raises; `failures.failure_of` says what it means.
    """
    with Session(engine) as session:
        audit = session.get(Audit, claim.audit_id)
        if audit is None:
            raise HoldLost
        request = _request_of(audit)
        if claim.ranking_id is not None:
            request = _with_ranking(request, session.get(Ranking, claim.ranking_id))
        context = StageContext(
            engine=engine,
            settings=settings,
            claim=claim,
            hold=hold,
            request=request,
            provenance=audit.provenance,
            tenant=audit.tenant,
        )
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    check_fits(context)
    started = time.perf_counter()
    output = STAGES[claim.stage](context)
    return replace(output, stage=claim.stage.value, seconds=time.perf_counter() - started)
