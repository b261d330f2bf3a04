"""The estimators by name."""

from workers.influence.estimators.base import (
    Baseline,
    CurvatureEstimator,
    DotEstimator,
    Estimator,
    SampleEstimator,
    SampleFacts,
)
from workers.influence.estimators.baselines import Loss, Oracle, Random
from workers.influence.estimators.datainf import DataInf
from workers.influence.estimators.grad_cosine import GradCosine
from workers.influence.estimators.grad_dot import GradDot
from workers.influence.estimators.self_influence import SelfInfluence

__all__ = [
    "ESTIMATORS",
    "Baseline",
    "CurvatureEstimator",
    "DotEstimator",
    "Estimator",
    "SampleEstimator",
    "SampleFacts",
]

ESTIMATORS: dict[str, Estimator] = {
    estimator.name: estimator
    for estimator in (
        GradDot(),
        GradCosine(),
        DataInf(),
        SelfInfluence(),
        Loss(),
        Random(),
        Oracle(),
    )
}
