"""The contenders of `benchmarks.peers`: each computes the same influence in its own way.

Every contender is given the model and the samples in the same batches, and returns the dot products
of the gradients of every LoRA factor, float32 [F, V, T] with the samples in batch order. What they
import is imported when they run, so that none pays for another (PLC0415); most of it carries no
types, so what it hands over is Any (ANN401).

Shapes: F LoRA factors, V validation samples, T training samples, B batch.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.gradients import Batch, run_epoch
from workers.influence.gradients import GradientExtractor
from workers.influence.rows import GradientRows

BLOCK = 4
"""Batches whose gradients meet the validation gradients together: wider products are faster."""


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        model: MiniLM with a LoRA adapter, in evaluation mode.
        train: training samples in batches of similar length.
        validation: validation samples, likewise.
    """

    model: nn.Module
    train: Sequence[Batch]
    validation: Sequence[Batch]

    def factors(self) -> list[str]:
        """Return the names of the LoRA factors' linear layers, in the model's order."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and ".lora_" in name
        ]

    def stacked(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Stack what belongs to every factor, in the model's order."""
        return torch.stack([rows[name] for name in self.factors()])


def plain_epoch(work: Work) -> None:
    """Do the yardstick: forward and backward into the parameter gradients, no optimizer step."""
    run_epoch(work.model, [*work.validation, *work.train])


def winnow(work: Work) -> Tensor:
    """Do it as the service's gradient stage does."""
    extractor = GradientExtractor(work.model)
    chosen = [place for place, spec in enumerate(extractor.modules) if ".lora_" in spec.name]

    def rows(batches: Sequence[Batch]) -> list[GradientRows]:
        parts = [extractor.extract(*batch).gradients for batch in batches]
        return [GradientRows.concatenate([part[place] for part in parts]) for place in chosen]

    validation = rows(work.validation)
    blocks = []
    for start in range(0, len(work.train), BLOCK):
        train = rows(work.train[start : start + BLOCK])
        dots = [known.dot(each) for known, each in zip(validation, train, strict=True)]
        blocks.append(torch.stack(dots))
    return torch.cat(blocks, dim=-1)


def loop(work: Work) -> Tensor:
    """Do it as the paper's code does: one sample at a time, its gradients copied one by one."""

    def rows(batches: Sequence[Batch]) -> list[Tensor]:
        samples = []
        for inputs, labels_B in batches:
            for sample in range(len(labels_B)):
                length = int(inputs["attention_mask"][sample].sum())
                single = {name: ids[sample : sample + 1, :length] for name, ids in inputs.items()}
                work.model.zero_grad()
                loss = cross_entropy(work.model(**single).logits, labels_B[sample : sample + 1])
                loss.backward()
                samples.append(
                    [
                        parameter.grad.flatten().clone()
                        for name, parameter in work.model.named_parameters()
                        if parameter.grad is not None and ".lora_" in name
                    ]
                )
        return [torch.stack(parts) for parts in zip(*samples, strict=True)]

    pairs = zip(rows(work.validation), rows(work.train), strict=True)
    return torch.stack([validation @ train.T for validation, train in pairs])


def kronfluence(work: Work) -> Tensor:
    """Do it by kronfluence, all validation samples in one batch: fewer passes over the training."""
    from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model  # noqa: PLC0415
    from kronfluence.utils.dataset import DataLoaderKwargs  # noqa: PLC0415

    factors = work.factors()

    class Classifying(Task):  # type: ignore[misc]  # no types
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:  # noqa: ANN401, ARG002, FBT001, FBT002
            return cross_entropy(_logits(model, batch), batch["labels"], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:  # noqa: ANN401
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return factors

        def get_attention_mask(self, batch: Any) -> Tensor:  # noqa: ANN401
            mask: Tensor = batch["attention_mask"]
            return mask

    task = Classifying()
    train, validation = _samples(work.train), _samples(work.validation)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            analysis_name="peers",
            model=prepare_model(work.model, task),
            task=task,
            cpu=True,
            disable_tqdm=True,
            output_dir=folder,
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=_collate))
        analyzer.fit_all_factors(
            factors_name="identity",
            dataset=train,
            factor_args=FactorArguments(strategy="identity"),
        )
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="identity",
            query_dataset=validation,
            train_dataset=train,
            per_device_query_batch_size=len(validation),
            per_device_train_batch_size=len(work.train[-1][1]),
            score_args=ScoreArguments(compute_per_module_scores=True),
        )
        scores = analyzer.load_pairwise_scores("scores")
        return torch.stack([scores[name] for name in factors])


def dattri_llm(work: Work) -> Tensor:
    """Do it by dattri-llm's hooks and its similarity of captured gradients."""
    from dattri_llm import CaptureCallback, HookManager, HookManagerConfig  # noqa: PLC0415

    factors = work.factors()
    config = HookManagerConfig(
        hook_types=dict.fromkeys(factors, "linear_io"),
        module_kwargs={name: {"has_bias": False} for name in factors},
    )

    def gradients(batches: Sequence[Batch]) -> list[Any]:
        captured = []
        for inputs, labels_B in batches:
            callback = CaptureCallback()
            manager = HookManager(work.model, config, callbacks=[callback])
            with manager.collect(deregister_on_exit=True):
                logits = work.model(**inputs).logits
                cross_entropy(logits, labels_B, reduction="sum").backward()
            work.model.zero_grad()
            captured.append(callback.record.gradient)
        return captured

    validation = gradients(work.validation)
    blocks = []
    for batch in work.train:
        (train,) = gradients([batch])
        parts = [known.similarity(train, mode="materialized") for known in validation]
        blocks.append(work.stacked({n: torch.cat([part[n] for part in parts]) for n in factors}))
    return torch.cat(blocks, dim=-1)


def bergson(work: Work) -> Tensor:
    """Do it by bergson's collector; its own loop over batches knows causal language models only."""
    from bergson import GradientProcessor  # noqa: PLC0415
    from bergson.collector.collector import HookCollectorBase  # noqa: PLC0415

    logging.getLogger("bergson").setLevel(logging.ERROR)

    class Collector(HookCollectorBase):  # type: ignore[misc]  # no types
        def setup(self) -> None:
            self.mod_grads: dict[str, Tensor] = {}

        def teardown(self) -> None:
            pass

        def backward_hook(self, module: Any, g: Tensor) -> None:  # noqa: ANN401
            self.mod_grads[module._name] = self._compute_gradient(module, g)  # noqa: SLF001

        def process_batch(self, indices: list[int], **kwargs: Any) -> None:
            pass

    collector = Collector(
        model=work.model, target_modules=set(work.factors()), processor=GradientProcessor()
    )

    def gradients(batches: Sequence[Batch]) -> Tensor:
        rows = []
        for inputs, labels_B in batches:
            with collector.with_batch(inputs["attention_mask"].bool()):
                logits = work.model(**inputs).logits
                cross_entropy(logits, labels_B, reduction="sum").backward()
            work.model.zero_grad()
            rows.append(work.stacked(collector.mod_grads))
        return torch.cat(rows, dim=1)

    return gradients(work.validation) @ gradients(work.train).mT


CONTENDERS: Mapping[str, Callable[[Work], Tensor | None]] = {
    "plain epoch": plain_epoch,
    "winnow": winnow,
    "loop": loop,
    "kronfluence": kronfluence,
    "dattri-llm": dattri_llm,
    "bergson": bergson,
}


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits


def _samples(batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Take the batches apart, without their padding."""
    samples = []
    for inputs, labels_B in batches:
        for sample, label in enumerate(labels_B):
            length = int(inputs["attention_mask"][sample].sum())
            columns = {name: ids[sample, :length] for name, ids in inputs.items()}
            samples.append({**columns, "labels": label})
    return samples


def _collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    batch = {
        name: nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True)
        for name in samples[0]
        if name != "labels"
    }
    return {**batch, "labels": torch.stack([sample["labels"] for sample in samples])}
