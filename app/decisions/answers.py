"""What decisions look like over HTTP: the answers."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.decisions.models import Action

BatchAction = Action | Literal["clear"]


class SampleDecision(BaseModel):
    """What was decided on a sample."""

    action: Action
    label: str | None = Field(
        description="The label that it gets: the suggested one (accept), or the reviewer's (edit)."
    )
    text: str | None = Field(description="The completion that it gets (edit).")
    reviewer: str
    decided_at: datetime
    version: int = Field(description="The audit's decision_version after it.")


class DecisionBatch(BaseModel):
    """One call of a reviewer."""

    id: str
    action: BatchAction
    label: str | None
    text: str | None
    filter: dict[str, Any] | None = Field(description="None where samples were named by index.")
    ranking_id: str = Field(description="Whose suggestions and filter it was.")
    num_samples: int = Field(description="Named by index, or matching the filter.")
    num_changed: int = Field(description="Whose decision is another than before.")
    num_skipped: int = Field(
        description="Matching samples that were left alone: accept without a suggested label. Of "
        "an undo, those that were decided again since."
    )
    reviewer: str
    created_at: datetime
    undone_at: datetime | None
    undone_by: str | None
    decision_version: int = Field(description="The audit's, after this call.")


class DecisionPreview(BaseModel):
    """What a batch would do."""

    num_samples: int
    num_skipped: int = Field(description="accept: samples without a suggested label.")
    num_conflicts: int = Field(description="Samples that somebody else decided since `as_of`.")
    decision_version: int


class PrecisionAt(BaseModel):
    """How many of the decided samples among the k lowest are wrong."""

    k: int
    num_decided: int
    num_wrong: int = Field(description="Dropped, or given another label or completion.")
    precision: float | None = Field(description="None where nothing is decided yet.")


class Precision(BaseModel):
    """How well a ranking finds what reviewers find wrong."""

    ranking_id: str
    at: list[PrecisionAt] = Field(description="For k = 10, 20, 50, 100 and so on.")
