"""Stages 5 and 6: the curvature that an estimator sums over ALL training samples, and its queries.

Each shard sums its part; then the parts are added in the order of the shards, so that the sum does
not depend on who computed what when.

Shapes: V validation samples, B a block of training samples, d entries of one module.
"""

import torch
from torch import Tensor

from workers.influence.estimators import ESTIMATORS, CurvatureEstimator
from workers.pipeline.artifacts import TensorFile, write_tensors
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.gradients import stream_gradients
from workers.pipeline.runtime import Runtime, load_runtime
from workers.pipeline.validation import estimators_of


def curvature_estimators(context: StageContext) -> list[CurvatureEstimator]:
    """Return the audit's estimators that need further passes."""
    return [
        estimator
        for name in estimators_of(context)
        if isinstance(estimator := ESTIMATORS[name], CurvatureEstimator)
    ]


def sum_curvature(context: StageContext) -> StageOutput:
    """Write a shard's part of every estimator's curvature, float64 [V, d] per module."""
    artifacts, shard = context.artifacts, context.claim.position
    if artifacts.curvature(shard).exists():
        return StageOutput()
    runtime = load_runtime(context)
    validation = [
        gradient_Vd.double()
        for gradient_Vd in runtime.validation_gradients(artifacts.validation_gradients)
    ]
    parts: dict[str, Tensor] = {}
    estimators = curvature_estimators(context)
    dampings = {estimator.name: _dampings(context, runtime, estimator) for estimator in estimators}
    for _positions, gradients in stream_gradients(context, runtime, shard):
        for estimator in estimators:
            for module, gradient_Bd in enumerate(gradients):
                part_Vd = estimator.partial_curvature(
                    validation_Vd=validation[module],
                    train_Bd=gradient_Bd,
                    damping=dampings[estimator.name][module],
                )
                key = f"{estimator.name}/{module:05d}"
                if key in parts:
                    parts[key] += part_Vd
                else:
                    parts[key] = part_Vd
    write_tensors(artifacts.curvature(shard), parts)
    return StageOutput()


def precondition(context: StageContext) -> StageOutput:
    """Add the parts up and write every estimator's queries, float32 [V, d] per module."""
    runtime = load_runtime(context)
    artifacts = context.artifacts
    validation = runtime.validation_gradients(artifacts.validation_gradients)
    num_shards = context.provenance["num_shards"]
    parts = [TensorFile(artifacts.curvature(shard)) for shard in range(num_shards)]
    queries: dict[str, Tensor] = {}
    for estimator in curvature_estimators(context):
        dampings = _dampings(context, runtime, estimator)
        for module, validation_Vd in enumerate(validation):
            key = f"{estimator.name}/{module:05d}"
            context.hold.tick(module, len(validation))
            curvature_Vd = torch.zeros(validation_Vd.shape, dtype=torch.float64)
            for part in parts:
                curvature_Vd += part.rows(key)
            queries[key] = estimator.precondition(
                validation_Vd=validation_Vd,
                curvature_Vd=curvature_Vd.to(validation_Vd.device),
                num_train=len(runtime.train),
                damping=dampings[module],
            )
    write_tensors(artifacts.queries, queries)
    return StageOutput()


def _dampings(
    context: StageContext, runtime: Runtime, estimator: CurvatureEstimator
) -> list[float]:
    """Return the damping of every module, from the gradient lengths of ALL training samples."""
    total_M = torch.zeros(len(runtime.extractor.modules), dtype=torch.float64)
    for shard in range(context.provenance["num_shards"]):
        total_M += TensorFile(context.artifacts.facts(shard)).rows("squared_norm_sum")
    return [
        estimator.damping(
            mean_squared_norm=total / len(runtime.train), num_parameters=spec.num_parameters
        )
        for total, spec in zip(total_M.tolist(), runtime.extractor.modules, strict=True)
    ]
