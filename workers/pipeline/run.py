"""Run the stage that a claim is about."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from pydantic import ValidationError
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.audits.models import Audit
from app.audits.schemas import AuditRequest
from app.settings import Settings
from app.work.models import Stage
from app.work.repository import Claim
from workers.lease import Hold
from workers.pipeline.aggregate import aggregate
from workers.pipeline.checkpoints import compute_checkpoint
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.curvature import fit_curvature
from workers.pipeline.failures import AuditRefused
from workers.pipeline.fine_tune import fine_tune
from workers.pipeline.gradients import compute_gradients
from workers.pipeline.influence import compute_influence
from workers.pipeline.prepare import prepare
from workers.pipeline.validation import compute_validation

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


def run_stage(engine: Engine, settings: Settings, claim: Claim, hold: Hold) -> StageOutput:
    """Run one unit and return what is to be saved.

    Raises:
        Stopped: the hold ended.
        Exception: what the stage raises; `failures.failure_of` says what it means.
    """
    with Session(engine) as session:
        audit = session.get_one(Audit, claim.audit_id)
        context = StageContext(
            engine=engine,
            settings=settings,
            claim=claim,
            hold=hold,
            request=_request_of(audit),
            provenance=audit.provenance,
            tenant=audit.tenant,
        )
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    started = time.perf_counter()
    output = STAGES[claim.stage](context)
    return replace(output, stage=claim.stage.value, seconds=time.perf_counter() - started)
