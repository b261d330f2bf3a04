"""Orders of columns: whole and partial ones, on whatever device there is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import ranks
from workers.influence.aggregation import (
    GroupAggregator,
    by_column,
    columns,
    lowest_of_columns,
    lowest_places,
    rank_columns,
    sort_columns,
)

SHAPES = [(1, 1), (3, 7), (40, 2000), (2, 70_000)]
number_lists = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1.0]),
    min_size=1,
    max_size=200,
)


def mixed_numbers(shape: tuple[int, int]) -> Tensor:
    """Tiny and huge numbers, many ties, negative zeros."""
    generator = torch.Generator().manual_seed(0)
    influence_CT = torch.randn(shape, generator=generator)
    exponent_CT = torch.randint(-44, 38, shape, generator=generator)
    return torch.where(
        torch.rand(shape, generator=generator) < 0.5,
        influence_CT.round(),
        influence_CT * 10.0**exponent_CT,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_are_sorted_as_torch_sorts_them(
    shape: tuple[int, int], device: torch.device
) -> None:
    """Stably, and blocks of any size."""
    values_CT = mixed_numbers(shape).to(device)
    order_CT = values_CT.argsort(dim=1, stable=True)
    assert torch.equal(sort_columns(values_CT), order_CT)
    assert torch.equal(rank_columns(values_CT).long(), order_CT.argsort(dim=1))


@pytest.mark.parametrize("count", [1, 5, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_lowest_places_of_a_sample_are_those_of_the_whole_order(
    shape: tuple[int, int], count: int, device: torch.device
) -> None:
    """Ties by place, also from the other end: as torch's stable sort has them, both ways."""
    values_KT = mixed_numbers(shape).to(device)
    for descending, given_KT in ((False, values_KT), (True, -values_KT)):
        whole_kT = values_KT.argsort(dim=0, descending=descending, stable=True)[:count]
        assert torch.equal(lowest_places(given_KT, count), whole_kT)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_lowest_are_those_of_the_whole_order(
    shape: tuple[int, int], fraction: float, device: torch.device
) -> None:
    values_CT = mixed_numbers(shape).to(device)
    count = max(1, round(fraction * shape[1]))
    whole_Ck = values_CT.argsort(dim=1, stable=True)[:, :count]
    assert torch.equal(lowest_of_columns(values_CT, count), whole_Ck)


@given(column=number_lists, share=st.floats(0, 1))
@settings(deadline=None, derandomize=True)
def test_any_column_is_sorted_as_python_sorts_it(column: list[float], share: float) -> None:
    influence_1T = torch.tensor([column])
    expected = sorted(range(len(column)), key=lambda index: (column[index], index))
    assert sort_columns(influence_1T)[0].tolist() == expected
    assert rank_columns(influence_1T)[0].tolist() == ranks(column)
    count = max(1, round(share * len(column)))
    assert lowest_of_columns(influence_1T, count)[0].tolist() == expected[:count]


def test_columns_that_rise_and_fall_are_cut_right() -> None:
    """The cut is guessed from every 16th sample: where those are all high or low, it is mended."""
    base_T = torch.arange(4000.0)
    for offset in (-1e6, 1e6):
        values_T = base_T.clone()
        values_T[::16] += offset
        values_1T = values_T[None]
        assert torch.equal(lowest_of_columns(values_1T, 900), sort_columns(values_1T)[:, :900])


def run(aggregations: list[str]) -> GroupAggregator:
    generator = torch.Generator().manual_seed(0)
    influence_VT = torch.randn(6, 300, generator=generator).round(decimals=1)
    aggregator = GroupAggregator(
        {"all": [0]},
        num_train=300,
        is_correct_V=torch.tensor([True, False] * 3),
        aggregations=aggregations,
    )
    aggregator.add(module=0, influence_VT=influence_VT, validation=slice(0, 6))
    return aggregator


def test_the_vote_alone_sorts_no_column_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the scores that it gives beside aggregations that need the ranks."""
    together = run(["vote", "rank"])
    lowest_counts = []

    def count_lowest(influence_CT: Tensor, count: int) -> Tensor:
        lowest_counts.append(count)
        return lowest_of_columns(influence_CT, count)

    monkeypatch.setattr(by_column, "rank_columns", None)  # calling it would fail
    monkeypatch.setattr(columns, "lowest_of_columns", count_lowest)
    alone = run(["vote", "mean", "min"])
    assert lowest_counts == [90, 90]
    for correct_only in (False, True):
        assert torch.equal(
            alone.scores("all", "vote", correct_only=correct_only),
            together.scores("all", "vote", correct_only=correct_only),
        )


def test_where_ranks_are_needed_columns_are_sorted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_columns = []

    def count_columns(influence_CT: Tensor) -> Tensor:
        sorted_columns.append(len(influence_CT))
        return rank_columns(influence_CT)

    monkeypatch.setattr(by_column, "rank_columns", count_columns)
    monkeypatch.setattr(columns, "lowest_of_columns", None)  # calling it would fail
    run(["vote", "rank", "mean"])
    assert sum(sorted_columns) == 6
