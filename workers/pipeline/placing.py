"""Where an audit's model goes on this worker, in how many bits, and how its blocks run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from app.shared_files import fetch_folder
from workers.device import choose_device
from workers.influence.layers import find_block_stack, is_linear_like
from workers.influence.recomputing import recompute_blocks
from workers.pipeline.context import StageContext
from workers.pipeline.failures import AuditRefused
from workers.pipeline.prepared import Prepared
from workers.sources.loading import load_model, load_skeleton
from workers.sources.models import ResolvedModel
from workers.sources.placement import Placement, can_quantize

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What a weight takes, with the scales that stand beside it.
BYTES_PER_WEIGHT = {None: 4.0, "8bit": 1.0, "4bit": 0.5 + 4 / 64}


def load_placed(
    context: StageContext,
    prepared: Prepared,
    resolved: ResolvedModel,
    *,
    new_head_seed: int | None = None,
) -> nn.Module:
    """Load a model, with its adapter, as the request and this worker's settings say.

    It is on this worker's device, spread over several, or, where it can still be moved, on the CPU.

    Raises:
        AuditRefused: this worker cannot quantise.
        SourceError: the model cannot be loaded.
    """
    fetch_model(resolved)
    placement = placement_of(context, prepared)
    return load_model(
        resolved,
        task=prepared.task,
        labels=prepared.labels,
        new_head_seed=new_head_seed,
        # merging an adapter and training it want float32; what cannot be cast is loaded as it runs
        dtype=DTYPES[context.request.precision] if placement.is_final else torch.float32,
        placement=placement,
    ).model


def fetch_model(resolved: ResolvedModel) -> None:
    """Bring a model and its adapter here, which another worker may have resolved.

    Raises:
        NotReady: they are shared by a bucket, which cannot be reached.
    """
    for folder in (resolved.path, resolved.adapter_path):
        if folder is not None:
            fetch_folder(folder)


def placement_of(context: StageContext, prepared: Prepared) -> Placement:
    """Return where the model goes.

    Raises:
        AuditRefused: it shall be quantised, and this worker has no bitsandbytes.
    """
    quantization = context.request.model.quantization
    device_map: str | dict[str, Any] | None = None
    if context.settings.device_map == "auto":
        device_map = "auto"
    unquantized: Sequence[str] = ()
    if quantization is not None:
        if not can_quantize():
            raise AuditRefused(
                "quantization_unavailable",
                "This worker has no bitsandbytes to quantise a model with: install "
                "winnow[quantization] there, or leave out model.quantization.",
                field="model.quantization",
            )
        device_map = device_map or {"": str(choose_device(context.settings.device))}
        unquantized = outside_blocks(load_skeleton(prepared.model, task=prepared.task))
    return Placement(
        device_map=device_map,
        offload_folder=context.artifacts.offloaded,
        quantization=quantization,
        unquantized=tuple(unquantized),
        compute_dtype=DTYPES[context.request.precision],
    )


def outside_blocks(model: nn.Module) -> list[str]:
    """Name the linear layers outside the transformer blocks: the head among them, which trains."""
    stack = find_block_stack(model)
    return [
        name
        for name, module in model.named_modules()
        if is_linear_like(module) and not name.startswith(f"{stack.name}.")
    ]


def recomputes(context: StageContext) -> bool:
    """Return whether the blocks keep their inputs alone: as asked, or as the estimate chose."""
    wanted = context.request.model.activation_checkpointing
    if isinstance(wanted, bool):
        return wanted
    told = context.provenance.get("estimate") or {}
    return bool(told.get("activation_checkpointing", False))


def on_device(context: StageContext, model: nn.Module, *, trains: bool = False) -> nn.Module:
    """Return a loaded model where this worker computes, and its blocks ready to be trained."""
    if context.request.model.quantization is None and context.settings.device_map != "auto":
        model = model.to(choose_device(context.settings.device))
    if trains and recomputes(context):
        recompute_blocks(model, find_block_stack(model).block_names)
    return model
