"""Probabilities of being wrong, and the classes that are suggested: against plain Python."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.pipeline.judging import along_ranking, posterior, suggest

CONFIDENCES = st.lists(st.integers(0, 8), min_size=1, max_size=7)


def falling(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence that never rises, by its min-max formula over all means of runs."""

    def mean(start: int, stop: int) -> float:
        total = sum(weights[start:stop])
        return sum(map(math.prod, zip(values[start:stop], weights[start:stop], strict=True))) / (
            total
        )

    places = range(len(values))
    return [
        min(max(mean(a, b + 1) for b in places if b >= i) for a in places if a <= i) for i in places
    ]


def slow_posterior(right: list[int], wrong: list[int], share: float) -> dict[float, float]:
    """The probability of being wrong at each known confidence; equal ones count as one."""
    known = sorted({*right, *wrong})
    weights = [
        [right.count(value) * (1 - share) / len(right), wrong.count(value) * share / len(wrong)]
        for value in known
    ]
    totals = [sum(parts) for parts in weights]
    shares = [parts[1] / sum(parts) for parts in weights]
    return dict(zip(known, falling(shares, totals), strict=True))


@given(CONFIDENCES, CONFIDENCES, st.floats(0.01, 0.99))
def test_the_posterior_is_the_falling_curve_nearest_to_the_known_samples(
    right: list[int], wrong: list[int], share: float
) -> None:
    expected = slow_posterior(right, wrong, share)
    known = [torch.tensor(values) / 8 for values in (right, wrong)]
    # between two known confidences as well, and beyond them
    asked_T = torch.arange(-2, 21) / 16
    found = posterior(asked_T, *known, share=share).tolist()
    assert all(one >= other - 1e-7 for one, other in itertools.pairwise(found))
    assert 0 <= min(found) <= max(found) <= 1
    for place, value in zip((16 * asked_T).tolist(), found, strict=True):
        below = max((at for at in expected if 2 * at <= place), default=min(expected))
        above = min((at for at in expected if 2 * at >= place), default=max(expected))
        part = (place / 2 - below) / (above - below) if below < above else 0.0
        between = expected[below] + part * (expected[above] - expected[below])
        assert value == pytest.approx(between, abs=1e-5)


@given(CONFIDENCES, CONFIDENCES, st.floats(0, 1))
def test_the_posterior_averages_to_the_share_over_the_known_samples(
    right: list[int], wrong: list[int], share: float
) -> None:
    right_M, wrong_W = torch.tensor(right) / 8, torch.tensor(wrong) / 8
    means = [
        float(posterior(known_N, right_M, wrong_W, share=share).double().mean())
        for known_N in (right_M, wrong_W)
    ]
    assert (1 - share) * means[0] + share * means[1] == pytest.approx(share, abs=1e-5)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(0, 4)), min_size=1, max_size=9))
def test_probabilities_fall_along_the_ranking_and_keep_their_mean(
    samples: list[tuple[float, int]],
) -> None:
    """The lowest scores are the most suspect; ties stand by training index."""
    probability_T = torch.tensor([probability for probability, _ in samples])
    score_T = torch.tensor([score for _, score in samples], dtype=torch.float32)
    found_T = along_ranking(probability_T, score_T)
    order = sorted(range(len(samples)), key=lambda i: (samples[i][1], i))
    expected = falling([samples[i][0] for i in order], [1.0] * len(order))
    assert [float(found_T[i]) for i in order] == pytest.approx(expected, abs=1e-5)
    assert float(found_T.double().mean()) == pytest.approx(
        float(probability_T.double().mean()), abs=1e-6
    )
    assert found_T.dtype == torch.float32


@st.composite
def asked_for_classes(
    draw: st.DrawFn,
) -> tuple[list[list[float]], list[int], list[float]]:
    num_classes = draw(st.integers(2, 4))
    weights = st.lists(st.integers(0, 5), min_size=num_classes, max_size=num_classes)
    rows = draw(st.lists(weights, min_size=1, max_size=5))
    labels = [draw(st.integers(0, num_classes - 1)) for _ in rows]
    wrong = [draw(st.integers(0, 16)) / 16 for _ in rows]
    return [[value / (sum(row) or 1) for value in row] for row in rows], labels, wrong


def slow_classes(row: list[float], label: int, wrong: float) -> list[float]:
    """The probability of each class: the given one's is known, the others share the rest."""
    others = sum(value for index, value in enumerate(row) if index != label)
    return [
        1 - wrong
        if index == label
        else wrong * (value / others if others > 0 else 1 / (len(row) - 1))
        for index, value in enumerate(row)
    ]


@given(asked_for_classes())
def test_the_most_probable_class_is_suggested(
    asked: tuple[list[list[float]], list[int], list[float]],
) -> None:
    rows, labels, wrongs = asked
    suggested_T, probability_T = suggest(
        torch.tensor(rows), torch.tensor(labels), torch.tensor(wrongs)
    )
    for row, label, wrong, suggested, probability in zip(
        rows, labels, wrongs, suggested_T.tolist(), probability_T.tolist(), strict=True
    ):
        expected = slow_classes(row, label, wrong)
        assert sum(expected) == pytest.approx(1)
        assert probability == pytest.approx(max(expected), abs=1e-6)
        assert expected[suggested] == pytest.approx(max(expected), abs=1e-6)
        if wrong < 0.5:
            assert suggested == label, "more likely right than wrong"


def test_a_single_class_has_nothing_to_suggest_but_itself() -> None:
    suggested_T, probability_T = suggest(torch.ones(2, 1), torch.zeros(2).long(), torch.zeros(2))
    assert suggested_T.tolist() == [0, 0]
    assert probability_T.tolist() == [1.0, 1.0]
