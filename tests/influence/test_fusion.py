"""A consensus of rankings: the weighted mean of ranks, whatever the scales of the scores."""

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.influence.fusion import fuse_by_rank

SCORES = st.lists(st.integers(-5, 5), min_size=7, max_size=7).map(
    lambda values: torch.tensor(values, dtype=torch.float32)
)


@given(st.lists(st.tuples(SCORES, st.floats(0.125, 4)), min_size=1, max_size=4))
def test_a_consensus_is_the_weighted_mean_of_the_places(
    members: list[tuple[torch.Tensor, float]],
) -> None:
    scores, weights = [score for score, _ in members], [weight for _, weight in members]
    fused = fuse_by_rank(scores, weights).tolist()
    for sample in range(7):
        places = [
            sum((other, at) < (score[sample], sample) for at, other in enumerate(score))
            for score in (score_T.tolist() for score_T in scores)
        ]
        mean = sum(map(operator.mul, places, weights)) / sum(weights)
        assert fused[sample] == pytest.approx(mean / 6, abs=1e-6)


@given(SCORES)
def test_scales_say_nothing(score_T: torch.Tensor) -> None:
    other_T = torch.arange(7).float()
    fused = fuse_by_rank([score_T, other_T], [1, 1])
    assert torch.equal(fused, fuse_by_rank([score_T * 1e6 - 3, other_T], [1, 1]))


@pytest.mark.parametrize("weights", [[], [0.0], [-1.0]])
def test_a_consensus_of_nothing_is_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="fusing needs rankings"):
        fuse_by_rank([torch.zeros(3)] * len(weights), weights)
