"""The estimators by name."""

from collections.abc import Mapping

from workers.influence.estimators.base import (
    Baseline,
    CheckpointEstimator,
    ClassEstimator,
    CurvatureEstimator,
    DotEstimator,
    Estimator,
    HiddenStateEstimator,
    RowStatistics,
    SampleEstimator,
    SampleFacts,
    WordEmbeddingEstimator,
)
from workers.influence.estimators.baselines import Confidence, Loss, Oracle, Random
from workers.influence.estimators.datainf import DataInf
from workers.influence.estimators.datainf_self import DataInfSelf
from workers.influence.estimators.ekfac import EKFAC
from workers.influence.estimators.gauss_newton import GaussNewton
from workers.influence.estimators.grad_cosine import GradCosine
from workers.influence.estimators.grad_covariance import GradCovariance
from workers.influence.estimators.grad_dot import GradDot
from workers.influence.estimators.lissa import LiSSA
from workers.influence.estimators.outlier_gradient import OutlierGradient
from workers.influence.estimators.parameters import Parameter
from workers.influence.estimators.repsim import RepSim
from workers.influence.estimators.self_influence import SelfInfluence
from workers.influence.estimators.tracin import TracIn
from workers.influence.estimators.tracin_we import TracInWE
from workers.influence.estimators.tracin_we_topk import TracInWETopK
from workers.influence.estimators.training import TrainingGradients

__all__ = [
    "ESTIMATORS",
    "Baseline",
    "CheckpointEstimator",
    "ClassEstimator",
    "CurvatureEstimator",
    "DotEstimator",
    "Estimator",
    "HiddenStateEstimator",
    "Parameter",
    "RowStatistics",
    "SampleEstimator",
    "SampleFacts",
    "TrainingGradients",
    "WordEmbeddingEstimator",
    "make_estimator",
]

_CLASSES: tuple[type[Estimator], ...] = (
    GradDot,
    GradCosine,
    GradCovariance,
    DataInf,
    DataInfSelf,
    LiSSA,
    GaussNewton,
    EKFAC,
    TracIn,
    TracInWE,
    TracInWETopK,
    OutlierGradient,
    RepSim,
    SelfInfluence,
    Loss,
    Confidence,
    Random,
    Oracle,
)

ESTIMATORS: dict[str, Estimator] = {each.name: each() for each in _CLASSES}
"""Every estimator with its default parameters."""


def make_estimator(name: str, parameters: Mapping[str, float] | None = None) -> Estimator:
    """Return the estimator `name`, with some parameters other than their defaults.

    Raises:
        ValueError: there is no such estimator or parameter, or a value is out of range.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"there is no estimator {name!r}; there are {', '.join(ESTIMATORS)}.")
    kind = type(ESTIMATORS[name])
    known = kind.parameters()
    if unknown := sorted(set(parameters or {}) - set(known)):
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"{name} has no parameter {unknown[0]!r}; {has}.")
    values: dict[str, float] = {}
    for parameter_name, value in (parameters or {}).items():
        known[parameter_name].check(f"{name}.{parameter_name}", value)
        values[parameter_name] = int(value) if known[parameter_name].is_whole else float(value)
    return kind(**values)
