"""Choose by planted probes: which configuration, or which members of a consensus, rank.

A configuration is as good as it finds the probes, by AUC-NDR. Among those that the probes cannot
tell from the best, the one is taken whose ranking is most like the mean of theirs: the best by a
hair is the luckiest of hundreds, and theirs is what they agree on (docs/results.md).

Shapes: K configurations, F samples of the probed set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from app.audits.automatic import CANDIDATE_AGGREGATIONS
from app.audits.schemas import Configuration, RankingSpecification
from app.catalogue import AUTO, CONSENSUS, ESTIMATORS, EstimatorName
from workers.influence.aggregation import order_by_score
from workers.influence.estimators import Estimator
from workers.influence.layer_groups import UnknownLayers
from workers.pipeline.context import StageContext
from workers.pipeline.estimating import estimators_of, make_named
from workers.pipeline.findings import Findings
from workers.pipeline.layout import ALL, ModelLayout
from workers.pipeline.scores import Scorer

NUM_RUNNERS_UP = 10
# A member that finds the probes this much worse than the best counts e times less.
WEIGHT_SCALE = 0.02
# Standard errors above chance that the best of some hundred configurations does not reach by luck.
_SURE = 4.0
# A fresh copy with a wrong target is easy for these, real noise that was trained on is not.
FLATTERED = frozenset({EstimatorName.LOSS, EstimatorName.SELF_INFLUENCE})
_TIED = 1e-9  # rounding
# What tells the configurations of one audit apart.
_PLACE = {"estimator", "layers", "aggregation", "correct_only"}
_NO_CANDIDATES = frozenset({EstimatorName.RANDOM, EstimatorName.ORACLE, EstimatorName.TRACIN})


@dataclass(frozen=True)
class Candidate:
    """A configuration with what the probes say of it.

    Attributes:
        found: its detection of the probes.
        score_F: its scores of the probed set.
    """

    configuration: Configuration
    found: dict[str, float]
    score_F: Tensor

    @property
    def auc_ndr(self) -> float:
        """How well it finds the probes."""
        return self.found["auc_ndr"]


@dataclass(frozen=True)
class Member:
    """A configuration that ranks, alone or among others.

    Attributes:
        weight: of its ranks in a consensus.
        auc_ndr: how well it finds the probes; None where none were asked.
    """

    configuration: Configuration
    weight: float = 1.0
    auc_ndr: float | None = None


@dataclass(frozen=True)
class Choice:
    """What ranks, and why.

    Attributes:
        members: one, or those of a consensus, the best first.
        evidence: what the audit tells of the choice; None where nothing was chosen.
        best_pairwise: the best configuration that was measured and has pairs of training and
            validation samples; None where nothing was measured.
    """

    members: Sequence[Member]
    is_consensus: bool = False
    evidence: dict[str, Any] | None = None
    best_pairwise: Configuration | None = None

    @property
    def lead(self) -> Configuration:
        """The configuration that ranks, or of a consensus the best member that has pairs."""
        first = self.members[0].configuration
        if not self.is_consensus:
            return first
        return next(
            (each.configuration for each in self.members if _has_pairs(each.configuration)), first
        )

    @property
    def witness(self) -> Configuration:
        """Whose influence tells what a sample harms: the lead's, if it has pairs, else the best."""
        return self.lead if _has_pairs(self.lead) else self.best_pairwise or self.lead


def choose(context: StageContext, findings: Findings, ranking: RankingSpecification) -> Choice:
    """Settle what a ranking leaves open.

    Raises:
        UnknownLayers: no estimator has the asked layers.
    """
    if is_settled(ranking):
        return Choice([Member(settled(ranking))])
    probed = findings.probed(context)
    if not bool(probed.is_probe_N.any()):
        return _by_default(context, findings, ranking, num_samples=len(probed.is_probe_N))
    scorer = findings.scorer(context, probed)
    table: list[Candidate] = []
    for estimator in _candidates(context, ranking):
        try:
            measured = _measure(scorer, estimator, ranking, findings.layout)
        except UnknownLayers:
            if ranking.estimator == estimator.name:
                raise
            continue
        table += measured
    if not table:
        raise UnknownLayers(f"no estimator of this audit has the layers {ranking.layers!r}.")
    table.sort(key=lambda candidate: -candidate.auc_ndr)
    num_probes, num_samples = int(probed.is_probe_N.sum()), len(probed.is_probe_N)
    if ranking.estimator == CONSENSUS:
        members = _members(table)
    else:
        error = standard_error(table[0].auc_ndr, num_probes=num_probes, num_samples=num_samples)
        chosen = most_agreed(_sound(table), margin=error)
        members = [Member(chosen.configuration, auc_ndr=chosen.auc_ndr)]
    best = table[0].auc_ndr
    return Choice(
        members=members,
        is_consensus=ranking.estimator == CONSENSUS,
        best_pairwise=next(
            (each.configuration for each in table if _has_pairs(each.configuration)), None
        ),
        evidence={
            "num_probes": num_probes,
            "num_samples": num_samples,
            "chance": chance(num_probes, num_samples),
            "works": is_better_than_chance(best, num_probes=num_probes, num_samples=num_samples),
            "members": [
                {
                    **member.configuration.model_dump(mode="json"),
                    "weight": member.weight,
                    "auc_ndr": member.auc_ndr,
                }
                for member in members
            ],
            "configurations": [
                {**each.configuration.model_dump(mode="json"), **each.found}
                for each in table[:NUM_RUNNERS_UP]
            ],
            "measured": [
                {
                    **each.configuration.model_dump(mode="json", include=_PLACE),
                    "auc_ndr": each.auc_ndr,
                }
                for each in table
            ],
        },
    )


def _by_default(
    context: StageContext, findings: Findings, ranking: RankingSpecification, *, num_samples: int
) -> Choice:
    """Choose where no probe could be planted: the ranks of the first estimator, over all layers."""
    estimator = _candidates(context, ranking)[0]
    values = ranking.model_dump() | {"estimator": estimator.name}
    if values["layers"] == AUTO:
        values["layers"] = next(iter(findings.layout.standard_groups(estimator)))
    if values["aggregation"] == AUTO:
        values["aggregation"] = "rank"
    values["correct_only"] = bool(values["correct_only"])
    configuration = Configuration.model_validate(values)
    told = {**configuration.model_dump(mode="json"), "weight": 1.0, "auc_ndr": None}
    return Choice(
        members=[Member(configuration)],
        evidence={
            "num_probes": 0,
            "num_samples": num_samples,
            "chance": chance(0, num_samples) if num_samples else 1.0,
            "works": False,
            "members": [told],
            "configurations": [],
            "measured": [],
        },
    )


def _has_pairs(configuration: Configuration) -> bool:
    return ESTIMATORS[configuration.estimator].kind == "pairwise"


def is_settled(ranking: RankingSpecification) -> bool:
    """Return whether a ranking leaves nothing open."""
    estimator = ESTIMATORS.get(ranking.estimator)
    if estimator is None:
        return False
    return not estimator.has_layers or AUTO not in {ranking.layers, ranking.aggregation}


def settled(ranking: RankingSpecification) -> Configuration:
    """Return the configuration that a ranking without open ends, or of a baseline, names."""
    values = ranking.model_dump()
    values["correct_only"] = bool(values["correct_only"])
    if not ESTIMATORS[ranking.estimator].has_layers:
        values |= {"layers": ALL, "aggregation": CANDIDATE_AGGREGATIONS[0]}
    return Configuration.model_validate(values)


def chance(num_probes: int, num_samples: int) -> float:
    """Return the AUC-NDR of a random ranking."""
    num_others = num_samples - num_probes
    return (num_samples / 2) / (num_others + num_probes / 2)


def standard_error(auc_ndr: float, *, num_probes: int, num_samples: int) -> float:
    """Return how far an AUC-NDR of that many probes is off by luck (Hanley and McNeil 1982)."""
    num_others = num_samples - num_probes
    if not num_probes or not num_others:
        return 0.0
    auc = min(1.0, max(0.0, _auc(auc_ndr, num_probes, num_others)))
    both_probes, both_others = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc)
    variance += (num_probes - 1) * (both_probes - auc**2)
    variance += (num_others - 1) * (both_others - auc**2)
    error = math.sqrt(max(0.0, variance) / (num_probes * num_others))
    return error * num_others / (num_others + num_probes / 2)


def _auc(auc_ndr: float, num_probes: int, num_others: int) -> float:
    """Return the area under the ROC curve: the chance that a probe stands before another sample.

    AUC-NDR = (AUC · others + probes / 2) / (others + probes / 2).
    """
    return (auc_ndr * (num_others + num_probes / 2) - num_probes / 2) / num_others


def is_better_than_chance(auc_ndr: float, *, num_probes: int, num_samples: int) -> bool:
    """Return whether an AUC-NDR is more than luck, by the normal limit of the rank-sum test."""
    num_others = num_samples - num_probes
    if not num_probes or not num_others:
        return False
    auc = _auc(auc_ndr, num_probes, num_others)
    error = math.sqrt((num_samples + 1) / (12 * num_probes * num_others))
    return auc - 0.5 > _SURE * error


def _candidates(context: StageContext, ranking: RankingSpecification) -> list[Estimator]:
    if ranking.estimator not in {AUTO, CONSENSUS}:
        return [make_named(context, str(ranking.estimator))]
    found = [each for each in estimators_of(context) if each.name not in _NO_CANDIDATES]
    if ranking.layers != AUTO:
        found = [each for each in found if each.has_layers]
    return found


def _measure(
    scorer: Scorer,
    estimator: Estimator,
    ranking: RankingSpecification,
    layout: ModelLayout,
) -> list[Candidate]:
    """Return the configurations of an estimator that the ranking leaves open."""
    options = {
        name: getattr(ranking, name) for name in ("vote_fraction", "trim_fraction", "common_share")
    }
    layers = ranking.layers
    if layers == AUTO:
        layers = next(iter(layout.standard_groups(estimator)))
    asked = CANDIDATE_AGGREGATIONS if ranking.aggregation == AUTO else [ranking.aggregation]
    first = Configuration(
        estimator=EstimatorName(estimator.name), layers=layers, aggregation=asked[0], **options
    )
    scored = scorer.score_all([estimator], aggregations=asked, ranking=first)
    rows = []
    for row, score_F in zip(scored.configurations, scored.probed_scores, strict=True):
        if ranking.layers not in {AUTO, row["layer_group"]}:
            continue
        is_asked = ranking.correct_only in {None, row["correct_only"]}
        if estimator.kind == "pairwise" and not is_asked:
            continue
        configuration = Configuration(
            estimator=EstimatorName(estimator.name),
            layers=row["layer_group"],
            aggregation=row["aggregation"] or asked[0],
            correct_only=row["correct_only"],
            **options,
        )
        rows.append(Candidate(configuration, row["detection"], score_F))
    return rows


def _sound(table: Sequence[Candidate]) -> Sequence[Candidate]:
    """Return the candidates that probes do not flatter, all if there are no others."""
    sound = [each for each in table if each.configuration.estimator not in FLATTERED]
    return sound or table


def most_agreed(table: Sequence[Candidate], *, margin: float) -> Candidate:
    """Return the candidate, of those within a margin of the best, whose ranking is most like all.

    Args:
        table: the best first; of equals the first is taken.
        margin: of AUC-NDR.
    """
    near = [each for each in table if each.auc_ndr >= table[0].auc_ndr - margin]
    rank_KF = torch.stack([order_by_score(each.score_F).argsort().double() for each in near])
    rank_KF -= rank_KF.mean(dim=1, keepdim=True)
    rank_KF /= rank_KF.norm(dim=1, keepdim=True).clamp(min=1e-30)
    likeness_K = rank_KF @ rank_KF.mean(dim=0)
    return near[int((likeness_K >= likeness_K.max() - _TIED).nonzero()[0])]


def _members(table: Sequence[Candidate]) -> list[Member]:
    """Return the best candidate of every estimator, and of the loss, with their weights.

    The out-of-sample confidence, the one voice that has not seen the sample's own target, has at
    least half the say: probes are fresh, so they cannot tell how much the others have memorised.
    """
    best: dict[str, Candidate] = {}
    for candidate in table:
        best.setdefault(str(candidate.configuration.estimator), candidate)
    voices = list(_sound(list(best.values())))
    top = max(each.auc_ndr for each in voices)
    if EstimatorName.LOSS in best and best[EstimatorName.LOSS] not in voices:
        voices.append(best[EstimatorName.LOSS])
    members = [
        Member(
            each.configuration,
            weight=min(1.0, math.exp((each.auc_ndr - top) / WEIGHT_SCALE)),
            auc_ndr=each.auc_ndr,
        )
        for each in voices
    ]
    others = math.fsum(each.weight for each in members if not _is_out_of_sample(each))
    members = [
        replace(each, weight=max(each.weight, others)) if _is_out_of_sample(each) else each
        for each in members
    ]
    return sorted(members, key=lambda member: -member.weight)


def _is_out_of_sample(member: Member) -> bool:
    return member.configuration.estimator == EstimatorName.CONFIDENCE
