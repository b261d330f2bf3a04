"""What holds for every aggregation, whichever way it goes through the columns."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.influence import aggregation_oracles
from tests.influence.aggregating import (
    GROUPS,
    IS_CORRECT_V,
    NUM_TRAIN,
    NUM_VALIDATION,
    Aggregated,
    random_influence,
)
from workers.influence.aggregation import AGGREGATIONS, AggregationOptions, order_by_score

examples = settings(deadline=None, derandomize=True, max_examples=40)
configurations = list(itertools.product(GROUPS, AGGREGATIONS, (False, True)))
fractions = st.integers(1, 100).map(lambda percent: percent / 100)


@pytest.mark.parametrize(("group", "aggregation", "correct_only"), configurations)
def test_scores_equal_those_of_loops(group: str, aggregation: str, correct_only: bool) -> None:
    """Ties included."""
    influence_MVT = random_influence(with_ties=True)
    chosen_MVT = influence_MVT[list(GROUPS[group])]
    if correct_only:
        chosen_MVT = chosen_MVT[:, IS_CORRECT_V]
    found = Aggregated(influence_MVT).scores(group, aggregation, correct_only=correct_only)
    expected = aggregation_oracles.aggregate(
        chosen_MVT, aggregation, vote_fraction=0.4, trim_fraction=0.2, common_share=0.6
    )
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@examples
@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 12)),
    fraction=fractions,
    trim=st.integers(0, 49).map(lambda percent: percent / 100),
)
def test_scores_equal_those_of_loops_at_any_size_and_fraction(
    seed: int, shape: tuple[int, int, int], fraction: float, trim: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    influence_MVT = (torch.randn(shape, generator=generator) * 2).round()
    options = AggregationOptions(vote_fraction=fraction, trim_fraction=trim, common_share=fraction)
    aggregated = Aggregated(
        influence_MVT, options=options, is_correct_V=torch.ones(shape[1], dtype=torch.bool)
    )
    for name in AGGREGATIONS:
        expected = aggregation_oracles.aggregate(
            influence_MVT,
            name,
            vote_fraction=fraction,
            trim_fraction=trim,
            common_share=fraction,
        )
        assert aggregated.scores("all", name).tolist() == pytest.approx(expected, abs=1e-6)


@examples
@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, NUM_VALIDATION), max_size=4),
    train_cuts=st.lists(st.integers(0, NUM_TRAIN), max_size=8),
)
def test_blocks_change_no_bit(seed: int, cuts: list[int], train_cuts: list[int]) -> None:
    """Of validation samples or of training samples; with sums that round at every step."""
    influence_MVT = random_influence(seed=seed) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    whole = Aggregated(influence_MVT)
    cut = Aggregated(influence_MVT, cuts=cuts, train_cuts=train_cuts)
    for group, name, correct_only in configurations:
        assert torch.equal(
            whole.scores(group, name, correct_only=correct_only),
            cut.scores(group, name, correct_only=correct_only),
        )


@examples
@given(seed=st.integers(0, 1000), exponent=st.integers(-8, 8))
def test_aggregations_of_ranks_ignore_the_scale_of_a_module(seed: int, exponent: int) -> None:
    influence_MVT = random_influence(seed=seed)
    rescaled_MVT = influence_MVT * torch.tensor([1.0, 10.0**exponent, 1.0])[:, None, None]
    for name in ("rank", "vote", "common_set"):
        assert torch.equal(
            Aggregated(rescaled_MVT).scores("all", name),
            Aggregated(influence_MVT).scores("all", name),
        )


@examples
@given(seed=st.integers(0, 1000), factor=st.floats(-4, 4, width=32))
def test_mean_is_linear(seed: int, factor: float) -> None:
    one_MVT, two_MVT = random_influence(seed=seed), random_influence(seed=seed + 1)

    def mean(influence_MVT: Tensor) -> Tensor:
        return Aggregated(influence_MVT).scores("all", "mean", correct_only=True)

    torch.testing.assert_close(
        mean(one_MVT + factor * two_MVT),
        mean(one_MVT) + factor * mean(two_MVT),
        rtol=1e-5,
        atol=1e-5,
    )


@examples
@given(seed=st.integers(0, 1000), permutation=st.permutations(range(NUM_TRAIN)))
def test_the_order_of_the_training_set_does_not_matter(seed: int, permutation: list[int]) -> None:
    """Without ties, a reordered training set has reordered scores."""
    influence_MVT = random_influence(seed=seed)
    whole, permuted = Aggregated(influence_MVT), Aggregated(influence_MVT[..., permutation])
    for name in AGGREGATIONS:
        assert torch.equal(permuted.scores("all", name), whole.scores("all", name)[permutation])


@examples
@given(seed=st.integers(0, 1000), permutation=st.permutations(range(NUM_VALIDATION)))
def test_the_order_of_the_validation_set_does_not_matter(seed: int, permutation: list[int]) -> None:
    influence_MVT = random_influence(seed=seed)
    whole = Aggregated(influence_MVT)
    permuted = Aggregated(influence_MVT[:, permutation], is_correct_V=IS_CORRECT_V[permutation])
    for name, correct_only in itertools.product(AGGREGATIONS, (False, True)):
        torch.testing.assert_close(
            permuted.scores("all", name, correct_only=correct_only),
            whole.scores("all", name, correct_only=correct_only),
        )


def test_ties_go_by_training_index() -> None:
    aggregated = Aggregated(torch.zeros(3, NUM_VALIDATION, NUM_TRAIN))
    for name in ("rank", "common_set"):
        assert aggregated.scores("all", name).tolist() == list(range(NUM_TRAIN))
    assert aggregated.scores("all", "vote").tolist() == [-4, -3, -2, -1, 0, 0, 0, 0, 0]
    assert order_by_score(torch.tensor([1.0, 0.0, 1.0, 0.0])).tolist() == [1, 3, 0, 2]


def test_negative_zero_is_zero() -> None:
    """Which of the two comes first depends on blocks: a stored score is never -0.0."""
    zeros_MVT = torch.zeros(3, NUM_VALIDATION, NUM_TRAIN)
    zeros_MVT[:, ::2] *= -1
    aggregated = Aggregated(zeros_MVT)
    for name in ("min", "median", "trimmed_mean"):
        assert not bool(aggregated.scores("all", name).signbit().any())
    assert aggregated.scores("all", "rank").tolist() == list(range(NUM_TRAIN))


def test_correct_only_without_a_choice_counts_all_validation_samples() -> None:
    """Because the model predicts none correctly, which is told, or all."""
    influence_MVT = random_influence()
    for is_correct in (False, True):
        is_correct_V = torch.full((NUM_VALIDATION,), is_correct)
        aggregated = Aggregated(influence_MVT, is_correct_V=is_correct_V)
        assert aggregated.by_column.correct_only_fell_back is not is_correct
        for name in AGGREGATIONS:
            assert torch.equal(
                aggregated.scores("all", name, correct_only=True),
                aggregated.scores("all", name, correct_only=False),
            )
    assert not Aggregated(influence_MVT).by_column.correct_only_fell_back


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.3, 3), (1.0, 9)])
def test_at_least_one_sample_gets_a_vote(fraction: float, count: int) -> None:
    assert AggregationOptions(vote_fraction=fraction).vote_count(NUM_TRAIN) == count


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("vote_fraction", 0.0),
        ("vote_fraction", 1.1),
        ("trim_fraction", 0.5),
        ("trim_fraction", -0.1),
        ("common_share", 0.0),
        ("common_share", 1.1),
        ("common_share", math.nan),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        AggregationOptions(**{option: value})


def test_every_aggregation_says_when_to_use_it() -> None:
    for name, aggregation in AGGREGATIONS.items():
        assert aggregation.name == name
        assert aggregation.description.endswith(".")
