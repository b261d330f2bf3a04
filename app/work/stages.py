"""Which stages an audit goes through, and what each is worth on the progress bar."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from app.audits.automatic import computed_estimators, needs_probes
from app.audits.models import AuditState
from app.audits.verification_schemas import num_trainings
from app.catalogue import ESTIMATORS
from app.work.models import Stage

STATE_OF_STAGE = {
    Stage.PREPARE: AuditState.PREPARING,
    Stage.FINE_TUNE: AuditState.FINE_TUNING,
    Stage.VALIDATION: AuditState.COMPUTING,
    Stage.GRADIENTS: AuditState.COMPUTING,
    Stage.PROBES: AuditState.COMPUTING,
    Stage.CHECKPOINTS: AuditState.COMPUTING,
    Stage.CURVATURE: AuditState.COMPUTING,
    Stage.INFLUENCE: AuditState.COMPUTING,
    Stage.AGGREGATE: AuditState.AGGREGATING,
    Stage.VERIFY: AuditState.VERIFYING,
    Stage.CONCLUDE: AuditState.VERIFYING,
}

# Shares of one epoch's work, as measured on the demo; fine-tuning counts once per epoch, in every
# training of the verification too.
_WEIGHT = {
    Stage.PREPARE: 0.05,
    Stage.FINE_TUNE: 1.0,
    Stage.VALIDATION: 0.15,
    Stage.GRADIENTS: 0.9,
    Stage.PROBES: 0.1,
    Stage.CHECKPOINTS: 0.9,
    Stage.CURVATURE: 0.1,
    Stage.INFLUENCE: 0.1,
    Stage.AGGREGATE: 0.15,
    Stage.VERIFY: 1.0,
    Stage.CONCLUDE: 0.01,
}

_LONGEST_PAUSE_SECONDS = 30.0  # heartbeats come every few seconds; a longer silence is no work
_LEAST_PROGRESS_FOR_ETA = 0.05  # an estimate from less is a guess


def stages_of(request: Mapping[str, Any]) -> list[Stage]:
    """Return the stages that a stored request goes through, in their order."""
    verify = request.get("verify")
    names = computed_estimators(request)
    needs = {need for name in names for need in ESTIMATORS[name].needs}
    skipped = {Stage.RANK}
    if not request.get("fine_tune"):
        skipped.add(Stage.FINE_TUNE)
    if not needs_probes(request):
        skipped.add(Stage.PROBES)
    if "checkpoints" not in needs:
        skipped.add(Stage.CHECKPOINTS)
    if "curvature" not in needs:
        skipped |= {Stage.CURVATURE, Stage.INFLUENCE}
    if not verify:
        skipped |= {Stage.VERIFY, Stage.CONCLUDE}
    return [stage for stage in Stage if stage not in skipped]


def num_units(stage: Stage, provenance: Mapping[str, Any]) -> int:
    """Return how many units a stage is cut into, as planned when computing began."""
    shards = int(provenance.get("num_shards", 0))
    probes = int(provenance.get("num_probe_shards", 0))
    planned = {
        Stage.GRADIENTS: shards,
        Stage.PROBES: probes,
        Stage.CHECKPOINTS: shards * int(provenance.get("num_checkpoints", 0)),
        Stage.CURVATURE: int(provenance.get("num_module_blocks", 0)),
        Stage.INFLUENCE: shards + probes,
        Stage.VERIFY: int(provenance.get("num_trainings", 0)),
    }
    return planned.get(stage, 1)


def next_stage(request: Mapping[str, Any], stage: Stage) -> Stage | None:
    """Return the stage after `stage`, or None after the last."""
    stages = stages_of(request)
    following = stages[stages.index(stage) + 1 :]
    return following[0] if following else None


def overall_progress(request: Mapping[str, Any], stage: Stage, fraction: float) -> float:
    """Return how much of an audit is done, 0 to 1, when `fraction` of `stage` is."""
    fine_tune = request.get("fine_tune")
    epochs = fine_tune["epochs"] if fine_tune else 0

    checkpoints = epochs or len(request["model"].get("checkpoints") or ())

    def weight(of: Stage) -> float:
        times = {
            Stage.FINE_TUNE: epochs,
            Stage.CHECKPOINTS: checkpoints,
            Stage.VERIFY: epochs * num_trainings(request),
        }
        return _WEIGHT[of] * times.get(of, 1)

    stages = stages_of(request)
    before = sum(weight(earlier) for earlier in stages[: stages.index(stage)])
    return min(1.0, (before + fraction * weight(stage)) / sum(map(weight, stages)))


def busy_seconds(before: float, *, since: datetime | None, now: datetime) -> float:
    """Return how long an audit has been worked on, with the time since its last sign of life.

    A night in which the service was off, or another audit had the workers, is no work: it would
    make a guess of the time left many times too long.
    """
    if since is None:
        return before
    return before + min(max(0.0, (now - since).total_seconds()), _LONGEST_PAUSE_SECONDS)


def seconds_left(busy: float, progress: float) -> float | None:
    """Return how much longer an audit takes if it goes on as it did; None for too little."""
    if progress < _LEAST_PROGRESS_FOR_ETA:
        return None
    return busy * (1 - progress) / progress
