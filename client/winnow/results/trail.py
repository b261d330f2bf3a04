"""Answers about who did what."""

from datetime import datetime

from winnow.results.base import Result


class TrailEntry(Result):
    """One change that somebody made."""

    id: str
    at: datetime
    actor: str
    key_id: str | None
    action: str
    object_id: str
    request_id: str | None
