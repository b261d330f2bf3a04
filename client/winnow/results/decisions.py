"""Answers about what reviewers decided."""

from datetime import datetime
from typing import Any

from winnow.results.base import Result


class SampleDecision(Result):
    """What was decided about a sample: the action, and the label or completion that it gets."""

    action: str
    label: str | None
    text: str | None
    reviewer: str
    decided_at: datetime
    version: int


class DecisionBatch(Result):
    """Decisions that were made in one call, and are undone in one.

    `decision_version` goes into `as_of` of the next call. `num_skipped` counts samples that could
    not be decided so, or, after an undo, those that were decided again since.
    """

    id: str
    action: str
    label: str | None
    text: str | None
    filter: dict[str, Any] | None
    ranking_id: str
    num_samples: int
    num_changed: int
    num_skipped: int
    reviewer: str
    created_at: datetime
    undone_at: datetime | None
    undone_by: str | None
    decision_version: int


class DecisionPreview(Result):
    """How many samples a call would decide, without deciding them."""

    num_samples: int
    num_skipped: int
    num_conflicts: int
    decision_version: int


class PrecisionAt(Result):
    """How many of the decided samples among the `k` most suspect were wrong."""

    k: int
    num_decided: int
    num_wrong: int
    precision: float | None


class Precision(Result):
    """How good the ranking is, by the decisions so far."""

    ranking_id: str
    at: list[PrecisionAt]


class LabelCell(Result):
    """How many samples with a given label have a suggested one."""

    given_label: str
    suggested_label: str | None
    count: int


class Histogram(Result):
    """How the scores are spread: one more edge than there are counts."""

    edges: list[float]
    counts: list[int]
    flagged_counts: list[int]


class SuspectSummary(Result):
    """What a filter of the suspects matches, counted."""

    ranking_id: str
    num_matching: int
    num_undecided: int
    matrix: list[LabelCell]
    by_decision: dict[str, int]
    histogram: Histogram
