"""The share of wrong samples from three means, with an interval that covers the truth.

Shapes: N scores of the set, M of right samples, W of wrong ones.
"""

import statistics
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from workers.influence.quantification import NoiseShare, estimate_noise_share

NUM_DRAWS = 50
SCORES = st.lists(st.integers(-20, 20), min_size=1, max_size=15)


def estimate(score: Sequence[float], right: Sequence[float], wrong: Sequence[float]) -> NoiseShare:
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (score, right, wrong)]
    found = estimate_noise_share(*tensors, seed=0)
    assert found is not None
    return found


@given(SCORES, SCORES, SCORES)
def test_the_share_mixes_the_two_known_means_into_that_of_the_set(
    score: list[int], right: list[int], wrong: list[int]
) -> None:
    """The share p with (1 − p) · right + p · wrong = mean, or the nearest of 0 and 1."""
    mean, high, low = (statistics.fmean(values) for values in (score, right, wrong))
    assume(high - low > 0.01)
    found = estimate(score, right, wrong)
    assert 0 <= found.low <= found.share <= found.high <= 1
    if mean >= high:
        assert found.share == pytest.approx(0, abs=1e-12)
    elif mean <= low:
        assert found.share == pytest.approx(1, abs=1e-12)
    else:
        mixed = (1 - found.share) * high + found.share * low
        assert mixed == pytest.approx(mean, rel=1e-9, abs=1e-9)


@given(SCORES, SCORES, SCORES, st.floats(0.01, 100), st.floats(-100, 100))
def test_neither_the_scale_nor_the_zero_of_the_scores_counts(
    score: list[int], right: list[int], wrong: list[int], scale: float, shift: float
) -> None:
    assume(statistics.fmean(right) - statistics.fmean(wrong) > 1)
    one = estimate(score, right, wrong)
    other = estimate(
        *([scale * value + shift for value in values] for values in (score, right, wrong))
    )
    for name in ("share", "low", "high"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-6)


def draw_mixture(share: float, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a set with a share of wrong samples among it, and right and wrong ones besides."""
    generator = torch.Generator().manual_seed(seed)

    def right(count: int) -> Tensor:
        return torch.rand(count, generator=generator) ** 0.5

    def wrong(count: int) -> Tensor:
        return torch.rand(count, generator=generator) ** 2

    is_wrong_N = torch.rand(600, generator=generator) < share
    score_N = torch.where(is_wrong_N, wrong(600), right(600))
    return score_N, right(150), wrong(300)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5, 0.9])
def test_the_interval_covers_the_share_that_a_set_was_made_with(share: float) -> None:
    found = []
    for seed in range(NUM_DRAWS):
        estimated = estimate_noise_share(*draw_mixture(share, seed=seed), seed=seed)
        assert estimated is not None
        found.append(estimated)
    assert statistics.fmean(each.share for each in found) == pytest.approx(share, abs=0.03)
    assert max(abs(each.share - share) for each in found) < 0.2
    num_covered = sum(each.low <= share <= each.high for each in found)
    assert num_covered >= 0.8 * NUM_DRAWS
    # and not because it says nothing
    assert statistics.fmean(each.high - each.low for each in found) < 0.25


def test_more_samples_make_a_narrower_interval() -> None:
    sets = draw_mixture(0.3, seed=1)
    few = estimate_noise_share(*sets, seed=0)
    many = estimate_noise_share(*(scores.repeat(16) for scores in sets), seed=0)
    assert few is not None
    assert many is not None
    assert many.share == pytest.approx(few.share, abs=1e-6)
    assert (many.high - many.low) == pytest.approx((few.high - few.low) / 4, rel=0.1)


def test_samples_that_do_not_spread_leave_nothing_open() -> None:
    assert estimate([0.75] * 3, [1.0, 1.0], [0.0]) == NoiseShare(share=0.25, low=0.25, high=0.25)


def test_the_seed_decides_the_interval_and_not_the_share() -> None:
    sets = draw_mixture(0.3, seed=0)
    one, again, other = (estimate_noise_share(*sets, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one is not None
    assert other is not None
    assert one.share == other.share
    assert (one.low, one.high) != (other.low, other.high)


@pytest.mark.parametrize(
    ("score", "right", "wrong"),
    [
        ([], [1.0], [0.0]),
        ([0.5], [], [0.0]),
        ([0.5], [1.0], []),
        ([0.5], [0.5, 0.5], [0.5]),
        ([0.5], [0.2], [0.9, 0.8]),
    ],
    ids=["no set", "none right", "none wrong", "alike", "the wrong way round"],
)
def test_nothing_is_said_where_right_and_wrong_cannot_be_told_apart(
    score: list[float], right: list[float], wrong: list[float]
) -> None:
    tensors = [torch.tensor(values) for values in (score, right, wrong)]
    assert estimate_noise_share(*tensors, seed=0) is None
