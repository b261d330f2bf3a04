"""Stage 5, by checkpoint and shard: dot products at earlier states of the adapter, for tracin.

The unit at position p is checkpoint p // S, shard p % S, for S shards. What a checkpoint adds is
written with its weight; whoever reads the influence adds the checkpoints up.
"""

from typing import Any

import torch
from torch import Tensor

from app.shared_files import fetch
from workers.influence.estimators.tracin import TracIn
from workers.pipeline.artifacts import Artifacts, TensorFile, read_json
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.memory import in_batches
from workers.pipeline.non_finite import check_share
from workers.pipeline.runtime import Runtime, load_runtime
from workers.pipeline.screening import compared, narrowed
from workers.pipeline.tensor_writer import writing_influence
from workers.pipeline.validation_rows import collect_validation, write_rows


def learning_rates(context: StageContext) -> list[float]:
    """Return the learning rate that led to each checkpoint."""
    if context.request.fine_tune is not None:
        kept: dict[str, Any] = read_json(context.artifacts.epochs)
        return [float(rate) for rate in kept["learning_rates"]]
    return [checkpoint.learning_rate for checkpoint in context.request.model.checkpoints or ()]


def compute_checkpoint(context: StageContext) -> StageOutput:
    """Write a shard's weighted dot products [M, V, T_shard] at one checkpoint."""
    artifacts = context.artifacts
    checkpoint, number = divmod(context.claim.position, context.provenance["num_shards"])
    estimator = TracIn()
    target = artifacts.influence(estimator.name, number, checkpoint)
    if fetch(target):
        return StageOutput()
    runtime = load_runtime(context, checkpoint=checkpoint)
    path = artifacts.validation_gradients(checkpoint)
    if not fetch(path):
        _write_validation(context, runtime, checkpoint)
    validation = runtime.validation_rows(path)
    weight = estimator.weights(learning_rates(context))[checkpoint]
    modules = runtime.dense_modules
    shard = runtime.shard(context, number)
    shape = (len(modules), len(runtime.trusted), len(shard))
    is_finite_T = torch.ones(len(shard), dtype=torch.bool)
    is_compared_T = compared(shard)

    with writing_influence(target, shape, index=shard.index_T, is_finite=is_finite_T) as influence:

        def work(batch: slice, indices: Tensor) -> None:
            context.hold.tick(batch.start, len(shard))
            positions, indices = narrowed(batch, indices, is_compared_T[batch])
            if not len(indices):
                return
            sample = runtime.extract(shard.samples, indices)
            is_finite_T[positions] = sample.is_finite_B.cpu()
            for module in modules:
                dot_VB = validation[module].dot(sample.gradients[module])
                influence.put(module, positions, weight * dot_VB)

        runtime.limits = in_batches(shard.index_T, shard.length_T, limits=runtime.limits, work=work)
    return StageOutput()


def finite_at_checkpoints(
    artifacts: Artifacts, *, num_checkpoints: int, num_shards: int, num_train: int
) -> Tensor:
    """Return which training samples have finite gradients at every checkpoint, bool [T]."""
    is_finite_T = torch.ones(num_train, dtype=torch.bool)
    for checkpoint in range(num_checkpoints):
        for shard in range(num_shards):
            file = TensorFile(artifacts.influence(TracIn.name, shard, checkpoint))
            is_finite_T[file.rows("index")] &= file.rows("is_finite")
    return is_finite_T


def _write_validation(context: StageContext, runtime: Runtime, checkpoint: int) -> None:
    """Take the validation gradients at a checkpoint; two workers at once write the same bytes."""
    collected = collect_validation(context, runtime)
    check_share(context, collected.facts.tensors()["is_finite"], name="validation")
    write_rows(context.artifacts.validation_gradients(checkpoint), collected.rows)
