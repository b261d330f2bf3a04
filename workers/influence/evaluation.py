"""How well scores find known noise.

Shapes: T training samples.
"""

import torch
from torch import Tensor

from workers.influence.aggregation import order_by_score


def noise_detection_rate(score_T: Tensor, is_noisy_T: Tensor, *, fraction: float) -> float:
    """Return the share of all noisy samples among the lowest-scored `round(fraction · T)`: NDR@q.

    Raises:
        ValueError: no sample is noisy, or the fraction is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1.")
    hits_T = _hits(score_T, is_noisy_T)
    cut = round(fraction * len(hits_T))
    return int(hits_T[cut - 1]) / int(hits_T[-1]) if cut else 0.0


def noise_detection_curve(score_T: Tensor, is_noisy_T: Tensor) -> Tensor:
    """Return NDR at every cut, float64 [T]; entry k − 1 is the rate among the lowest k.

    Raises:
        ValueError: no sample is noisy.
    """
    hits_T = _hits(score_T, is_noisy_T)
    return hits_T.double() / hits_T[-1]


def auc_ndr(score_T: Tensor, is_noisy_T: Tensor) -> float:
    """Return the area under the NDR curve over that of the ideal ranking, all noise first.

    The area is taken by trapezoids from NDR(0) = 0 to NDR(T) = 1, that is Σ_k NDR(k) − 1/2; the
    ideal ranking's is then n_clean + n_noise/2 to the digit, so that the oracle gives exactly 1.
    A random ranking gives (n/2) / (n_clean + n_noise/2) on average: 0.5 for rare noise, 0.556 at
    20 %.

    Raises:
        ValueError: no sample is noisy.
    """
    hits_T = _hits(score_T, is_noisy_T)
    num_noisy = int(hits_T[-1])
    num_clean = len(hits_T) - num_noisy
    # in whole numbers, both areas times 2 · num_noisy: no rounding before the one division
    area = 2 * int(hits_T.sum()) - num_noisy
    ideal_area = 2 * num_noisy * num_clean + num_noisy**2
    return area / ideal_area


def _hits(score_T: Tensor, is_noisy_T: Tensor) -> Tensor:
    """Count the noisy samples among the lowest 1, 2, … T, int64."""
    hits_T = is_noisy_T[order_by_score(score_T)].cumsum(dim=0, dtype=torch.int64)
    if not len(hits_T) or int(hits_T[-1]) == 0:
        raise ValueError("no sample is marked as noisy, so there is no rate of finding noise.")
    return hits_T
