"""What an audit holds in memory and on disk: read off its request, its modules and its samples."""

import math
from dataclasses import dataclass

from app.audits.automatic import needs_probes
from workers.influence.estimators import (
    CheckpointEstimator,
    ClassEstimator,
    CurvatureEstimator,
    HiddenStateEstimator,
    WordEmbeddingEstimator,
)
from workers.influence.kronecker import MAX_SIDE
from workers.influence.layers import ModuleSpec
from workers.influence.sketch import sketch_floats
from workers.pipeline.context import StageContext
from workers.pipeline.estimating import estimators_of, wishes_of
from workers.pipeline.memory import FLOAT32, Workload, row_floats
from workers.pipeline.pace import most_samples
from workers.pipeline.probe_samples import num_probes


@dataclass(frozen=True)
class Audited:
    """What of a model and its data decides how much an audit holds.

    Attributes:
        specs: the modules whose gradients are taken.
        num_blocks: transformer blocks.
        num_classes: 0 for a causal language model.
        num_train: training samples.
        num_validation: validation samples, 0 without a validation set.
        longest: tokens of the longest training sample.
        activation_bytes: what a token needs in a forward and backward pass.
    """

    specs: tuple[ModuleSpec, ...]
    num_blocks: int
    num_classes: int
    num_train: int
    num_validation: int
    longest: int
    activation_bytes: int

    @property
    def dense(self) -> list[ModuleSpec]:
        """The modules that pass through a curvature: all but the word embeddings."""
        return [spec for spec in self.specs if spec.form != "sparse"]


@dataclass(frozen=True)
class Demand:
    """What an audit asks for.

    Attributes:
        workload: what is held in memory.
        disk_bytes: files, with as many shards as there are where no pace is known.
    """

    workload: Workload
    disk_bytes: int


def demand_of(context: StageContext, audited: Audited) -> Demand:
    """Return what an audit holds in memory and on disk.

    Raises:
        InsufficientMemory: a module is too large for an estimator; says what to change.
    """
    num_train, num_validation = audited.num_train, audited.num_validation
    sizes = [spec.num_parameters for spec in audited.dense]
    curvature = [item for item in estimators_of(context) if isinstance(item, CurvatureEstimator)]
    dense_floats = sum(sizes) if curvature else 0
    for estimator in curvature:
        for spec in audited.dense:
            estimator.check_size(spec)
    cache_bytes = num_train * dense_floats * FLOAT32
    sums = _sum_floats(context, audited)
    workload = Workload(
        num_validation=num_validation,
        row_floats=sum(row_floats(spec, num_tokens=audited.longest) for spec in audited.specs),
        dense_floats=dense_floats,
        largest_floats=max(sizes, default=0) if curvature else 0,
        num_curvature=len(curvature),
        held_floats=sums + sketch_floats(audited.specs),
        influence_floats=_influence_floats(context, audited),
        activation_bytes=audited.activation_bytes,
        keeps_gradients=0 < cache_bytes <= context.settings.max_gradient_cache_bytes,
    )
    has_probes = needs_probes(context.request.stored())
    num_samples = num_train + (num_probes(context, num_train) if has_probes else 0)
    num_checkpoints = _num_checkpoints(context) if wishes_of(context).checkpoints else 0
    # queries once more for the probes
    held = workload.row_floats * (1 + num_checkpoints)
    held += dense_floats * len(curvature) * (1 + has_probes)
    kept_bytes = num_samples * dense_floats * FLOAT32
    # sums over a shard are as large however small it is; the probes have shards of their own
    largest = most_samples(num_train, context.settings, is_measured=False)
    num_shards = -(-num_train // largest) + has_probes
    return Demand(
        workload=workload,
        disk_bytes=FLOAT32 * (num_samples * workload.influence_floats + num_validation * held)
        + FLOAT32 * num_shards * sums
        + min(kept_bytes, context.settings.max_gradient_cache_bytes),
    )


def _num_checkpoints(context: StageContext) -> int:
    """Return at how many checkpoints gradients are taken, before there are any."""
    fine_tune = context.request.fine_tune
    return fine_tune.epochs if fine_tune else len(context.request.model.checkpoints or ())


def _sum_floats(context: StageContext, audited: Audited) -> int:
    """Return how many float32 the sums over samples take: float64 totals and Kronecker factors."""
    total = sum(math.prod(spec.shape) for spec in audited.dense)
    if wishes_of(context).kronecker:
        sides = [side for spec in audited.dense if len(spec.shape) > 1 for side in spec.shape]
        total += sum(side**2 for side in sides if side <= MAX_SIDE)
    return 2 * total


def _influence_floats(context: StageContext, audited: Audited) -> int:
    """Return how many numbers of influence all estimators have on one training sample."""
    num_dense, num_validation = len(audited.dense), audited.num_validation
    total = 0
    for estimator in estimators_of(context):
        if estimator.kind not in {"pairwise", "class"}:
            continue
        match estimator:
            case WordEmbeddingEstimator():
                total += num_validation
            case HiddenStateEstimator():
                total += audited.num_blocks * num_validation
            case ClassEstimator():
                total += num_dense * audited.num_classes
            case CheckpointEstimator():
                total += num_dense * num_validation * _num_checkpoints(context)
            case _:
                total += len(audited.specs) * num_validation
    return total
