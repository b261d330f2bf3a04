"""What an audit takes at most, told as soon as its model and its samples are known.

The passes of the audit run once on PyTorch's meta device, which holds no values; what is held
beside them is counted from shapes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.device import choose_device, free_bytes
from workers.influence.errors import InsufficientMemory
from workers.influence.footprint import counting, peak_of, weight_bytes
from workers.influence.gradients import GradientExtractor
from workers.influence.objectives import OBJECTIVES
from workers.pipeline.checkpoint import trainable
from workers.pipeline.context import StageContext
from workers.pipeline.fine_tune import add_adapters
from workers.pipeline.memory import (
    FLOAT32,
    SHARD_BYTES,
    BatchLimits,
    MemoryPlan,
    Workload,
    plan_batches,
    plan_memory,
)
from workers.pipeline.planning import Audited, demand_of
from workers.pipeline.prepared import Prepared
from workers.pipeline.runtime import DTYPES, make_extractor
from workers.pipeline.samples import SampleSet
from workers.sources.loading import load_skeleton

# Python with torch, Transformers and the database's driver, before any work.
PROCESS_BYTES = 640 * 10**6
# Blocks of influence that are read, sorted and aggregated.
_BLOCK_BYTES = 100 * 10**6
_META = torch.device("meta")


@dataclass(frozen=True)
class Estimate:
    """What an audit takes at most.

    Attributes:
        device_bytes: by stage, what lies where the model is: on a GPU, if a worker has one.
        host_bytes: by stage, what lies in the worker's process in any case.
        disk_bytes: files while the audit runs.
        activation_bytes: what a token needs in a forward and backward pass.
    """

    device_bytes: dict[str, int]
    host_bytes: dict[str, int]
    disk_bytes: int
    activation_bytes: int

    def described(self) -> dict[str, Any]:
        """Return what the audit tells of it."""
        names = {**self.device_bytes, **self.host_bytes}
        stages = {
            name: PROCESS_BYTES + self.device_bytes.get(name, 0) + self.host_bytes.get(name, 0)
            for name in names
        }
        return {
            "memory_bytes": max(stages.values()),
            "gpu_bytes": max(self.device_bytes.values()),
            "disk_bytes": self.disk_bytes,
            "stages": stages,
            "activation_bytes": self.activation_bytes,
        }


def estimate(context: StageContext, prepared: Prepared) -> Estimate:
    """Return what the audit takes at most.

    Raises:
        AuditRefused: the gradients of this model cannot be taken; names the field.
        InsufficientMemory: a module is too large for an estimator.
    """
    paper = Paper.of(context, prepared)
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
    rows_bytes = FLOAT32 * load.num_validation * load.row_floats
    held = paper.audited_bytes + rows_bytes
    shard = min(plan.samples_per_shard, len(paper.train))
    kept_floats = load.dense_floats if load.keeps_gradients else load.largest_floats
    device = {
        "validation": held + batch_bytes,
        "gradients": held + batch_bytes + FLOAT32 * load.held_floats,
    }
    host = {
        "gradients": FLOAT32 * shard * (load.influence_floats + kept_floats),
        "aggregate": _BLOCK_BYTES,
    }
    if context.request.fine_tune is not None:
        device["fine_tune"] = paper.training_bytes(context.request.fine_tune.batch_size)
    if load.num_curvature:
        device["curvature"] = held + _curvature_bytes(load, audited)
        device["influence"] = held + FLOAT32 * load.num_validation * load.largest_floats
        host["influence"] = FLOAT32 * shard * load.influence_floats
    num_shards = -(-len(paper.train) // plan.samples_per_shard)
    return Estimate(
        device_bytes=device,
        host_bytes=host,
        disk_bytes=demand.disk_bytes + num_shards * demand.shard_disk_bytes,
        activation_bytes=audited.activation_bytes,
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

    @classmethod
    def of(cls, context: StageContext, prepared: Prepared) -> "Paper":
        """Build the model on the meta device and try how its gradients are taken."""
        artifacts, request = context.artifacts, context.request
        train = SampleSet(artifacts.train)
        validation = SampleSet(artifacts.validation) if context.has_validation else None
        longest = max(int(samples.length_T.max()) for samples in (train, validation) if samples)
        model = skeleton(context, prepared)
        loaded_bytes = weight_bytes(model)
        has_adapter = request.fine_tune is not None or prepared.model.adapter_path is not None
        with counting():
            extractor = make_extractor(context, model, has_adapter=has_adapter, longest=longest)
        shrunk = DTYPES[request.precision].itemsize / FLOAT32
        return cls(
            *(context, prepared, train, validation, extractor),
            loaded_bytes=loaded_bytes,
            audited_bytes=int(loaded_bytes * shrunk),
        )

    def activation_bytes(self) -> int:
        """Return what a token needs in a forward and backward pass."""
        longest = int(self.train.length_T.max())
        return self.gradient_bytes(BatchLimits(1)) // longest

    def gradient_bytes(self, limits: BatchLimits) -> int:
        """Return what the gradients of the largest batch take, and all that lives meanwhile."""
        inputs, targets = self._batch(self.train, plan_batches(self.train.length_T, limits)[0])
        return peak_of(lambda: self.extractor.extract(inputs, targets))

    def training_bytes(self, batch_size: int) -> int:
        """Return what fine-tuning takes: weights, gradients, moments, the best state, a batch."""
        options = self.context.request.fine_tune
        assert options is not None  # noqa: S101 - asked for audits that fine-tune
        model = skeleton(self.context, self.prepared).train()
        largest = self.train.length_T.argsort(descending=True, stable=True)[:batch_size]
        objective = OBJECTIVES[self.prepared.task]

        def step() -> None:
            objective.run(model, *self._batch(self.train, largest)).loss_B.mean().backward()

        def evaluate() -> None:
            limits = BatchLimits(self.context.settings.tokens_per_batch)
            if self.validation is not None:
                batch = plan_batches(self.validation.length_T, limits)[0]
                with torch.no_grad():
                    objective.run(model, *self._batch(self.validation, batch))

        # two moments and the best state; the gradients live in the step
        kept = 3 * sum(FLOAT32 * each.numel() for each in trainable(model).values())
        return self.loaded_bytes + kept + max(peak_of(step), peak_of(evaluate))

    def _batch(self, samples: SampleSet, indices: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return a batch without values, its targets as long as the longest completion."""
        inputs, targets = samples.batch(indices, pad_id=self.prepared.pad_id, device=_META)
        if samples.has_completions:
            first = int(samples.completion_start_T[indices].min())
            targets = targets[:, : targets.shape[1] - max(0, first - 1)]
        return inputs, targets


def activation_bytes(context: StageContext, prepared: Prepared) -> int:
    """Return what a token needs in a forward and backward pass, as told before."""
    told = context.provenance.get("estimate")  # none of an audit that an earlier version prepared
    return told["activation_bytes"] if told else Paper.of(context, prepared).activation_bytes()


def skeleton(context: StageContext, prepared: Prepared) -> nn.Module:
    """Return the model as it is loaded, in float32 with its adapter, on the meta device."""
    model: nn.Module = load_skeleton(prepared.model, task=prepared.task, labels=prepared.labels)
    model.float()
    if context.request.fine_tune is not None:
        model = add_adapters(model, prepared.task, context.request.fine_tune)
    return model


def _plan(context: StageContext, workload: Workload) -> MemoryPlan:
    """Return the batches and shards that this worker would plan; the smallest where none fit."""
    settings = context.settings
    try:
        return plan_memory(
            workload,
            free_bytes=free_bytes(choose_device(settings.device)),
            tokens_per_batch=settings.tokens_per_batch,
            samples_per_shard=settings.samples_per_shard,
        )
    except InsufficientMemory:
        return MemoryPlan(BatchLimits(1, 1), 1, 0)


def _curvature_bytes(load: Workload, audited: Audited) -> int:
    """Return what fitting the largest module takes: its matrix or sums twice, and its queries."""
    floats = load.num_validation * load.largest_floats * (2 + load.num_curvature)
    return FLOAT32 * floats + min(SHARD_BYTES, FLOAT32 * audited.num_train * load.dense_floats)
