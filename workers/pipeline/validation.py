"""Stage 3: gradients of the validation samples, computed once and held by every shard.

Here the model is seen for the first time as the engine will use it, so the memory is planned here
and the training set is cut into shards.
"""

import shutil

import torch

from app.catalogue import ESTIMATORS
from workers.device import device_name, free_bytes
from workers.influence.errors import InsufficientMemory
from workers.pipeline.artifacts import write_json, write_tensors
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.facts import Facts
from workers.pipeline.failures import AuditRefused
from workers.pipeline.memory import (
    FLOAT32,
    FLOAT64,
    in_batches,
    plan_batches,
    plan_memory,
    plan_shards,
)
from workers.pipeline.runtime import Runtime, load_runtime


def compute_validation(context: StageContext) -> StageOutput:
    """Write the validation gradients and facts; plan memory and shards."""
    runtime = load_runtime(context)
    extractor = runtime.extractor
    layers = context.request.ranking.layers
    if layers not in extractor.groups:
        raise AuditRefused(
            "unknown_layers",
            f"This model has no layer group {layers!r}; it has {', '.join(extractor.groups)}.",
            field="ranking.layers",
        )
    names = estimators_of(context)
    pairwise = [name for name in names if ESTIMATORS[name].kind == "pairwise"]
    num_curvature = sum(ESTIMATORS[name].needs_curvature for name in names)
    cache_bytes = len(runtime.train) * extractor.num_parameters * FLOAT32
    keeps_gradients = num_curvature > 0 and cache_bytes <= context.settings.max_gradient_cache_bytes
    plan = plan_memory(
        free_bytes=free_bytes(runtime.device),
        num_validation=len(runtime.validation),
        num_parameters=extractor.num_parameters,
        num_modules=len(extractor.modules),
        num_pairwise=len(pairwise),
        keeps_gradients=keeps_gradients,
        hidden_size=runtime.hidden_size,
        num_layers=runtime.num_layers,
        tokens_per_batch=context.settings.tokens_per_batch,
        samples_per_shard=context.settings.samples_per_shard,
    )
    runtime.tokens_per_batch = plan.tokens_per_batch
    _check_disk(
        context,
        runtime,
        num_pairwise=len(pairwise),
        num_curvature_files=num_curvature * -(-len(runtime.train) // plan.samples_per_shard),
        cache_bytes=cache_bytes if keeps_gradients else 0,
    )
    _write_gradients(context, runtime)
    write_json(
        context.artifacts.modules,
        {
            "modules": [spec.name for spec in extractor.modules],
            "groups": {name: list(members) for name, members in extractor.groups.items()},
        },
    )
    shards = plan_shards(
        runtime.train.length_T,
        tokens_per_batch=runtime.tokens_per_batch,
        samples_per_shard=plan.samples_per_shard,
    )
    return StageOutput(
        provenance={
            "device": device_name(runtime.device),
            "tokens_per_batch": runtime.tokens_per_batch,
            "samples_per_shard": plan.samples_per_shard,
            "num_shards": len(shards),
            "keeps_gradients": keeps_gradients,
            "num_modules": len(extractor.modules),
            "num_parameters": extractor.num_parameters,
        }
    )


def estimators_of(context: StageContext) -> list[str]:
    """Return the estimators that an audit computes: the asked ones and the baselines."""
    asked = [*context.request.estimators, context.request.ranking.estimator, "loss", "random"]
    if context.request.plant_noise or (
        context.request.train.columns and context.request.train.columns.noise
    ):
        asked.append("oracle")
    return list(dict.fromkeys(str(name) for name in asked))


def _check_disk(
    context: StageContext,
    runtime: Runtime,
    *,
    num_pairwise: int,
    num_curvature_files: int,
    cache_bytes: int,
) -> None:
    influence_bytes = (
        len(runtime.train)
        * len(runtime.validation)
        * len(runtime.extractor.modules)
        * num_pairwise
        * FLOAT32
    )
    curvature_bytes = (
        num_curvature_files * len(runtime.validation) * runtime.extractor.num_parameters * FLOAT64
    )
    needed = influence_bytes + curvature_bytes + cache_bytes
    free = shutil.disk_usage(context.settings.data_dir).free
    if needed > free:
        raise InsufficientMemory(
            f"The audit's files need {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are "
            "free in the data directory. Use fewer estimators or validation samples, or make room."
        )


def _write_gradients(context: StageContext, runtime: Runtime) -> None:
    samples, extractor = runtime.validation, runtime.extractor
    gradients = [torch.zeros(len(samples), spec.num_parameters) for spec in extractor.modules]
    facts = Facts(len(samples), len(extractor.modules))
    batches = plan_batches(samples.length_T, tokens_per_batch=runtime.tokens_per_batch)
    index_V = torch.cat(batches)

    def work(positions: slice, indices: torch.Tensor) -> None:
        context.hold.tick(positions.start, len(samples))
        sample = runtime.extract(samples, indices, name="validation")
        for kept_Vd, gradient_Bd in zip(gradients, sample.gradients, strict=True):
            kept_Vd[indices] = gradient_Bd.cpu()
        facts.put(indices, sample, samples.label_T[indices])

    runtime.tokens_per_batch = in_batches(
        index_V,
        samples.length_T[index_V],
        tokens_per_batch=runtime.tokens_per_batch,
        work=work,
    )
    write_tensors(context.artifacts.validation_facts, facts.tensors())
    write_tensors(
        context.artifacts.validation_gradients,
        {f"{module:05d}": kept_Vd for module, kept_Vd in enumerate(gradients)},
    )
