import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import aggregate, ranks
from workers.influence.aggregation import (
    AGGREGATIONS,
    GroupAggregator,
    order_by_score,
    sort_columns,
)
from workers.influence.errors import NonFiniteInfluence

GROUPS = {"all": (0, 1, 2), "low": (0, 1), "CL": (2,)}
NUM_TRAIN, NUM_VALIDATION = 9, 5
IS_CORRECT_V = torch.tensor([True, False, True, True, False])


def random_influence(*, seed: int = 0, with_ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    influence_MVT = torch.randn(3, NUM_VALIDATION, NUM_TRAIN, generator=generator)
    return influence_MVT.round() if with_ties else influence_MVT


def aggregated(
    influence_MVT: Tensor,
    *,
    cuts: Sequence[int] = (),
    is_correct_V: Tensor = IS_CORRECT_V,
    vote_fraction: float = 0.4,
) -> GroupAggregator:
    """Feed everything, module by module, the validation samples cut at `cuts`."""
    num_modules, num_validation, num_train = influence_MVT.shape
    groups = {name: [m for m in modules if m < num_modules] for name, modules in GROUPS.items()}
    aggregator = GroupAggregator(
        groups, num_train=num_train, vote_fraction=vote_fraction, is_correct_V=is_correct_V
    )
    edges = [0, *sorted(cuts), num_validation]
    for module in range(num_modules):
        for start, stop in itertools.pairwise(edges):
            if start < stop:
                aggregator.add(
                    module=module,
                    influence_VT=influence_MVT[module, start:stop],
                    validation=slice(start, stop),
                )
    return aggregator


@pytest.mark.parametrize("correct_only", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("group", GROUPS)
def test_scores_equal_the_sorted_columns(group: str, aggregation: str, correct_only: bool) -> None:
    """Against Python's own sort and sums, ties included."""
    influence_MVT = random_influence(with_ties=True)
    chosen_MVT = influence_MVT[list(GROUPS[group])]
    if correct_only:
        chosen_MVT = chosen_MVT[:, IS_CORRECT_V]
    score_T = aggregated(influence_MVT).scores(group, aggregation, correct_only=correct_only)
    expected = aggregate(chosen_MVT, aggregation=aggregation, vote_fraction=0.4)
    assert score_T.dtype == torch.float32
    assert score_T.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, NUM_VALIDATION), max_size=4))
def test_cutting_the_validation_samples_changes_no_bit(seed: int, cuts: list[int]) -> None:
    influence_MVT = random_influence(seed=seed) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    whole, pieces = aggregated(influence_MVT), aggregated(influence_MVT, cuts=cuts)
    for group, name, correct_only in itertools.product(GROUPS, AGGREGATIONS, (False, True)):
        assert torch.equal(
            whole.scores(group, name, correct_only=correct_only),
            pieces.scores(group, name, correct_only=correct_only),
        )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 1000), exponent=st.integers(-8, 8))
def test_rank_and_vote_ignore_the_scale_of_a_module(seed: int, exponent: int) -> None:
    influence_MVT = random_influence(seed=seed)
    rescaled_MVT = influence_MVT * torch.tensor([1.0, 10.0**exponent, 1.0])[:, None, None]
    for name in ("rank", "vote"):
        assert torch.equal(
            aggregated(rescaled_MVT).scores("all", name, correct_only=False),
            aggregated(influence_MVT).scores("all", name, correct_only=False),
        )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 1000), factor=st.floats(-4, 4, width=32))
def test_mean_is_linear(seed: int, factor: float) -> None:
    one_MVT, two_MVT = random_influence(seed=seed), random_influence(seed=seed + 1)

    def mean(influence_MVT: Tensor) -> Tensor:
        return aggregated(influence_MVT).scores("all", "mean", correct_only=True)

    torch.testing.assert_close(
        mean(one_MVT + factor * two_MVT),
        mean(one_MVT) + factor * mean(two_MVT),
        rtol=1e-5,
        atol=1e-5,
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 1000), permutation=st.permutations(range(NUM_TRAIN)))
def test_the_order_of_the_training_set_does_not_matter(seed: int, permutation: list[int]) -> None:
    """Without ties, a reordered training set has reordered scores."""
    influence_MVT = random_influence(seed=seed)
    for name in AGGREGATIONS:
        score_T = aggregated(influence_MVT).scores("all", name, correct_only=False)
        permuted_T = aggregated(influence_MVT[..., permutation]).scores(
            "all", name, correct_only=False
        )
        assert torch.equal(permuted_T, score_T[permutation])


def test_ties_go_by_training_index() -> None:
    constant_MVT = torch.zeros(3, NUM_VALIDATION, NUM_TRAIN)
    score_T = aggregated(constant_MVT).scores("all", "rank", correct_only=False)
    assert score_T.tolist() == list(range(NUM_TRAIN))
    assert order_by_score(torch.tensor([1.0, 0.0, 1.0, 0.0])).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 2000), (2, 70_000)])
def test_columns_are_sorted_as_torch_sorts_them(
    shape: tuple[int, int], device: torch.device
) -> None:
    """Stably, negative zero equal to zero, tiny and huge numbers, blocks of any size."""
    generator = torch.Generator().manual_seed(0)
    influence_CT = torch.randn(shape, generator=generator)
    exponent_CT = torch.randint(-44, 38, shape, generator=generator)
    values_CT = torch.where(
        torch.rand(shape, generator=generator) < 0.5,
        influence_CT.round(),
        influence_CT * 10.0**exponent_CT,
    ).to(device)
    assert torch.equal(sort_columns(values_CT), values_CT.argsort(dim=1, stable=True))


@given(column=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@settings(deadline=None, derandomize=True)
def test_any_column_is_sorted_as_python_sorts_it(column: list[float]) -> None:
    order_T = sort_columns(torch.tensor([column]))[0]
    assert order_T.argsort().tolist() == ranks(column)


def test_without_a_correct_prediction_all_validation_samples_count() -> None:
    influence_MVT = random_influence()
    nothing_V = torch.zeros(NUM_VALIDATION, dtype=torch.bool)
    aggregator = aggregated(influence_MVT, is_correct_V=nothing_V)
    assert aggregator.correct_only_fell_back
    for name in AGGREGATIONS:
        assert torch.equal(
            aggregator.scores("all", name, correct_only=True),
            aggregator.scores("all", name, correct_only=False),
        )
    assert not aggregated(influence_MVT).correct_only_fell_back


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.3, 3), (1.0, 9)])
def test_at_least_one_sample_gets_a_vote(fraction: float, count: int) -> None:
    assert aggregated(random_influence(), vote_fraction=fraction).vote_count == count


def test_non_finite_influence_names_the_training_samples() -> None:
    influence_MVT = random_influence()
    influence_MVT[1, 2, 4] = math.nan
    influence_MVT[1, 3, 7] = math.inf
    with pytest.raises(NonFiniteInfluence) as caught:
        aggregated(influence_MVT)
    assert caught.value.positions == (4, 7)


def test_scores_wait_for_every_module() -> None:
    """A group is complete as soon as its own modules are."""
    aggregator = aggregated(random_influence()[:2])
    assert aggregator.scores("low", "rank", correct_only=False).shape == (NUM_TRAIN,)
    late = GroupAggregator(
        GROUPS, num_train=NUM_TRAIN, vote_fraction=0.4, is_correct_V=IS_CORRECT_V
    )
    late.add(module=2, influence_VT=random_influence()[2], validation=slice(0, 5))
    assert late.scores("CL", "rank", correct_only=False).shape == (NUM_TRAIN,)
    with pytest.raises(ValueError, match=r"'all' still misses modules \[0, 1\]"):
        late.scores("all", "rank", correct_only=False)


def test_blocks_out_of_turn_are_refused() -> None:
    """Twice the same block would count twice, a gap not at all."""
    influence_MVT = random_influence()
    aggregator = aggregated(influence_MVT)
    with pytest.raises(ValueError, match="complete already"):
        aggregator.add(module=0, influence_VT=influence_MVT[0], validation=slice(0, 5))
    fresh = GroupAggregator(
        GROUPS, num_train=NUM_TRAIN, vote_fraction=0.4, is_correct_V=IS_CORRECT_V
    )
    with pytest.raises(ValueError, match="goes on at validation sample 0, not 2"):
        fresh.add(module=0, influence_VT=influence_MVT[0, 2:], validation=slice(2, 5))
    with pytest.raises(ValueError, match="influence of shape"):
        fresh.add(module=0, influence_VT=influence_MVT[0, :, :3], validation=slice(0, 5))


def test_unknown_names_and_fractions_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown aggregations: median"):
        GroupAggregator(
            GROUPS,
            num_train=2,
            vote_fraction=0.3,
            is_correct_V=IS_CORRECT_V,
            aggregations=["median"],
        )
    with pytest.raises(ValueError, match="vote_fraction 0 "):
        GroupAggregator(GROUPS, num_train=2, vote_fraction=0, is_correct_V=IS_CORRECT_V)


def test_only_the_mean_needs_no_sorting() -> None:
    aggregator = GroupAggregator(
        {"all": [0]},
        num_train=NUM_TRAIN,
        vote_fraction=0.4,
        is_correct_V=IS_CORRECT_V,
        aggregations=["mean"],
    )
    influence_VT = random_influence()[0]
    aggregator.add(module=0, influence_VT=influence_VT, validation=slice(0, NUM_VALIDATION))
    torch.testing.assert_close(
        aggregator.scores("all", "mean", correct_only=False), influence_VT.mean(dim=0)
    )
    with pytest.raises(KeyError):
        aggregator.scores("all", "rank", correct_only=False)
    assert [name for name, each in AGGREGATIONS.items() if not each.needs_order] == ["mean"]


def test_every_aggregation_says_when_to_use_it() -> None:
    for name, aggregation in AGGREGATIONS.items():
        assert aggregation.name == name
        assert aggregation.description.endswith(".")
