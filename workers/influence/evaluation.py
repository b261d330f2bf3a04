"""How well scores find known noise, and influence the samples of a known group.

Shapes: T training samples, V validation samples, N numbers, U distinct ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.influence.aggregation import order_by_score


def noise_detection_rate(score_T: Tensor, is_noisy_T: Tensor, *, fraction: float) -> float:
    """Return the share of all noisy samples among the lowest-scored `round(fraction · T)`: NDR@q.

    Raises:
        ValueError: no sample is noisy, or the fraction is not between 0 and 1.
    """
    return measure_detection(score_T, is_noisy_T, fractions=[fraction]).rates[0]


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
    return measure_detection(score_T, is_noisy_T, fractions=()).auc_ndr


@dataclass(frozen=True, slots=True)
class DetectionMeasures:
    """How well one ranking finds known noise.

    Attributes:
        rates: `noise_detection_rate` at the asked fractions.
        auc_ndr: `auc_ndr`.
    """

    rates: tuple[float, ...]
    auc_ndr: float


def measure_detection(
    score_T: Tensor, is_noisy_T: Tensor, *, fractions: Sequence[float]
) -> DetectionMeasures:
    """Measure noise detection rates and the area under their curve, sorting the scores once.

    Raises:
        ValueError: no sample is noisy, or a fraction is not between 0 and 1.
    """
    hits_T = _hits(score_T, is_noisy_T)
    num_noisy = int(hits_T[-1])
    num_clean = len(hits_T) - num_noisy
    # in whole numbers, both areas times 2 · num_noisy: no rounding before the one division
    area = 2 * int(hits_T.sum()) - num_noisy
    ideal_area = 2 * num_noisy * num_clean + num_noisy**2
    return DetectionMeasures(
        rates=tuple(_rate(hits_T, fraction) for fraction in fractions),
        auc_ndr=area / ideal_area,
    )


def _rate(hits_T: Tensor, fraction: float) -> float:
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1.")
    cut = round(fraction * len(hits_T))
    return int(hits_T[cut - 1]) / int(hits_T[-1]) if cut else 0.0


def _hits(score_T: Tensor, is_noisy_T: Tensor) -> Tensor:
    """Count the noisy samples among the lowest 1, 2, … T, int64."""
    hits_T = is_noisy_T[order_by_score(score_T)].cumsum(dim=0, dtype=torch.int64)
    if not len(hits_T) or int(hits_T[-1]) == 0:
        raise ValueError("no sample is marked as noisy, so there is no rate of finding noise.")
    return hits_T


def group_auc(influence_T: Tensor, is_member_T: Tensor) -> float:
    """Return how well influence tells the members of a group from the other training samples.

    The probability that a random member has a HIGHER influence than a random other sample, a tie
    counting half: for the samples of a validation sample's own group, which should help it most.
    1.0 is perfect, 0.5 chance.

    Raises:
        ValueError: all samples are members, or none is.
    """
    num_members, num_others = _count_members(is_member_T)
    if not num_others:
        raise ValueError("all samples are members of the group: there is nothing to tell apart.")
    member_rank_sum = float(_average_ranks(influence_T)[is_member_T].sum())
    return (member_rank_sum - num_members * (num_members - 1) / 2) / (num_members * num_others)


def group_recall(influence_T: Tensor, is_member_T: Tensor) -> float:
    """Return recall@|group|: the share of the members among the |group| highest influences.

    Samples that tie at the cut count by the share of them that the cut lets in, which is what a
    random order of them gives on average.

    Raises:
        ValueError: no sample is a member.
    """
    num_members, _ = _count_members(is_member_T)
    cut = influence_T.sort(descending=True).values[num_members - 1]
    is_above_T, is_tied_T = influence_T > cut, influence_T == cut
    room = num_members - int(is_above_T.sum())
    tied_members = int((is_tied_T & is_member_T).sum())
    found = int((is_above_T & is_member_T).sum()) + room * tied_members / int(is_tied_T.sum())
    return found / num_members


@dataclass(frozen=True, slots=True)
class GroupRetrieval:
    """How well influence finds the training samples of a validation sample's own group.

    Attributes:
        auc: mean `group_auc` over the validation samples.
        recall: mean `group_recall` over them.
        num_validation: how many there are whose group has training samples in it and outside.
    """

    auc: float
    recall: float
    num_validation: int


def group_retrieval(influence_VT: Tensor, group_V: Tensor, group_T: Tensor) -> GroupRetrieval:
    """Measure how well influence finds the training samples of each validation sample's group.

    Args:
        influence_VT: of every training sample on every validation sample.
        group_V: the group of each validation sample, as whole numbers.
        group_T: of each training sample.

    Raises:
        ValueError: no validation sample's group divides the training samples.
    """
    pairs = [
        (influence_T, group_T == group)
        for influence_T, group in zip(influence_VT, group_V.tolist(), strict=True)
        if 0 < int((group_T == group).sum()) < len(group_T)
    ]
    if not pairs:
        raise ValueError("no validation sample has a group with training samples in and out of it.")
    return GroupRetrieval(
        auc=sum(group_auc(*pair) for pair in pairs) / len(pairs),
        recall=sum(group_recall(*pair) for pair in pairs) / len(pairs),
        num_validation=len(pairs),
    )


def spearman(first_N: Tensor, second_N: Tensor) -> float:
    """Return Spearman's rank correlation, ties by their average rank; 0 where one is constant."""
    first_N, second_N = _average_ranks(first_N), _average_ranks(second_N)
    first_N, second_N = first_N - first_N.mean(), second_N - second_N.mean()
    lengths = float(first_N.norm() * second_N.norm())
    return float(first_N @ second_N) / lengths if lengths else 0.0


def _count_members(is_member_T: Tensor) -> tuple[int, int]:
    """Return the number of members, at least one, and of other samples."""
    num_members = int(is_member_T.sum())
    if not num_members:
        raise ValueError("no sample is a member of the group, so there is none to be found.")
    return num_members, len(is_member_T) - num_members


def _average_ranks(value_N: Tensor) -> Tensor:
    """Return ranks from 0 on, float64; equal values share the mean of their ranks."""
    _, place_N, count_U = value_N.unique(return_inverse=True, return_counts=True)
    first_U = count_U.cumsum(0) - count_U
    rank_N: Tensor = (first_U + (count_U - 1).double() / 2)[place_N]
    return rank_N
