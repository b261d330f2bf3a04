import pytest
import torch

from workers.influence.estimators import SampleFacts
from workers.influence.estimators.baselines import Loss, Oracle, Random
from workers.influence.evaluation import auc_ndr


def facts(*, num_train: int = 4, seed: int = 0, known: bool = True) -> SampleFacts:
    is_noisy_T = torch.arange(num_train) % 5 == 1
    return SampleFacts(
        loss_T=torch.arange(num_train).float(), is_noisy_T=is_noisy_T if known else None, seed=seed
    )


def test_the_largest_loss_is_the_most_suspect() -> None:
    assert Loss().score(facts()).argmin() == 3


def test_random_repeats_itself_for_a_seed() -> None:
    assert torch.equal(Random().score(facts(seed=7)), Random().score(facts(seed=7)))
    assert not torch.equal(Random().score(facts(seed=7)), Random().score(facts(seed=8)))


def test_random_is_as_good_as_chance() -> None:
    """With 20 % noise chance has an area of (n/2) / (0.8 n + 0.1 n)."""
    samples = facts(num_train=20_000)
    assert samples.is_noisy_T is not None
    assert auc_ndr(Random().score(samples), samples.is_noisy_T) == pytest.approx(0.5556, abs=0.01)


def test_the_oracle_is_perfect_and_needs_to_know() -> None:
    samples = facts(num_train=13)
    assert samples.is_noisy_T is not None
    assert auc_ndr(Oracle().score(samples), samples.is_noisy_T) == 1.0
    with pytest.raises(ValueError, match="which samples are noisy"):
        Oracle().score(facts(known=False))
