"""What decisions look like over HTTP: the requests."""

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from app.audits.filters import MAX_INDEX, SuspectFilter
from app.audits.schemas import Strict
from app.datasets.columns import NUL
from app.decisions.answers import BatchAction
from app.decisions.models import Action
from app.errors import FieldConflict

MAX_INDICES = 100_000
ANONYMOUS = "anonymous"

Reviewer = Annotated[
    str,
    StringConstraints(min_length=1, max_length=200, strip_whitespace=True, pattern=r"^[^\x00]*$"),
]
Index = Annotated[int, Field(ge=0, le=MAX_INDEX)]


class DecisionRequest(Strict):
    """The same decision on some samples: those named, or all that match a filter."""

    action: BatchAction = Field(
        description="accept: take the suggested label; keep: the sample is right as it is; drop: "
        "leave it out of the training set; edit: give it another label or completion; clear: take "
        "back what was decided."
    )
    label: str | None = Field(
        None, max_length=200, description="edit of a classifier's sample: a class of the audit."
    )
    text: str | None = Field(
        None, description="edit of a causal language model's sample: its new completion."
    )
    indices: list[Index] | None = Field(
        None, min_length=1, max_length=MAX_INDICES, description="Rows of the training file, from 0."
    )
    filter: SuspectFilter | None = Field(
        None, description="Instead of indices: all samples that match, not a page of them."
    )
    ranking_id: str | None = Field(
        None,
        max_length=100,
        description="Whose suggestions, scores and flags count. Default: the audit's own.",
    )
    as_of: int | None = Field(
        None,
        ge=0,
        le=MAX_INDEX,
        description="The decision_version that the reviewer saw. Where somebody of another name "
        "decided on one of the samples since, nothing is stored and the answer is 409. Left out: "
        "no check.",
    )
    reviewer: Reviewer | None = Field(
        None,
        description=f"Who decides. Where API keys are used it is the key's name, whatever is said "
        f"here; else by default {ANONYMOUS}, who counts as one person.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.indices is None) == (self.filter is None):
            raise FieldConflict("indices", message="give either indices or filter")
        given = {name: getattr(self, name) is not None for name in ("label", "text")}
        for name, is_given in given.items():
            if is_given and self.action is not Action.EDIT:
                raise FieldConflict(name, message=f"only edit takes a {name}")
        if self.action is Action.EDIT and sum(given.values()) != 1:
            raise FieldConflict(
                "label", message="edit takes a label, or for a causal language model a text"
            )
        if self.text is not None and (NUL in self.text or not self.text.strip()):
            raise FieldConflict("text", message="give a text that is not blank and holds no NUL")
        return self


class UndoRequest(Strict):
    """Who takes a batch back."""

    reviewer: Reviewer | None = Field(None, description="As in a decision.")
