"""How much of a set is wrong, from the scores of samples known to be right and known to be wrong.

The mean score of the set is a mixture of two known means (probabilistic adjusted counting: Bella et
al. 2010, "Quantification via Probability Estimators"). One number from three means: it neither
needs densities nor gets better by them on a few hundred samples (docs/results.md).

Shapes: N scores of the set, M of right samples, W of wrong ones, R resamples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_RESAMPLES = 1000
CONFIDENCE = 0.9


@dataclass(frozen=True)
class NoiseShare:
    """An estimate of the share of wrong samples.

    Attributes:
        share: from 0 to 1.
        low, high: the 90 % interval over resamples of all three sets.
    """

    share: float
    low: float
    high: float


def estimate_noise_share(
    score_N: Tensor, right_M: Tensor, wrong_W: Tensor, *, seed: int
) -> NoiseShare | None:
    """Estimate how much of a set is wrong; None where right and wrong cannot be told apart.

    Args:
        score_N: of the set; high for right samples.
        right_M: of samples that are right, scored alike.
        wrong_W: of samples that are wrong, scored alike.
        seed: of the resamples.
    """
    if not (len(score_N) and len(right_M) and len(wrong_W)):
        return None
    samples = [scores.double() for scores in (score_N, right_M, wrong_W)]
    mean, right, wrong = (scores.mean() for scores in samples)
    if right <= wrong:
        return None
    generator = torch.Generator().manual_seed(seed)
    means_R = [_resampled_means(scores, generator) for scores in samples]
    gap_R = (means_R[1] - means_R[2]).clamp(min=torch.finfo(torch.float64).tiny)
    share_R = ((means_R[1] - means_R[0]) / gap_R).clamp(0, 1)
    tail = (1 - CONFIDENCE) / 2
    low, high = share_R.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    share = float(((right - mean) / (right - wrong)).clamp(0, 1))
    return NoiseShare(share=share, low=min(low, share), high=max(high, share))


def _resampled_means(score_N: Tensor, generator: torch.Generator) -> Tensor:
    """Return the means of resamples, [R]: normal, as the means of a few hundred scores are."""
    spread = score_N.std(correction=0) / len(score_N) ** 0.5
    noise_R = torch.randn(NUM_RESAMPLES, generator=generator, dtype=torch.float64)
    means_R: Tensor = score_N.mean() + spread * noise_R
    return means_R
