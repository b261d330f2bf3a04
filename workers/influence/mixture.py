"""How much of a set is wrong, from the scores of samples that are right and of samples that are wrong.

The scores of the set are a mixture of both: F = (1 − π) G0 + π G1. On a histogram, π has one
maximum of the likelihood, found by expectation-maximisation (the mixture proportion problem with
both components known; Blanchard et al. 2010 treat the harder one with one unknown).

Shapes: N scores of the set, M of right samples, W of wrong ones, B bins, R resamples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_BINS = 20
NUM_RESAMPLES = 200
_STEPS = 300
_CONFIDENCE = 0.9


@dataclass(frozen=True)
class NoiseShare:
    """An estimate of the share of wrong samples, with an interval.

    Attributes:
        share: π, 0 to 1.
        low, high: the 90 % interval over resamples of all three sets.
        probability_N: float32, of every score of the set: that its sample is wrong.
    """

    share: float
    low: float
    high: float
    probability_N: Tensor


def estimate_noise_share(
    score_N: Tensor, right_M: Tensor, wrong_W: Tensor, *, seed: int
) -> NoiseShare:
    """Estimate how much of a set is wrong.

    Args:
        score_N: of the set; any scale.
        right_M: of samples that are known to be right, scored alike.
        wrong_W: of samples that are known to be wrong, scored alike.
        seed: of the resamples.

    Raises:
        ValueError: one of the sets is empty.
    """
    if not (len(score_N) and len(right_M) and len(wrong_W)):
        raise ValueError("the noise share needs scores of the set, of right and of wrong samples.")
    levels = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)[1:-1]
    known = torch.cat([right_M, wrong_W]).double()
    edges = known.quantile(levels).unique() if len(known) > 1 else known
    place_N = torch.bucketize(score_N.double(), edges)
    counts = [
        torch.bincount(torch.bucketize(scores.double(), edges), minlength=len(edges) + 1).double()
        for scores in (score_N, right_M, wrong_W)
    ]
    count_B, right_B, wrong_B = counts
    share = _maximise(count_B[None], right_B[None], wrong_B[None])
    density = _densities(right_B[None], wrong_B[None])
    wrong_part_B = share * density[1][0]
    probability_B = wrong_part_B / (wrong_part_B + (1 - share) * density[0][0])
    generator = torch.Generator().manual_seed(seed)
    resampled = [_resample(each_B, generator) for each_B in counts]
    shares_R = _maximise(*resampled)
    tail = (1 - _CONFIDENCE) / 2
    low, high = shares_R.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return NoiseShare(
        share=float(share),
        low=min(low, float(share)),
        high=max(high, float(share)),
        probability_N=probability_B[place_N].float(),
    )


def _resample(count_B: Tensor, generator: torch.Generator) -> Tensor:
    """Return resampled counts, [R, B]: every sample counts a Poisson number of times."""
    return torch.poisson(count_B.expand(NUM_RESAMPLES, -1), generator=generator)


def _densities(right_RB: Tensor, wrong_RB: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares of the bins, half a sample added to each so that none is impossible."""
    right_RB, wrong_RB = right_RB + 0.5, wrong_RB + 0.5
    return (
        right_RB / right_RB.sum(dim=1, keepdim=True),
        wrong_RB / wrong_RB.sum(dim=1, keepdim=True),
    )


def _maximise(count_RB: Tensor, right_RB: Tensor, wrong_RB: Tensor) -> Tensor:
    """Return π of the largest likelihood, [R]."""
    right_RB, wrong_RB = _densities(right_RB, wrong_RB)
    share_R1 = torch.full((len(count_RB), 1), 0.5, dtype=torch.float64)
    total_R1 = count_RB.sum(dim=1, keepdim=True)
    for _ in range(_STEPS):
        part_RB = share_R1 * wrong_RB
        posterior_RB = part_RB / (part_RB + (1 - share_R1) * right_RB)
        share_R1 = (count_RB * posterior_RB).sum(dim=1, keepdim=True) / total_R1
    return share_R1[:, 0]
