"""Stage 7, by shard: influence of the estimators whose queries needed the whole training set."""

import torch

from workers.pipeline.artifacts import read_tensors, write_tensors
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.curvature import curvature_estimators
from workers.pipeline.gradients import stream_gradients
from workers.pipeline.runtime import load_runtime


def compute_influence(context: StageContext) -> StageOutput:
    """Write a shard's influence [M, V, T_shard] by every estimator's queries."""
    artifacts, shard = context.artifacts, context.claim.position
    runtime = load_runtime(context)
    queries = {
        name: query_Vd.to(runtime.device)
        for name, query_Vd in read_tensors(artifacts.queries).items()
    }
    index_T = runtime.shard(context, shard)
    shape = (len(runtime.extractor.modules), len(runtime.validation), len(index_T))
    influence = {estimator.name: torch.zeros(shape) for estimator in curvature_estimators(context)}
    for positions, gradients in stream_gradients(context, runtime, shard):
        for name, influence_MVT in influence.items():
            for module, gradient_Bd in enumerate(gradients):
                query_Vd = queries[f"{name}/{module:05d}"]
                influence_MVT[module, :, positions] = (query_Vd @ gradient_Bd.T).cpu()
    for name, influence_MVT in influence.items():
        write_tensors(artifacts.influence(name, shard), {"influence": influence_MVT})
    return StageOutput()
