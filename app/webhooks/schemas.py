"""What webhooks look like over HTTP."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from app.webhooks.models import DeliveryState, EventType


class WebhookRequest(BaseModel):
    """An address, and what it wants to be told of."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(
        min_length=1,
        max_length=2000,
        description="https only, a public address, no redirects.",
        examples=["https://example.com/winnow"],
    )
    events: list[EventType] = Field(
        default_factory=lambda: list(EventType),
        min_length=1,
        description="By default all of them.",
    )
    description: str = Field("", max_length=500, description="For people.")


class Webhook(BaseModel):
    """An address that is told."""

    id: str
    url: str
    events: list[EventType]
    description: str
    created_at: datetime
    disabled_at: datetime | None
    disabled_reason: str | None = Field(description="Make a new webhook to be told again.")
    previous_secret_until: datetime | None = Field(
        description="Until then the secret before the last rotation signs too."
    )
    links: dict[str, str]


class NewWebhook(Webhook):
    """A webhook with its new secret."""

    secret: str = Field(
        description="What signs the messages (Standard Webhooks), shown once. Keep it where the "
        "receiver finds it.",
        examples=["whsec_…"],
    )


class Attempt(BaseModel):
    """One call to the receiver."""

    attempt: int
    at: datetime
    status_code: int | None
    error: str | None
    seconds: float


class Delivery(BaseModel):
    """One message to one webhook, and how its delivery goes."""

    id: str = Field(description="The `webhook-id` of every attempt.")
    webhook_id: str
    type: str
    state: DeliveryState
    created_at: datetime
    finished_at: datetime | None
    attempts: int
    next_attempt_at: datetime | None = Field(description="None when it is over.")
    status_code: int | None = Field(description="Of the last answer.")
    error: str | None = Field(description="Of the last attempt; None when it succeeded.")
    history: list[Attempt] = Field(description="The last 20 attempts, the first one first.")
    payload: dict[str, Any] = Field(description="The body that is sent.")
