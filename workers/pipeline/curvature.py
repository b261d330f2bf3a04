"""Stage 6, by block of modules: estimators whose curvature sums over ALL training samples.

Everything of a module happens in one unit, over the same batches in the same order, so that no bit
of it depends on the number of shards.

Shapes: V validation samples, B a block of training samples, d entries of one module.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from app.shared_files import fetch
from workers.influence.estimators import CurvatureEstimator, TrainingGradients
from workers.influence.kronecker import KroneckerSums
from workers.influence.layers import ModuleSpec
from workers.pipeline.artifacts import TensorFile, read_tensors
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.estimating import estimators_of
from workers.pipeline.gradients import keep_block, shard_batches, stream_kept
from workers.pipeline.memory import FLOAT32
from workers.pipeline.non_finite import check_share
from workers.pipeline.runtime import Runtime, load_runtime
from workers.pipeline.shards import Shard
from workers.pipeline.tensor_writer import writing_tensors
from workers.pipeline.training_facts import TrainingFacts, read_compared

MAX_MODULES_PER_BLOCK = 8


def plan_module_blocks(
    modules: list[tuple[int, ModuleSpec]], *, num_train: int, max_bytes: int
) -> list[list[int]]:
    """Cut modules into blocks, each the work of one unit.

    Args:
        modules: positions and descriptions of the modules that pass through a curvature.
        num_train: T.
        max_bytes: disk that the gradients of one block may take; a module that takes more is a
            block of its own.
    """
    blocks: list[list[int]] = []
    room = 0
    for module, spec in modules:
        needed = FLOAT32 * num_train * spec.num_parameters
        if not blocks or needed > room or len(blocks[-1]) == MAX_MODULES_PER_BLOCK:
            blocks.append([])
            room = max_bytes
        blocks[-1].append(module)
        room -= needed
    return blocks


def module_blocks(runtime: Runtime, *, max_bytes: int) -> list[list[int]]:
    """Return the audit's blocks of modules."""
    specs = runtime.extractor.modules
    modules = [(module, specs[module]) for module in runtime.dense_modules]
    return plan_module_blocks(modules, num_train=len(runtime.train), max_bytes=max_bytes)


def planned_blocks(context: StageContext, runtime: Runtime) -> list[list[int]]:
    """Return the blocks as planned when computing began."""
    plan = context.provenance
    max_bytes = plan.get("block_bytes")
    if max_bytes is None:  # an earlier version planned the audit
        of_shards = 512 * 1024**2 * len(runtime.train) // plan["samples_per_shard"]
        max_bytes = min(context.settings.max_gradient_cache_bytes, of_shards)
    return module_blocks(runtime, max_bytes=max_bytes)


def curvature_estimators(context: StageContext) -> list[CurvatureEstimator]:
    """Return the audit's estimators that need further passes."""
    return [item for item in estimators_of(context) if isinstance(item, CurvatureEstimator)]


def fit_curvature(context: StageContext) -> StageOutput:
    """Write every estimator's queries, float32 [V, d], of one block of modules."""
    artifacts, block = context.artifacts, context.claim.position
    if fetch(artifacts.queries(block)):
        return StageOutput()
    runtime = load_runtime(context)
    modules = planned_blocks(context, runtime)[block]
    if not context.provenance["keeps_gradients"]:
        keep_block(context, runtime, block=block, modules=modules)
    validation = runtime.validation_rows(artifacts.validation_gradients())
    estimators = curvature_estimators(context)
    is_finite_T = TrainingFacts(artifacts, context.provenance["num_shards"]).is_finite_T
    check_share(context, is_finite_T, name="training")
    with_probes = [False, True] if context.num_probe_shards else [False]
    passes = list(itertools.product(modules, with_probes))
    like = {
        query_name(estimator.name, module, for_probes=has_probes): torch.empty(
            len(validation[module]), validation[module].num_parameters, device="meta"
        )
        for (module, has_probes), estimator in itertools.product(passes, estimators)
    }
    training: TrainingGradients | None = None
    with writing_tensors(artifacts.queries(block), like) as file:
        for number, (module, has_probes) in enumerate(passes):
            before = training if has_probes else None
            training = _training_gradients(
                context, runtime, block=block, module=module, before=before
            )
            validation_Vd = validation[module].dense()
            for place, estimator in enumerate(estimators):
                context.hold.step(number * len(estimators) + place, len(passes) * len(estimators))
                name = query_name(estimator.name, module, for_probes=has_probes)
                query_Vd = estimator.queries(validation_Vd=validation_Vd, training=training)
                file.put_rows(name, slice(0, len(query_Vd)), query_Vd)
    context.hold.keep_alive()  # who lost the lease leaves the files to the heir
    artifacts.remove_block(block)
    return StageOutput()


def query_name(estimator: str, module: int, *, for_probes: bool) -> str:
    """Return the name of an estimator's queries for training samples, or for probes.

    Wrong labels are in the curvature that they are measured with, which shortens their influence.
    So the probes are measured with a curvature that sums over them too; else they would be easier
    to find than real noise, for these estimators alone.
    """
    return f"{estimator}/{'probes/' if for_probes else ''}{module:05d}"


def _training_gradients(
    context: StageContext,
    runtime: Runtime,
    *,
    block: int,
    module: int,
    before: TrainingGradients | None,
) -> TrainingGradients:
    """Return the gradients of the training samples; after these, given as `before`, the probes'."""
    num_shards = context.provenance["num_shards"]
    shards = _shards(context, runtime, range(num_shards))
    grown_from = None
    if before is not None:
        probes = _shards(context, runtime, range(num_shards, num_shards + context.num_probe_shards))
        shards = [*shards, *probes]
        grown_from = (before, partial(_blocks, context, runtime, probes, block, module))
    facts = [TensorFile(shard.files.facts(shard.number)) for _, shard in shards]
    # summed once over all shards: no bit of the damping depends on how they were cut
    squared_norm_T = torch.cat([file.rows("squared_norm", module) for file in facts])
    num_compared = sum(int(read_compared(file).sum()) for file in facts)
    return TrainingGradients(
        num_samples=num_compared,
        mean_squared_norm=float(squared_norm_T.double().sum()) / max(1, num_compared),
        spec=runtime.extractor.modules[module],
        kronecker=_read_kronecker([shard for _, shard in shards], module),
        blocks=partial(_blocks, context, runtime, shards, block, module),
        keep_alive=context.hold.keep_alive,
        silence=context.hold.silence,
        grown_from=grown_from,
    )


def _shards(
    context: StageContext, runtime: Runtime, positions: Iterable[int]
) -> list[tuple[int, Shard]]:
    return [(position, runtime.shard(context, position)) for position in positions]


def _blocks(
    context: StageContext,
    runtime: Runtime,
    shards: Sequence[tuple[int, Shard]],
    block: int,
    module: int,
) -> Iterator[Tensor]:
    """Yield a module's gradients [B, d] of all samples, in the order of the batches."""
    for position, shard in shards:
        path = (
            shard.files.gradients(shard.number)
            if context.provenance["keeps_gradients"]
            else shard.files.block_gradients(block, shard.number)
        )
        batches = shard_batches(context, runtime, position)
        for gradient_Bd in stream_kept(path, runtime, module, batches):
            context.hold.keep_alive()
            yield gradient_Bd


def _read_kronecker(shards: Sequence[Shard], module: int) -> KroneckerSums | None:
    """Return a module's sums over all shards, in their order; None where it has none."""
    result: KroneckerSums | None = None
    for shard in shards:
        path = shard.files.kronecker(shard.number)
        if not len(shard):
            continue
        if not fetch(path):
            return None
        tensors = read_tensors(path, prefix=f"{module:05d}/")
        if not tensors:  # nobody of this shard is compared, or the module has none in any
            continue
        sums = KroneckerSums.from_tensors(tensors)
        result = sums if result is None else result + sums
    return result
