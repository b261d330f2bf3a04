"""The loaded model of one audit: kept in the worker process between the audit's units."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workers.influence.errors import NoTrackedModules, UnsupportedModule
from workers.influence.gradients import GradientExtractor, SampleGradients
from workers.influence.layer_groups import UnknownLayers, resolve_layers
from workers.influence.objectives import OBJECTIVES
from workers.influence.projection import Projection
from workers.influence.rows import GradientRows, rows_from_tensors
from workers.influence.sketch import GradientSketch
from workers.pipeline.artifacts import read_tensors
from workers.pipeline.context import StageContext
from workers.pipeline.estimating import layers_of_interest, wishes_of
from workers.pipeline.failures import AuditRefused
from workers.pipeline.fine_tune import query_and_value
from workers.pipeline.memory import (
    BatchLimits,
    most_tokens,
    plan_batches,
    plan_shards,
    split_batches,
)
from workers.pipeline.pace import Pace
from workers.pipeline.placing import DTYPES, load_placed, on_device, recomputes
from workers.pipeline.prepared import Prepared
from workers.pipeline.probe_samples import ProbeSet, read_probes
from workers.pipeline.samples import SampleSet
from workers.pipeline.shards import Shard


@dataclass
class Runtime:
    """An audit's model with its samples, on this worker's device.

    Attributes:
        key: the audit, and the checkpoint where it is not the audited state.
        validation: None for an audit without a validation set.
        limits: of a batch that fits here; halved for good when memory ran out.
        pace: of the passes over the validation samples.
    """

    key: tuple[str, int | None]
    extractor: GradientExtractor
    prepared: Prepared
    train: SampleSet
    validation: SampleSet | None
    limits: BatchLimits
    pace: Pace = field(default_factory=Pace)
    _shards: list[Tensor] | None = None
    _probes: ProbeSet | None = None
    _probe_shards: list[Tensor] = field(default_factory=list)
    _sketch: GradientSketch | None = field(default=None, repr=False)
    _validation_rows: tuple[GradientRows, ...] | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.extractor.device

    @property
    def trusted(self) -> SampleSet:
        """The validation set, for what only audits with one get to."""
        if self.validation is None:
            raise RuntimeError("this audit has no validation set")
        return self.validation

    def extract(self, samples: SampleSet | ProbeSet, indices: Tensor) -> SampleGradients:
        """Take the gradients of the samples at `indices`."""
        inputs, targets = samples.batch(indices, pad_id=self.prepared.pad_id, device=self.device)
        return self.extractor.extract(inputs, targets)

    def screen(self, samples: SampleSet | ProbeSet, indices: Tensor) -> SampleGradients:
        """Tell losses and predictions of the samples at `indices`, without gradients."""
        inputs, targets = samples.batch(indices, pad_id=self.prepared.pad_id, device=self.device)
        return self.extractor.screen(inputs, targets)

    @property
    def dense_modules(self) -> list[int]:
        """The modules that pass through a curvature: all but the word embeddings."""
        return [
            module for module, spec in enumerate(self.extractor.modules) if spec.form != "sparse"
        ]

    def shard(self, context: StageContext, position: int) -> Shard:
        """Return one shard, as planned when computing began; those of the probes come last."""
        if self._shards is None:
            self._shards = plan_shards(
                self.train.length_T,
                BatchLimits.planned(context.provenance),
                samples_per_shard=context.provenance["samples_per_shard"],
                # an audit that an earlier version planned has none
                tokens_per_shard=context.provenance.get("tokens_per_shard"),
            )
        if position < len(self._shards):
            files = context.artifacts
            return Shard(self.train, self._shards[position], files, position, is_probes=False)
        if self._probes is None:
            self._probes = read_probes(context, self.train)
            self._probe_shards = split_batches(
                plan_batches(self._probes.length_T, BatchLimits.planned(context.provenance)),
                count=context.num_probe_shards,
            )
        number = position - len(self._shards)
        files = context.artifacts.probes
        return Shard(self._probes, self._probe_shards[number], files, number, is_probes=True)

    @property
    def sketch(self) -> GradientSketch:
        """What sketches the samples' gradients, drawn once."""
        if self._sketch is None:
            self._sketch = GradientSketch(self.extractor.modules, device=self.device)
        return self._sketch

    def validation_rows(self, path: Path) -> tuple[GradientRows, ...]:
        """Return the validation gradients of every module, read once."""
        if self._validation_rows is None:
            tensors: dict[str, dict[str, Tensor]] = {}
            for key, tensor in read_tensors(path).items():
                module, _, name = key.partition("/")
                tensors.setdefault(module, {})[name] = tensor
            self._validation_rows = tuple(
                rows_from_tensors(tensors[module]).to(self.device) for module in sorted(tensors)
            )
        return self._validation_rows


_loaded: list[Runtime] = []  # at most one: the audit whose units this process works on


def load_runtime(context: StageContext, *, checkpoint: int | None = None) -> Runtime:
    """Return the audit's runtime, loading it unless the last unit needed the same.

    Args:
        context: the unit of work.
        checkpoint: an earlier state of the adapter; None is the audited state.
    """
    key = (context.claim.audit_id, checkpoint)
    if _loaded and _loaded[0].key == key:
        return _loaded[0]
    _loaded.clear()
    artifacts = context.artifacts
    prepared = Prepared.read(artifacts.prepared)
    resolved = replace(prepared.model, adapter_path=_adapter_path(context, prepared, checkpoint))
    with context.hold.silence():
        model = on_device(context, load_placed(context, prepared, resolved))
    train = SampleSet(artifacts.train)
    validation = SampleSet(artifacts.validation) if context.has_validation else None
    longest = max(int(samples.length_T.max()) for samples in (train, validation) if samples)
    runtime = Runtime(
        key=key,
        extractor=make_extractor(
            context,
            model,
            has_adapter=resolved.adapter_path is not None,
            longest=longest,
        ),
        prepared=prepared,
        train=train,
        validation=validation,
        limits=BatchLimits.planned(context.provenance)
        if "samples_per_batch" in context.provenance
        else BatchLimits(most_tokens(context.settings)),
    )
    _loaded.append(runtime)
    return runtime


def forget_runtime() -> None:
    """Let go of the model that this process keeps, for one that will take its place."""
    _loaded.clear()


def _adapter_path(context: StageContext, prepared: Prepared, checkpoint: int | None) -> Path | None:
    if context.request.fine_tune is None:
        if checkpoint is None:
            return prepared.model.adapter_path
        return prepared.checkpoint_paths[checkpoint]
    if checkpoint is None:
        return context.artifacts.adapter
    return context.artifacts.epoch_adapter(checkpoint)


def make_extractor(
    context: StageContext,
    model: nn.Module,
    *,
    has_adapter: bool,
    longest: int,
    recompute: bool | None = None,
) -> GradientExtractor:
    """Return what takes the audit's gradients.

    Args:
        context: the unit of work.
        model: on the device where it will run.
        has_adapter: whether it is a PEFT model.
        longest: tokens of the longest sample.
        recompute: whether blocks are computed again on the way back; None is what was chosen.

    Raises:
        AuditRefused: its gradients cannot be taken; names the field.
    """
    request, wishes = context.request, wishes_of(context)
    wanted = request.model.projection
    options: Mapping[str, Any] = {
        "objective": OBJECTIVES[request.task],
        "dtype": DTYPES[request.precision],
        "projection": Projection(dimension=wanted.dimension, seed=wanted.seed) if wanted else None,
        "longest": longest,
        "needs_dense": wishes.curvature,
        "word_embeddings": wishes.word_embeddings,
        "hidden_states": wishes.hidden_states,
        "kronecker": wishes.kronecker,
        "recompute": recomputes(context) if recompute is None else recompute,
    }
    try:
        targets = None
        if not has_adapter:
            targets = request.model.target_modules or query_and_value(model)
        extractor = GradientExtractor(model, target_modules=targets, **options)
    except (NoTrackedModules, UnsupportedModule) as error:
        field = "model.adapter" if request.model.adapter else "model.target_modules"
        if request.fine_tune is not None:
            field = "fine_tune.target_modules"
        raise AuditRefused(error.code, str(error), field=field) from error
    _restrict(extractor, layers_of_interest(request))
    return extractor


def _restrict(extractor: GradientExtractor, expressions: Sequence[str] | None) -> None:
    """Leave out the gradients of layers that nobody asked for."""
    if expressions is None:
        return
    chosen: set[int] = set()
    for expression in expressions:
        try:
            chosen |= set(
                resolve_layers(
                    expression,
                    groups=extractor.groups,
                    layers=[spec.layer for spec in extractor.modules],
                    num_blocks=extractor.num_blocks,
                )
            )
        except UnknownLayers:
            return  # of another kind of estimator, or refused when the layout is checked
    if len(chosen) < len(extractor.modules):
        extractor.restrict(chosen)
