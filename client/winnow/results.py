"""What the service answers, typed. Fields that a newer service adds are ignored."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FileFormat = Literal["parquet", "csv", "jsonl"]


class Result(BaseModel):
    """Base of the answers."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Dataset(Result):
    """An uploaded, checked table; pass `reference` to an audit."""

    id: str
    reference: str
    name: str
    format: FileFormat
    columns: dict[str, str | None]
    num_rows: int
    num_bytes: int
    sha256: str
    summary: dict[str, Any]
    created_at: datetime
    links: dict[str, str]


class AuditError(Result):
    """Why an audit failed."""

    code: str
    message: str
    field: str | None


class ResultFile(Result):
    """The whole ranking as one file."""

    href: str
    bytes: int
    sha256: str


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


class AuditResults(Result):
    """What a finished audit found."""

    ranking_id: str
    num_flagged: int
    labels: list[str]
    validation_accuracy: float
    train_accuracy: float
    num_noisy: int | None
    detection: Detection | None
    files: dict[FileFormat, ResultFile]
    warnings: list[str]
    score_order: str


class Audit(Result):
    """An audit and where it stands.

    `state` is queued, preparing, fine_tuning, computing, aggregating, succeeded, failed or
    cancelled; `done` is true for the last three. `results` is there when it succeeded, `error`
    when it failed.
    """

    id: str
    state: str
    done: bool
    stage: str | None
    progress: float
    samples_per_second: float | None
    eta_seconds: float | None
    created_at: datetime
    finished_at: datetime | None
    state_times: dict[str, datetime]
    cancel_requested_at: datetime | None
    request: dict[str, Any]
    metadata: dict[str, str]
    num_train: int | None
    num_validation: int | None
    provenance: dict[str, Any]
    timings: dict[str, float]
    results: AuditResults | None
    error: AuditError | None
    links: dict[str, str]


class Suspect(Result):
    """One training sample at its place in the ranking; rank 0 is the most suspect.

    `index` is its row in the training file, from 0.
    """

    rank: int
    index: int
    text: str
    text_pair: str | None
    given_label: str
    predicted_label: str
    predicted_probability: float
    given_probability: float
    loss: float
    score: float
    flagged: bool
    is_noisy: bool | None


class SuspectPage(Result):
    """A page of the ranking."""

    data: list[Suspect]
    next_cursor: str | None


class GroupStanding(Result):
    """A sample's score and rank by one layer group alone."""

    layer_group: str
    score: float
    rank: int


class RelatedSample(Result):
    """A validation sample, and what the training sample does to it: negative influence harms."""

    index: int
    text: str
    text_pair: str | None
    given_label: str
    predicted_label: str
    influence: float


class SampleDetail(Suspect):
    """One training sample with the evidence."""

    layer_groups: list[GroupStanding]
    harms_most: list[RelatedSample]
    helps_most: list[RelatedSample]
    ranking_id: str
    score_order: str


class LayerTable(Result):
    """Every computed configuration."""

    layer_groups: dict[str, list[str]]
    data: list[LayerResult]
    score_order: str


class Estimator(Result):
    """One estimator that the service offers."""

    name: str
    kind: str
    formula: str
    description: str
    has_layers: bool
    needs_curvature: bool
    needs_known_noise: bool
    cost: float


class AggregationParameter(Result):
    """A parameter of an aggregation."""

    name: str
    minimum: float
    maximum: float
    default: float
    description: str


class Aggregation(Result):
    """One aggregation that the service offers."""

    name: str
    formula: str
    description: str
    parameters: list[AggregationParameter]
