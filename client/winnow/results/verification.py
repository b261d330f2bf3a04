"""What fine-tuning again has shown."""

from typing import Any

from winnow.results.base import Result


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
