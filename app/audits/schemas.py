"""What audits look like over HTTP: the request."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from app.catalogue import ESTIMATORS, AggregationName, EstimatorName
from app.datasets.files import ColumnNames
from app.errors import FieldConflict

Reference = Annotated[str, StringConstraints(min_length=1, max_length=1000, strip_whitespace=True)]
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]{1,200}$")]
MAX_METADATA_KEYS = 50


class Strict(BaseModel):
    """Base of request bodies: a misspelt field is an error, not a silence."""

    model_config = ConfigDict(extra="forbid")


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
        description="For a model that was fine-tuned in full: the linear modules of its attention "
        "whose gradients are compared. Default: the query and value projections.",
    )


class DatasetSource(Strict):
    """A table of labelled texts."""

    reference: Reference = Field(
        description="upload:<id> of POST /v1/datasets, file:///path.parquet|jsonl|csv under a "
        "configured root, or hf://datasets/owner/name@revision?config=…&split=…",
        examples=["upload:ds_0192f0c1a1b27c3d8e4f5a6b7c8d9e0f"],
    )
    columns: ColumnNames | None = Field(
        None,
        description="Names of the columns. Default: those of the upload, else text and label.",
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
    """Wrong labels that the service plants itself, to measure how well they are found."""

    fraction: float = Field(0.2, gt=0, le=0.9, description="Share of the training labels.")
    seed: int = Field(0, ge=0, lt=2**31)


class RankingSpecification(Strict):
    """Which influence makes the ranking."""

    estimator: EstimatorName = EstimatorName.GRAD_COSINE
    layers: str = Field(
        "all",
        pattern=r"^(all|WE|CL|\d{2,3}(-\d{2,3})?)$",
        description="A layer group: all, CL (the head), or a band of blocks such as 02-03; "
        "GET /v1/audits/{id}/layers lists the groups of a model.",
    )
    aggregation: AggregationName = AggregationName.RANK
    vote_fraction: float = Field(
        0.3, gt=0, le=1, description="For vote: the share of the training set that gets votes."
    )
    correct_only: bool = Field(
        False, description="Use only validation samples that the model predicts correctly."
    )


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


class AuditRequest(Strict):
    """Everything that decides an audit; with the resolved revisions it reproduces it."""

    model: ModelSource
    train: DatasetSource = Field(description="The training set that is audited.")
    validation: DatasetSource = Field(
        description="A small, trusted set that stands for the behaviour you want."
    )
    fine_tune: FineTune | None = Field(
        None, description="Fine-tune first. Leave out for a model that is fine-tuned already."
    )
    plant_noise: PlantNoise | None = Field(
        None, description="Flip some training labels first, to measure the detection."
    )
    estimators: list[EstimatorName] = Field(
        default_factory=lambda: [EstimatorName.GRAD_COSINE],
        max_length=len(EstimatorName),
        description="Estimators to compute and compare. The ranking's own, the loss and random "
        "are always among them.",
    )
    ranking: RankingSpecification = Field(default_factory=RankingSpecification)
    flag: Flag = Field(
        default_factory=lambda: Flag(fraction=0.1, count=None),
        description="Which of the lowest-scored samples are flagged. Default: a tenth.",
    )
    max_tokens: int = Field(256, ge=8, le=8192, description="Longer texts are cut to this.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the model's weights; scores are float32 always."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of the random baseline.")
    metadata: dict[str, str] = Field(
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
                    "estimators": ["grad_dot", "grad_cosine", "datainf"],
                    "ranking": {"estimator": "datainf", "aggregation": "vote"},
                    "flag": {"fraction": 0.2},
                }
            ]
        },
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "AuditRequest":
        if self.model.adapter and self.fine_tune:
            raise FieldConflict(
                "fine_tune",
                message="fine_tune starts from a base model; leave out either fine_tune or "
                "model.adapter",
            )
        if self.model.target_modules and (self.model.adapter or self.fine_tune):
            raise FieldConflict(
                *("model", "target_modules"),
                message="model.target_modules is for a model that was fine-tuned in full; with "
                "adapters their own modules are used (fine_tune.target_modules chooses them)",
            )
        if self.plant_noise and self.train.columns and self.train.columns.noise:
            raise FieldConflict(
                "plant_noise",
                message="train.columns.noise names known noise and plant_noise adds more; use "
                "one of them",
            )
        if not ESTIMATORS[self.ranking.estimator].has_layers and self.ranking.layers != "all":
            raise FieldConflict(
                *("ranking", "layers"),
                message=f"ranking.estimator {self.ranking.estimator.value} has no layers; "
                "set ranking.layers to all",
            )
        if len(self.metadata) > MAX_METADATA_KEYS:
            raise FieldConflict(
                "metadata", message=f"metadata has more than {MAX_METADATA_KEYS} keys"
            )
        return self

    def stored(self) -> dict[str, Any]:
        """Return the request as it is kept in the database, defaults filled in."""
        return self.model_dump(mode="json", exclude={"metadata"})
