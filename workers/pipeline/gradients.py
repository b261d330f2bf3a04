"""Stage 4, by shard: per-sample gradients, and the influence that is one dot product away.

Shapes: M modules, V validation samples, T the shard's training samples, B a batch of them.
"""

from collections.abc import Iterator

import torch
from safetensors import safe_open
from torch import Tensor

from workers.influence.estimators import ESTIMATORS, DotEstimator
from workers.pipeline.artifacts import write_tensors
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.facts import Facts
from workers.pipeline.memory import in_batches, plan_batches
from workers.pipeline.runtime import Runtime, load_runtime
from workers.pipeline.validation import estimators_of

ROWS_PER_READ = 256


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

    They are read where they were kept, else computed again: the same numbers either way.
    """
    index_T = runtime.shard(context, shard)
    path = context.artifacts.gradients(shard)
    if path.exists():
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(f"{i:05d}") for i in range(len(runtime.extractor.modules))]
            for start in range(0, len(index_T), ROWS_PER_READ):
                context.hold.tick(start, len(index_T))
                positions = slice(start, min(start + ROWS_PER_READ, len(index_T)))
                yield (
                    positions,
                    tuple(
                        kept[positions.start : positions.stop].to(runtime.device) for kept in slices
                    ),
                )
        return
    start = 0
    lengths = runtime.train.length_T[index_T]
    for batch in plan_batches(lengths, tokens_per_batch=runtime.tokens_per_batch):
        context.hold.tick(start, len(index_T))
        positions = slice(start, start + len(batch))
        yield (
            positions,
            runtime.extract(runtime.train, index_T[positions], name="training").gradients,
        )
        start += len(batch)
