"""Choose by planted probes: which configuration, or which members of a consensus, rank.

A configuration is as good as it finds the probes, by AUC-NDR (docs/results.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.audits.automatic import CANDIDATE_AGGREGATIONS
from app.audits.schemas import Configuration, RankingSpecification
from app.catalogue import AUTO, CONSENSUS, ESTIMATORS, EstimatorName
from workers.influence.estimators import Estimator
from workers.influence.layer_groups import UnknownLayers
from workers.pipeline.context import StageContext
from workers.pipeline.estimating import estimators_of, make_named
from workers.pipeline.findings import Findings
from workers.pipeline.layout import ALL, ModelLayout

NUM_RUNNERS_UP = 10
# A member that finds the probes this much worse than the best counts e times less.
WEIGHT_SCALE = 0.02
# Standard errors above chance that the best of some hundred configurations does not reach by luck.
_SURE = 4.0
# A fresh copy with a wrong target is easy for these, real noise that was trained on is not.
FLATTERED = frozenset({EstimatorName.LOSS, EstimatorName.SELF_INFLUENCE})
_NO_CANDIDATES = frozenset({EstimatorName.RANDOM, EstimatorName.ORACLE, EstimatorName.TRACIN})


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
    """

    members: Sequence[Member]
    is_consensus: bool = False
    evidence: dict[str, Any] | None = None

    @property
    def lead(self) -> Configuration:
        """The configuration that ranks, or the best member."""
        return self.members[0].configuration


def choose(context: StageContext, findings: Findings, ranking: RankingSpecification) -> Choice:
    """Settle what a ranking leaves open.

    Raises:
        UnknownLayers: no estimator has the asked layers.
    """
    if is_settled(ranking):
        return Choice([Member(settled(ranking))])
    probed = findings.probed(context)
    scorer = findings.scorer(context, probed)
    table: list[tuple[Configuration, dict[str, float]]] = []
    for estimator in _candidates(context, ranking):
        try:
            measured = _measure(scorer.score_all, estimator, ranking, findings.layout)
        except UnknownLayers:
            if ranking.estimator == estimator.name:
                raise
            continue
        table += measured
    if not table:
        raise UnknownLayers(f"no estimator of this audit has the layers {ranking.layers!r}.")
    table.sort(key=lambda row: -row[1]["auc_ndr"])
    num_probes, num_samples = int(probed.is_probe_F.sum()), len(probed.is_probe_F)
    members = _members(table, ranking)
    best = max(row[1]["auc_ndr"] for row in table)
    return Choice(
        members=members,
        is_consensus=ranking.estimator == CONSENSUS,
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
                {**configuration.model_dump(mode="json"), **found}
                for configuration, found in table[:NUM_RUNNERS_UP]
            ],
        },
    )


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


def is_better_than_chance(auc_ndr: float, *, num_probes: int, num_samples: int) -> bool:
    """Return whether an AUC-NDR is more than luck, by the normal limit of the rank-sum test."""
    num_others = num_samples - num_probes
    if not num_probes or not num_others:
        return False
    # AUC-NDR = (AUC · clean + noise / 2) / (clean + noise / 2)
    auc = (auc_ndr * (num_others + num_probes / 2) - num_probes / 2) / num_others
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
    score_all: Any,  # noqa: ANN401 - Scorer.score_all
    estimator: Estimator,
    ranking: RankingSpecification,
    layout: ModelLayout,
) -> list[tuple[Configuration, dict[str, float]]]:
    """Return the configurations of an estimator that the ranking leaves open, with the probes'."""
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
    scored = score_all([estimator], aggregations=asked, ranking=first)
    rows = []
    for row in scored.configurations:
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
        rows.append((configuration, row["detection"]))
    return rows


def _members(
    table: Sequence[tuple[Configuration, dict[str, float]]],
    ranking: RankingSpecification,
) -> list[Member]:
    """Return what ranks: the best configuration, or the best of every estimator."""
    best: dict[str, Member] = {}
    for configuration, found in table:
        member = Member(configuration, auc_ndr=found["auc_ndr"])
        best.setdefault(str(configuration.estimator), member)
    sound = [member for name, member in best.items() if name not in FLATTERED]
    if ranking.estimator != CONSENSUS:
        return (sound or list(best.values()))[:1]
    voices = sound + [best[name] for name in (EstimatorName.LOSS,) if name in best]
    top = max(member.auc_ndr or 0.0 for member in sound or voices)
    weighted = [
        Member(
            member.configuration,
            weight=min(1.0, math.exp(((member.auc_ndr or 0.0) - top) / WEIGHT_SCALE)),
            auc_ndr=member.auc_ndr,
        )
        for member in voices
    ]
    return sorted(weighted, key=lambda member: -member.weight)
