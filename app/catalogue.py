"""What this server can compute: the estimators and aggregations, described without torch.

The engine's registries (`workers.influence`) hold the code under the same names; a test keeps the
two in step.
"""

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.catalogue_texts import AGGREGATION_TEXTS, ESTIMATOR_TEXTS, Text

Need = Literal[
    "validation",
    "known_noise",
    "curvature",
    "checkpoints",
    "word_embeddings",
    "hidden_states",
    "classes",
    "features",
]
Task = Literal["classification", "causal_lm"]
Auto = Literal["auto"]
Consensus = Literal["consensus"]
AUTO: Auto = "auto"
CONSENSUS: Consensus = "consensus"


class EstimatorName(StrEnum):
    """How influence is estimated."""

    GRAD_DOT = "grad_dot"
    GRAD_COSINE = "grad_cosine"
    GRAD_COVARIANCE = "grad_covariance"
    DATAINF = "datainf"
    DATAINF_SELF = "datainf_self"
    LISSA = "lissa"
    GAUSS_NEWTON = "gauss_newton"
    EKFAC = "ekfac"
    TRACIN = "tracin"
    TRACIN_WE = "tracin_we"
    TRACIN_WE_TOPK = "tracin_we_topk"
    OUTLIER_GRADIENT = "outlier_gradient"
    REPSIM = "repsim"
    SELF_INFLUENCE = "self_influence"
    LOSS = "loss"
    CONFIDENCE = "confidence"
    RANDOM = "random"
    ORACLE = "oracle"


class AggregationName(StrEnum):
    """How influence over layers and validation samples becomes one score."""

    MEAN = "mean"
    RANK = "rank"
    VOTE = "vote"
    TRIMMED_MEAN = "trimmed_mean"
    MEDIAN = "median"
    MIN = "min"
    COMMON_SET = "common_set"


class Parameter(BaseModel):
    """A number that a request may set, between `minimum` and `maximum`."""

    model_config = ConfigDict(frozen=True)

    name: str
    minimum: float = Field(description="The least that is allowed.")
    maximum: float = Field(description="The most that is allowed.")
    default: float
    is_whole: bool = Field(False, description="Whether it must be a whole number.")
    description: str


class Estimator(BaseModel):
    """One estimator that this server offers."""

    model_config = ConfigDict(frozen=True)

    name: EstimatorName
    kind: Literal["pairwise", "class", "sample", "baseline"] = Field(
        description="pairwise: an influence for every pair of a training and a validation sample; "
        "class: one for every pair of a training sample and a class; sample: one number per "
        "training sample and layer; baseline: one number per sample."
    )
    formula: str
    description: str = Field(description="What it does, and when to use it.")
    parameters: list[Parameter] = Field(
        [], description="What estimator_parameters of an audit may set."
    )
    cost: float = Field(
        description="Time of the gradient and influence stages with this estimator alone, relative "
        "to grad_dot; tracin's is for each checkpoint."
    )
    cost_class: Literal["free", "dot", "second pass", "checkpoints"] = Field(
        description="free: comes with any audit; dot: from the pass over the training set that "
        "every audit makes; second pass: sums over all training gradients first; checkpoints: a "
        "pass over both sets for every checkpoint."
    )
    needs: list[Need] = Field(
        description="What the audit must have: a validation set, known_noise (a noise column or "
        "plant_noise), checkpoints (two or more), classes; and what the service works out for it: "
        "curvature, word_embeddings, hidden_states, features."
    )
    has_layers: bool = Field(description="Whether it has a value for every layer.")
    tasks: list[Task] = Field(description="The tasks that it works for.")


class Aggregation(BaseModel):
    """One aggregation that this server offers."""

    model_config = ConfigDict(frozen=True)

    name: AggregationName
    formula: str
    description: str = Field(description="What it does, and when to use it.")
    parameters: list[Parameter] = Field([], description="What the ranking of an audit may set.")


_TASKS: list[Task] = ["classification", "causal_lm"]
_DAMPING = Parameter(
    name="damping",
    minimum=1e-4,
    maximum=100.0,
    default=0.1,
    description="λ as a share of the mean eigenvalue of a module's curvature. More of it comes "
    "nearer to grad_dot.",
)


def _estimator(
    name: EstimatorName,
    *needs: Need,
    kind: Literal["pairwise", "class", "sample", "baseline"] = "pairwise",
    cost_class: Literal["free", "dot", "second pass", "checkpoints"] = "dot",
    cost: float = 1.0,
    parameters: tuple[Parameter, ...] = (),
) -> Estimator:
    text: Text = ESTIMATOR_TEXTS[name]
    return Estimator(
        name=name,
        kind=kind,
        formula=text.formula,
        description=text.description,
        parameters=list(parameters),
        cost=cost,
        cost_class=cost_class,
        needs=list(needs),
        has_layers=kind != "baseline",
        tasks=["classification"] if "classes" in needs else _TASKS,
    )


def _aggregation(name: AggregationName, *parameters: Parameter) -> Aggregation:
    text = AGGREGATION_TEXTS[name]
    return Aggregation(
        name=name,
        formula=text.formula,
        description=text.description,
        parameters=list(parameters),
    )


ESTIMATORS: dict[str, Estimator] = {
    estimator.name: estimator
    for estimator in (
        _estimator(EstimatorName.GRAD_DOT, "validation"),
        _estimator(EstimatorName.GRAD_COSINE, "validation"),
        _estimator(EstimatorName.GRAD_COVARIANCE, "validation"),
        _estimator(
            EstimatorName.DATAINF,
            *("validation", "curvature"),
            cost_class="second pass",
            cost=1.2,
            parameters=(_DAMPING,),
        ),
        _estimator(EstimatorName.DATAINF_SELF, "validation"),
        _estimator(
            EstimatorName.LISSA,
            *("validation", "curvature"),
            cost_class="second pass",
            cost=1.4,
            parameters=(
                _DAMPING,
                Parameter(
                    name="steps",
                    minimum=1,
                    maximum=10_000,
                    default=10,
                    is_whole=True,
                    description="Steps of the series; with more it comes nearer to gauss_newton.",
                ),
            ),
        ),
        _estimator(
            EstimatorName.GAUSS_NEWTON,
            *("validation", "curvature"),
            cost_class="second pass",
            cost=1.2,
            parameters=(_DAMPING,),
        ),
        _estimator(
            EstimatorName.EKFAC,
            *("validation", "curvature"),
            cost_class="second pass",
            cost=1.2,
            parameters=(_DAMPING,),
        ),
        _estimator(EstimatorName.TRACIN, "validation", "checkpoints", cost_class="checkpoints"),
        _estimator(EstimatorName.TRACIN_WE, "validation", "word_embeddings", cost=1.1),
        _estimator(
            EstimatorName.TRACIN_WE_TOPK,
            *("validation", "word_embeddings"),
            cost=1.1,
            parameters=(
                Parameter(
                    name="num_tokens",
                    minimum=1,
                    maximum=1000,
                    default=10,
                    is_whole=True,
                    description="How many tokens of each text count.",
                ),
            ),
        ),
        _estimator(
            EstimatorName.OUTLIER_GRADIENT,
            *("validation", "classes"),
            kind="class",
            cost=1.1,
            parameters=(
                Parameter(
                    name="nu",
                    minimum=0.01,
                    maximum=1.0,
                    default=0.5,
                    description="The share of a class's validation samples that may lie outside.",
                ),
            ),
        ),
        _estimator(EstimatorName.REPSIM, "validation", "hidden_states"),
        _estimator(EstimatorName.SELF_INFLUENCE, kind="sample"),
        _estimator(EstimatorName.LOSS, kind="baseline", cost_class="free"),
        _estimator(
            EstimatorName.CONFIDENCE,
            *("validation", "classes", "features"),
            kind="baseline",
            cost_class="free",
        ),
        _estimator(EstimatorName.RANDOM, kind="baseline", cost_class="free"),
        _estimator(EstimatorName.ORACLE, "known_noise", kind="baseline", cost_class="free"),
    )
}

AGGREGATIONS: dict[str, Aggregation] = {
    aggregation.name: aggregation
    for aggregation in (
        _aggregation(AggregationName.MEAN),
        _aggregation(AggregationName.RANK),
        _aggregation(
            AggregationName.VOTE,
            Parameter(
                name="vote_fraction",
                minimum=0.0,
                maximum=1.0,
                default=0.3,
                description="k as a share of the training samples, above 0; 10–20 % for many "
                "classes, 30–50 % for two.",
            ),
        ),
        _aggregation(
            AggregationName.TRIMMED_MEAN,
            Parameter(
                name="trim_fraction",
                minimum=0.0,
                maximum=0.5,
                default=0.1,
                description="The share of the columns that is cut off at each end, below 0.5.",
            ),
        ),
        _aggregation(AggregationName.MEDIAN),
        _aggregation(AggregationName.MIN),
        _aggregation(
            AggregationName.COMMON_SET,
            Parameter(
                name="common_share",
                minimum=0.0,
                maximum=1.0,
                default=0.5,
                description="The share of the columns that must have listed a sample, above 0.",
            ),
        ),
    )
}
