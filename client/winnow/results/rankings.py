"""Answers about rankings."""

from datetime import datetime
from typing import Any

from winnow.results.audits import (
    AuditError,
    Cancellation,
    Choice,
    Detection,
    LayerResult,
    NoiseEstimate,
    ResultFile,
)
from winnow.results.base import FileFormat, Result


class RankingResults(Result):
    """What a ranking found."""

    num_flagged: int
    detection: Detection | None
    choice: Choice | None = None
    noise: NoiseEstimate | None = None
    files: dict[FileFormat, ResultFile]
    warnings: list[str]
    score_order: str


class Ranking(Result):
    """One ranking of an audit and where it stands.

    `state` is queued, running, succeeded or failed; `done` is true for the last two. `results` is
    there when it succeeded, `error` when it failed. `is_own` is true for the one that the audit was
    submitted with.
    """

    id: str
    audit_id: str
    is_own: bool
    state: str
    done: bool
    progress: float
    waiting: str | None = None
    created_at: datetime
    finished_at: datetime | None
    seconds: float | None
    request: dict[str, Any]
    results: RankingResults | None
    error: AuditError | None
    links: dict[str, str]


class LayerTable(Result):
    """Every computed configuration, and how much each module's training gradients cancel out."""

    layer_groups: dict[str, list[str]]
    module_cancellation: dict[str, Cancellation] | None = None
    data: list[LayerResult]
    score_order: str
