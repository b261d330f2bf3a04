"""Stage 7, by shard: influence of the estimators whose queries needed the whole training set."""

from contextlib import ExitStack

import torch

from workers.pipeline.artifacts import TensorFile
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.curvature import curvature_estimators, planned_blocks, query_name
from workers.pipeline.gradients import compute_again, shard_batches, stream_kept
from workers.pipeline.runtime import Runtime, load_runtime
from workers.pipeline.shards import Shard
from workers.pipeline.tensor_writer import writing_influence


def compute_influence(context: StageContext) -> StageOutput:
    """Write a shard's influence [M, V, T_shard] by every estimator's queries."""
    position = context.claim.position
    runtime = load_runtime(context)
    modules = runtime.dense_modules
    shard = runtime.shard(context, position)
    shape = (len(modules), len(runtime.trusted), len(shard))
    with ExitStack() as files:
        influence = {
            estimator.name: files.enter_context(
                writing_influence(shard.files.influence(estimator.name, shard.number), shape)
            )
            for estimator in curvature_estimators(context)
        }

        def multiply(
            module: int, positions: slice | torch.Tensor, gradient_Bd: torch.Tensor
        ) -> None:
            for name, writer in influence.items():
                writer.put(module, positions, queries[name, module] @ gradient_Bd.T)

        if context.provenance["keeps_gradients"]:
            batches = shard_batches(context, runtime, position)
            path = shard.files.gradients(shard.number)
            for module in modules:
                queries = _queries(context, runtime, shard, names=list(influence), modules=[module])
                gradients = stream_kept(path, runtime, module, batches)
                for positions, gradient_Bd in zip(batches, gradients, strict=True):
                    context.hold.step(module, len(modules))
                    multiply(module, positions, gradient_Bd)
        else:
            queries = _queries(context, runtime, shard, names=list(influence), modules=modules)
            compute_again(context, runtime, position, modules=modules, use=multiply)
    return StageOutput()


def _queries(
    context: StageContext,
    runtime: Runtime,
    shard: Shard,
    *,
    names: list[str],
    modules: list[int],
) -> dict[tuple[str, int], torch.Tensor]:
    """Read the queries [V, d] of some modules, by estimator and module."""
    block_of = {
        module: block
        for block, members in enumerate(planned_blocks(context, runtime))
        for module in members
    }
    files = {
        block: TensorFile(context.artifacts.queries(block)) for block in set(block_of.values())
    }
    return {
        (name, module): files[block_of[module]]
        .rows(query_name(name, module, for_probes=shard.is_probes))
        .to(runtime.device)
        for name in names
        for module in modules
    }
