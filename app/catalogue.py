"""What this server can compute: the estimators and aggregations, described without torch.

The engine's registries (`workers.influence`) hold the code under the same names; a test keeps the
two in step.
"""

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EstimatorName(StrEnum):
    """How influence is estimated."""

    GRAD_DOT = "grad_dot"
    GRAD_COSINE = "grad_cosine"
    DATAINF = "datainf"
    SELF_INFLUENCE = "self_influence"
    LOSS = "loss"
    RANDOM = "random"
    ORACLE = "oracle"


class AggregationName(StrEnum):
    """How influence over layers and validation samples becomes one score."""

    MEAN = "mean"
    RANK = "rank"
    VOTE = "vote"


class Estimator(BaseModel):
    """One estimator that this server offers."""

    model_config = ConfigDict(frozen=True)

    name: EstimatorName
    kind: Literal["pairwise", "sample", "baseline"] = Field(
        description="pairwise: an influence for every pair of a training and a validation sample; "
        "sample: one number per training sample and layer; baseline: one number per sample."
    )
    formula: str
    description: str
    has_layers: bool = Field(description="Whether it has a value for every layer.")
    needs_curvature: bool = Field(
        description="Whether it needs further passes over the training gradients."
    )
    needs_known_noise: bool = False
    cost: float = Field(
        description="Time of the gradient and influence stages, relative to grad_dot alone."
    )


class AggregationParameter(BaseModel):
    """A parameter of an aggregation."""

    model_config = ConfigDict(frozen=True)

    name: str
    minimum: float
    maximum: float
    default: float
    description: str


class Aggregation(BaseModel):
    """One aggregation that this server offers."""

    model_config = ConfigDict(frozen=True)

    name: AggregationName
    formula: str
    description: str
    parameters: list[AggregationParameter] = []


ESTIMATORS: dict[str, Estimator] = {
    estimator.name: estimator
    for estimator in (
        Estimator(
            name=EstimatorName.GRAD_DOT,
            kind="pairwise",
            formula="v_j · g_i",
            description="TracIn at one checkpoint: fast, but a few large gradients decide; "
            "combine it with vote.",
            has_layers=True,
            needs_curvature=False,
            cost=1.0,
        ),
        Estimator(
            name=EstimatorName.GRAD_COSINE,
            kind="pairwise",
            formula="v_j · g_i / (‖v_j‖ ‖g_i‖)",
            description="The dot product without the lengths of the gradients: a robust default "
            "with rank.",
            has_layers=True,
            needs_curvature=False,
            cost=1.0,
        ),
        Estimator(
            name=EstimatorName.DATAINF,
            kind="pairwise",
            formula="(1/λ) [v_j·g_i − (1/n) Σ_k (v_j·g_k)(g_k·g_i) / (λ + ‖g_k‖²)], "
            "λ = mean ‖g_k‖² / (10 d)",
            description="A closed-form inverse Hessian for adapters (Kwon et al. 2024): often the "
            "best on language models, with rank or vote.",
            has_layers=True,
            needs_curvature=True,
            cost=1.2,
        ),
        Estimator(
            name=EstimatorName.SELF_INFLUENCE,
            kind="sample",
            formula="−‖g_i‖²",
            description="How hard a sample pulls on the model; tells outliers without looking at "
            "the validation set.",
            has_layers=True,
            needs_curvature=False,
            cost=1.0,
        ),
        Estimator(
            name=EstimatorName.LOSS,
            kind="baseline",
            formula="−loss(x_i)",
            description="The plain loss at the checkpoint: the baseline that influence must beat.",
            has_layers=False,
            needs_curvature=False,
            cost=1.0,
        ),
        Estimator(
            name=EstimatorName.RANDOM,
            kind="baseline",
            formula="a seeded draw",
            description="Chance, to compare with.",
            has_layers=False,
            needs_curvature=False,
            cost=1.0,
        ),
        Estimator(
            name=EstimatorName.ORACLE,
            kind="baseline",
            formula="known noise first",
            description="The best that is possible, where the noise is known.",
            has_layers=False,
            needs_curvature=False,
            needs_known_noise=True,
            cost=1.0,
        ),
    )
}

AGGREGATIONS: dict[str, Aggregation] = {
    aggregation.name: aggregation
    for aggregation in (
        Aggregation(
            name=AggregationName.MEAN,
            formula="mean of I[l, j, i] over modules l and validation samples j",
            description="The classic; a few modules or validation samples with large gradients "
            "can decide it.",
        ),
        Aggregation(
            name=AggregationName.RANK,
            formula="mean over (l, j) of the rank of i among all training samples, 0 = lowest",
            description="Every module and validation sample has the same weight: the default.",
        ),
        Aggregation(
            name=AggregationName.VOTE,
            formula="−Σ over (l, j) of max(k − rank, 0)",
            description="Only the k lowest of every column vote; makes the choice of layers "
            "nearly harmless for grad_dot and datainf.",
            parameters=[
                AggregationParameter(
                    name="vote_fraction",
                    minimum=0.0,
                    maximum=1.0,
                    default=0.3,
                    description="k as a share of the training samples, above 0; "
                    "10–20 % for many classes, 30–50 % for two.",
                )
            ],
        ),
    )
}
