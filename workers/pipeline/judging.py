"""How much of the training set is wrong, how likely each sample is, and which label it should have.

Shapes: T training samples, V validation samples, N known samples (right and wrong ones), C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from workers.influence.aggregation import order_by_score
from workers.influence.quantification import CONFIDENCE, NoiseShare, estimate_noise_share
from workers.pipeline.confidence import OutOfSample
from workers.pipeline.context import StageContext
from workers.pipeline.findings import Findings
from workers.pipeline.samples import NO_CLASS


@dataclass(frozen=True)
class Judgement:
    """What is said of the training samples beside their order.

    Attributes:
        share: how much of the training set is wrong.
        probability_T: float32, that a sample is wrong, by its place in the ranking: never less
            further up, and `share` on average.
        suggested_T: int64, the most probable class; NO_CLASS for a causal language model.
        suggested_probability_T: float32, of that class; NaN for a causal language model.
    """

    share: NoiseShare
    probability_T: Tensor
    suggested_T: Tensor
    suggested_probability_T: Tensor

    def described(self) -> dict[str, Any]:
        """Return what the audit tells of the share."""
        share = self.share
        return {
            "share": share.share,
            "low": share.low,
            "high": share.high,
            "confidence": CONFIDENCE,
        }


def judge(context: StageContext, findings: Findings, score_T: Tensor) -> Judgement | None:
    """Judge the training samples by samples that are known to be right, and to be wrong.

    Right are the validation samples. Wrong are the same with every other class, or for a causal
    language model the planted probes. Each has a confidence: the probability of its class out of
    sample, or of its completion.

    Args:
        context: the unit of work.
        findings: of the audit.
        score_T: of the ranking, the lowest first.

    Returns:
        None where nothing is known to compare with, or right and wrong look alike.
    """
    known = _confidences(context, findings)
    if known is None:
        return None
    confidence_T, right_M, wrong_W = known
    share = estimate_noise_share(confidence_T, right_M, wrong_W, seed=context.request.seed)
    if share is None:
        return None
    own_T = posterior(confidence_T, right_M, wrong_W, share=share.share)
    probability_T = along_ranking(own_T, score_T)
    if findings.out_of_sample is None:
        nothing = torch.full_like(findings.train.label_T, NO_CLASS)
        return Judgement(share, probability_T, nothing, torch.full_like(probability_T, torch.nan))
    suggested_T, suggested_probability_T = suggest(
        findings.out_of_sample.train_TC, findings.train.label_T, probability_T
    )
    return Judgement(share, probability_T, suggested_T, suggested_probability_T)


def posterior(confidence_T: Tensor, right_M: Tensor, wrong_W: Tensor, *, share: float) -> Tensor:
    """Return the probability of being wrong at each confidence, float32 [T], falling with it.

    Isotonic regression on the known samples, the wrong ones weighted to `share` together.
    """
    confidence_N = torch.cat([right_M, wrong_W]).double().numpy()
    is_wrong_N = torch.cat([torch.zeros(len(right_M)), torch.ones(len(wrong_W))]).numpy()
    weight_N = torch.cat(
        [
            torch.full((len(right_M),), (1 - share) / len(right_M)),
            torch.full((len(wrong_W),), share / len(wrong_W)),
        ]
    ).clamp(min=1e-12)
    regression = IsotonicRegression(y_min=0, y_max=1, increasing=False, out_of_bounds="clip")
    regression.fit(confidence_N, is_wrong_N, sample_weight=weight_N.double().numpy())
    return torch.from_numpy(regression.predict(confidence_T.double().numpy())).float()


def along_ranking(probability_T: Tensor, score_T: Tensor) -> Tensor:
    """Return the probabilities made to fall along a ranking, their mean unchanged, float32 [T]."""
    order_T = order_by_score(score_T)
    regression = IsotonicRegression(y_min=0, y_max=1, increasing=False)
    place_T = torch.arange(len(order_T)).double().numpy()
    fitted = regression.fit_transform(place_T, probability_T[order_T].double().numpy())
    result_T = torch.empty(len(order_T))
    result_T[order_T] = torch.from_numpy(fitted).float()
    return result_T


def suggest(probability_TC: Tensor, label_T: Tensor, wrong_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most probable class of every sample and its probability.

    The given class has what is left of the probability of being wrong, which the others share in
    the proportions of their own probabilities.

    Args:
        probability_TC: out of sample.
        label_T: given classes.
        wrong_T: probability of being wrong.
    """
    given_T1 = label_T[:, None]
    others_TC = probability_TC.double().scatter(1, given_T1, 0.0)
    total_T1 = others_TC.sum(dim=1, keepdim=True)
    num_others = max(1, probability_TC.shape[1] - 1)
    even_TC = torch.full_like(others_TC, 1 / num_others).scatter(1, given_T1, 0.0)
    share_TC = torch.where(total_T1 > 0, others_TC / total_T1.clamp(min=1e-30), even_TC)
    wrong_T1 = wrong_T.double()[:, None]
    posterior_TC = (wrong_T1 * share_TC).scatter(1, given_T1, 1 - wrong_T1)
    best = posterior_TC.max(dim=1)
    return best.indices, best.values.float()


def _confidences(context: StageContext, findings: Findings) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the confidence of the training samples, of right samples and of wrong ones."""
    validation = findings.validation
    if validation is None:
        return None
    is_finite_V = findings.validation_facts["is_finite"].bool()
    if findings.out_of_sample is not None:
        return _class_confidences(
            findings.out_of_sample,
            findings.train.label_T,
            validation.label_T[is_finite_V],
            findings.out_of_sample.validation_VC[is_finite_V],
        )
    if not context.num_probe_shards or not findings.train.has_completions:
        return None
    probed = findings.probed(context)
    probe_facts = probed.probe_facts
    return (
        findings.facts.given_probability_T,
        findings.validation_facts["given_probability"][is_finite_V],
        probe_facts.given_probability_T[probe_facts.finite_N],
    )


def _class_confidences(
    found: OutOfSample, label_T: Tensor, label_V: Tensor, probability_VC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    given_V1 = label_V[:, None]
    is_wrong_VC = torch.ones_like(probability_VC, dtype=torch.bool).scatter(
        1, given_V1, value=False
    )
    return (
        found.train_TC.gather(1, label_T[:, None])[:, 0],
        probability_VC.gather(1, given_V1)[:, 0],
        probability_VC[is_wrong_VC],
    )


def flagged_number(judgement: Judgement | None, num_train: int) -> tuple[int, Sequence[str]]:
    """Return how many samples `flag: auto` flags, and what the user should know."""
    if judgement is None:
        warning = (
            "How much of the training set is wrong cannot be told here, so nothing is flagged: "
            "set flag.fraction or flag.count."
        )
        return 0, [warning]
    return round(judgement.share.share * num_train), []
