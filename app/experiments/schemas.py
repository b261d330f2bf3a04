"""What experiments look like over HTTP: the request."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, ValidationError, model_validator

from app.audits.schemas import (
    AuditRequest,
    DatasetSource,
    FineTune,
    Flag,
    Layers,
    Metadata,
    ModelSource,
    PlantNoise,
    RankingSpecification,
    Strict,
    Task,
)
from app.audits.verification_schemas import ArmName, Configurations, Seed, Verify, num_trainings
from app.catalogue import ESTIMATORS, AggregationName, EstimatorName
from app.errors import FieldConflict

MAX_TASKS = 50
MAX_SEEDS = 20
MAX_AUDITS = 200
MAX_TRAININGS = 50_000
FLAGGED = 0.3  # what the paper filters
BASELINE_ARMS = [ArmName.FULL, ArmName.RANDOM, ArmName.ORACLE]

TaskName = Annotated[str, StringConstraints(min_length=1, max_length=100, strip_whitespace=True)]


class ExperimentTask(Strict):
    """A model and the data that it is fine-tuned, judged and tested on."""

    name: TaskName = Field(description="What the tables call it; each only once.")
    task: Task = Field("classification", description="As in an audit.")
    model: ModelSource = Field(description="The base model.")
    train: DatasetSource = Field(description="The training set that noise is planted in.")
    validation: DatasetSource | None = Field(
        None,
        description="The trusted set that influence is measured on. Without one a part of the "
        "training set is taken, as in an audit.",
    )
    test: DatasetSource | None = Field(
        None, description="What the filtered models are measured on; needed for verify."
    )
    fine_tune: FineTune = Field(
        default_factory=FineTune,
        description="Of the audit and of every training of the verification; its seed is the "
        "experiment's.",
    )
    max_tokens: int = Field(256, ge=8, le=8192, description="Longer texts are cut to this.")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the model's weights."
    )


class ExperimentVerify(Strict):
    """Fine-tune again without what the configurations put lowest."""

    fraction: float = Field(
        0.3, gt=0, le=0.9, description="Share of the training samples that is removed."
    )
    estimators: list[EstimatorName] | None = Field(
        None,
        min_length=1,
        description="Only for the configurations of these, where training is dear; detection is "
        "measured for all. Default: for all.",
    )
    aggregations: list[AggregationName] | None = Field(
        None, min_length=1, description="Only for the configurations with these. Default: with all."
    )


class ExperimentRequest(Strict):
    """Tasks × seeds × estimators × layer groups × aggregations.

    Every task is audited once with every seed: noise is planted, the model fine-tuned and the
    gradients taken once for all configurations. Then every configuration filters the training set,
    and the model is fine-tuned again without what it put lowest.
    """

    tasks: list[ExperimentTask] = Field(min_length=1, max_length=MAX_TASKS)
    seeds: list[Seed] = Field(
        default_factory=lambda: [0, 1, 2],
        min_length=1,
        max_length=MAX_SEEDS,
        description="Each plants its own noise, and fine-tunes and verifies with its own draws.",
    )
    estimators: list[EstimatorName] = Field(
        default_factory=lambda: [
            EstimatorName.GRAD_DOT,
            EstimatorName.GRAD_COSINE,
            EstimatorName.DATAINF,
        ],
        min_length=1,
        max_length=len(EstimatorName),
        description="The loss, random and oracle always stand beside them.",
    )
    estimator_parameters: dict[EstimatorName, dict[str, float]] = Field(
        default_factory=dict, description="As in an audit."
    )
    layer_groups: list[Layers] | None = Field(
        None,
        min_length=1,
        max_length=50,
        description="Layers by name, as in an audit's ranking.layers, which every task's model "
        "must have. Default: every layer group of the model: all, four bands of blocks, CL, and WE "
        "where its gradients are taken.",
    )
    aggregations: list[AggregationName] = Field(
        default_factory=lambda: [
            AggregationName.MEAN,
            AggregationName.RANK,
            AggregationName.VOTE,
        ],
        min_length=1,
        max_length=len(AggregationName),
    )
    correct_only: list[bool] = Field(
        default_factory=lambda: [False],
        min_length=1,
        max_length=2,
        description="Use all validation samples (false), only those that the model predicts "
        "correctly (true), or compare both.",
    )
    vote_fraction: float = Field(0.3, gt=0, le=1, description="For vote.")
    trim_fraction: float = Field(0.1, ge=0, lt=0.5, description="For trimmed_mean.")
    common_share: float = Field(0.5, gt=0, le=1, description="For common_set.")
    noise_fraction: float | None = Field(
        0.2,
        gt=0,
        le=0.9,
        description="Share of the training labels that every seed makes wrong. null: the noise is "
        "known already, from the columns train.columns.noise.",
    )
    verify: ExperimentVerify | None = Field(
        default_factory=ExperimentVerify,
        description="Fine-tune again without what each configuration puts lowest: the most costly "
        "part by far. null: the tables tell of detection alone.",
    )
    metadata: Metadata = Field(
        default_factory=dict, max_length=50, description="Your own key-value pairs."
    )

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "tasks": [
                        {
                            "name": "reviews",
                            "model": {"reference": "file:///models/all-MiniLM-L6-v2"},
                            "train": {"reference": "upload:ds_0192f0c1a1b27c3d8e4f5a6b7c8d9e0f"},
                            "validation": {
                                "reference": "upload:ds_0192f0c1a1b27c3d8e4f5a6b7c8d9e10"
                            },
                            "test": {"reference": "upload:ds_0192f0c1a1b27c3d8e4f5a6b7c8d9e11"},
                            "fine_tune": {"epochs": 3},
                        }
                    ],
                    "seeds": [0, 1],
                    "estimators": ["grad_dot", "grad_cosine", "datainf"],
                    "aggregations": ["mean", "rank", "vote"],
                }
            ]
        },
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "ExperimentRequest":
        self._check_lists()
        for place, task in enumerate(self.tasks):
            if "seed" in task.fine_tune.model_fields_set:
                raise FieldConflict(
                    *("tasks", place, "fine_tune", "seed"),
                    message="the seeds are the experiment's: leave out fine_tune.seed and name "
                    "them in seeds",
                )
            try:
                audit = self.audit_request(task, self.seeds[0])
            except ValidationError as error:
                raise self._conflict_at(place, error) from error
            if place == 0:
                self._check_number(audit)
        return self

    def _check_lists(self) -> None:
        lists: dict[str, list[Any]] = {
            "tasks": [task.name for task in self.tasks],
            "seeds": self.seeds,
            "estimators": self.estimators,
            "aggregations": self.aggregations,
            "correct_only": self.correct_only,
        }
        lists["layer_groups"] = list(self.layer_groups or ())
        for name, values in lists.items():
            for place, value in enumerate(values):
                if value in values[:place]:
                    what = f"the task {value!r}" if name == "tasks" else str(value)
                    path = (name, place, "name") if name == "tasks" else (name, place)
                    raise FieldConflict(*path, message=f"{what} stands here twice; name it once")

    def _check_number(self, audit: AuditRequest) -> None:
        number = len(self.tasks) * len(self.seeds)
        if number > MAX_AUDITS:
            raise FieldConflict(
                "seeds",
                message=f"{len(self.tasks)} tasks with {len(self.seeds)} seeds are {number} "
                f"audits; an experiment has {MAX_AUDITS} at most. Name fewer, or submit several",
            )
        trainings = number * num_trainings(audit.stored())
        if trainings > MAX_TRAININGS:
            raise FieldConflict(
                "verify",
                message=f"this asks for about {trainings:,} trainings; an experiment has "
                f"{MAX_TRAININGS:,} at most. Compare fewer configurations, or set verify to null",
            )

    def _conflict_at(self, place: int, error: ValidationError) -> FieldConflict:
        """Return what is wrong with a task's audits as a conflict of the experiment's fields."""
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        path = cause.path if isinstance(cause, FieldConflict) else first["loc"]
        message = str(cause) if cause is not None else first["msg"]
        match path:
            case (name, *_) if name in ExperimentTask.model_fields:
                return FieldConflict("tasks", place, *path, message=message)
            case ("plant_noise", *_):
                return FieldConflict("noise_fraction", message=message)
            case ("verify", "configurations", *rest):
                return FieldConflict("verify", *rest, message=message)
            case ("ranking", *_):
                return FieldConflict("estimators", 0, message=message)
        return FieldConflict(*path, message=message)

    def audit_request(self, task: ExperimentTask, seed: int) -> AuditRequest:
        """Return the audit of one task with one seed.

        Raises:
            ValidationError: the fields do not fit together.
        """
        return AuditRequest(
            task=task.task,
            model=task.model,
            train=task.train,
            validation=task.validation,
            test=task.test,
            fine_tune=task.fine_tune.model_copy(update={"seed": seed}),
            plant_noise=PlantNoise(fraction=self.noise_fraction, seed=seed)
            if self.noise_fraction is not None
            else None,
            estimators=self.estimators,
            estimator_parameters=self.estimator_parameters,
            aggregations=self.aggregations,
            layer_groups=self.layer_groups,
            ranking=RankingSpecification(
                estimator=self.estimators[0],
                layers=self._ranking_layers(),
                aggregation=self.aggregations[0],
                vote_fraction=self.vote_fraction,
                trim_fraction=self.trim_fraction,
                common_share=self.common_share,
                correct_only=self.correct_only[0],
            ),
            flag=Flag(fraction=self.verify.fraction if self.verify else FLAGGED, count=None),
            verify=self._verify(seed),
            max_tokens=task.max_tokens,
            precision=task.precision,
            seed=seed,
        )

    def _verify(self, seed: int) -> Verify | None:
        if self.verify is None:
            return None
        configurations = Configurations(
            correct_only=self.correct_only,
            # the loss is what every ranking is held against
            estimators=self.verify.estimators
            and list(dict.fromkeys([*self.verify.estimators, EstimatorName.LOSS])),
            aggregations=self.verify.aggregations,
        )
        return Verify(
            fraction=self.verify.fraction,
            seeds=[seed],
            arms=BASELINE_ARMS,
            configurations=configurations,
        )

    def _ranking_layers(self) -> str:
        """Return what each audit's own ranking looks at: layers that the first estimator has."""
        needs = ESTIMATORS[self.estimators[0]].needs
        if "word_embeddings" in needs:
            return "WE"
        if not ESTIMATORS[self.estimators[0]].has_layers or self.layer_groups is None:
            return "all"
        elsewhere = {"WE", "CL"} if "hidden_states" in needs else {"WE"}
        for layers in self.layer_groups:
            if elsewhere.isdisjoint(layers.split(",")):
                return layers
        return "all"

    def stored(self) -> dict[str, Any]:
        """Return the request as it is kept in the database, defaults filled in."""
        return self.model_dump(mode="json", exclude={"metadata"})
