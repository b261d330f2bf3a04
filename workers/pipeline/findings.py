"""What the passes over the model left of an audit, opened for ranking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from app.shared_files import fetch
from workers.influence.aggregation import lower_half
from workers.pipeline.artifacts import read_tensors, write_tensors
from workers.pipeline.confidence import OutOfSample, predict_out_of_sample
from workers.pipeline.context import StageContext
from workers.pipeline.layout import ModelLayout
from workers.pipeline.prepared import Prepared
from workers.pipeline.probe_samples import read_probes
from workers.pipeline.probed_set import ProbedSet
from workers.pipeline.samples import SampleSet
from workers.pipeline.scores import Scorer
from workers.pipeline.training_facts import TrainingFacts
from workers.pipeline.validation_choice import ValidationChoice

# Enough to tell configurations apart; the cost of choosing does not grow beyond.
MAX_PROBED_SAMPLES = 4000


@dataclass(frozen=True)
class Findings:
    """The samples of an audit with all that is known of them.

    Attributes:
        validation: None for an audit without a validation set; then its facts are empty.
        labels: the label of each class; none for a causal language model.
        out_of_sample: what a simple model says of the samples; None without classes.
    """

    train: SampleSet
    validation: SampleSet | None
    facts: TrainingFacts
    validation_facts: Mapping[str, Tensor]
    layout: ModelLayout
    labels: Sequence[str]
    out_of_sample: OutOfSample | None

    @classmethod
    def open(cls, context: StageContext) -> Self:
        """Open the files of an audit."""
        artifacts = context.artifacts
        train = SampleSet(artifacts.train)
        facts = TrainingFacts(artifacts, context.provenance["num_shards"])
        validation, validation_facts = None, {}
        if context.has_validation:
            validation = SampleSet(artifacts.validation)
            validation_facts = read_tensors(artifacts.validation_facts)
        labels = [str(label) for label in Prepared.read(artifacts.prepared).labels]
        return cls(
            train=train,
            validation=validation,
            facts=facts,
            validation_facts=validation_facts,
            layout=ModelLayout.read(artifacts.modules),
            labels=labels,
            out_of_sample=_out_of_sample(context, train, facts, validation_facts, len(labels)),
        )

    def scorer(self, context: StageContext, probed: ProbedSet | None = None) -> Scorer:
        """Return what turns influence into scores, of the training set or of the probed one."""
        label_T = self.train.label_T
        if probed is not None:
            label_T = probed.label_T
        # of an unknown number of passes over the probed set, the only truth is that work goes on
        tick = context.hold.step if probed is None else lambda *_: context.hold.keep_alive()
        confidence_T = None
        if self.out_of_sample is not None:
            confidence_T = self.out_of_sample.train_TC.gather(1, label_T[:, None])[:, 0]
        return Scorer(
            context.artifacts,
            probed.facts if probed else self.facts,
            layout=self.layout,
            validation=choose_validation(self.validation, self.validation_facts),
            num_checkpoints=context.provenance.get("num_checkpoints", 0),
            is_noisy_T=probed.is_probe_T if probed else self.train.is_noisy_T,
            confidence_T=confidence_T,
            probed=probed,
            seed=context.request.seed,
            tick=tick,
        )

    def probed(self, context: StageContext) -> ProbedSet:
        """Return the training set with the probes in the place of their originals."""
        return ProbedSet.of(
            context.artifacts,
            self.train,
            self.facts,
            read_probes(context, self.train).probes,
            num_shards=context.num_probe_shards,
            max_samples=MAX_PROBED_SAMPLES,
            seed=context.request.probes.seed,
        )


def choose_validation(samples: SampleSet | None, facts: Mapping[str, Tensor]) -> ValidationChoice:
    """Return which validation samples count, and which of them `correct_only` keeps.

    Those that the model predicts correctly; for a causal language model the half with the lower
    loss, of those that are finite.
    """
    if samples is None:
        return ValidationChoice.nothing()
    is_finite_V = facts["is_finite"].bool()
    if samples.has_completions:
        is_correct_V = torch.zeros_like(is_finite_V)
        is_correct_V[is_finite_V] = lower_half(facts["loss"][is_finite_V])
    else:
        is_correct_V = facts["predicted"] == samples.label_T
    return ValidationChoice(is_finite_V, is_correct_V, samples.label_T)


def _out_of_sample(
    context: StageContext,
    train: SampleSet,
    facts: TrainingFacts,
    validation_facts: Mapping[str, Tensor],
    num_classes: int,
) -> OutOfSample | None:
    """Ask the simple model, once for the audit and all its rankings."""
    features = facts.wide("features")
    if features is None or "features" not in validation_facts:
        return None
    path = context.artifacts.out_of_sample
    if not fetch(path):
        found = predict_out_of_sample(
            features,
            train.label_T,
            validation_facts["features"],
            num_classes=num_classes,
            seed=context.request.seed,
            keep_alive=context.hold.keep_alive,
        )
        write_tensors(path, {"train": found.train_TC, "validation": found.validation_VC})
    kept = read_tensors(path)
    return OutOfSample(kept["train"], kept["validation"])
