"""Stage 3: preflight, plan, and the gradients of the validation samples, held by every shard.

Here the model is seen for the first time as the engine will use it, so it is tried on a few samples
first, the memory is planned, and the training set is cut into shards.

Shapes: V validation samples, M modules.
"""

import math
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from app.audits.automatic import needs_probes
from app.audits.fitting import named_rankings
from app.catalogue import AUTO
from app.storage import wait_if_full
from workers.device import device_name, free_bytes
from workers.influence.errors import InsufficientMemory
from workers.influence.estimators import ClassEstimator
from workers.influence.layer_groups import UnknownLayers
from workers.influence.rows import SparseRows
from workers.pipeline.agreement import compare_projection
from workers.pipeline.artifacts import write_json, write_tensors
from workers.pipeline.checkpoints import learning_rates
from workers.pipeline.checkup import check_model
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.curvature import module_blocks
from workers.pipeline.estimate import activation_bytes
from workers.pipeline.estimating import estimators_of, wishes_of
from workers.pipeline.failures import AuditRefused
from workers.pipeline.layout import ModelLayout
from workers.pipeline.memory import MemoryPlan, most_tokens, plan_memory, plan_shards
from workers.pipeline.non_finite import check_share
from workers.pipeline.pace import count_workers, most_samples, plan_tokens
from workers.pipeline.planning import Audited, demand_of
from workers.pipeline.probe_samples import num_probes
from workers.pipeline.runtime import Runtime, load_runtime
from workers.pipeline.screening import least_loss
from workers.pipeline.validation_rows import ValidationRows, collect_validation, write_rows


def compute_validation(context: StageContext) -> StageOutput:
    """Write the validation gradients and facts; plan memory and shards."""
    runtime = load_runtime(context)
    extractor = runtime.extractor
    layout = _layout(context, runtime)
    preflight = check_model(context, runtime)
    keeps_gradients, plan = _plan(context, runtime)
    runtime.limits = plan.limits
    if runtime.validation is not None:
        collected = collect_validation(context, runtime)
        _write_validation(context, runtime, collected)
    agreement = compare_projection(context, runtime)
    write_json(context.artifacts.modules, layout)
    tokens_per_shard = _tokens_per_shard(context, runtime)
    is_measured = runtime.pace.tokens_per_second is not None
    samples_per_shard = most_samples(len(runtime.train), context.settings, is_measured=is_measured)
    shards = plan_shards(
        runtime.train.length_T,
        runtime.limits,
        samples_per_shard=samples_per_shard,
        tokens_per_shard=tokens_per_shard,
    )
    # of which the number of the probes' shards follows
    samples_per_shard = min(samples_per_shard, max(map(len, shards)))
    block_bytes = context.settings.max_gradient_cache_bytes
    return StageOutput(
        provenance={
            "device": device_name(runtime.device),
            "tokens_per_batch": runtime.limits.tokens,
            "samples_per_batch": runtime.limits.samples,
            "tokens_per_second": runtime.pace.tokens_per_second,
            "tokens_per_shard": tokens_per_shard,
            "samples_per_shard": samples_per_shard,
            "num_shards": len(shards),
            "num_probe_shards": _num_probe_shards(context, runtime, samples_per_shard),
            "block_bytes": block_bytes,
            "num_module_blocks": len(module_blocks(runtime, max_bytes=block_bytes)),
            "num_checkpoints": _num_checkpoints(context),
            "keeps_gradients": keeps_gradients,
            "least_loss": least_loss(context, runtime),
            "num_modules": len(extractor.modules),
            "num_parameters": extractor.num_parameters,
            "preflight": preflight,
            "projection": agreement,
        }
    )


def _layout(context: StageContext, runtime: Runtime) -> Mapping[str, Any]:
    """Return what the aggregation needs to know of the modules.

    Raises:
        AuditRefused: a ranking's estimator has not the asked layers in this model, or no
            estimator has those of a layer group.
    """
    extractor = runtime.extractor
    sparse = [module for module, spec in enumerate(extractor.modules) if spec.form == "sparse"]
    layout = {
        "modules": [spec.name for spec in extractor.modules],
        "layers": [spec.layer for spec in extractor.modules],
        "groups": {name: list(members) for name, members in extractor.groups.items()},
        "blocks": extractor.num_blocks,
        "word_embedding": sparse[0] if sparse and context.request.model.word_embeddings else None,
    }
    estimators = {item.name: item for item in estimators_of(context)}
    for path, ranking in named_rankings(context.request):
        if ranking.layers == AUTO:
            continue
        named = ranking.estimator
        asked = [each for each in estimators.values() if named in {AUTO, each.name}]
        try:
            ModelLayout.of(layout).check_layers(asked, ranking.layers)
        except UnknownLayers as error:
            field = ".".join((*map(str, path), "layers"))
            raise AuditRefused("unknown_layers", str(error), field=field) from error
    with_layers = [estimator for estimator in estimators.values() if estimator.axis != "none"]
    for place, layers in enumerate(context.request.layer_groups or ()):
        try:
            ModelLayout.of(layout).check_layers(with_layers, layers)
        except UnknownLayers as error:
            field = f"layer_groups.{place}"
            raise AuditRefused("unknown_layers", str(error), field=field) from error
    return layout


def _num_checkpoints(context: StageContext) -> int:
    return len(learning_rates(context)) if wishes_of(context).checkpoints else 0


def _tokens_per_shard(context: StageContext, runtime: Runtime) -> int | None:
    """Return how many tokens take as long as a shard shall; None where samples are counted."""
    pace = runtime.pace.tokens_per_second
    if context.settings.samples_per_shard or pace is None:
        return None
    return plan_tokens(
        int(runtime.train.length_T.sum()),
        tokens_per_second=pace,
        shard_seconds=context.settings.shard_seconds,
        num_workers=count_workers(
            context.engine, stale_seconds=context.settings.worker_stale_seconds
        ),
    )


def _num_probe_shards(context: StageContext, runtime: Runtime, samples_per_shard: int) -> int:
    if not needs_probes(context.request.stored()):
        return 0
    return math.ceil(num_probes(context, len(runtime.train)) / samples_per_shard)


def _plan(context: StageContext, runtime: Runtime) -> tuple[bool, MemoryPlan]:
    """Return whether gradients are kept between passes, and what fits into memory and disk.

    Raises:
        InsufficientMemory: it does not fit; says what to change.
    """
    demand = demand_of(
        context,
        Audited(
            specs=runtime.extractor.modules,
            num_blocks=runtime.extractor.num_blocks,
            num_classes=len(runtime.prepared.labels),
            num_train=len(runtime.train),
            num_validation=len(runtime.validation) if runtime.validation else 0,
            longest=int(runtime.train.length_T.max()),
            activation_bytes=activation_bytes(context, runtime.prepared),
        ),
    )
    plan = plan_memory(
        demand.workload,
        free_bytes=free_bytes(runtime.device),
        tokens_per_batch=most_tokens(context.settings),
    )
    _check_disk(context, demand.disk_bytes)
    return demand.workload.keeps_gradients, plan


def _check_disk(context: StageContext, needed: int) -> None:
    free = shutil.disk_usage(context.settings.data_dir).free
    if needed > free:
        wait_if_full(context.settings.data_dir)
        raise InsufficientMemory(
            f"The audit's files need {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are "
            "free in the data directory. Use fewer estimators or validation samples, or make room."
        )


def _write_validation(context: StageContext, runtime: Runtime, collected: ValidationRows) -> None:
    artifacts = context.artifacts
    facts = collected.facts.tensors()
    check_share(context, facts["is_finite"], name="validation")
    write_tensors(artifacts.validation_facts, facts)
    if collected.hidden_LVH is not None:
        write_tensors(artifacts.hidden_states, {"hidden": collected.hidden_LVH})
    fitted = _fit_classes(context, runtime, collected, facts["is_finite"])
    if fitted:
        write_tensors(artifacts.fitted, fitted)
    write_rows(artifacts.validation_gradients(), collected.rows)


def _fit_classes(
    context: StageContext, runtime: Runtime, collected: ValidationRows, is_finite_V: Tensor
) -> dict[str, Tensor]:
    """Return what the class estimators fit to the validation gradients, by name and module."""
    fitted: dict[str, Tensor] = {}
    class_V = torch.where(is_finite_V, runtime.trusted.label_T, -1)
    estimators = [item for item in estimators_of(context) if isinstance(item, ClassEstimator)]
    for estimator in estimators:
        for module, rows in enumerate(collected.rows):
            if isinstance(rows, SparseRows):
                continue
            context.hold.keep_alive()
            tensors = estimator.fit(
                gram_VV=rows.dot(rows),
                norm_V=rows.squared_norm().sqrt(),
                class_V=class_V,
                num_classes=len(runtime.prepared.labels),
            )
            for name, tensor in tensors.items():
                fitted[f"{estimator.name}/{module:05d}/{name}"] = tensor
    return fitted
