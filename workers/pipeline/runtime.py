"""The loaded model of one audit: kept in the worker process between the audit's units."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workers.device import choose_device
from workers.influence.errors import NonFiniteInfluence, NoTrackedModules, UnsupportedModule
from workers.influence.gradients import GradientExtractor, SampleGradients
from workers.pipeline.artifacts import read_tensors
from workers.pipeline.context import StageContext
from workers.pipeline.failures import AuditRefused
from workers.pipeline.fine_tune import query_and_value
from workers.pipeline.memory import plan_shards
from workers.pipeline.prepare import Prepared
from workers.pipeline.samples import SampleSet
from workers.sources.loading import load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Runtime:
    """An audit's model with its samples, on this worker's device.

    Attributes:
        tokens_per_batch: the budget that fits here; halved for good when memory ran out.
    """

    audit_id: str
    extractor: GradientExtractor
    prepared: Prepared
    train: SampleSet
    validation: SampleSet
    tokens_per_batch: int
    hidden_size: int
    num_layers: int
    _shards: list[Tensor] | None = None
    _validation_gradients: tuple[Tensor, ...] | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.extractor.device

    def extract(self, samples: SampleSet, indices: Tensor, *, name: str) -> SampleGradients:
        """Take the gradients of the samples at `indices`.

        Raises:
            NonFiniteInfluence: names the rows of the user's file.
        """
        inputs, label_B = samples.batch(indices, pad_id=self.prepared.pad_id, device=self.device)
        try:
            return self.extractor.extract(inputs, label_B)
        except NonFiniteInfluence as error:
            rows = [int(indices[position]) for position in error.positions]
            raise NonFiniteInfluence(f"{error.what} in the {name} set", positions=rows) from error

    def shard(self, context: StageContext, position: int) -> Tensor:
        """Return the training indices of one shard, as planned when computing began."""
        if self._shards is None:
            self._shards = plan_shards(
                self.train.length_T,
                tokens_per_batch=context.provenance["tokens_per_batch"],
                samples_per_shard=context.provenance["samples_per_shard"],
            )
        return self._shards[position]

    def validation_gradients(self, path: Path) -> tuple[Tensor, ...]:
        """Return the validation gradients [V, d] of every module, read once."""
        if self._validation_gradients is None:
            kept = read_tensors(path)
            self._validation_gradients = tuple(
                kept[f"{module:05d}"].to(self.device)
                for module in range(len(self.extractor.modules))
            )
        return self._validation_gradients


_loaded: list[Runtime] = []  # at most one: the audit whose units this process works on


def load_runtime(context: StageContext) -> Runtime:
    """Return the audit's runtime, loading it unless the last unit was of the same audit."""
    audit_id = context.claim.audit_id
    if _loaded and _loaded[0].audit_id == audit_id:
        return _loaded[0]
    _loaded.clear()
    artifacts = context.artifacts
    prepared = Prepared.read(artifacts.prepared)
    resolved = prepared.model
    if context.request.fine_tune is not None:
        resolved = replace(resolved, adapter_path=artifacts.adapter)
    with context.hold.silence():
        loaded = load_model(resolved, labels=prepared.labels)
    model: Any = loaded.model
    config = model.config
    extractor = _make_extractor(context, model, has_adapter=resolved.adapter_path is not None)
    runtime = Runtime(
        audit_id=audit_id,
        extractor=extractor,
        prepared=prepared,
        train=SampleSet(artifacts.train),
        validation=SampleSet(artifacts.validation),
        tokens_per_batch=context.provenance.get(
            "tokens_per_batch", context.settings.tokens_per_batch
        ),
        hidden_size=int(config.hidden_size),
        num_layers=int(config.num_hidden_layers),
    )
    _loaded.append(runtime)
    return runtime


def _make_extractor(
    context: StageContext, model: nn.Module, *, has_adapter: bool
) -> GradientExtractor:
    request = context.request
    try:
        targets = None
        if not has_adapter:
            targets = request.model.target_modules or query_and_value(model)
        return GradientExtractor(
            model.to(choose_device(context.settings.device)),
            target_modules=targets,
            dtype=DTYPES[request.precision],
        )
    except (NoTrackedModules, UnsupportedModule) as error:
        field = "model.adapter" if request.model.adapter else "model.target_modules"
        if request.fine_tune is not None:
            field = "fine_tune.target_modules"
        raise AuditRefused(error.code, str(error), field=field) from error
