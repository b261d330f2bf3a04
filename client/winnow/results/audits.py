"""Answers about audits."""

from datetime import datetime
from typing import Any

from winnow.results.base import FileFormat, Result
from winnow.results.verification import Verification


class ResultFile(Result):
    """The whole ranking as one file."""

    href: str
    bytes: int
    sha256: str


class AuditError(Result):
    """Why an audit or a ranking failed."""

    code: str
    message: str
    field: str | None


class Detection(Result):
    """How well known noise was found.

    `ndr_20` is the share of all known noise among the lowest 20 % of the scores; `auc_ndr` is 1.0
    when all noise stands first, and about 0.5 by chance.
    """

    ndr_10: float
    ndr_20: float
    ndr_30: float
    auc_ndr: float


class LayerResult(Result):
    """One configuration: an estimator on a layer group with an aggregation."""

    layer_group: str
    estimator: str
    aggregation: str | None
    correct_only: bool
    detection: Detection | None


class Cancellation(Result):
    """How much the training gradients of a layer group cancel out: 1 means not at all."""

    l1: float | None
    l2: float | None


class ProjectionReport(Result):
    """How well projected scores agree with exact ones, on a sample of pairs."""

    dimension: int
    spearman: float | None
    num_pairs: int
    by_group: dict[str, float | None]


class ChosenConfiguration(Result):
    """A configuration, and how well it finds the planted probes; its weight in a consensus."""

    estimator: str
    layers: str
    aggregation: str
    correct_only: bool
    vote_fraction: float
    trim_fraction: float
    common_share: float
    weight: float | None = None
    auc_ndr: float | None


class Choice(Result):
    """What auto or consensus chose by planted probes, and why; `works`: better than chance."""

    num_probes: int
    num_samples: int
    chance: float
    works: bool
    members: list[ChosenConfiguration]
    configurations: list[ChosenConfiguration]


class NoiseEstimate(Result):
    """How much of the training set seems to be wrong, from 0 to 1, with an interval."""

    share: float
    low: float
    high: float
    confidence: float


class AuditResults(Result):
    """What a finished audit found.

    A causal language model has no labels; its accuracies are the mean shares of completion tokens
    that it predicts right. `projection` is there when gradients were projected.
    """

    ranking_id: str
    num_flagged: int
    labels: list[str]
    validation_accuracy: float | None
    train_accuracy: float | None
    num_noisy: int | None
    detection: Detection | None
    num_non_finite: int | None = None
    num_non_finite_validation: int | None = None
    num_compared: int | None = None
    choice: Choice | None = None
    noise: NoiseEstimate | None = None
    cancellation: dict[str, Cancellation] | None = None
    projection: ProjectionReport | None = None
    preflight: dict[str, Any] | None = None
    verification: Verification | None = None
    files: dict[FileFormat, ResultFile]
    warnings: list[str]
    score_order: str


class Kept(Result):
    """What of a finished audit is still there: influence files go at `until`, results stay."""

    influence_bytes: int | None
    results_bytes: int
    until: datetime | None


class AuditEstimate(Result):
    """What an audit takes at most, in bytes, told when it is prepared.

    `memory_bytes` is of a worker that computes on its CPU, `gpu_bytes` what of it lies on a GPU
    where it computes on one, `stages` the memory stage by stage, and `least_bytes` what a stage's
    device must have.
    """

    memory_bytes: int
    gpu_bytes: int
    disk_bytes: int
    stages: dict[str, int]
    least_bytes: dict[str, int]
    activation_checkpointing: bool


class Audit(Result):
    """An audit and where it stands.

    `state` is queued, preparing, fine_tuning, computing, aggregating, verifying, succeeded, failed
    or cancelled; `done` is true for the last three. `waiting` is "storage" while the server's disk
    is full: the audit goes on by itself when there is room. `results` is there when it succeeded,
    `error` when it failed.
    """

    id: str
    state: str
    done: bool
    stage: str | None
    progress: float
    waiting: str | None = None
    samples_per_second: float | None
    eta_seconds: float | None
    created_at: datetime
    finished_at: datetime | None
    state_times: dict[str, datetime]
    cancel_requested_at: datetime | None
    request: dict[str, Any]
    metadata: dict[str, str]
    experiment_id: str | None = None
    decision_version: int = 0
    num_decided: int = 0
    num_train: int | None
    num_validation: int | None
    provenance: dict[str, Any]
    estimate: AuditEstimate | None = None
    timings: dict[str, float]
    results: AuditResults | None
    kept: Kept | None = None
    error: AuditError | None
    links: dict[str, str]
