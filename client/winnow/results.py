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
    """Why an audit or a ranking failed."""

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


class SeedValues(Result):
    """A measure on the test set: its mean, and the value of every seed."""

    mean: float | None
    values: list[float | None]


class AgainstFull(Result):
    """How much higher an arm's measure is than that of the full training set.

    `low` and `high` are what other seeds would say on the same data, `sample_low` and `sample_high`
    what another test set would say of the same models.
    """

    difference: float
    low: float | None
    high: float | None
    num_seeds: int
    sample_low: float | None
    sample_high: float | None


class VerificationArm(Result):
    """What fine-tuning again on one arm's samples gave."""

    name: str
    ranking: dict[str, Any] | None
    num_train: int
    num_removed: int
    num_relabelled: int
    metrics: dict[str, SeedValues]
    against_full: dict[str, AgainstFull | None] | None


class Verification(Result):
    """What fine-tuning again without the suspects changes on the test set."""

    fraction: float
    seeds: list[int]
    confidence: float
    num_test: int
    arms: list[VerificationArm]
    warnings: list[str]


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


class Audit(Result):
    """An audit and where it stands.

    `state` is queued, preparing, fine_tuning, computing, aggregating, verifying, succeeded, failed
    or cancelled; `done` is true for the last three. `results` is there when it succeeded, `error`
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
    experiment_id: str | None = None
    num_train: int | None
    num_validation: int | None
    provenance: dict[str, Any]
    timings: dict[str, float]
    results: AuditResults | None
    kept: Kept | None = None
    error: AuditError | None
    links: dict[str, str]


class RankingResults(Result):
    """What a ranking found."""

    num_flagged: int
    detection: Detection | None
    choice: Choice | None = None
    noise: NoiseEstimate | None = None
    files: dict[FileFormat, ResultFile]
    warnings: list[str]
    score_order: str


class Ranking(Result):
    """One ranking of an audit and where it stands.

    `state` is queued, running, succeeded or failed; `done` is true for the last two. `results` is
    there when it succeeded, `error` when it failed. `is_own` is true for the one that the audit was
    submitted with.
    """

    id: str
    audit_id: str
    is_own: bool
    state: str
    done: bool
    progress: float
    created_at: datetime
    finished_at: datetime | None
    seconds: float | None
    request: dict[str, Any]
    results: RankingResults | None
    error: AuditError | None
    links: dict[str, str]


class RankingPage(Result):
    """A page of an audit's rankings."""

    data: list[Ranking]
    next_cursor: str | None


class Suspect(Result):
    """One training sample at its place in the ranking; rank 0 is the most suspect.

    `index` is its row in the training file, from 0. Of a causal language model `text` is the
    prompt and `text_pair` the completion, and there are no labels.
    """

    rank: int
    index: int
    text: str
    text_pair: str | None
    given_label: str | None
    predicted_label: str | None
    predicted_probability: float
    given_probability: float
    loss: float
    score: float
    flagged: bool
    noise_probability: float | None = None
    suggested_label: str | None = None
    suggested_probability: float | None = None
    is_noisy: bool | None
    non_finite: bool = False


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
    given_label: str | None
    predicted_label: str | None
    influence: float


class AlikeSample(Result):
    """Another training sample, and how its gradient lies to that of the sample.

    `similarity` is the cosine of the two gradients: 1 for samples that do the same to the model,
    -1 for the opposite, as a near-duplicate with another label does.
    """

    index: int
    text: str
    text_pair: str | None
    given_label: str | None
    predicted_label: str | None
    similarity: float
    has_other_label: bool | None


class ClassProbability(Result):
    """How likely a class is by the model, and by a simple one that has not seen the sample."""

    label: str
    probability: float
    out_of_sample: float | None


class SampleDetail(Suspect):
    """One training sample with the evidence.

    `most_alike` and `most_opposed` are None where the service did not look for them: beyond 20,000
    training samples only the most suspect are compared.
    """

    layer_groups: list[GroupStanding]
    harms_most: list[RelatedSample]
    helps_most: list[RelatedSample]
    most_alike: list[AlikeSample] | None = None
    most_opposed: list[AlikeSample] | None = None
    class_probabilities: list[ClassProbability] | None = None
    ranking_id: str
    score_order: str


class LayerTable(Result):
    """Every computed configuration, and how much each module's training gradients cancel out."""

    layer_groups: dict[str, list[str]]
    module_cancellation: dict[str, Cancellation] | None = None
    data: list[LayerResult]
    score_order: str


class Parameter(Result):
    """A number that a request may set, between `minimum` and `maximum`."""

    name: str
    minimum: float
    maximum: float
    default: float
    is_whole: bool
    description: str


class Estimator(Result):
    """One estimator that the service offers: what it does, when to use it, what it needs.

    `cost` is its time relative to that of grad_dot; `needs` and `tasks` say which audits it is for.
    """

    name: str
    kind: str
    formula: str
    description: str
    parameters: list[Parameter]
    cost: float
    cost_class: str
    needs: list[str]
    has_layers: bool
    tasks: list[str]


class Aggregation(Result):
    """One aggregation that the service offers."""

    name: str
    formula: str
    description: str
    parameters: list[Parameter]


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


class ExperimentPage(Result):
    """A page of experiments."""

    data: list[Experiment]
    next_cursor: str | None


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
