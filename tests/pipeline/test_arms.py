"""Which samples an arm keeps, beside what whole audits show."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.influence.noise import flip_labels
from workers.pipeline.arms import kept_without_lowest
from workers.pipeline.draws import random_order


@settings(deadline=None, derandomize=True)
@given(scores=st.lists(st.integers(-3, 3), min_size=1, max_size=30), fraction=st.floats(0.01, 0.9))
def test_the_lowest_go_ties_by_index(scores: list[int], fraction: float) -> None:
    order = sorted(range(len(scores)), key=lambda place: (scores[place], place))
    gone = set(order[: round(fraction * len(scores))])
    order_T = torch.tensor(scores).argsort(stable=True)
    kept = kept_without_lowest(order_T, fraction).tolist()
    assert kept == [place not in gone for place in range(len(scores))]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1))
def test_removal_at_random_does_not_find_noise_that_was_planted_with_the_same_seed(
    seed: int,
) -> None:
    """Both draw a permutation from a seed; of the same draw it would be the oracle."""
    num_train = 2000
    _, is_noisy_T = flip_labels(
        torch.zeros(num_train, dtype=torch.int64), num_classes=2, fraction=0.3, seed=seed
    )
    order_T = random_order(num_train, seed=seed, purpose="removal at random")
    assert torch.equal(order_T.sort().values, torch.arange(num_train))
    again_T = random_order(num_train, seed=seed, purpose="removal at random")
    assert torch.equal(order_T, again_T)
    found = float((is_noisy_T & ~kept_without_lowest(order_T, 0.3)).sum()) / 600
    assert 0.2 < found < 0.4


def test_seeds_remove_others() -> None:
    orders = [random_order(50, seed=seed, purpose="removal at random") for seed in range(20)]
    kept = [kept_without_lowest(order_T, 0.3) for order_T in orders]
    assert len({tuple(row.tolist()) for row in kept}) == 20
