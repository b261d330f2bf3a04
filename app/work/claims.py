"""What a worker holds of a unit of work, and how it loses or fails it."""

from dataclasses import dataclass

from app.work.models import Stage


@dataclass(frozen=True)
class Claim:
    """A worker's hold on one unit of work."""

    unit_id: str
    audit_id: str
    stage: Stage
    position: int
    epoch: int
    attempts: int
    ranking_id: str | None = None
    traceparent: str | None = None  # of the request that the audit or ranking came by


class LeaseLost(Exception):
    """Another worker has the unit, or its owner has ended or is gone; drop its result."""


class CancelPending(LeaseLost):
    """The unit is done, but its audit is being cancelled."""


@dataclass(frozen=True)
class Failure:
    """Why it failed: a stable code, a sentence that says what to change, the field."""

    code: str
    message: str
    field: str | None = None
