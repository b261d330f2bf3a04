"""What the aggregators refuse, and how much they hold."""

import math
from typing import Any

import pytest
import torch

from tests.influence.aggregating import (
    GROUPS,
    IS_CORRECT_V,
    NUM_TRAIN,
    NUM_VALIDATION,
    Aggregated,
    random_influence,
)
from workers.influence.aggregation import (
    GroupAggregator,
    SampleAggregator,
)
from workers.influence.errors import NonFiniteInfluence


def fresh(**options: object) -> GroupAggregator:
    arguments = {"num_train": NUM_TRAIN, "is_correct_V": IS_CORRECT_V, **options}
    return GroupAggregator(GROUPS, **arguments)  # type: ignore[arg-type]  # of a test's choice


def test_non_finite_influence_names_the_training_samples() -> None:
    influence_MVT = random_influence()
    influence_MVT[1, 2, 4] = math.nan
    influence_MVT[1, 3, 7] = math.inf
    with pytest.raises(NonFiniteInfluence) as caught:
        Aggregated(influence_MVT)
    assert caught.value.positions == (4, 7)
    by_sample = SampleAggregator(
        GROUPS, num_train=NUM_TRAIN, is_correct_V=IS_CORRECT_V, aggregations=["median"]
    )
    with pytest.raises(NonFiniteInfluence) as caught:
        by_sample.add(torch.arange(2, 9), influence_MVT.flatten(0, 1)[:, 2:])
    assert caught.value.positions == (4, 7)


def test_scores_wait_for_every_module() -> None:
    """A group is complete as soon as its own modules are."""
    aggregator = fresh()
    for module in range(2):
        aggregator.add(
            module=module, influence_VT=random_influence()[module], validation=slice(0, 5)
        )
    assert aggregator.scores("low", "rank", correct_only=False).shape == (NUM_TRAIN,)
    for group in ("all", "CL"):
        with pytest.raises(ValueError, match=rf"'{group}' still misses modules \[2\]"):
            aggregator.scores(group, "rank", correct_only=False)


def test_scores_wait_for_every_training_sample() -> None:
    aggregator = SampleAggregator(
        GROUPS, num_train=NUM_TRAIN, is_correct_V=IS_CORRECT_V, aggregations=["median"]
    )
    value_KT = random_influence().flatten(0, 1)
    aggregator.add(torch.arange(6), value_KT[:, :6])
    with pytest.raises(ValueError, match="3 training samples are missing"):
        aggregator.scores("all", "median", correct_only=False)
    aggregator.add(torch.arange(6, 9), value_KT[:, 6:])
    assert aggregator.scores("all", "median", correct_only=False).shape == (NUM_TRAIN,)


def test_blocks_out_of_turn_are_refused() -> None:
    """Twice the same block would count twice, a gap not at all, another order round otherwise."""
    influence_MVT = random_influence()
    aggregator = Aggregated(influence_MVT).by_column
    with pytest.raises(ValueError, match="module 0 comes after module 2"):
        aggregator.add(module=0, influence_VT=influence_MVT[0], validation=slice(0, 5))
    with pytest.raises(ValueError, match="goes on at validation sample 0, not 2"):
        fresh().add(module=0, influence_VT=influence_MVT[0, 2:], validation=slice(2, 5))
    with pytest.raises(ValueError, match="influence of shape"):
        fresh().add(module=0, influence_VT=influence_MVT[0, :, :3], validation=slice(0, 5))
    with pytest.raises(ValueError, match="module 3 is in no group"):
        fresh().add(module=3, influence_VT=influence_MVT[0], validation=slice(0, 5))
    begun = fresh()
    begun.add(module=0, influence_VT=influence_MVT[0, :2], validation=slice(0, 2))
    with pytest.raises(ValueError, match="module 0 is not complete, and module 1 begins"):
        begun.add(module=1, influence_VT=influence_MVT[1], validation=slice(0, 5))


def test_unknown_aggregations_are_refused() -> None:
    """So are those that go the other way through the columns."""
    for name in ("median", "nothing"):
        with pytest.raises(ValueError, match=f"unknown aggregations: {name}"):
            fresh(aggregations=["mean", name])
    for names, message in (
        (["rank"], "unknown aggregations: rank"),
        (["median", "common_set"], "of influence and of ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            SampleAggregator(GROUPS, num_train=2, is_correct_V=IS_CORRECT_V, aggregations=names)


def test_a_group_without_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="groups without modules: CL"):
        GroupAggregator({"CL": []}, num_train=2, is_correct_V=IS_CORRECT_V)


def test_only_what_was_asked_is_computed() -> None:
    aggregator = fresh(aggregations=["mean"])
    influence_MVT = random_influence()
    for module, influence_VT in enumerate(influence_MVT):
        aggregator.add(
            module=module, influence_VT=influence_VT, validation=slice(0, NUM_VALIDATION)
        )
    torch.testing.assert_close(
        aggregator.scores("all", "mean", correct_only=False), influence_MVT.mean(dim=(0, 1))
    )
    with pytest.raises(KeyError):
        aggregator.scores("all", "rank", correct_only=False)


@pytest.mark.parametrize("is_correct_V", [[True, False, True], [False] * 3, [True] * 3])
@pytest.mark.parametrize("choice", [False, True])
def test_one_choice_alone_gives_the_same_scores(is_correct_V: list[bool], choice: bool) -> None:
    """Also where `correct_only` makes no difference, or would leave nothing."""
    influence_KT = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {
        "groups": {"all": (0, 1), "CL": (1,)},
        "num_train": 7,
        "is_correct_V": torch.tensor(is_correct_V),
        "aggregations": ["median", "trimmed_mean"],
    }
    both, alone = SampleAggregator(**options), SampleAggregator(**options, choices=(choice,))
    for aggregator in (both, alone):
        aggregator.add(torch.arange(7), influence_KT)
    for group in options["groups"]:
        for name in options["aggregations"]:
            expected_T = both.scores(group, name, correct_only=choice)
            assert torch.equal(alone.scores(group, name, correct_only=choice), expected_T)
