"""Measures of predictions, and how sure a difference between two trainings is.

Shapes: N samples, S seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats
from torch import Tensor

MIN_PAIRS = 2


def accuracy(label_N: Tensor, predicted_N: Tensor) -> float:
    """Return the share of the samples whose predicted class is the right one."""
    return float((label_N == predicted_N).double().mean())


def macro_f1(label_N: Tensor, predicted_N: Tensor) -> float:
    """Return the mean over classes of F1 = 2 · hits / (samples of the class + predictions of it).

    Over the classes that occur among the labels or the predictions, as scikit-learn does it; a
    negative prediction is a prediction of no class.
    """
    label_N, predicted_N = label_N.long(), predicted_N.long()
    num_classes = 1 + max(int(label_N.max()), int(predicted_N.max()))

    def count(class_K: Tensor) -> Tensor:
        return class_K.bincount(minlength=num_classes).double()

    hits_C = count(label_N[label_N == predicted_N])
    sizes_C = count(label_N) + count(predicted_N[predicted_N >= 0])
    occurs_C = sizes_C > 0
    return float((2 * hits_C[occurs_C] / sizes_C[occurs_C]).mean())


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of paired differences, and an interval of it.

    Attributes:
        mean: over the pairs.
        low, high: ends of the interval; None from less than two pairs.
        num_pairs: how many there are.
    """

    mean: float
    low: float | None
    high: float | None
    num_pairs: int


def paired_difference(
    one_S: Sequence[float], other_S: Sequence[float], *, confidence: float
) -> Difference:
    """Return how much higher `one` is than `other`, with Student's t interval of the paired mean.

    Mean ± t · s / √S of the differences, with their standard deviation s (S − 1 in the
    denominator) and t the quantile of S − 1 degrees of freedom. It holds where differences are
    normal, and says what ANOTHER SEED would do on the same data: pairs are seeds.

    Args:
        one_S: a measure for every seed.
        other_S: of what it is compared with, for the same seeds.
        confidence: of the interval, between 0 and 1.

    Raises:
        ValueError: no pair, or not as many of one as of the other.
    """
    difference_S = [one - other for one, other in zip(one_S, other_S, strict=True)]
    if not difference_S:
        raise ValueError("there is no pair to take a difference of.")
    count = len(difference_S)
    mean = math.fsum(difference_S) / count
    if count < MIN_PAIRS:
        return Difference(mean, None, None, count)
    variance = math.fsum((value - mean) ** 2 for value in difference_S) / (count - 1)
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    reach = quantile * math.sqrt(variance / count)
    return Difference(mean, mean - reach, mean + reach, count)


def paired_sample_difference(one_SN: Tensor, other_SN: Tensor, *, confidence: float) -> Difference:
    """Return the same with the SAMPLES as pairs: what another test set of the kind would say.

    A sample's difference is its mean over the seeds; the interval is that of the mean of N
    independent differences, by the normal distribution that such means approach.

    Args:
        one_SN: a measure for every seed and sample.
        other_SN: of what it is compared with.
        confidence: of the interval, between 0 and 1.

    Raises:
        ValueError: no seed or sample, or not the same number of them.
    """
    if one_SN.shape != other_SN.shape or not one_SN.numel():
        raise ValueError(
            f"{tuple(one_SN.shape)} and {tuple(other_SN.shape)} measures are no pairs."
        )
    difference_N = (one_SN.double() - other_SN.double()).mean(dim=0)
    count, mean = len(difference_N), float(difference_N.mean())
    if count < MIN_PAIRS:
        return Difference(mean, None, None, count)
    quantile = float(stats.norm.ppf((1 + confidence) / 2))
    reach = quantile * float(difference_N.std()) / math.sqrt(count)
    return Difference(mean, mean - reach, mean + reach, count)
