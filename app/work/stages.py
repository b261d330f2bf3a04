"""Which stages an audit goes through, and what each is worth on the progress bar."""

from collections.abc import Mapping
from typing import Any

from app.audits.models import AuditState
from app.catalogue import ESTIMATORS
from app.work.models import Stage

STATE_OF_STAGE = {
    Stage.PREPARE: AuditState.PREPARING,
    Stage.FINE_TUNE: AuditState.FINE_TUNING,
    Stage.VALIDATION: AuditState.COMPUTING,
    Stage.GRADIENTS: AuditState.COMPUTING,
    Stage.CURVATURE: AuditState.COMPUTING,
    Stage.PRECONDITION: AuditState.COMPUTING,
    Stage.INFLUENCE: AuditState.COMPUTING,
    Stage.AGGREGATE: AuditState.AGGREGATING,
}

SHARDED_STAGES = frozenset({Stage.GRADIENTS, Stage.CURVATURE, Stage.INFLUENCE})

# Shares of one epoch's work, as measured on the demo; fine-tuning counts once per epoch.
_WEIGHT = {
    Stage.PREPARE: 0.05,
    Stage.FINE_TUNE: 1.0,
    Stage.VALIDATION: 0.15,
    Stage.GRADIENTS: 0.9,
    Stage.CURVATURE: 0.1,
    Stage.PRECONDITION: 0.02,
    Stage.INFLUENCE: 0.1,
    Stage.AGGREGATE: 0.15,
}


def stages_of(request: Mapping[str, Any]) -> list[Stage]:
    """Return the stages that a stored request goes through, in their order."""
    names = {*request["estimators"], request["ranking"]["estimator"]}
    needs_curvature = any(ESTIMATORS[name].needs_curvature for name in names)
    skipped = set()
    if not request.get("fine_tune"):
        skipped.add(Stage.FINE_TUNE)
    if not needs_curvature:
        skipped |= {Stage.CURVATURE, Stage.PRECONDITION, Stage.INFLUENCE}
    return [stage for stage in Stage if stage not in skipped]


def next_stage(request: Mapping[str, Any], stage: Stage) -> Stage | None:
    """Return the stage after `stage`, or None after the last."""
    stages = stages_of(request)
    following = stages[stages.index(stage) + 1 :]
    return following[0] if following else None


def overall_progress(request: Mapping[str, Any], stage: Stage, fraction: float) -> float:
    """Return how much of an audit is done, 0 to 1, when `fraction` of `stage` is."""
    fine_tune = request.get("fine_tune")
    epochs = fine_tune["epochs"] if fine_tune else 0

    def weight(of: Stage) -> float:
        return _WEIGHT[of] * (epochs if of is Stage.FINE_TUNE else 1)

    stages = stages_of(request)
    before = sum(weight(earlier) for earlier in stages[: stages.index(stage)])
    return min(1.0, (before + fraction * weight(stage)) / sum(map(weight, stages)))
