"""What verification looks like over HTTP."""

from typing import Any

from pydantic import BaseModel, Field


class SeedValues(BaseModel):
    """A measure on the test set, for every seed."""

    mean: float | None = Field(description="Over the seeds that have one.")
    values: list[float | None] = Field(
        description="In the order of the seeds; None where the training diverged or had no samples."
    )


class AgainstFull(BaseModel):
    """How much higher an arm's measure is than that of the full training set, seed by seed."""

    difference: float = Field(description="Mean over the seeds.")
    low: float | None = Field(
        description="Lower end of Student's t interval of the paired mean over seeds: what other "
        "seeds would say on the same data. None from one seed."
    )
    high: float | None = Field(description="Upper end.")
    num_seeds: int = Field(description="Seeds that both have been measured with.")
    sample_low: float | None = Field(
        description="Lower end of the interval over the test samples, paired, with the mean over "
        "the seeds of each: what another test set of the kind would say of these models. None for "
        "macro_f1, which is no mean over samples."
    )
    sample_high: float | None = Field(description="Upper end.")


class VerificationArm(BaseModel):
    """What fine-tuning again on one arm's samples gave."""

    name: str = Field(
        description="filtered, relabelled, full, random, oracle, or a ranking's estimator, layers "
        "and aggregation."
    )
    ranking: dict[str, Any] | None = Field(description="Of verify.rankings, for an arm of its own.")
    num_train: int = Field(description="Samples that it is trained on.")
    num_removed: int
    num_relabelled: int = Field(description="Samples whose label is not the given one.")
    metrics: dict[str, SeedValues] = Field(
        description="accuracy, macro_f1 and loss; for a causal language model loss and "
        "exact_match: the share of completions that greedy decoding writes to the letter."
    )
    against_full: dict[str, AgainstFull | None] | None = Field(
        description="By metric; None for the arm full itself, or without it."
    )


class Verification(BaseModel):
    """What fine-tuning again without the suspects changes on the test set."""

    fraction: float
    seeds: list[int]
    confidence: float = Field(description="Of all intervals.")
    num_test: int
    arms: list[VerificationArm]
    warnings: list[str]
