"""The baselines that every table shows beside influence."""

import torch
from torch import Tensor

from workers.influence.estimators.base import Baseline, SampleFacts


class Loss(Baseline):
    """−loss(x_i)."""

    name = "loss"
    description = "The plain loss at the checkpoint: what influence must beat."

    def score(self, facts: SampleFacts) -> Tensor:
        return -facts.loss_T


class Confidence(Baseline):
    """The probability of the given class, out of sample: P(y_i | x_i)."""

    name = "confidence"
    description = (
        "How likely a simple model, that has not seen the sample, finds the given class: cheap and "
        "strong on classifiers."
    )
    needs_validation = True
    needs_classes = True
    needs_features = True

    def score(self, facts: SampleFacts) -> Tensor:
        if facts.confidence_T is None:
            raise ValueError("the confidence needs out-of-sample probabilities of the classes.")
        return facts.confidence_T


class Random(Baseline):
    """A seeded draw, the same for the same seed and number of samples."""

    name = "random"
    description = "Chance, the floor of every comparison."

    def score(self, facts: SampleFacts) -> Tensor:
        # drawn on the CPU, so that every device gives the same scores
        generator = torch.Generator().manual_seed(facts.seed)
        return torch.rand(len(facts.loss_T), generator=generator).to(facts.loss_T.device)


class Oracle(Baseline):
    """−1 for known noise, 0 for the rest."""

    name = "oracle"
    description = "Known noise first: the best that is possible, where the noise is known."
    needs_known_noise = True

    def score(self, facts: SampleFacts) -> Tensor:
        if facts.is_noisy_T is None:
            raise ValueError("the oracle needs to know which samples are noisy.")
        return -facts.is_noisy_T.float()
