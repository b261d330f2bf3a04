"""What an audit is asked to verify: fine-tune again without the suspects, measure on a test set."""

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from app.audits.automatic import computed_estimators
from app.catalogue import AggregationName, EstimatorName
from app.errors import FieldConflict

if TYPE_CHECKING:
    from app.audits.schemas import Configuration

MAX_RANKINGS = 500
MAX_SEEDS = 20
Seed = Annotated[int, Field(ge=0, lt=2**31)]
_USUAL_GROUPS = 6  # all, four bands of blocks, the head
# What tells two rankings with the same aggregation apart.
_PARAMETER_OF = {
    "vote": "vote_fraction",
    "trimmed_mean": "trim_fraction",
    "common_set": "common_share",
}


class ArmName(StrEnum):
    """What a training set is made of beside the rankings that are named one by one."""

    FILTERED = "filtered"
    RELABELLED = "relabelled"
    FULL = "full"
    RANDOM = "random"
    ORACLE = "oracle"


class Configurations(BaseModel):
    """Every configuration of the audit's table, each an arm of its own.

    A configuration is an estimator on a layer group with an aggregation. random and oracle are
    arms anyway, so they are not among them.
    """

    model_config = ConfigDict(extra="forbid")

    correct_only: list[bool] = Field(
        default_factory=lambda: [False],
        min_length=1,
        max_length=2,
        description="Those that use all validation samples (false), those that use only the ones "
        "that the model predicts correctly (true), or both.",
    )
    estimators: list[EstimatorName] | None = Field(
        None, min_length=1, description="Only those of these estimators. Default: of all."
    )
    aggregations: list[AggregationName] | None = Field(
        None, min_length=1, description="Only those with these aggregations. Default: with all."
    )

    @field_validator("correct_only", "estimators", "aggregations")
    @classmethod
    def _distinct(cls, values: list[Any] | None) -> list[Any] | None:
        return distinct(values)


class Verify(BaseModel):
    """Fine-tune again from the same start on parts of the training set, and compare.

    The test set that tells takes no part in the audit, nor in choosing the best epoch.
    """

    model_config = ConfigDict(extra="forbid")

    fraction: float = Field(
        0.3,
        gt=0,
        le=0.9,
        description="Share of the training samples, the lowest-scored ones, that is removed (or, "
        "in the arm relabelled, gets its suggested label).",
    )
    seeds: list[Seed] = Field(
        default_factory=lambda: [0, 1, 2],
        min_length=1,
        max_length=MAX_SEEDS,
        description="Every arm is trained with each of these in place of fine_tune.seed. A "
        "confidence interval needs two or more.",
    )
    arms: list[ArmName] | None = Field(
        None,
        max_length=len(ArmName),
        description="filtered: without the samples that the audit's ranking puts lowest; "
        "relabelled (classification only): with their suggested labels instead; full: all "
        "samples; random: without as many random ones; oracle: without exactly the known noise. "
        "Default: all that fit the audit; oracle where noise is known or planted.",
    )
    rankings: list["Configuration"] = Field(
        default_factory=list,
        max_length=MAX_RANKINGS,
        description="Further rankings to filter by, each an arm of its own.",
    )
    configurations: Configurations | None = Field(
        None,
        description="Filter by every configuration of the audit's table too: {} for those that "
        "use all validation samples. Many trainings.",
    )
    confidence: float = Field(
        0.95, ge=0.5, le=0.999, description="Of the intervals of the differences."
    )

    @field_validator("seeds", "arms")
    @classmethod
    def _distinct(cls, values: list[Any] | None) -> list[Any] | None:
        return distinct(values)

    @model_validator(mode="after")
    def _distinct_rankings(self) -> "Verify":
        seen: dict[str, int] = {}
        for place, ranking in enumerate(self.rankings):
            name = ranking_name(ranking)
            if name in seen:
                raise FieldConflict(
                    *("rankings", place),
                    message=f"verify.rankings {seen[name]} and {place} are the same, {name}; "
                    "leave one out",
                )
            seen[name] = place
        if self.arms == [] and not (self.rankings or self.configurations):
            raise FieldConflict(
                "arms", message="name at least one of arms, rankings and configurations"
            )
        return self

    def arms_of(self, *, task: str, knows_noise: bool) -> list[ArmName]:
        """Return the arms beside the rankings: the asked ones, else all that fit the audit."""
        if self.arms is not None:
            return self.arms
        unfit = set() if task == "classification" else {ArmName.RELABELLED}
        unfit |= set() if knows_noise else {ArmName.ORACLE}
        return [arm for arm in ArmName if arm not in unfit]


def distinct(values: list[Any] | None) -> list[Any] | None:
    """Return a list in which nothing stands twice.

    Raises:
        ValueError: something does.
    """
    if values is not None and len(set(values)) < len(values):
        raise ValueError("name each only once")
    return values


def ranking_name(ranking: "Configuration") -> str:
    """Return the name of a ranking's arm: what makes its order, and nothing else."""
    estimator, aggregation = ranking.estimator.value, ranking.aggregation.value
    parts = [estimator, ranking.layers, aggregation]
    if parameter := _PARAMETER_OF.get(aggregation):
        parts[-1] += f"={getattr(ranking, parameter):g}"
    if ranking.correct_only:
        parts.append("correct_only")
    return "/".join(parts)


def num_trainings(request: Mapping[str, Any]) -> int:
    """Return how many trainings a stored request asks for at most; 0 without verification.

    Before the model is read its layer groups are not known: they are taken to be the usual six.
    """
    verify = request.get("verify")
    if not verify:
        return 0
    arms = verify["arms"] if verify["arms"] is not None else ArmName
    num_arms = len(arms) + len(verify["rankings"])
    if configurations := verify.get("configurations"):
        groups = request.get("layer_groups")
        num_arms += (
            len(configurations["estimators"] or computed_estimators(request))
            * len(configurations["aggregations"] or request["aggregations"])
            * (len(groups) if groups else _USUAL_GROUPS)
            * len(configurations["correct_only"])
        )
    return num_arms * len(verify["seeds"])
