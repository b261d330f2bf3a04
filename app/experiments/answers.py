"""What experiments look like over HTTP: the answers."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.audits.answers import AuditError
from app.audits.models import AuditState
from app.experiments.models import ExperimentState

MEASURES = (
    "auc_ndr and ndr_30: how well planted or known noise is found. accuracy and negative_loss: of "
    "the model that was fine-tuned again without the lowest-scored samples, on the test set. "
    "Higher is better."
)

Factor = Literal["estimator", "layer_group", "aggregation", "correct_only", "configuration"]
Predictor = Literal["ndr_30", "auc_ndr", "cancellation_l1", "cancellation_l2"]
Outcome = Literal["accuracy", "negative_loss"]
Over = Literal["configurations", "layer_groups"]


class ExperimentAudit(BaseModel):
    """One audit of an experiment."""

    id: str
    task: str
    seed: int
    state: AuditState
    progress: float
    error: AuditError | None
    href: str


class Experiment(BaseModel):
    """An experiment and where it stands."""

    id: str
    state: ExperimentState = Field(
        description="running until every audit has ended; then cancelled if one was, else failed "
        "if one has, else succeeded."
    )
    done: bool
    progress: float = Field(ge=0, le=1, description="Mean over the audits.")
    created_at: datetime
    finished_at: datetime | None = Field(description="When the last audit ended.")
    cancel_requested_at: datetime | None
    request: dict[str, Any] = Field(description="As accepted, defaults filled in.")
    metadata: dict[str, str]
    num_audits: int
    num_ended: int
    audits: list[ExperimentAudit] = Field(description="By task, then by seed.")
    links: dict[str, str]


class ResultRow(BaseModel):
    """One configuration, or baseline, in one audit."""

    task: str
    model: str
    seed: int
    estimator: str = Field(description="Or loss, random, oracle, or full: nothing removed.")
    layer_group: str | None = Field(description="None for a baseline.")
    layer_position: str | None = Field(
        description="The group's place in the model: band 2 of 4 for a band of blocks."
    )
    aggregation: str | None
    correct_only: bool
    ndr_10: float | None
    ndr_20: float | None
    ndr_30: float | None
    auc_ndr: float | None
    cancellation_l1: float | None = Field(description="Of the layer group.")
    cancellation_l2: float | None
    num_train: int | None = Field(description="Samples that were kept and trained on.")
    accuracy: float | None = Field(description="On the test set, as all that follow.")
    macro_f1: float | None
    exact_match: float | None
    loss: float | None


class Level(BaseModel):
    """How often one level of a factor beats the others."""

    level: str
    win_rate: float = Field(description="Share of the comparisons; a tie counts half.")
    num_comparisons: int


class WinRates(BaseModel):
    """The win rates of a factor's levels.

    Two configurations are compared when they belong to the same task and seed and agree in all
    other factors.
    """

    factor: Factor
    measure: str = Field(description=MEASURES)
    model: str | None = Field(description="None: over all models.")
    levels: list[Level] = Field(
        description="The highest first. Over models whose layer groups differ, layer_group is the "
        "place in the model."
    )


class CellCorrelation(BaseModel):
    """Spearman's rank correlation in one audit."""

    task: str
    seed: int
    spearman: float | None = Field(
        description="None where one of the measures does not vary, or of fewer than 3 points."
    )
    num_points: int


class Correlation(BaseModel):
    """Whether a measure without a second training predicts what the filtered models are worth."""

    predictor: Predictor
    outcome: Outcome
    over: Over = Field(
        description="What the points are; a layer group's is the mean over the configurations that "
        "use it, the group all left out."
    )
    mean: float | None = Field(description="Over the audits that have one.")
    audits: list[CellCorrelation]


class Best(BaseModel):
    """The best configuration of a model or of a task, in hindsight, beside the baselines."""

    model: str
    task: str | None = Field(description="None: over all tasks of the model.")
    measure: str = Field(description="By which it is the best, as a mean over tasks and seeds.")
    estimator: str
    layer_group: str
    aggregation: str | None
    correct_only: bool
    means: dict[str, float] = Field(description="Of the measures.")
    beside: dict[str, dict[str, float]] = Field(
        description="The means of loss, random, oracle and full."
    )


class Missing(BaseModel):
    """An audit that the tables lack."""

    task: str
    seed: int
    audit_id: str
    state: AuditState
    error: AuditError | None


class ExperimentResults(BaseModel):
    """The tables of an experiment whose audits have ended."""

    experiment_id: str
    is_partial: bool = Field(
        description="Whether audits are missing that failed or were cancelled."
    )
    missing: list[Missing]
    win_rates: list[WinRates]
    correlations: list[Correlation]
    best: list[Best]
    rows: list[ResultRow]
