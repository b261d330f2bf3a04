"""Rank the training samples: the audit's own ranking, or one that was asked later."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.audits.schemas import Flag
from workers.influence.estimators import Estimator
from workers.influence.fusion import fuse_by_rank
from workers.pipeline.choosing import Choice, choose
from workers.pipeline.context import StageContext
from workers.pipeline.estimating import make_named
from workers.pipeline.findings import Findings
from workers.pipeline.judging import flagged_number, judge
from workers.pipeline.layout import ModelLayout
from workers.pipeline.publish import RankedSet
from workers.pipeline.scores import Scorer, detection

CONSENSUS_GROUP = "consensus"


@dataclass(frozen=True)
class Ranked:
    """A ranking with what is told of it.

    Attributes:
        rows: what is published.
        choice: what ranks, and why.
        summary: what is told of the ranking.
    """

    rows: RankedSet
    choice: Choice
    summary: dict[str, Any]


def make_ranking(
    context: StageContext,
    findings: Findings,
    scorer: Scorer,
    *,
    estimators: Sequence[Estimator] | None,
    aggregations: Sequence[str],
) -> Ranked:
    """Settle what the request leaves open, and rank.

    Args:
        context: the unit of work.
        findings: of the audit.
        scorer: of the training set.
        estimators: those whose configurations are compared; None for what ranks alone.
        aggregations: those that are compared, beside the ranking's own.

    Raises:
        UnknownLayers: the estimator has not the asked layers.
    """
    request = context.request
    choice = choose(context, findings, request.ranking)
    lead = choice.lead
    leading = make_named(context, lead.estimator)
    scored = scorer.score_all(
        estimators if estimators is not None else [leading],
        aggregations=aggregations,
        ranking=lead,
        layer_groups=request.layer_groups if estimators is not None else None,
        is_alone=estimators is None,
    )
    layers = lead.layers
    if choice.is_consensus:
        fused_T = fuse_by_rank(
            [
                scorer.score_rankings(make_named(context, each.estimator), [each])[0]
                for each in (member.configuration for member in choice.members)
            ],
            [member.weight for member in choice.members],
        )
        layers = CONSENSUS_GROUP
        scored.group_scores[layers] = findings.facts.put_first(fused_T)
    score_T = scored.group_scores[layers]
    judgement = judge(context, findings, score_T)
    warnings = [*scored.warnings, *_warn_of(choice)]
    if isinstance(request.flag, Flag):
        num_flagged = request.flag.number(len(findings.train))
    else:
        num_flagged, more = flagged_number(judgement, len(findings.train))
        warnings += more
    rows = RankedSet(
        samples=findings.train,
        facts=findings.facts,
        labels=findings.labels,
        group_scores=scored.group_scores,
        layers=layers,
        num_flagged=num_flagged,
        related=scorer.find_related(
            make_named(context, choice.witness.estimator), layers=choice.witness.layers
        ),
        judgement=judgement,
    )
    return Ranked(
        rows=rows,
        choice=choice,
        summary={
            "num_flagged": num_flagged,
            "warnings": warnings,
            "detection": detection(score_T, findings.train.is_noisy_T),
            "choice": choice.evidence,
            "noise": judgement.described() if judgement else None,
            "group_order": list(scored.group_scores),
            **name_groups(findings.layout, scored.configurations),
            "configurations": scored.configurations,
        },
    )


def name_groups(layout: ModelLayout, configurations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the modules of every layer group of the table, and the order of the groups."""
    standard = list(layout.groups)
    found = dict.fromkeys(item["layer_group"] for item in configurations)
    order = [*(name for name in standard if name in found)]
    order += [name for name in found if name not in standard]
    return {
        "layer_groups": {
            name: [layout.modules[module] for module in layout.members(name)] for name in order
        },
        "layer_group_order": order,
    }


def _warn_of(choice: Choice) -> list[str]:
    if choice.evidence is None or choice.evidence["works"]:
        return []
    warning = (
        "No configuration finds the planted probes better than chance would, so this ranking says "
        "little: the model may not have learned the task, or the training set is too small."
    )
    return [warning]
