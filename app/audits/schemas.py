"""What audits look like over HTTP: the request."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from app.audits.fitting import check_fits_together
from app.audits.verification_schemas import Verify
from app.catalogue import AUTO, AggregationName, Auto, Consensus, EstimatorName
from app.datasets.files import ColumnNames

Reference = Annotated[str, StringConstraints(min_length=1, max_length=1000, strip_whitespace=True)]
ModuleName = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9_.]{1,200}|all-linear)$")]
Task = Literal["classification", "causal_lm"]
Metadata = dict[
    Annotated[str, StringConstraints(min_length=1, max_length=100)],
    Annotated[str, StringConstraints(max_length=1000)],
]
_LAYERS = r"(all|WE|CL|\d{2,3}(-\d{2,3})?)"
Layers = Annotated[str, StringConstraints(max_length=1000, pattern=rf"^{_LAYERS}(,{_LAYERS})*$")]


class Strict(BaseModel):
    """Base of request bodies: a misspelt field is an error, not a silence."""

    model_config = ConfigDict(extra="forbid")


class Projection(Strict):
    """A two-sided random projection of the gradients of large modules."""

    dimension: int = Field(
        32,
        ge=2,
        le=256,
        description="Inputs and output gradients of a module are each projected to this many "
        "dimensions: the gradient to its square.",
    )
    seed: int = Field(0, ge=0, lt=2**31)


class Checkpoint(Strict):
    """An adapter at one point of its training."""

    adapter: Reference = Field(description="A PEFT LoRA adapter, as file:// or hf:// reference.")
    learning_rate: float = Field(
        gt=0, le=1, description="The learning rate of the steps that led here: its weight."
    )


class ModelSource(Strict):
    """The model whose training data is audited."""

    reference: Reference = Field(
        description="A Transformers folder or repository with safetensors: file:///path under a "
        "configured root, or hf://owner/name@revision. The base model when the audit fine-tunes "
        "or names an adapter, else the fine-tuned model itself.",
        examples=["file:///models/all-MiniLM-L6-v2", "hf://org/model@main"],
    )
    adapter: Reference | None = Field(
        None,
        description="A PEFT LoRA adapter, fine-tuned already, as file:// or hf:// reference.",
    )
    target_modules: list[ModuleName] | None = Field(
        None,
        min_length=1,
        max_length=20,
        description="For a model that was fine-tuned in full: the modules whose gradients are "
        "compared, by the last parts of their names, or all-linear for every linear layer of the "
        "blocks. Default: the query and value projections.",
    )
    projection: Projection | None = Field(
        None,
        description="For a model that was fine-tuned in full: project the gradients of its large "
        "modules. Without it they are exact, which takes memory. The audit reports how well "
        "projected scores agree with exact ones.",
    )
    word_embeddings: bool = Field(
        False,
        description="Take the gradients of the word embeddings too, sparse by token: estimators "
        "of dot products also get the layer group WE. tracin_we takes them anyway.",
    )
    activation_checkpointing: bool | Auto = Field(
        AUTO,
        description="Keep only the inputs of the transformer blocks and compute the rest again on "
        "the way back: far less memory, about a third more time, the same numbers. auto: where "
        "the audit would not fit into memory otherwise.",
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        None,
        description="Hold the base model's weights in 8 or 4 bits, by bitsandbytes. Needs "
        "fine_tune or an adapter, whose factors stay exact: gradients are those of the adapter on "
        "the quantised base.",
    )
    checkpoints: list[Checkpoint] | None = Field(
        None,
        min_length=2,
        max_length=20,
        description="For tracin on a model that is fine-tuned already: its adapters at several "
        "points of the training. With fine_tune the epochs are the checkpoints.",
    )


class DatasetSource(Strict):
    """A table of labelled texts, or of prompts with completions."""

    reference: Reference = Field(
        description="upload:<id> of POST /v1/datasets, file:///path.parquet|jsonl|csv under a "
        "configured root, or hf://datasets/owner/name@revision?config=…&split=…",
        examples=["upload:ds_0192f0c1a1b27c3d8e4f5a6b7c8d9e0f"],
    )
    columns: ColumnNames | None = Field(
        None,
        description="Names of the columns. Default: those of the upload, else text and label, or "
        "prompt and completion for a causal language model.",
    )


class FineTune(Strict):
    """LoRA fine-tuning of the base model on the training set, before the audit."""

    method: Literal["lora"] = "lora"
    rank: int = Field(4, ge=1, le=256, description="Rank r of the adapters.")
    alpha: float = Field(8, gt=0, le=4096, description="The adapters are scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    target_modules: list[ModuleName] | None = Field(
        None,
        min_length=1,
        max_length=20,
        description="Linear modules that get adapters. Default: the query and value projections.",
    )
    epochs: int = Field(3, ge=1, le=100)
    learning_rate: float = Field(5e-4, gt=0, le=1)
    weight_decay: float = Field(0.0, ge=0, le=1)
    warmup_fraction: float = Field(0.06, ge=0, lt=1, description="Share of the steps.")
    batch_size: int = Field(16, ge=1, le=4096)
    seed: int = Field(0, ge=0, lt=2**31)


class PlantNoise(Strict):
    """Wrong labels that the service plants itself, to measure how well they are found.

    With causal_lm the completions of the drawn samples are exchanged among them.
    """

    fraction: float = Field(0.2, gt=0, le=0.9, description="Share of the training samples.")
    seed: int = Field(0, ge=0, lt=2**31)


class Probes(Strict):
    """Copies of training samples with wrong targets, by which `auto` chooses and measures.

    Their gradients are taken at the same checkpoint. What ranks the copies low finds real noise.
    """

    fraction: float = Field(
        0.2,
        gt=0,
        le=0.5,
        description="How many, as a share of the training samples; at most 1,000.",
    )
    seed: int = Field(0, ge=0, lt=2**31)


class RankingSpecification(Strict):
    """Which influence makes the ranking."""

    estimator: EstimatorName | Auto | Consensus = Field(
        AUTO,
        description="An estimator; or auto: the configuration that finds the planted probes best; "
        "or consensus: several of them and the loss, fused by rank.",
    )
    layers: Layers | Auto = Field(
        AUTO,
        description="Which layers count: all, CL (the head), WE (the word embeddings), a block "
        "(04), a range of blocks (02-03), or several of these with commas (02-03,05,CL). "
        "GET /v1/audits/{id}/layers lists the groups of a model. auto: the group that finds the "
        "planted probes best.",
    )
    aggregation: AggregationName | Auto = Field(
        AUTO, description="auto: which of mean, rank and vote finds the planted probes best."
    )
    vote_fraction: float = Field(
        0.3, gt=0, le=1, description="For vote: the share of the training set that gets votes."
    )
    trim_fraction: float = Field(
        0.1, ge=0, lt=0.5, description="For trimmed_mean: the share that is cut off at each end."
    )
    common_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="For common_set: the share of the columns that must have listed a sample.",
    )
    correct_only: bool | None = Field(
        None,
        description="Use only validation samples that the model predicts correctly; for a causal "
        "language model the half with the lower loss. Left out: false, or with aggregation auto "
        "whatever finds the planted probes better.",
    )


class Configuration(RankingSpecification):
    """One way to rank: an estimator on some layers with an aggregation, nothing left open."""

    estimator: EstimatorName = EstimatorName.GRAD_COSINE
    layers: str = Field(
        "all",
        max_length=1000,
        pattern=rf"^{_LAYERS}(,{_LAYERS})*$",
        description="As in the audit's ranking, but for auto.",
    )
    aggregation: AggregationName = AggregationName.RANK
    correct_only: bool = Field(False, description="As in the audit's ranking.")


class Flag(Strict):
    """How many of the lowest-scored samples are flagged; exactly one of the two."""

    fraction: float | None = Field(None, ge=0, le=1, description="Share of the training set.")
    count: int | None = Field(None, ge=0, description="Number of samples.")

    @model_validator(mode="after")
    def _one_of_two(self) -> "Flag":
        if (self.fraction is None) == (self.count is None):
            raise ValueError("give either fraction or count")
        return self

    def number(self, num_train: int) -> int:
        """Return how many of `num_train` samples are flagged."""
        if self.fraction is not None:
            return round(self.fraction * num_train)
        return min(self.count or 0, num_train)


class RankingRequest(RankingSpecification):
    """Another ranking of an audit that has ended, from the influence that it computed."""

    flag: Flag | Auto | None = Field(
        None, description="Which of the lowest-scored samples are flagged. Default: as the audit."
    )

    def specification(self) -> RankingSpecification:
        """Return the ranking alone."""
        return RankingSpecification.model_validate(self.model_dump(exclude={"flag"}))


Verify.model_rebuild()  # it names Configuration


class AuditRequest(Strict):
    """Everything that decides an audit; with the resolved revisions it reproduces it."""

    task: Task = Field(
        "classification",
        description="What the model does: tell the class of a text or a pair of texts, or write "
        "the completion of a prompt.",
    )
    model: ModelSource
    train: DatasetSource = Field(description="The training set that is audited.")
    validation: DatasetSource | None = Field(
        None,
        description="A small, trusted set that stands for the behaviour you want. "
        "Without one a fifth of the training set, at most 500 samples, stands in for it.",
    )
    test: DatasetSource | None = Field(
        None,
        description="What verify measures on: a set that takes no part in anything else.",
    )
    fine_tune: FineTune | None = Field(
        None, description="Fine-tune first. Leave out for a model that is fine-tuned already."
    )
    plant_noise: PlantNoise | None = Field(
        None, description="Flip some training labels first, to measure the detection."
    )
    estimators: list[EstimatorName] | Auto = Field(
        AUTO,
        description="Estimators to compute and compare. The ranking's own, the loss and random "
        "are always among them. auto: the ranking's own; where that is auto or consensus, those "
        "that found noise best in our measurements and cost little together.",
    )
    estimator_parameters: dict[EstimatorName, dict[str, float]] = Field(
        default_factory=dict,
        description="Parameters of estimators that differ from their defaults, such as "
        '{"lissa": {"steps": 20}}; GET /v1/estimators lists them.',
    )
    aggregations: list[AggregationName] = Field(
        default_factory=lambda: [
            AggregationName.MEAN,
            AggregationName.RANK,
            AggregationName.VOTE,
        ],
        max_length=len(AggregationName),
        description="Aggregations to compute and compare; the ranking's own is always among them.",
    )
    layer_groups: list[Layers] | None = Field(
        None,
        min_length=1,
        max_length=50,
        description="Layers to compute and compare, as in ranking.layers; the ranking's own are "
        "always among them. Default: every layer group of the model.",
    )
    ranking: RankingSpecification = Field(default_factory=RankingSpecification)
    probes: Probes = Field(
        default_factory=Probes,
        description="The planted probes, where the ranking or the flag says auto or consensus.",
    )
    flag: Flag | Auto = Field(
        AUTO,
        description="Which of the lowest-scored samples are flagged. auto: as many as seem to be "
        "wrong, by the scores of the planted probes and of the validation set.",
    )
    verify: Verify | None = Field(
        None,
        description="Fine-tune again without the suspects, and compare on the test set. Needs "
        "fine_tune and test.",
    )
    max_tokens: int = Field(256, ge=8, le=8192, description="Longer texts are cut to this.")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the model's weights; scores are float32 always."
    )
    effort: Literal["exact", "fast"] = Field(
        "exact",
        description="exact: the influence of every training sample. fast: that of the samples with "
        "the 30 % highest losses alone, in two thirds of the time; the others are ranked behind "
        "them by their losses. For classifiers: on language models it finds less.",
    )
    max_nonfinite_fraction: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="The audit goes on without samples whose loss or gradient is not finite, and "
        "names them; it fails when they are more than this share of a set.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of the random baseline.")
    metadata: Metadata = Field(
        default_factory=dict, description="Your own key-value pairs, returned as they came."
    )

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "model": {"reference": "file:///models/all-MiniLM-L6-v2"},
                    "train": {"reference": "upload:ds_0192f0c1a1b27c3d8e4f5a6b7c8d9e0f"},
                    "validation": {"reference": "upload:ds_0192f0c1a1b27c3d8e4f5a6b7c8d9e10"},
                    "fine_tune": {"epochs": 3},
                    "ranking": {"estimator": "consensus"},
                }
            ]
        },
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "AuditRequest":
        check_fits_together(self)
        return self

    def stored(self) -> dict[str, Any]:
        """Return the request as it is kept in the database, defaults filled in."""
        return self.model_dump(mode="json", exclude={"metadata"})
