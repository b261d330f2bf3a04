"""Make answers out of rows."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Any, Protocol, get_args

from app.audits import answers
from app.audits.models import (
    Audit,
    AuditState,
    RankedSample,
    Ranking,
    RankingState,
    TrainingSample,
    ValidationSample,
)
from app.audits.repository import NamedSample, SuspectRow
from app.decisions.answers import SampleDecision
from app.decisions.models import Decision
from app.work.models import Stage

FILE_FORMATS = get_args(answers.FileFormat)
_RESULTS = ("suspects", "layers", *(f"suspects.{name}" for name in FILE_FORMATS))


def audit_path(audit_id: str, *rest: str) -> str:
    """Return the path of an audit, or of a part of it."""
    return "/".join(("/v1/audits", audit_id, *rest))


class NamesRanking(Protocol):
    """What a ranking's paths are made of: its row, whole or in part."""

    @property
    def id(self) -> str: ...
    @property
    def audit_id(self) -> str: ...


def ranking_path(ranking: NamesRanking, *rest: str) -> str:
    """Return the path of a ranking, or of a part of it."""
    return audit_path(ranking.audit_id, "rankings", ranking.id, *rest)


def assemble_audit(audit: Audit, *, influence_days: float) -> answers.Audit:
    """Return an audit and where it stands.

    Args:
        audit: its row.
        influence_days: how long influence files are kept; 0 is for ever.
    """
    state = AuditState(audit.state)
    return answers.Audit(
        id=audit.id,
        state=state,
        done=state.is_final,
        stage=Stage(audit.stage) if audit.stage else None,
        progress=audit.progress,
        waiting=audit.waiting,
        samples_per_second=audit.samples_per_second,
        eta_seconds=audit.eta_seconds,
        created_at=audit.created_at,
        finished_at=audit.finished_at,
        state_times=_in_order(audit.state_times),
        cancel_requested_at=audit.cancel_requested_at,
        request=audit.request,
        metadata=audit.metadata_,
        experiment_id=audit.experiment_id,
        decision_version=audit.decision_version,
        num_decided=audit.num_decided,
        num_train=audit.num_train,
        num_validation=audit.num_validation,
        provenance=audit.provenance,
        estimate=audit.provenance.get("estimate"),
        timings=audit.timings,
        results=_results(audit) if state is AuditState.SUCCEEDED else None,
        kept=_kept(audit, influence_days) if state is AuditState.SUCCEEDED else None,
        error=_error(audit) if state is AuditState.FAILED else None,
        links=audit_links(audit.id, state),
    )


def _in_order(state_times: dict[str, str]) -> dict[AuditState, datetime]:
    """Return when each state began, the first one first: JSONB forgets the order of keys."""
    begun = {AuditState(name): datetime.fromisoformat(time) for name, time in state_times.items()}
    return dict(sorted(begun.items(), key=itemgetter(1)))


def _error(of: Audit | Ranking) -> answers.AuditError:
    return answers.AuditError(
        code=of.error_code or "", message=of.error_message or "", field=of.error_field
    )


def influence_until(audit: Audit, influence_days: float) -> datetime | None:
    """Return when a finished audit's influence files are deleted, or were; None for never."""
    if audit.influence_deleted_at is not None:
        return audit.influence_deleted_at
    if audit.finished_at is None or not influence_days:
        return None
    return audit.finished_at + timedelta(days=influence_days)


def _kept(audit: Audit, influence_days: float) -> answers.Kept:
    return answers.Kept(
        influence_bytes=audit.influence_bytes,
        results_bytes=sum(file["bytes"] for file in audit.summary["files"].values()),
        until=influence_until(audit, influence_days),
    )


def _results(audit: Audit) -> answers.AuditResults:
    summary = audit.summary
    files = {
        name: {**file, "href": audit_path(audit.id, f"suspects.{name}")}
        for name, file in summary["files"].items()
    }
    names = answers.AuditResults.model_fields.keys() & summary.keys()
    return answers.AuditResults.model_validate(
        {**{name: summary[name] for name in names}, "files": files}
    )


def audit_links(audit_id: str, state: AuditState) -> dict[str, str]:
    """Return the paths that make sense for an audit in a state."""
    links = {"self": audit_path(audit_id)}
    if not state.is_final:
        links["cancel"] = audit_path(audit_id, "cancel")
        links["events"] = audit_path(audit_id, "events")
    if state is AuditState.SUCCEEDED:
        for name in (*_RESULTS, "rankings", "decisions"):
            links[name] = audit_path(audit_id, name)
    return links


def assemble_ranking(ranking: Ranking) -> answers.Ranking:
    """Return a ranking and where it stands."""
    state = RankingState(ranking.state)
    has_results = state is RankingState.SUCCEEDED
    return answers.Ranking(
        id=ranking.id,
        audit_id=ranking.audit_id,
        is_own=ranking.is_own,
        state=state,
        done=state.is_final,
        progress=ranking.progress,
        waiting=ranking.waiting,
        created_at=ranking.created_at,
        finished_at=ranking.finished_at,
        seconds=ranking.seconds,
        request={**ranking.specification, "flag": ranking.flag},
        results=_ranking_results(ranking) if has_results else None,
        error=_error(ranking) if state is RankingState.FAILED else None,
        links=ranking_links(ranking, state),
    )


def ranking_links(ranking: NamesRanking, state: RankingState) -> dict[str, str]:
    """Return the paths that make sense for a ranking in a state."""
    links = {"self": ranking_path(ranking), "audit": audit_path(ranking.audit_id)}
    if not state.is_final:
        links["events"] = ranking_path(ranking, "events")
    if state is RankingState.SUCCEEDED:
        links |= {name: ranking_path(ranking, name) for name in _RESULTS}
    return links


def _ranking_results(ranking: Ranking) -> answers.RankingResults:
    summary = ranking.summary
    files = {
        name: {**file, "href": ranking_path(ranking, f"suspects.{name}")}
        for name, file in summary["files"].items()
    }
    names = answers.RankingResults.model_fields.keys() & summary.keys()
    return answers.RankingResults.model_validate(
        {**{name: summary[name] for name in names}, "files": files}
    )


def assemble_suspect(row: SuspectRow) -> answers.Suspect:
    """Return one place of a ranking."""
    return answers.Suspect(**_suspect_fields(*row))


def assemble_sample(ranking: Ranking, named: NamedSample) -> answers.SampleDetail:
    """Return one training sample with the evidence.

    Args:
        ranking: its summary names the layer groups.
        named: the sample's place in it.
    """
    ranked, sample, decision = named.row

    def related(indices: list[int], influences: list[float]) -> list[answers.RelatedSample]:
        return [
            answers.RelatedSample(**_identity(named.validation[index]), influence=influence)
            for index, influence in zip(indices, influences, strict=True)
        ]

    def alike(
        indices: list[int] | None, cosines: list[float] | None
    ) -> list[answers.AlikeSample] | None:
        if indices is None or cosines is None:
            return None
        others = [named.training[index] for index in indices]
        return [
            answers.AlikeSample(
                **_identity(other),
                similarity=cosine,
                has_other_label=other.given_label != sample.given_label if named.labels else None,
            )
            for other, cosine in zip(others, cosines, strict=True)
        ]

    standings = zip(
        ranking.summary["group_order"], ranked.group_scores, ranked.group_ranks, strict=True
    )
    return answers.SampleDetail(
        **_suspect_fields(ranked, sample, decision),
        layer_groups=[
            answers.GroupStanding(layer_group=group, score=score, rank=rank)
            for group, score, rank in standings
        ],
        harms_most=related(ranked.harmed_validation, ranked.harmed_influence),
        helps_most=related(ranked.helped_validation, ranked.helped_influence),
        most_alike=alike(sample.alike_training, sample.alike_cosine),
        most_opposed=alike(sample.opposed_training, sample.opposed_cosine),
        class_probabilities=_class_probabilities(sample, named.labels),
        ranking_id=ranked.ranking_id,
    )


def _class_probabilities(
    sample: TrainingSample, labels: Sequence[str]
) -> list[answers.ClassProbability] | None:
    probabilities = sample.class_probabilities
    if probabilities is None:
        return None
    classes = sample.shown_classes or range(len(labels))
    nothing: list[None] = [None] * len(probabilities)
    out_of_sample = sample.out_of_sample_probabilities or nothing
    return [
        answers.ClassProbability(label=labels[index], probability=one, out_of_sample=other)
        for index, one, other in zip(classes, probabilities, out_of_sample, strict=True)
    ]


def assemble_layers(summary: Mapping[str, Any]) -> answers.LayerTable:
    """Return every configuration that an audit, or a ranking, computed."""
    # JSONB forgets the order of keys; the groups have one, from the first layer to the last.
    # Winnow 0.1.0 kept one order for the table and for the samples' standings.
    order = summary.get("layer_group_order", summary["group_order"])
    groups = {name: summary["layer_groups"][name] for name in order}
    return answers.LayerTable.model_validate(
        {
            "layer_groups": groups,
            "module_cancellation": summary.get("module_cancellation"),
            "data": summary["configurations"],
        }
    )


def _suspect_fields(
    ranked: RankedSample, sample: TrainingSample, decision: Decision | None
) -> dict[str, Any]:
    return {
        "rank": ranked.rank,
        "index": ranked.sample_index,
        "text": sample.text,
        "text_pair": sample.text_pair,
        "given_label": sample.given_label,
        "predicted_label": sample.predicted_label,
        "predicted_probability": sample.predicted_probability,
        "given_probability": sample.given_probability,
        "loss": sample.loss,
        "score": ranked.score,
        "flagged": ranked.flagged,
        "noise_probability": ranked.noise_probability,
        "suggested_label": ranked.suggested_label,
        "suggested_probability": ranked.suggested_probability,
        "is_noisy": sample.is_noisy,
        "non_finite": sample.non_finite,
        "decision": _decision(decision) if decision is not None else None,
    }


def _decision(decision: Decision) -> SampleDecision:
    names = SampleDecision.model_fields
    return SampleDecision.model_validate({name: getattr(decision, name) for name in names})


def _identity(sample: TrainingSample | ValidationSample) -> dict[str, Any]:
    return {
        "index": sample.sample_index,
        "text": sample.text,
        "text_pair": sample.text_pair,
        "given_label": sample.given_label,
        "predicted_label": sample.predicted_label,
    }
