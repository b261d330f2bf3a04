"""Fuse several rankings into one.

Shapes: K rankings, T training samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.influence.aggregation import order_by_score


def fuse_by_rank(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean of the ranks, from 0 for the lowest score to 1, float32 [T].

    Ranks need no common scale, so any scores can be fused (the Borda count).

    Args:
        scores: score_T of each ranking; the lowest are suspects. Ties stand by training index.
        weights: of each ranking, at least 0 and not all 0.

    Raises:
        ValueError: there is nothing to fuse, or no weight.
    """
    if not scores or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError("fusing needs rankings, with weights of 0 and more and not all 0.")
    num_train = len(scores[0])
    total_T = torch.zeros(num_train, dtype=torch.float64)
    for score_T, weight in zip(scores, weights, strict=True):
        total_T += weight * order_by_score(score_T).argsort()
    return (total_T / (sum(weights) * max(1, num_train - 1))).float()
