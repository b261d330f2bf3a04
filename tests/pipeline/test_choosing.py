"""How `auto` and `consensus` weigh configurations by the probes, against plain Python."""

import itertools
import statistics
from collections.abc import Sequence

import pytest
import torch

from app.audits.schemas import Configuration, RankingSpecification
from tests import oracles
from workers.pipeline.choosing import (
    Candidate,
    chance,
    is_better_than_chance,
    is_settled,
    most_agreed,
    settled,
    standard_error,
)


def likeness(scores: Sequence[Sequence[float]]) -> list[float]:
    """Spearman's correlation of every ranking with each of them, on average."""
    ranks = [oracles.ranks(values) for values in scores]
    return [
        statistics.fmean(statistics.correlation(one, other) for other in ranks) for one in ranks
    ]


def test_most_agreed_is_most_like_the_others_within_the_margin() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(30):
        table = sorted(
            (
                Candidate(
                    Configuration(),
                    {"auc_ndr": float(torch.rand((), generator=draw))},
                    torch.randint(6, (9,), generator=draw).float(),
                )
                for _ in range(7)
            ),
            key=lambda candidate: -candidate.auc_ndr,
        )
        near = [each for each in table if each.auc_ndr >= table[0].auc_ndr - 0.5]
        like = likeness([each.score_F.tolist() for each in near])
        found = most_agreed(table, margin=0.5)
        place = next(number for number, each in enumerate(near) if each is found)
        assert like[place] == pytest.approx(max(like), abs=1e-9)
        assert most_agreed(table, margin=0.0) is table[0]


@pytest.mark.parametrize(("num_probes", "num_samples"), [(1, 4), (2, 6), (3, 5)])
def test_chance_is_the_mean_over_all_orders(num_probes: int, num_samples: int) -> None:
    found = [
        oracles.auc_ndr(range(num_samples), [place in places for place in range(num_samples)])
        for places in itertools.combinations(range(num_samples), num_probes)
    ]
    expected = chance(num_probes, num_samples)
    assert statistics.fmean(found) == pytest.approx(expected)


def test_luck_is_as_large_as_its_standard_error_says() -> None:
    """Where suspicion falls off exponentially, for which the formula is made."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        score_N = -torch.empty(120).exponential_(generator=draw)
        score_N[:30] *= 4
        found.append(oracles.auc_ndr(score_N.tolist(), [place < 30 for place in range(120)]))
    mean = statistics.fmean(found)
    error = standard_error(mean, num_probes=30, num_samples=120)
    assert error == pytest.approx(statistics.stdev(found), rel=0.15)
    assert standard_error(1.0, num_probes=30, num_samples=120) == 0
    assert standard_error(1.0, num_probes=3, num_samples=3) == 0


def test_luck_is_not_taken_for_more_and_more_is_not_taken_for_luck() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = {"num_probes": 20, "num_samples": 100}
    is_probe = [place < 20 for place in range(100)]
    for shift, is_better in ((0.0, False), (2.0, True)):
        for _ in range(100):
            score_N = torch.randn(100, generator=draw)
            score_N[:20] -= shift
            auc_ndr = oracles.auc_ndr(score_N.tolist(), is_probe)
            assert is_better_than_chance(auc_ndr, **sizes) == is_better
    for num_probes in (0, 5):
        assert not is_better_than_chance(1.0, num_probes=num_probes, num_samples=5)


@pytest.mark.parametrize(
    ("ranking", "is_open"),
    [
        ({"estimator": "auto", "layers": "all", "aggregation": "mean"}, True),
        ({"estimator": "consensus"}, True),
        ({"estimator": "grad_dot", "layers": "all"}, True),
        ({"estimator": "grad_dot", "aggregation": "mean"}, True),
        ({"estimator": "grad_dot", "layers": "all", "aggregation": "mean"}, False),
        ({"estimator": "loss"}, False),
        ({"estimator": "confidence", "layers": "auto"}, False),
    ],
)
def test_what_leaves_nothing_open_is_taken_as_it_is(
    ranking: dict[str, str], *, is_open: bool
) -> None:
    specification = RankingSpecification.model_validate(ranking)
    assert is_settled(specification) != is_open
    if not is_open:
        found = settled(specification)
        assert (found.estimator, found.layers) == (ranking["estimator"], "all")
        assert found.correct_only is False
