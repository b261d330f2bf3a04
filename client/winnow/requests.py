"""What the service is asked, typed. What is left out is the service's default."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Request(BaseModel):
    """Base of the requests: only what was set is sent, so the defaults are the service's own."""

    model_config = ConfigDict(extra="forbid")

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        return self.model_dump(mode="json", exclude_none=True)


class Columns(Request):
    """Which columns of a dataset hold what.

    Text and label for a classifier (with text_pair for pairs), prompt and completion or messages
    for a causal language model. Without any the service tells by the usual names.
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    noise: str | None = None


class Projection(Request):
    """A two-sided random projection of the gradients of large modules."""

    dimension: int | None = None
    seed: int | None = None


class Checkpoint(Request):
    """An adapter at one point of its training."""

    adapter: str
    learning_rate: float


class ModelSource(Request):
    """The model: file:///folder or hf://owner/name@revision, with an adapter where there is one."""

    reference: str
    adapter: str | None = None
    target_modules: list[str] | None = None
    projection: Projection | None = None
    word_embeddings: bool | None = None
    activation_checkpointing: bool | str | None = None
    quantization: str | None = None
    checkpoints: list[Checkpoint] | None = None


class DatasetSource(Request):
    """A table of labelled texts, or of prompts with completions.

    The reference is upload:<id>, file:///path or
    hf://datasets/owner/name@revision?config=…&split=….
    """

    reference: str
    columns: Columns | None = None


class FineTune(Request):
    """LoRA fine-tuning of the base model on the training set, before the audit."""

    method: str | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: list[str] | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    warmup_fraction: float | None = None
    batch_size: int | None = None
    seed: int | None = None


class PlantNoise(Request):
    """Wrong labels or completions that the service plants itself, to measure the detection."""

    fraction: float | None = None
    seed: int | None = None


class Probes(Request):
    """Copies of training samples with wrong targets, by which auto chooses and measures."""

    fraction: float | None = None
    seed: int | None = None


class Configuration(Request):
    """One way to rank: an estimator on some layers with an aggregation; nothing is auto."""

    estimator: str | None = None
    layers: str | None = None
    aggregation: str | None = None
    vote_fraction: float | None = None
    trim_fraction: float | None = None
    common_share: float | None = None
    correct_only: bool | None = None


class RankingSpecification(Request):
    """Which influence makes the ranking; estimator, layers and aggregation may be auto."""

    estimator: str | None = None
    layers: str | None = None
    aggregation: str | None = None
    vote_fraction: float | None = None
    trim_fraction: float | None = None
    common_share: float | None = None
    correct_only: bool | None = None


class Flag(Request):
    """How many of the lowest-scored samples are flagged; exactly one of the two."""

    fraction: float | None = None
    count: int | None = None


class RankingRequest(RankingSpecification):
    """Another ranking of a finished audit, from the influence that it computed.

    The audit's own `flag` holds when none is given here.
    """

    flag: Flag | Literal["auto"] | None = None


class Configurations(Request):
    """Every configuration of the audit's table, each an arm of its own; or some of them."""

    correct_only: list[bool] | None = None
    estimators: list[str] | None = None
    aggregations: list[str] | None = None


class Verify(Request):
    """Fine-tune again without the lowest-scored samples, and measure on the test set.

    `arms` are of filtered, relabelled, full, random and oracle; each of `rankings` is one more, and
    so is every one of the `configurations`.
    """

    fraction: float | None = None
    seeds: list[int] | None = None
    arms: list[str] | None = None
    rankings: list[Configuration] | None = None
    configurations: Configurations | None = None
    confidence: float | None = None


class AuditRequest(Request):
    """Everything that decides an audit; README.md explains every option.

    `task` is classification or causal_lm; without a validation set a part of the training set
    stands in for it.
    """

    task: str | None = None
    model: ModelSource
    train: DatasetSource
    validation: DatasetSource | None = None
    test: DatasetSource | None = None
    fine_tune: FineTune | None = None
    plant_noise: PlantNoise | None = None
    estimators: list[str] | Literal["auto"] | None = None
    estimator_parameters: dict[str, dict[str, float]] | None = None
    aggregations: list[str] | None = None
    layer_groups: list[str] | None = None
    ranking: RankingSpecification | None = None
    probes: Probes | None = None
    flag: Flag | Literal["auto"] | None = None
    verify: Verify | None = None
    max_tokens: int | None = None
    precision: str | None = None
    effort: str | None = None
    max_nonfinite_fraction: float | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None


class ExperimentTask(Request):
    """A model and the data that it is fine-tuned, judged and tested on."""

    name: str
    task: str | None = None
    model: ModelSource
    train: DatasetSource
    validation: DatasetSource | None = None
    test: DatasetSource | None = None
    fine_tune: FineTune | None = None
    max_tokens: int | None = None
    precision: str | None = None


class ExperimentVerify(Request):
    """Fine-tune again without what the configurations put lowest; or of some of them only."""

    fraction: float | None = None
    estimators: list[str] | None = None
    aggregations: list[str] | None = None


class ExperimentRequest(Request):
    """Tasks × seeds × estimators × layer groups × aggregations; README.md explains it.

    To leave out the verification, or to use noise that is known, send the body as a dict with
    `verify` or `noise_fraction` None.
    """

    tasks: list[ExperimentTask]
    seeds: list[int] | None = None
    estimators: list[str] | None = None
    estimator_parameters: dict[str, dict[str, float]] | None = None
    layer_groups: list[str] | None = None
    aggregations: list[str] | None = None
    correct_only: list[bool] | None = None
    vote_fraction: float | None = None
    trim_fraction: float | None = None
    common_share: float | None = None
    noise_fraction: float | None = None
    verify: ExperimentVerify | None = None
    metadata: dict[str, str] | None = None


class SuspectFilter(Request):
    """All samples that match, not only those of a page; what is left out does not count."""

    flagged: bool | None = None
    label: str | None = None
    suggested_label: str | None = None
    min_score: float | None = None
    max_score: float | None = None
    min_noise_probability: float | None = None
    max_noise_probability: float | None = None
    search: str | None = None
    decision: list[str] | None = None


class DecisionRequest(Request):
    """One decision about many samples: those of `indices`, or all that match `filter`.

    `action` is accept (the suggested label), keep, drop, edit (to `label`, or to `text` for a
    completion) or clear. With `as_of`, a `decision_version`, the call is refused when somebody
    else has decided one of the samples since.
    """

    action: Literal["accept", "keep", "drop", "edit", "clear"]
    label: str | None = None
    text: str | None = None
    indices: list[int] | None = None
    filter: SuspectFilter | None = None
    ranking_id: str | None = None
    as_of: int | None = None
    reviewer: str | None = None


class WebhookRequest(Request):
    """An address, and what it wants to be told of."""

    url: str
    events: list[str] | None = None
    description: str | None = None


class UndoRequest(Request):
    """Who takes a batch of decisions back."""

    reviewer: str | None = None
