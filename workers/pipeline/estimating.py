"""Which estimators an audit computes, and what they ask of the passes over the model."""

from dataclasses import dataclass

from app.audits.automatic import computed_estimators, needs_features
from app.audits.fitting import named_rankings
from app.audits.schemas import AuditRequest
from app.catalogue import AUTO, EstimatorName
from workers.influence.estimators import Estimator, make_estimator
from workers.pipeline.context import StageContext


@dataclass(frozen=True)
class Wishes:
    """What the audit needs beside dot products of gradients."""

    curvature: bool
    kronecker: bool
    hidden_states: bool
    word_embeddings: bool
    checkpoints: bool
    features: bool


def estimators_of(context: StageContext) -> list[Estimator]:
    """Return the estimators that an audit computes: the asked ones and the baselines."""
    return [make_named(context, name) for name in computed_estimators(context.request.stored())]


def make_named(context: StageContext, name: str) -> Estimator:
    """Return one estimator with the audit's parameters."""
    parameters = context.request.estimator_parameters
    return make_estimator(name, parameters.get(EstimatorName(name), {}))


def layers_of_interest(request: AuditRequest) -> list[str] | None:
    """Return the layer expressions that gradients are wanted of; None for all layers."""
    ranked = [ranking.layers for _, ranking in named_rankings(request)]
    if request.layer_groups is None or AUTO in ranked:
        return None
    return [*request.layer_groups, *ranked]


def wishes_of(context: StageContext) -> Wishes:
    """Return what the audit's estimators need together."""
    estimators = estimators_of(context)

    def any_needs(what: str) -> bool:
        return any(getattr(estimator, f"needs_{what}") for estimator in estimators)

    features = needs_features(context.request.stored())
    return Wishes(
        curvature=any_needs("curvature"),
        kronecker=any_needs("kronecker"),
        hidden_states=any_needs("hidden_states") or features,
        word_embeddings=context.request.model.word_embeddings or any_needs("word_embeddings"),
        checkpoints=any_needs("checkpoints"),
        features=features,
    )
