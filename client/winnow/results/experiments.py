"""Answers about experiments."""

from datetime import datetime
from typing import Any

from winnow.results.audits import AuditError
from winnow.results.base import Result


class ExperimentAudit(Result):
    """One audit of an experiment."""

    id: str
    task: str
    seed: int
    state: str
    progress: float
    error: AuditError | None
    href: str


class Experiment(Result):
    """An experiment and where it stands.

    `state` is running until every audit has ended, then succeeded, failed or cancelled.
    """

    id: str
    state: str
    done: bool
    progress: float
    created_at: datetime
    finished_at: datetime | None
    cancel_requested_at: datetime | None
    request: dict[str, Any]
    metadata: dict[str, str]
    num_audits: int
    num_ended: int
    audits: list[ExperimentAudit]
    links: dict[str, str]


class ResultRow(Result):
    """One configuration, or baseline, in one audit.

    The last four measure the model without what the configuration put lowest, on the test set.
    """

    task: str
    model: str
    seed: int
    estimator: str
    layer_group: str | None
    layer_position: str | None
    aggregation: str | None
    correct_only: bool
    ndr_10: float | None
    ndr_20: float | None
    ndr_30: float | None
    auc_ndr: float | None
    cancellation_l1: float | None
    cancellation_l2: float | None
    num_train: int | None
    accuracy: float | None
    macro_f1: float | None
    exact_match: float | None
    loss: float | None


class Level(Result):
    """How often one level of a factor beats the others; a tie counts half."""

    level: str
    win_rate: float
    num_comparisons: int


class WinRates(Result):
    """The win rates of a factor's levels by one measure, of a model or of all (None)."""

    factor: str
    measure: str
    model: str | None
    levels: list[Level]


class CellCorrelation(Result):
    """Spearman's rank correlation in one audit."""

    task: str
    seed: int
    spearman: float | None
    num_points: int


class Correlation(Result):
    """How well detection, or cancellation, predicts what the filtered models are worth."""

    predictor: str
    outcome: str
    over: str
    mean: float | None
    audits: list[CellCorrelation]


class Best(Result):
    """The best configuration of a model (over its tasks: None) or of a task, beside baselines."""

    model: str
    task: str | None
    measure: str
    estimator: str
    layer_group: str
    aggregation: str | None
    correct_only: bool
    means: dict[str, float]
    beside: dict[str, dict[str, float]]


class Missing(Result):
    """An audit that the tables lack, and why."""

    task: str
    seed: int
    audit_id: str
    state: str
    error: AuditError | None


class ExperimentResults(Result):
    """The tables of an experiment: partial where audits have failed or were cancelled."""

    experiment_id: str
    is_partial: bool
    missing: list[Missing]
    win_rates: list[WinRates]
    correlations: list[Correlation]
    best: list[Best]
    rows: list[ResultRow]
