"""Deliveries that are due: claim them by a lease, note how they went (SERVICE.md, section 3)."""

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import Engine, exists, func, select, update
from sqlalchemy.orm import Session, aliased

from app.db import transaction
from app.webhooks.calls import Call, Outcome
from app.webhooks.models import MAX_TRIES, DeliveryState, Webhook, WebhookDelivery

LEASE = timedelta(seconds=60)  # longer than a call may take
GROWTH = 4.5  # with 8 tries from 8 seconds on: about a day
JITTER = (0.8, 1.2)
MAX_HISTORY = 20

log = structlog.get_logger()


@dataclass(frozen=True)
class ClaimedDelivery:
    """A sender's hold on one delivery."""

    delivery_id: str
    attempt: int
    call: Call


def claim_due(engine: Engine, *, limit: int) -> list[ClaimedDelivery]:
    """Take deliveries that are due, at most one of each webhook at a time.

    So one slow receiver holds up nobody but itself. What a sender took and never told of is due
    again when its lease is over.
    """
    other = aliased(WebhookDelivery)
    is_free = WebhookDelivery.lease_until.is_(None) | (WebhookDelivery.lease_until < func.now())
    is_busy = exists().where(
        other.webhook_id == WebhookDelivery.webhook_id,
        other.state == DeliveryState.PENDING,
        other.lease_until >= func.now(),
    )
    first = (
        select(other.id)
        .where(
            other.webhook_id == WebhookDelivery.webhook_id,
            other.state == DeliveryState.PENDING,
            other.next_attempt_at <= func.now(),
        )
        .order_by(other.next_attempt_at, other.id)
        .limit(1)
        .scalar_subquery()
    )
    due = (
        select(WebhookDelivery, Webhook)
        .join(Webhook, Webhook.id == WebhookDelivery.webhook_id)
        .where(WebhookDelivery.state == DeliveryState.PENDING, is_free, ~is_busy)
        .where(WebhookDelivery.next_attempt_at <= func.now(), WebhookDelivery.id == first)
        .where(Webhook.disabled_at.is_(None))
        .order_by(WebhookDelivery.next_attempt_at)
        .limit(limit)
        .with_for_update(of=WebhookDelivery, skip_locked=True)
    )
    with transaction(engine) as session:
        return [_claim(delivery, webhook) for delivery, webhook in session.execute(due)]


def _claim(delivery: WebhookDelivery, webhook: Webhook) -> ClaimedDelivery:
    now = datetime.now(UTC)
    delivery.attempts += 1
    delivery.tries_left = max(0, delivery.tries_left - 1)
    delivery.lease_until = func.now() + LEASE
    secrets = [webhook.secret]
    if webhook.previous_secret and webhook.previous_secret_until:
        secrets += [webhook.previous_secret] if webhook.previous_secret_until > now else []
    call = Call(delivery.id, webhook.url, delivery.payload, secrets)
    return ClaimedDelivery(delivery.id, delivery.attempts, call)


def record(
    engine: Engine, claimed: ClaimedDelivery, outcome: Outcome, *, retry_seconds: float
) -> None:
    """Note how an attempt went, and when to try again; nothing if the hold was lost.

    A receiver that answers 410 is told nothing any more.
    """
    with transaction(engine) as session:
        delivery = _held(session, claimed)
        if delivery is None:
            return
        delivery.lease_until = None
        delivery.status_code = outcome.status_code
        delivery.error = outcome.error
        entry = {
            "attempt": claimed.attempt,
            "at": datetime.now(UTC).isoformat(),
            "status_code": outcome.status_code,
            "error": outcome.error,
            "seconds": outcome.seconds,
        }
        delivery.history = [*delivery.history, entry][-MAX_HISTORY:]
        if outcome.error is None:
            _finish(delivery, DeliveryState.SUCCEEDED)
        elif outcome.is_gone or not delivery.tries_left:
            _finish(delivery, DeliveryState.FAILED)
        else:
            number = MAX_TRIES - delivery.tries_left - 1
            pause = retry_seconds * GROWTH**number * random.uniform(*JITTER)  # noqa: S311  spreads load
            delivery.next_attempt_at = func.now() + timedelta(seconds=pause)
        if outcome.is_gone:
            session.flush()
            _disable(session, delivery.webhook_id)
    log.info(
        "webhook_called",
        delivery_id=claimed.delivery_id,
        attempt=claimed.attempt,
        status_code=outcome.status_code,
        error=outcome.error,
    )


def give_back(engine: Engine, claimed: ClaimedDelivery) -> None:
    """Let another sender make an attempt that was broken off, as if it had not been begun."""
    with transaction(engine) as session:
        delivery = _held(session, claimed)
        if delivery is not None:
            delivery.lease_until = None
            delivery.tries_left += 1


def _held(session: Session, claimed: ClaimedDelivery) -> WebhookDelivery | None:
    held = select(WebhookDelivery).where(
        WebhookDelivery.id == claimed.delivery_id,
        WebhookDelivery.attempts == claimed.attempt,
        WebhookDelivery.state == DeliveryState.PENDING,
    )
    return session.scalars(held.with_for_update()).one_or_none()


def _finish(delivery: WebhookDelivery, state: DeliveryState) -> None:
    delivery.state = state
    delivery.next_attempt_at = None
    delivery.finished_at = func.now()


def _disable(session: Session, webhook_id: str) -> None:
    reason = "The receiver answered 410 Gone."
    session.execute(
        update(Webhook)
        .where(Webhook.id == webhook_id)
        .values(disabled_at=func.now(), disabled_reason=reason)
    )
    session.execute(
        update(WebhookDelivery)
        .where(
            WebhookDelivery.webhook_id == webhook_id,
            WebhookDelivery.state == DeliveryState.PENDING,
        )
        .values(
            state=DeliveryState.FAILED,
            next_attempt_at=None,
            finished_at=func.now(),
            error="The webhook was disabled before this was sent.",
        )
    )
