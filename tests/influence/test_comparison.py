"""Measures and intervals against scikit-learn, SciPy and their definitions."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

from workers.influence.comparison import (
    accuracy,
    macro_f1,
    paired_difference,
    paired_sample_difference,
)

classes = st.integers(0, 5)
predictions = st.lists(st.tuples(classes, classes), min_size=1, max_size=40)
measures = st.floats(-10, 10)
pairs = st.lists(st.tuples(measures, measures), min_size=2, max_size=12)


@settings(deadline=None, derandomize=True)
@given(rows=predictions)
def test_measures_are_those_of_scikit_learn(rows: list[tuple[int, int]]) -> None:
    """Also where classes occur only among the labels, only among the predictions, or not at all."""
    labels, predicted = zip(*rows, strict=True)
    label_N, predicted_N = torch.tensor(labels), torch.tensor(predicted, dtype=torch.int32)
    assert accuracy(label_N, predicted_N) == pytest.approx(accuracy_score(labels, predicted))
    expected = f1_score(labels, predicted, average="macro", zero_division=0)
    assert macro_f1(label_N, predicted_N) == pytest.approx(expected)


def test_a_prediction_of_no_class_is_wrong_and_makes_no_class() -> None:
    label_N, predicted_N = torch.tensor([0, 0, 1]), torch.tensor([0, -1, 1])
    assert accuracy(label_N, predicted_N) == pytest.approx(2 / 3)
    assert macro_f1(label_N, predicted_N) == pytest.approx((2 / 3 + 1) / 2)
    assert macro_f1(label_N, torch.full((3,), -1)) == 0


@settings(deadline=None, derandomize=True)
@given(rows=pairs, confidence=st.floats(0.5, 0.999))
def test_over_seeds_it_is_the_paired_t_interval(
    rows: list[tuple[float, float]], confidence: float
) -> None:
    one, other = (list(values) for values in zip(*rows, strict=True))
    found = paired_difference(one, other, confidence=confidence)
    assert found.num_pairs == len(rows)
    assert found.mean == pytest.approx(statistics.fmean(a - b for a, b in rows), abs=1e-9)
    assert found.low is not None
    assert found.high is not None
    differences = [a - b for a, b in rows]
    if max(differences) - min(differences) > 1e-6:
        expected = stats.ttest_rel(one, other).confidence_interval(confidence)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    else:
        assert (found.low, found.high) == pytest.approx((found.mean, found.mean), abs=1e-5)


def test_one_seed_gives_no_interval_and_none_no_difference() -> None:
    found = paired_difference([0.75], [0.5], confidence=0.95)
    assert (found.mean, found.low, found.high, found.num_pairs) == (0.25, None, None, 1)
    with pytest.raises(ValueError, match="no pair"):
        paired_difference([], [], confidence=0.95)


def test_over_samples_a_sample_counts_by_its_mean_over_the_seeds() -> None:
    one_SN = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]])
    other_SN = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    found = paired_sample_difference(one_SN, other_SN, confidence=0.9)
    differences = [0.5, -0.5, 0.0, 0.5]
    reach = 1.6448536269514722 * statistics.stdev(differences) / math.sqrt(4)
    assert found.mean == statistics.fmean(differences)
    assert (found.low, found.high) == pytest.approx((found.mean - reach, found.mean + reach))
    single = paired_sample_difference(one_SN[:, :1], other_SN[:, :1], confidence=0.9)
    assert (single.mean, single.low, single.num_pairs) == (0.5, None, 1)
    with pytest.raises(ValueError, match="no pairs"):
        paired_sample_difference(one_SN, other_SN[:1], confidence=0.9)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_hold_as_often_as_they_say(confidence: float) -> None:
    """On draws whose true difference is known: of seeds by t, of 200 samples by the normal."""
    draw = torch.Generator().manual_seed(0)
    held = {"seeds": 0, "samples": 0}
    rounds = 1500
    for _ in range(rounds):
        base_S = torch.randn(3, generator=draw)
        one_S = base_S + 0.3 + 0.5 * torch.randn(3, generator=draw)
        seeds = paired_difference(one_S.tolist(), base_S.tolist(), confidence=confidence)
        right_SN = (torch.rand(3, 200, generator=draw) < 0.8).float()
        wrong_SN = (torch.rand(3, 200, generator=draw) < 0.7).float()
        samples = paired_sample_difference(right_SN, wrong_SN, confidence=confidence)
        for name, found, truth in (("seeds", seeds, 0.3), ("samples", samples, 0.1)):
            assert found.low is not None
            assert found.high is not None
            held[name] += found.low <= truth <= found.high
    error = 4 * math.sqrt(confidence * (1 - confidence) / rounds)
    for count in held.values():
        assert abs(count / rounds - confidence) < error + 0.005
