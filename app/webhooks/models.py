"""Tables of webhooks: whom to tell of what, and what they were told or will be."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import ARRAY, CheckConstraint, ForeignKey, Index, String, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base

MAX_TRIES = 8


class EventType(StrEnum):
    """What a webhook can be told of."""

    AUDIT_SUCCEEDED = "audit.succeeded"
    AUDIT_FAILED = "audit.failed"
    AUDIT_CANCELLED = "audit.cancelled"
    RANKING_SUCCEEDED = "ranking.succeeded"
    RANKING_FAILED = "ranking.failed"
    EXPERIMENT_DONE = "experiment.done"


TEST_TYPE = "webhook.test"


class DeliveryState(StrEnum):
    """A delivery is owed, or over."""

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class Webhook(Base):
    """An address that wants to be told; the secret is kept readable, since it signs."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    url: Mapped[str]
    events: Mapped[list[str]] = mapped_column(ARRAY(String))
    description: Mapped[str] = mapped_column(default="")
    secret: Mapped[str]
    previous_secret: Mapped[str | None]
    previous_secret_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]

    __table_args__ = (Index("ix_webhooks_tenant_id", "tenant", "id"),)


class WebhookDelivery(Base):
    """One message to one webhook, written in the transaction that it tells of.

    Its id is the `webhook-id` of every attempt. Attempts are counted before they are made, so that
    the count fences off a sender that has lost its lease.
    """

    __tablename__ = "webhook_deliveries"

    id: Mapped[str] = mapped_column(primary_key=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey(Webhook.id, ondelete="CASCADE"))
    type: Mapped[str]
    payload: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(default=DeliveryState.PENDING)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)
    finished_at: Mapped[datetime | None]
    next_attempt_at: Mapped[datetime | None] = mapped_column(default=func.now())
    lease_until: Mapped[datetime | None]
    attempts: Mapped[int] = mapped_column(default=0)
    tries_left: Mapped[int] = mapped_column(default=MAX_TRIES)
    status_code: Mapped[int | None]
    error: Mapped[str | None]
    history: Mapped[list[Any]] = mapped_column(default=list)

    __table_args__ = (
        CheckConstraint(
            "state IN ({})".format(", ".join(f"'{state}'" for state in DeliveryState)),
            name="state",
        ),
        CheckConstraint("(state = 'pending') = (next_attempt_at IS NOT NULL)", name="next_attempt"),
        Index("ix_webhook_deliveries_webhook_id", "webhook_id", "id"),
        Index(
            "ix_webhook_deliveries_due",
            "next_attempt_at",
            postgresql_where=text("state = 'pending'"),
        ),
    )
