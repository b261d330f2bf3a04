"""Stage 4, by shard: per-sample gradients, and the influence that is one dot product away.

Shapes: M modules, V validation samples, T the shard's training samples, B a batch of them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from workers.influence.estimators import ESTIMATORS, DotEstimator
from workers.pipeline.artifacts import TensorFile, write_tensors
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.facts import Facts
from workers.pipeline.memory import in_batches, plan_batches
from workers.pipeline.runtime import Runtime, load_runtime
from workers.pipeline.validation import estimators_of


def compute_gradients(context: StageContext) -> StageOutput:
    """Write a shard's facts, the influence of all dot estimators, and the gradients to be kept."""
    artifacts, shard = context.artifacts, context.claim.position
    # The facts are written last: where they are, a worker was here before and finished.
    if artifacts.facts(shard).exists():
        return StageOutput()
    runtime = load_runtime(context)
    modules = runtime.extractor.modules
    index_T = runtime.shard(context, shard)
    validation = runtime.validation_gradients(artifacts.validation_gradients)
    validation_norms = [gradient_Vd.norm(dim=1) for gradient_Vd in validation]
    estimators = [
        estimator
        for name in estimators_of(context)
        if isinstance(estimator := ESTIMATORS[name], DotEstimator)
    ]
    shape = (len(modules), len(runtime.validation), len(index_T))
    influence = {estimator.name: torch.zeros(shape) for estimator in estimators}
    keeps_gradients = context.provenance["keeps_gradients"]
    kept = [torch.zeros(len(index_T), spec.num_parameters) for spec in modules] * keeps_gradients
    facts = Facts(len(index_T), len(modules))

    def work(positions: slice, indices: Tensor) -> None:
        context.hold.tick(positions.start, len(index_T))
        sample = runtime.extract(runtime.train, indices, name="training")
        facts.put(positions, sample, runtime.train.label_T[indices])
        norm_MB = sample.squared_norm_MB.sqrt()
        for module, gradient_Bd in enumerate(sample.gradients):
            if keeps_gradients:
                kept[module][positions] = gradient_Bd.cpu()
            if not estimators:
                continue
            dot_VB = validation[module] @ gradient_Bd.T
            for estimator in estimators:
                influence[estimator.name][module, :, positions] = estimator.influence(
                    dot_VB=dot_VB,
                    validation_norm_V=validation_norms[module],
                    train_norm_B=norm_MB[module],
                ).cpu()

    runtime.tokens_per_batch = in_batches(
        index_T,
        runtime.train.length_T[index_T],
        tokens_per_batch=runtime.tokens_per_batch,
        work=work,
    )
    for name, influence_MVT in influence.items():
        write_tensors(artifacts.influence(name, shard), {"influence": influence_MVT})
    if keeps_gradients:
        write_tensors(
            artifacts.gradients(shard),
            {f"{module:05d}": gradient_Td for module, gradient_Td in enumerate(kept)},
        )
    write_tensors(artifacts.facts(shard), {"index": index_T, **facts.tensors()})
    return StageOutput(
        result={"samples": len(index_T), "tokens_per_batch": runtime.tokens_per_batch}
    )


def stream_gradients(
    context: StageContext, runtime: Runtime, shard: int
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Yield a shard's gradients again, by positions in the shard, all modules [B, d].

    They are read where they were kept, else computed again. The blocks are the batches that were
    planned when computing began, so that what is made of them depends neither on the shard that a
    batch fell into nor on whether gradients were kept.
    """
    index_T = runtime.shard(context, shard)
    length_T = runtime.train.length_T[index_T]
    path = context.artifacts.gradients(shard)
    kept = TensorFile(path) if path.exists() else None
    start = 0
    for batch in plan_batches(length_T, tokens_per_batch=context.provenance["tokens_per_batch"]):
        context.hold.tick(start, len(index_T))
        positions = slice(start, start + len(batch))
        if kept is not None:
            yield (
                positions,
                tuple(
                    kept.rows(f"{module:05d}", rows=positions).to(runtime.device)
                    for module in range(len(runtime.extractor.modules))
                ),
            )
        else:
            yield positions, _compute_again(context, runtime, index_T[positions])
        start = positions.stop


def _compute_again(context: StageContext, runtime: Runtime, index_B: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients [B, d] of one batch; it is cut where memory is shorter than planned."""
    parts: list[tuple[Tensor, ...]] = []

    def work(_: slice, indices: Tensor) -> None:
        context.hold.keep_alive()
        parts.append(runtime.extract(runtime.train, indices, name="training").gradients)

    runtime.tokens_per_batch = in_batches(
        index_B,
        runtime.train.length_T[index_B],
        tokens_per_batch=runtime.tokens_per_batch,
        work=work,
    )
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
