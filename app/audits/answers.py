"""What audits look like over HTTP: the answers."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.audits.models import AuditState, RankingState
from app.audits.verification_answers import Verification
from app.decisions.answers import SampleDecision
from app.pagination import Page
from app.work.models import Stage

SCORE_ORDER = (
    "ascending: the lowest score is the most suspect; positive influence is helpful, negative "
    "is harmful"
)
FileFormat = Literal["parquet", "csv", "jsonl"]
Waiting = Literal["storage"] | None
WaitingField = Field(
    None,
    description="What the work waits for, without which it cannot go on: storage, room in the "
    "server's data directory. It goes on by itself.",
)
ScoreOrder = Field(SCORE_ORDER, description="Which end of the scores is suspect.")


class AuditError(BaseModel):
    """Why an audit or a ranking failed."""

    code: str = Field(description="A stable code; docs/errors.md lists them.")
    message: str = Field(description="What happened and what to change.")
    field: str | None = Field(description="The field of the request that it is about.")


class ResultFile(BaseModel):
    """The whole ranking as one file."""

    href: str
    bytes: int
    sha256: str = Field(description="Also the file's ETag.")


class Detection(BaseModel):
    """How well known noise was found; None of it without known noise."""

    ndr_10: float = Field(description="Share of the noisy samples in the lowest 10 % of scores.")
    ndr_20: float
    ndr_30: float
    auc_ndr: float = Field(description="1.0: all noise first; about 0.5: random.")


class LayerResult(BaseModel):
    """One configuration: an estimator on a layer group with an aggregation."""

    layer_group: str
    estimator: str
    aggregation: str | None
    correct_only: bool
    detection: Detection | None


class Cancellation(BaseModel):
    """How much the training gradients of a layer group cancel out: 1 means not at all."""

    l1: float | None = Field(
        description="Sum of the gradients' absolute values over the absolute value of their sum."
    )
    l2: float | None = Field(
        description="Sum of the gradients' lengths over the length of their sum."
    )


class ProjectionReport(BaseModel):
    """How well projected scores agree with exact ones, on a sample of pairs."""

    dimension: int = Field(description="Of the inputs and of the output gradients.")
    spearman: float | None = Field(description="Rank correlation over all pairs.")
    num_pairs: int = Field(description="Pairs of a training and a validation sample.")
    by_group: dict[str, float | None] = Field(description="Rank correlation by layer group.")


class ChosenConfiguration(BaseModel):
    """A configuration, and how well it finds the planted probes."""

    estimator: str
    layers: str
    aggregation: str
    correct_only: bool
    vote_fraction: float
    trim_fraction: float
    common_share: float
    weight: float | None = Field(None, description="Of its ranks in a consensus.")
    auc_ndr: float | None = Field(
        description="Of the probes: 1.0 puts all of them first; None where none could be planted."
    )


class Choice(BaseModel):
    """What auto or consensus chose by planted probes, and why."""

    num_probes: int = Field(description="Copies of training samples with wrong targets.")
    num_samples: int = Field(description="Samples that they were ranked among, with them.")
    chance: float = Field(description="The AUC-NDR of a random ranking.")
    works: bool = Field(description="Whether the best configuration is better than chance.")
    members: list[ChosenConfiguration] = Field(
        description="What ranks: one configuration, or the members of the consensus."
    )
    configurations: list[ChosenConfiguration] = Field(description="The best by the probes.")


class NoiseEstimate(BaseModel):
    """How much of the training set seems to be wrong."""

    share: float = Field(description="From 0 to 1.")
    low: float
    high: float
    confidence: float = Field(description="Of the interval from low to high.")


class AuditResults(BaseModel):
    """What a finished audit found."""

    ranking_id: str
    num_flagged: int
    labels: list[str] = Field(description="The classes; none for a causal language model.")
    validation_accuracy: float | None = Field(
        description="For a causal language model: the mean share of completion tokens that it "
        "predicts right. None without a validation set."
    )
    train_accuracy: float | None = Field(
        description="The same against the training labels or completions as given (or planted)."
    )
    num_noisy: int | None = Field(description="Known noisy training samples.")
    detection: Detection | None = Field(description="Of the audit's ranking; needs known noise.")
    num_non_finite: int | None = Field(
        None, description="Training samples whose loss or gradient is not finite."
    )
    num_non_finite_validation: int | None = Field(
        None, description="Validation samples whose loss or gradient is not finite: left out."
    )
    num_compared: int | None = Field(
        None,
        description="Training samples whose influence was computed: with effort fast those with "
        "the highest losses, else all whose loss and gradient are finite.",
    )
    choice: Choice | None = Field(None, description="None where the request left nothing open.")
    noise: NoiseEstimate | None = Field(
        None, description="None where it cannot be told: without classes and without probes."
    )
    cancellation: dict[str, Cancellation] | None = Field(None, description="By layer group.")
    projection: ProjectionReport | None = Field(
        None, description="None where all gradients are exact."
    )
    preflight: dict[str, Any] | None = Field(
        None,
        description="How a few samples' losses and gradients changed in a padded batch, and "
        "modules without any gradient.",
    )
    verification: Verification | None = Field(None, description="None without verify.")
    files: dict[FileFormat, ResultFile]
    warnings: list[str]
    score_order: str = ScoreOrder


class Kept(BaseModel):
    """What of a finished audit is still there, beside its rows."""

    influence_bytes: int | None = Field(
        description="Influence files, which further rankings are made from: measured when the "
        "audit ended, 0 when they are deleted. None: an earlier version did not measure them."
    )
    results_bytes: int = Field(
        description="The audit's own ranking as files; every other ranking tells its own."
    )
    until: datetime | None = Field(
        description="When the influence files are, or were, deleted; results stay. None: they "
        "stay as long as the audit."
    )


class AuditEstimate(BaseModel):
    """What an audit takes at most, told when it is prepared: within a fifth, as measured."""

    memory_bytes: int = Field(description="Of one worker that computes on its CPU.")
    gpu_bytes: int = Field(description="What of it lies on a GPU, where a worker computes on one.")
    disk_bytes: int = Field(description="The audit's files, while it runs.")
    stages: dict[str, int] = Field(description="memory_bytes, stage by stage.")
    least_bytes: dict[str, int] = Field(
        description="What a device must have for a stage with the smallest batches; with less the "
        "audit is refused."
    )
    activation_checkpointing: bool = Field(
        description="Whether the blocks' activations are computed again instead of kept."
    )


class Audit(BaseModel):
    """An audit and where it stands."""

    id: str
    state: AuditState
    done: bool
    stage: Stage | None
    progress: float = Field(ge=0, le=1)
    waiting: Waiting = WaitingField
    samples_per_second: float | None
    eta_seconds: float | None
    created_at: datetime
    finished_at: datetime | None
    state_times: dict[AuditState, datetime] = Field(description="When each state began.")
    cancel_requested_at: datetime | None
    request: dict[str, Any] = Field(description="As accepted, defaults filled in.")
    metadata: dict[str, str]
    experiment_id: str | None = Field(None, description="The experiment that it is part of.")
    decision_version: int = Field(
        description="Counts the batches of decisions and their undos; 0 without decisions."
    )
    num_decided: int = Field(description="Training samples that a decision stands on.")
    num_train: int | None
    num_validation: int | None
    provenance: dict[str, Any] = Field(
        description="What decides the numbers beside the request: engine version, resolved "
        "revisions, device, shards."
    )
    estimate: AuditEstimate | None = Field(
        None,
        description="Once the audit is prepared; None where the model does not let it be told.",
    )
    timings: dict[str, float] = Field(description="Seconds of work per stage, over all workers.")
    results: AuditResults | None
    kept: Kept | None = Field(None, description="Of an audit that succeeded.")
    error: AuditError | None
    links: dict[str, str]


class RankingResults(BaseModel):
    """What a ranking found."""

    num_flagged: int
    detection: Detection | None = Field(description="Needs known noise.")
    choice: Choice | None = Field(None, description="None where the request left nothing open.")
    noise: NoiseEstimate | None = Field(None, description="None where it cannot be told.")
    files: dict[FileFormat, ResultFile]
    warnings: list[str]
    score_order: str = ScoreOrder


class Ranking(BaseModel):
    """One ranking of an audit and where it stands."""

    id: str
    audit_id: str
    is_own: bool = Field(description="Whether it is the one that the audit was submitted with.")
    state: RankingState
    done: bool
    progress: float = Field(ge=0, le=1)
    waiting: Waiting = WaitingField
    created_at: datetime
    finished_at: datetime | None
    seconds: float | None = Field(
        description="That a worker took; the audit's own is in the audit's timings."
    )
    request: dict[str, Any] = Field(description="As accepted, defaults filled in.")
    results: RankingResults | None
    error: AuditError | None
    links: dict[str, str]


class Suspect(BaseModel):
    """One training sample at its place in the ranking."""

    rank: int = Field(description="0 is the most suspect.")
    index: int = Field(description="Row of the training file, from 0.")
    text: str = Field(
        description="For a causal language model: the prompt, or the messages before the last."
    )
    text_pair: str | None = Field(
        description="The second text; for a causal language model the completion."
    )
    given_label: str | None = Field(description="None for a causal language model.")
    predicted_label: str | None = Field(
        description="The model's own label; None for a causal language model."
    )
    predicted_probability: float = Field(
        description="For a causal language model: the share of completion tokens that it predicts "
        "right."
    )
    given_probability: float = Field(
        description="The model's probability of the given label, or of a token of the completion "
        "(geometric mean)."
    )
    loss: float
    score: float
    flagged: bool
    noise_probability: float | None = Field(
        None, description="That the sample is wrong, by its place in this ranking."
    )
    suggested_label: str | None = Field(
        None, description="The most probable label; the given one where that is."
    )
    suggested_probability: float | None = Field(None, description="Of the suggested label.")
    is_noisy: bool | None = Field(description="Known noise, where it is known.")
    non_finite: bool = Field(
        False, description="The loss or gradient is not finite, so influence says nothing of it."
    )
    decision: SampleDecision | None = Field(description="What was decided on it; None: nothing.")


class SuspectPage(Page[Suspect]):
    """A page of the ranking, the most suspect first."""

    ranking_id: str
    score_order: str = ScoreOrder


class GroupStanding(BaseModel):
    """A sample's score and rank by one layer group alone."""

    layer_group: str
    score: float
    rank: int


class RelatedSample(BaseModel):
    """A validation sample, and what the training sample does to it."""

    index: int
    text: str
    text_pair: str | None
    given_label: str | None
    predicted_label: str | None
    influence: float = Field(description="Mean over the ranking's modules; negative harms.")


class AlikeSample(BaseModel):
    """Another training sample, and how its gradient lies to that of the sample."""

    index: int
    text: str
    text_pair: str | None
    given_label: str | None
    predicted_label: str | None
    similarity: float = Field(
        description="Cosine of the two gradients over all modules but the word embeddings, from "
        "sketches, right within some 0.06: 1 for samples that do the same to the model, -1 for "
        "the opposite."
    )
    has_other_label: bool | None = Field(
        description="Whether the given labels differ; None for a causal language model."
    )


class ClassProbability(BaseModel):
    """How likely a class is."""

    label: str
    probability: float = Field(description="By the audited model.")
    out_of_sample: float | None = Field(
        description="By a simple model on the audited one's features, fitted without the sample; "
        "None where the audit did not need one."
    )


class SampleDetail(Suspect):
    """One training sample with the evidence."""

    layer_groups: list[GroupStanding]
    harms_most: list[RelatedSample]
    helps_most: list[RelatedSample]
    most_alike: list[AlikeSample] | None = Field(
        description="The training samples that do most the same to the model: duplicates, first "
        "of all. None where nobody looked: beyond 20,000 training samples only the 10,000 most "
        "suspect of the audit's own ranking are compared."
    )
    most_opposed: list[AlikeSample] | None = Field(
        description="Those that do most the opposite: near-duplicates with other labels, first of "
        "all. None as above."
    )
    class_probabilities: list[ClassProbability] | None = Field(
        description="In the order of results.labels; beyond 100 classes those of the ten most "
        "probable. None for a causal language model, and where the model says nothing finite."
    )
    ranking_id: str
    score_order: str = ScoreOrder


class LayerTable(BaseModel):
    """Every computed configuration."""

    layer_groups: dict[str, list[str]] = Field(description="Group to the modules in it.")
    module_cancellation: dict[str, Cancellation] | None = Field(
        None, description="Of every single module; that of groups and blocks stands in the audit."
    )
    data: list[LayerResult]
    score_order: str = ScoreOrder
