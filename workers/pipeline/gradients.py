"""Stage 4, by shard: per-sample gradients, and the influence that is one product away.

Shapes: M modules, L blocks, V validation samples, C classes, T the shard's training samples, B a
batch of them, d entries of a module, H hidden width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from app.shared_files import fetch
from app.work.models import Stage
from workers.influence.kronecker import KroneckerSums
from workers.pipeline.artifacts import TensorFile, write_tensors
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.estimating import wishes_of
from workers.pipeline.facts import Facts, Totals
from workers.pipeline.memory import BatchLimits, in_batches, plan_batches
from workers.pipeline.runtime import Runtime, load_runtime
from workers.pipeline.screening import compared, narrowed, screened
from workers.pipeline.shard_influence import ShardInfluence
from workers.pipeline.shards import Shard
from workers.pipeline.tensor_writer import writing_tensors

Keep = Callable[[int, slice | Tensor, Tensor], None]
"""Gets a module, positions in the shard, and gradient_Bd."""


def compute_gradients(context: StageContext) -> StageOutput:
    """Write a shard's facts, the influence that needs no other shard, and what later passes need.

    The gradients are taken once, however many estimators there are.
    """
    runtime = load_runtime(context)
    modules = runtime.extractor.modules
    shard = runtime.shard(context, position_of(context))
    files = shard.files
    # The facts are written last: where they are, a worker was here before and finished.
    if fetch(files.facts(shard.number)):
        return StageOutput()
    wishes = wishes_of(context)
    facts = Facts(len(shard), len(modules), features=wishes.features)
    totals = Totals(len(modules))
    kronecker: dict[int, KroneckerSums] = {}
    # nobody asks what is like a probe
    is_sketched = not (shard.is_probes or runtime.sketch.is_empty)

    with ExitStack() as stack:
        influence = ShardInfluence(context, runtime, shard, files=stack)
        keep: Keep | None = None
        if context.provenance["keeps_gradients"]:
            path = files.gradients(shard.number)
            keep = stack.enter_context(keeping(path, runtime, shard, runtime.dense_modules))

        def work(batch: slice, indices: Tensor) -> None:
            context.hold.tick(batch.start, len(shard))
            positions, indices = screened(
                context, runtime, shard, batch=batch, indices=indices, facts=facts
            )
            if not len(indices):
                return
            sample = runtime.extract(shard.samples, indices)
            facts.put(positions, sample)
            if is_sketched:
                facts.put_sketch(positions, runtime.sketch.sketch(sample.gradients))
            influence.add(positions, sample)
            if keep is not None:
                for module in runtime.dense_modules:
                    keep(module, positions, sample.gradients[module].dense())
            # what adds up comes last, where nothing can run out of memory any more: a batch that
            # does is done again in halves, and must not count twice
            totals.add(sample)
            _add_sums(kronecker, sample.kronecker)

        runtime.limits = in_batches(shard.index_T, shard.length_T, limits=runtime.limits, work=work)
    if wishes.kronecker:
        _write_kronecker(files.kronecker(shard.number), kronecker)
    write_tensors(
        files.facts(shard.number),
        {"index": shard.index_T, **facts.tensors(), **totals.tensors()},
    )
    return StageOutput(result={"samples": len(shard), "tokens_per_batch": runtime.limits.tokens})


def position_of(context: StageContext) -> int:
    """Return which shard a unit works on: those of the probes come after those of training."""
    position = context.claim.position
    if context.claim.stage is Stage.PROBES:
        position += context.provenance["num_shards"]
    return position


def _add_sums(kronecker: dict[int, KroneckerSums], added: Sequence[KroneckerSums | None]) -> None:
    for module, sums in enumerate(added):
        if sums is not None:
            kronecker[module] = kronecker[module].add_(sums) if module in kronecker else sums


def _write_kronecker(path: Path, kronecker: dict[int, KroneckerSums]) -> None:
    tensors = {
        f"{module:05d}/{name}": tensor
        for module, sums in kronecker.items()
        for name, tensor in sums.tensors().items()
    }
    write_tensors(path, tensors)


@contextmanager
def keeping(path: Path, runtime: Runtime, shard: Shard, modules: Sequence[int]) -> Iterator[Keep]:
    """Keep a shard's gradients of some modules in a file, whole or not at all."""
    specs = runtime.extractor.modules
    like = {
        f"{module:05d}": torch.empty(len(shard), specs[module].num_parameters, device="meta")
        for module in modules
    }
    with writing_tensors(path, like) as file:
        yield lambda module, positions, gradient_Bd: file.put_rows(
            f"{module:05d}", positions, gradient_Bd
        )


def stream_kept(
    path: Path, runtime: Runtime, module: int, batches: Sequence[slice]
) -> Iterator[Tensor]:
    """Yield a module's kept gradients [B, d] of one shard, batch by batch."""
    file = TensorFile(path)
    for positions in batches:
        yield file.rows(f"{module:05d}", rows=positions).to(runtime.device)


def shard_batches(context: StageContext, runtime: Runtime, shard: int) -> list[slice]:
    """Return the batches of a shard, as positions in it.

    They are those that were planned when computing began, so that what is made of them depends
    neither on the shard that a batch fell into nor on whether gradients were kept.
    """
    length_T = runtime.shard(context, shard).length_T
    batches = []
    start = 0
    for batch in plan_batches(length_T, BatchLimits.planned(context.provenance)):
        batches.append(slice(start, start + len(batch)))
        start += len(batch)
    return batches


def compute_again(
    context: StageContext,
    runtime: Runtime,
    shard: int,
    *,
    modules: Sequence[int],
    use: Keep,
) -> None:
    """Compute a shard's gradients of some modules again, batch by batch.

    Those of samples that are not compared are not computed.

    Args:
        context: the unit of work.
        runtime: the model.
        shard: the shard.
        modules: whose gradients are used.
        use: gets the module, the positions in the shard, and gradient_Bd; it may be called again
            for positions whose batch ran out of memory.
    """
    part = runtime.shard(context, shard)
    is_compared_T = compared(part)
    for planned in shard_batches(context, runtime, shard):
        index_B = part.index_T[planned]

        def work(batch: slice, indices: Tensor, first: int = planned.start) -> None:
            context.hold.keep_alive()
            whole = slice(first + batch.start, first + batch.stop)
            place, indices = narrowed(whole, indices, is_compared_T[whole])
            if not len(indices):
                return
            gradients = runtime.extract(part.samples, indices).gradients
            for module in modules:
                use(module, place, gradients[module].dense())

        runtime.limits = in_batches(
            index_B, part.length_T[planned], limits=runtime.limits, work=work
        )


def keep_block(
    context: StageContext, runtime: Runtime, *, block: int, modules: Sequence[int]
) -> None:
    """Compute the gradients of one block of modules again and keep them, shard by shard.

    For audits whose gradients would take too much disk if they were kept all at once.
    """
    num_shards = context.provenance["num_shards"] + context.num_probe_shards
    for position in range(num_shards):
        shard = runtime.shard(context, position)
        path = shard.files.block_gradients(block, shard.number)
        if fetch(path):
            continue
        context.hold.step(position, num_shards)
        with keeping(path, runtime, shard, modules) as keep:
            compute_again(context, runtime, position, modules=modules, use=keep)
