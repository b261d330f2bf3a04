"""Answers about webhooks."""

from datetime import datetime
from typing import Any

from winnow.results.base import Result


class Webhook(Result):
    """An address that is told when audits, rankings and experiments end."""

    id: str
    url: str
    events: list[str]
    description: str
    created_at: datetime
    disabled_at: datetime | None
    disabled_reason: str | None
    previous_secret_until: datetime | None
    links: dict[str, str]


class NewWebhook(Webhook):
    """A webhook with its secret, which signs the messages and is told this once."""

    secret: str


class Attempt(Result):
    """One call to the receiver."""

    attempt: int
    at: datetime
    status_code: int | None
    error: str | None
    seconds: float


class Delivery(Result):
    """One message to one webhook, and how its delivery goes.

    `id` is the `webhook-id` of every attempt; `payload` is the body that is sent.
    """

    id: str
    webhook_id: str
    type: str
    state: str
    created_at: datetime
    finished_at: datetime | None
    attempts: int
    next_attempt_at: datetime | None
    status_code: int | None
    error: str | None
    history: list[Attempt]
    payload: dict[str, Any]
