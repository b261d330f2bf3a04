import itertools
import statistics
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracles
from workers.influence.evaluation import (
    auc_ndr,
    group_auc,
    group_recall,
    group_retrieval,
    measure_detection,
    noise_detection_curve,
    noise_detection_rate,
    spearman,
)

rankings = st.lists(
    st.tuples(st.integers(-3, 3).map(float), st.booleans()), min_size=1, max_size=40
).filter(lambda rows: any(noisy for _, noisy in rows))


@settings(deadline=None, derandomize=True)
@given(rows=rankings, fraction=st.floats(0, 1))
def test_metrics_equal_their_definition(rows: list[tuple[float, bool]], fraction: float) -> None:
    """With many ties, which the training index breaks."""
    scores, noisy = zip(*rows, strict=True)
    score_T, is_noisy_T = torch.tensor(scores), torch.tensor(noisy)
    rates = oracles.noise_detection_rates(scores, noisy)
    assert noise_detection_curve(score_T, is_noisy_T).tolist() == pytest.approx(rates)
    assert auc_ndr(score_T, is_noisy_T) == pytest.approx(oracles.auc_ndr(scores, noisy))
    cut = round(fraction * len(rows))
    expected = rates[cut - 1] if cut else 0.0
    assert noise_detection_rate(score_T, is_noisy_T, fraction=fraction) == pytest.approx(expected)


@settings(deadline=None, derandomize=True)
@given(num_noisy=st.integers(1, 500), num_clean=st.integers(0, 2000))
def test_all_noise_first_is_exactly_one(num_noisy: int, num_clean: int) -> None:
    score_T = torch.arange(num_noisy + num_clean).float()
    is_noisy_T = score_T < num_noisy
    assert auc_ndr(score_T, is_noisy_T) == 1.0
    if num_clean:
        assert auc_ndr(-score_T, is_noisy_T) < 1.0


def test_the_cut_counts_no_sample_too_many() -> None:
    """The lowest 20 % of ten samples are two."""
    score_T = torch.arange(10.0)
    is_noisy_T = torch.tensor([True, False, True] + [False] * 7)
    assert noise_detection_rate(score_T, is_noisy_T, fraction=0.2) == 0.5
    assert noise_detection_rate(score_T, is_noisy_T, fraction=0.3) == 1.0


def test_no_known_noise_is_an_error() -> None:
    for metric in (auc_ndr, noise_detection_curve):
        with pytest.raises(ValueError, match="no sample is marked as noisy"):
            metric(torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="not between 0 and 1"):
        noise_detection_rate(torch.zeros(1), torch.ones(1, dtype=torch.bool), fraction=1.5)


@settings(deadline=None, derandomize=True)
@given(rows=rankings)
def test_all_measures_at_once_are_the_single_ones(rows: list[tuple[float, bool]]) -> None:
    scores, noisy = zip(*rows, strict=True)
    score_T, is_noisy_T = torch.tensor(scores), torch.tensor(noisy)
    measured = measure_detection(score_T, is_noisy_T, fractions=[0.1, 0.5])
    assert measured.auc_ndr == auc_ndr(score_T, is_noisy_T)
    assert measured.rates == tuple(
        noise_detection_rate(score_T, is_noisy_T, fraction=fraction) for fraction in (0.1, 0.5)
    )


class TestGroups:
    """Finding the training samples of a validation sample's own group."""

    @staticmethod
    def loops(influence: Sequence[float], is_member: Sequence[bool]) -> tuple[float, float]:
        """Return AUC over all pairs, and recall as the mean over all orders of the ties."""
        members = [value for value, member in zip(influence, is_member, strict=True) if member]
        others = [value for value, member in zip(influence, is_member, strict=True) if not member]
        wins = [float(a > b) + 0.5 * float(a == b) for a in members for b in others]
        found = []
        for order in itertools.permutations(range(len(influence))):
            ranked = sorted(order, key=lambda i: -influence[i])  # stable: the order breaks ties
            found.append(sum(is_member[i] for i in ranked[: len(members)]) / len(members))
        return statistics.fmean(wins), statistics.fmean(found)

    @settings(deadline=None, derandomize=True, max_examples=40)
    @given(
        rows=st.lists(
            st.tuples(st.integers(-2, 2).map(float), st.booleans()), min_size=2, max_size=6
        ).filter(lambda rows: 0 < sum(member for _, member in rows) < len(rows))
    )
    def test_measures_equal_their_definition(self, rows: list[tuple[float, bool]]) -> None:
        influence, is_member = zip(*rows, strict=True)
        auc, recall = self.loops(influence, is_member)
        influence_T, is_member_T = torch.tensor(influence), torch.tensor(is_member)
        assert group_auc(influence_T, is_member_T) == pytest.approx(auc)
        assert group_recall(influence_T, is_member_T) == pytest.approx(recall)

    def test_helpful_means_high(self) -> None:
        influence_T = torch.tensor([3.0, 2.0, -1.0, -5.0])
        is_member_T = torch.tensor([True, True, False, False])
        for sign, expected in ((1, 1.0), (-1, 0.0)):
            assert group_auc(sign * influence_T, is_member_T) == expected
            assert group_recall(sign * influence_T, is_member_T) == expected
        assert group_auc(torch.zeros(4), is_member_T) == 0.5
        assert group_recall(torch.zeros(4), is_member_T) == 0.5

    def test_retrieval_is_the_mean_over_validation_samples(self) -> None:
        """Those whose group has no training sample, or every one, tell nothing."""
        generator = torch.Generator().manual_seed(0)
        influence_VT = torch.randn(4, 12, generator=generator)
        group_V, group_T = torch.tensor([0, 1, 7, 1]), torch.arange(12) % 3
        found = group_retrieval(influence_VT, group_V, group_T)
        pairs = [(influence_VT[j], group_T == group_V[j]) for j in (0, 1, 3)]
        assert found.num_validation == 3
        assert found.auc == pytest.approx(statistics.fmean(group_auc(*pair) for pair in pairs))
        assert found.recall == pytest.approx(
            statistics.fmean(group_recall(*pair) for pair in pairs)
        )
        with pytest.raises(ValueError, match="no validation sample has a group"):
            group_retrieval(influence_VT, group_V + 9, group_T)

    def test_a_group_without_members_or_others_is_an_error(self) -> None:
        for measure in (group_auc, group_recall):
            with pytest.raises(ValueError, match="no sample is a member"):
                measure(torch.zeros(3), torch.zeros(3, dtype=torch.bool))
        with pytest.raises(ValueError, match="nothing to tell apart"):
            group_auc(torch.zeros(3), torch.ones(3, dtype=torch.bool))
        assert group_recall(torch.zeros(3), torch.ones(3, dtype=torch.bool)) == 1.0


@settings(deadline=None, derandomize=True)
@given(pairs=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30))
def test_spearman_is_the_correlation_of_average_ranks(pairs: list[tuple[int, int]]) -> None:
    first, second = ([float(value) for value in values] for values in zip(*pairs, strict=True))
    found = spearman(torch.tensor(first), torch.tensor(second))

    def average_ranks(values: list[float]) -> list[float]:
        ordered = sorted(values)
        return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]

    try:
        expected = statistics.correlation(average_ranks(first), average_ranks(second))
    except statistics.StatisticsError:  # one of them is constant
        expected = 0.0
    assert found == pytest.approx(expected, abs=1e-12)
