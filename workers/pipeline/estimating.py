"""Which estimators an audit computes, and what they ask of the passes over the model."""

from dataclasses import dataclass

from app.audits.fitting import computed_estimators
from app.catalogue import EstimatorName
from workers.influence.estimators import Estimator, make_estimator
from workers.pipeline.context import StageContext


@dataclass(frozen=True)
class Wishes:
    """What the audit's estimators need beside dot products of gradients."""

    curvature: bool
    kronecker: bool
    hidden_states: bool
    word_embeddings: bool
    checkpoints: bool


def estimators_of(context: StageContext) -> list[Estimator]:
    """Return the estimators that an audit computes: the asked ones and the baselines."""
    return [_make(context, name) for name in computed_estimators(context.request)]


def ranking_estimator_of(context: StageContext) -> Estimator:
    """Return the estimator that ranks."""
    return _make(context, context.request.ranking.estimator)


def _make(context: StageContext, name: EstimatorName) -> Estimator:
    return make_estimator(str(name), context.request.estimator_parameters.get(name, {}))


def wishes_of(context: StageContext) -> Wishes:
    """Return what the audit's estimators need together."""
    estimators = estimators_of(context)

    def any_needs(what: str) -> bool:
        return any(getattr(estimator, f"needs_{what}") for estimator in estimators)

    return Wishes(
        curvature=any_needs("curvature"),
        kronecker=any_needs("kronecker"),
        hidden_states=any_needs("hidden_states"),
        word_embeddings=context.request.model.word_embeddings or any_needs("word_embeddings"),
        checkpoints=any_needs("checkpoints"),
    )
