"""What an audit takes at most, told as soon as its model and its samples are known.

The passes of the audit run once on PyTorch's meta device, which holds no values; what is held
beside them is counted from shapes.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from app.catalogue import AUTO
from app.work.models import Stage
from workers.device import choose_device, free_bytes
from workers.influence.errors import InsufficientMemory
from workers.influence.footprint import counting, peak_of, weight_bytes
from workers.influence.gradients import GradientExtractor
from workers.influence.layers import find_block_stack, is_linear_like
from workers.influence.objectives import OBJECTIVES
from workers.influence.recomputing import recompute_blocks
from workers.pipeline.checkpoint import trainable
from workers.pipeline.context import StageContext
from workers.pipeline.estimating import estimators_of
from workers.pipeline.fine_tune import add_adapters
from workers.pipeline.memory import (
    FLOAT32,
    BatchLimits,
    MemoryPlan,
    Workload,
    most_tokens,
    plan_batches,
    plan_memory,
)
from workers.pipeline.placing import BYTES_PER_WEIGHT, DTYPES, recomputes
from workers.pipeline.planning import Audited, demand_of
from workers.pipeline.prepared import Prepared
from workers.pipeline.runtime import make_extractor
from workers.pipeline.samples import SampleSet
from workers.pipeline.tensor_writer import PART_BYTES
from workers.sources.loading import load_skeleton
from workers.sources.weights import load_config

# Python with torch, Transformers and the database's driver, before any work.
PROCESS_BYTES = 740 * 10**6
# What a process has of the system for each byte of a batch: tensors of many sizes leave gaps in
# the C library's heap (docs/performance.md, Memory). On a GPU torch's own allocator has few.
ALLOCATOR = defaultdict(lambda: 2.4, fine_tune=1.5)
# Blocks of influence that are read, sorted and aggregated.
_BLOCK_BYTES = 100 * 10**6
_META = torch.device("meta")
# What a token keeps in a block, and of its logits, in vectors of float32.
_VECTORS, _LOGITS = 24, 3
_ONLY_WITH_VALUES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

log = structlog.get_logger()


@dataclass(frozen=True)
class Estimate:
    """What an audit takes at most.

    Attributes:
        device_bytes: by stage, what lies where the model is: on a GPU, if a worker has one.
        batch_bytes: by stage, what of it comes and goes with every batch.
        host_bytes: by stage, what lies in the worker's process in any case.
        least_bytes: by stage, what a device must have at least: with batches of one sample where
            their size is free.
        disk_bytes: files while the audit runs.
        activation_bytes: what a token needs in a forward and backward pass.
        recomputes: whether the blocks keep their inputs alone.
    """

    device_bytes: dict[str, int]
    batch_bytes: dict[str, int]
    host_bytes: dict[str, int]
    least_bytes: dict[str, int]
    disk_bytes: int
    activation_bytes: int
    recomputes: bool

    def described(self) -> dict[str, Any]:
        """Return what the audit tells of it."""
        stages = {
            name: PROCESS_BYTES
            + self.device_bytes.get(name, 0)
            + round((ALLOCATOR[name] - 1) * self.batch_bytes.get(name, 0))
            + self.host_bytes.get(name, 0)
            for name in {**self.device_bytes, **self.host_bytes}
        }
        return {
            "memory_bytes": max(stages.values()),
            "gpu_bytes": max(self.device_bytes.values()),
            "disk_bytes": self.disk_bytes,
            "stages": stages,
            "least_bytes": self.least_bytes,
            "activation_bytes": self.activation_bytes,
            "activation_checkpointing": self.recomputes,
        }


def estimate(context: StageContext, prepared: Prepared) -> Estimate | None:
    """Return what the audit takes at most; None where the model does not run without values.

    Where the request leaves activation checkpointing open, it is chosen if the audit would not fit
    into this worker's memory otherwise.

    Raises:
        AuditRefused: the gradients of this model cannot be taken; names the field.
        InsufficientMemory: a module is too large for an estimator.
    """
    wanted = context.request.model.activation_checkpointing
    free = free_bytes(choose_device(context.settings.device))
    try:
        told = _estimate(context, prepared, recompute=wanted is True)
        if wanted == AUTO and max(told.least_bytes.values()) > free:
            return _estimate(context, prepared, recompute=True)
    except _ONLY_WITH_VALUES:
        log.warning("no_estimate", model=str(prepared.model.path), exc_info=True)
        return None
    return told


def check_fits(context: StageContext) -> None:
    """Check, before a model is loaded, that the unit's stage fits the device of this worker.

    Raises:
        InsufficientMemory: it does not; says how much is needed, and what would help.
    """
    stage = context.claim.stage
    told = (context.provenance.get("estimate") or {}).get("least_bytes", {})
    device = choose_device(context.settings.device)
    needed, free = told.get(stage.value, 0), free_bytes(device)
    if needed <= free or context.settings.device_map == "auto":
        return
    helps = []
    if not recomputes(context):
        prepared = Prepared.read(context.artifacts.prepared)
        less = _estimate(context, prepared, recompute=True).least_bytes[stage.value]
        helps.append(f"model.activation_checkpointing ({less / 1e9:.1f} GB)")
    if stage is Stage.FINE_TUNE:
        helps.append("a smaller fine_tune.batch_size")
    if context.request.model.quantization is None:
        helps.append("model.quantization")
    helps += ["a smaller max_tokens", "a worker with more memory"]
    raise InsufficientMemory(
        f"The stage {stage.value} needs at least {needed / 1e9:.1f} GB on this worker's "
        f"{device.type}, and {free / 1e9:.1f} GB are free. What would help: {', '.join(helps)}."
    )


def _estimate(context: StageContext, prepared: Prepared, *, recompute: bool) -> Estimate:
    paper = Paper.of(context, prepared, recompute=recompute)
    audited = Audited(
        specs=paper.extractor.modules,
        num_blocks=paper.extractor.num_blocks,
        num_classes=len(prepared.labels),
        num_train=len(paper.train),
        num_validation=len(paper.validation) if paper.validation else 0,
        longest=int(paper.train.length_T.max()),
        activation_bytes=paper.activation_bytes(),
    )
    demand = demand_of(context, audited)
    plan = _plan(context, demand.workload)
    load = demand.workload
    batch_bytes = paper.gradient_bytes(plan.limits)
    held = paper.audited_bytes + FLOAT32 * load.num_validation * load.row_floats
    writers = sum(each.kind in {"pairwise", "class"} for each in estimators_of(context))
    part = min(PART_BYTES * writers, FLOAT32 * len(paper.train) * load.influence_floats)
    device = {
        "validation": held + batch_bytes,
        "gradients": held + batch_bytes + FLOAT32 * load.held_floats,
    }
    host = {
        "gradients": part,
        "aggregate": _BLOCK_BYTES,
    }
    least = {"validation": held + audited.activation_bytes * audited.longest}
    batches = {"validation": batch_bytes, "gradients": batch_bytes}
    if context.request.fine_tune is not None:
        kept, batch = paper.training_bytes(context.request.fine_tune.batch_size)
        device["fine_tune"] = least["fine_tune"] = kept + batch
        batches["fine_tune"] = batch
    if load.num_curvature:
        device["curvature"] = held + _curvature_bytes(load)
        device["influence"] = held + FLOAT32 * load.num_validation * load.largest_floats
        host["influence"] = part
    return Estimate(
        device_bytes=device,
        batch_bytes=batches,
        host_bytes=host,
        least_bytes=least,
        disk_bytes=demand.disk_bytes + paper.file_bytes(),
        activation_bytes=audited.activation_bytes,
        recomputes=recompute,
    )


@dataclass(frozen=True)
class Paper:
    """An audit's model on the meta device, with its samples.

    Attributes:
        extractor: of the audited state.
        loaded_bytes: the weights as they are loaded, in float32.
        audited_bytes: the weights as gradients are taken of them.
    """

    context: StageContext
    prepared: Prepared
    train: SampleSet
    validation: SampleSet | None
    extractor: GradientExtractor
    loaded_bytes: int
    audited_bytes: int
    recomputes: bool

    @classmethod
    def of(
        cls, context: StageContext, prepared: Prepared, *, recompute: bool | None = None
    ) -> "Paper":
        """Build the model on the meta device and try how its gradients are taken."""
        artifacts, request = context.artifacts, context.request
        train = SampleSet(artifacts.train)
        validation = SampleSet(artifacts.validation) if context.has_validation else None
        longest = max(int(samples.length_T.max()) for samples in (train, validation) if samples)
        model = skeleton(context, prepared)
        loaded_bytes = _weight_bytes(context, model)
        recompute = recomputes(context) if recompute is None else recompute
        has_adapter = request.fine_tune is not None or prepared.model.adapter_path is not None
        with counting():
            extractor = make_extractor(
                context, model, has_adapter=has_adapter, longest=longest, recompute=recompute
            )
        shrunk = 1.0
        if request.model.quantization is None:
            shrunk = DTYPES[request.precision].itemsize / FLOAT32
        return cls(
            *(context, prepared, train, validation, extractor),
            loaded_bytes=loaded_bytes,
            audited_bytes=int(loaded_bytes * shrunk),
            recomputes=recompute,
        )

    def activation_bytes(self) -> int:
        """Return what a token needs in a forward and backward pass."""
        longest = int(self.train.length_T.max())
        return self.gradient_bytes(BatchLimits(1, 1)) // longest

    def gradient_bytes(self, limits: BatchLimits) -> int:
        """Return what the gradients of the largest batch take, and all that lives meanwhile.

        Activations grow with its tokens, gradients that are written out with its samples.
        """
        batches = (self._largest(self.train, limits), self._fullest(self.train, limits))
        return max(
            peak_of(partial(self.extractor.extract, *self._batch(self.train, indices)))
            for indices in batches
        )

    def training_bytes(self, batch_size: int) -> tuple[int, int]:
        """Return what fine-tuning holds (weights, moments, the best state), and a batch of it."""
        options = self.context.request.fine_tune
        assert options is not None  # noqa: S101 - asked for audits that fine-tune
        model = skeleton(self.context, self.prepared).train()
        if self.recomputes:
            recompute_blocks(model, find_block_stack(model).block_names)
        longest = self.train.length_T.argsort(descending=True, stable=True)[:batch_size]
        objective = OBJECTIVES[self.prepared.task]

        def step() -> None:
            objective.run(model, *self._batch(self.train, longest)).loss_B.mean().backward()

        def evaluate() -> None:
            limits = BatchLimits(most_tokens(self.context.settings))
            if self.validation is not None:
                batch = self._largest(self.validation, limits)
                with torch.no_grad():
                    objective.run(model, *self._batch(self.validation, batch))

        # two moments and the best state; the gradients live in the step
        kept = 3 * sum(FLOAT32 * each.numel() for each in trainable(model).values())
        return self.loaded_bytes + kept, max(peak_of(step), peak_of(evaluate))

    def file_bytes(self) -> int:
        """Return what the samples, the adapter and its checkpoint, and the results take on disk."""
        artifacts = self.context.artifacts
        prepared: int = sum(
            path.stat().st_size
            for path in (artifacts.train, artifacts.validation, artifacts.test)
            if path.exists()
        )
        # Parquet, CSV and JSONL of the ranking hold the texts once more each
        return 4 * prepared

    @staticmethod
    def _largest(samples: SampleSet, limits: BatchLimits) -> Tensor:
        """Return the first batch that `plan_batches` would cut, without cutting the others."""
        longest = samples.length_T.argsort(descending=True, stable=True)[: limits.samples]
        return longest[plan_batches(samples.length_T[longest], limits)[0]]

    @staticmethod
    def _fullest(samples: SampleSet, limits: BatchLimits) -> Tensor:
        """Return as many of the shortest samples as make a batch, the longest of them first."""
        shortest = samples.length_T.argsort(stable=True)[: limits.samples]
        number_N = torch.arange(1, len(shortest) + 1)
        fitting = int((number_N * samples.length_T[shortest] <= limits.tokens).sum())
        return shortest[: max(1, fitting)].flip(0)

    def _batch(self, samples: SampleSet, indices: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return a batch without values, its targets as long as the longest completion."""
        inputs, targets = samples.batch(indices, pad_id=self.prepared.pad_id, device=_META)
        if samples.has_completions:
            first = int(samples.completion_start_T[indices].min())
            targets = targets[:, : targets.shape[1] - max(0, first - 1)]
        return inputs, targets


def activation_bytes(context: StageContext, prepared: Prepared) -> int:
    """Return what a token needs in a forward and backward pass, as told before.

    Where nothing was told, from its widths and amply.
    """
    if told := context.provenance.get("estimate"):
        return int(told["activation_bytes"])
    config = load_config(prepared.model, prepared.task).get_text_config()
    vectors = config.hidden_size * config.num_hidden_layers * _VECTORS
    logits = config.vocab_size * _LOGITS if prepared.task == "causal_lm" else 0
    return FLOAT32 * int(vectors + logits)


def skeleton(context: StageContext, prepared: Prepared) -> nn.Module:
    """Return the model as it is loaded, in float32 with its adapter, on the meta device."""
    model: nn.Module = load_skeleton(
        prepared.model, task=prepared.task, labels=prepared.labels, pad_id=prepared.pad_id
    )
    model.float()
    if context.request.fine_tune is not None:
        model = add_adapters(model, prepared.task, context.request.fine_tune)
    return model


def _weight_bytes(context: StageContext, model: nn.Module) -> int:
    """Return what the weights take as they are loaded; in fewer bits where they are quantised."""
    quantization = context.request.model.quantization
    total = weight_bytes(model)
    if quantization is None:
        return total
    stack = find_block_stack(model)
    layers = (
        module
        for name, module in model.named_modules()
        if is_linear_like(module) and name.startswith(f"{stack.name}.") and "lora_" not in name
    )
    num_weights: int = sum(module.get_parameter("weight").numel() for module in layers)
    return total - round(num_weights * (FLOAT32 - BYTES_PER_WEIGHT[quantization]))


def _plan(context: StageContext, workload: Workload) -> MemoryPlan:
    """Return the batches that this worker would plan; the smallest where none fit."""
    settings = context.settings
    try:
        return plan_memory(
            workload,
            free_bytes=free_bytes(choose_device(settings.device)),
            tokens_per_batch=most_tokens(settings),
        )
    except InsufficientMemory:
        return MemoryPlan(BatchLimits(1, 1), 0)


def _curvature_bytes(load: Workload) -> int:
    """Return what fitting the largest module takes: its matrix or sums twice, and its queries."""
    return FLOAT32 * load.num_validation * load.largest_floats * (2 + load.num_curvature)
