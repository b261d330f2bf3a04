"""Webhooks: make, look at, rotate, test, remove; look at deliveries and send them again."""

import base64
import secrets
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from app.db import new_id, transaction
from app.errors import Conflict, NotFound
from app.settings import Settings
from app.trail.service import TrailAction, record
from app.webhooks.addresses import check_url
from app.webhooks.models import (
    MAX_TRIES,
    TEST_TYPE,
    DeliveryState,
    Webhook,
    WebhookDelivery,
)
from app.webhooks.outbox import new_delivery
from app.webhooks.schemas import WebhookRequest

MAX_WEBHOOKS = 20
SECRET_PREFIX = "whsec_"  # noqa: S105  of Standard Webhooks
PREVIOUS_SECRET_KEPT = timedelta(days=1)

log = structlog.get_logger()


def create(engine: Engine, settings: Settings, *, tenant: str, request: WebhookRequest) -> Webhook:
    """Make a webhook with a new secret.

    Raises:
        InvalidRequest: the address is not one that this service calls.
        Conflict: the tenant has as many as it may have.
    """
    check_url(settings, request.url)
    webhook = Webhook(
        id=new_id("whk"),
        tenant=tenant,
        url=request.url,
        events=list(dict.fromkeys(event.value for event in request.events)),
        description=request.description,
        secret=_new_secret(),
    )
    with transaction(engine) as session:
        count = select(func.count()).select_from(Webhook).where(Webhook.tenant == tenant)
        if (session.scalar(count) or 0) >= MAX_WEBHOOKS:
            raise Conflict(f"There are {MAX_WEBHOOKS} webhooks, the most there may be. Delete one.")
        session.add(webhook)
        record(session, TrailAction.WEBHOOK_CREATE, webhook.id, tenant=tenant)
        session.flush()
        session.refresh(webhook)
    log.info("webhook_created", webhook_id=webhook.id, tenant=tenant)
    return webhook


def _new_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def list_webhooks(
    engine: Engine, *, tenant: str, limit: int, before_id: str | None
) -> list[Webhook]:
    """Return a tenant's webhooks, the newest first, one more than `limit` if there are more."""
    statement = select(Webhook).where(Webhook.tenant == tenant)
    if before_id is not None:
        statement = statement.where(Webhook.id < before_id)
    with Session(engine) as session:
        return list(session.scalars(statement.order_by(Webhook.id.desc()).limit(limit + 1)))


def get_webhook(engine: Engine, *, tenant: str, webhook_id: str) -> Webhook:
    """Return a tenant's webhook.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    with Session(engine) as session:
        return _find(session, tenant, webhook_id)


def delete(engine: Engine, *, tenant: str, webhook_id: str) -> None:
    """Remove a webhook with its deliveries; what is owed is not sent any more.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    with transaction(engine) as session:
        session.delete(_find(session, tenant, webhook_id, lock=True))
        record(session, TrailAction.WEBHOOK_DELETE, webhook_id, tenant=tenant)
    log.info("webhook_deleted", webhook_id=webhook_id)


def rotate(engine: Engine, *, tenant: str, webhook_id: str) -> Webhook:
    """Give a webhook a new secret; for a day the one before it signs too.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    with transaction(engine) as session:
        webhook = _find(session, tenant, webhook_id, lock=True)
        webhook.previous_secret, webhook.secret = webhook.secret, _new_secret()
        webhook.previous_secret_until = datetime.now(UTC) + PREVIOUS_SECRET_KEPT
        record(session, TrailAction.WEBHOOK_ROTATE, webhook_id, tenant=tenant)
    log.info("webhook_rotated", webhook_id=webhook_id)
    return webhook


def send_test(engine: Engine, *, tenant: str, webhook_id: str) -> WebhookDelivery:
    """Owe a webhook a message that tells of nothing.

    Raises:
        NotFound: there is none, or it is another tenant's.
        Conflict: it is disabled.
    """
    with transaction(engine) as session:
        webhook = _find(session, tenant, webhook_id, lock_to_use=True)
        _check_enabled(webhook)
        delivery = new_delivery(webhook.id, TEST_TYPE, {"id": webhook.id})
        session.add(delivery)
        record(session, TrailAction.WEBHOOK_TEST, webhook_id, tenant=tenant)
        session.flush()
        session.refresh(delivery)
    return delivery


def list_deliveries(
    engine: Engine, *, tenant: str, webhook_id: str, limit: int, before_id: str | None
) -> list[WebhookDelivery]:
    """Return a webhook's deliveries, the newest first, one more than `limit` if there are more.

    Raises:
        NotFound: there is no such webhook, or it is another tenant's.
    """
    statement = select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)
    if before_id is not None:
        statement = statement.where(WebhookDelivery.id < before_id)
    with Session(engine) as session:
        _find(session, tenant, webhook_id)
        return list(session.scalars(statement.order_by(WebhookDelivery.id.desc()).limit(limit + 1)))


def redeliver(engine: Engine, *, tenant: str, webhook_id: str, delivery_id: str) -> WebhookDelivery:
    """Owe a webhook a message again, under the id that it had, with all tries anew.

    Raises:
        NotFound: there is no such delivery, or it is another tenant's.
        Conflict: the webhook is disabled, or the message is being sent.
    """
    with transaction(engine) as session:
        webhook = _find(session, tenant, webhook_id, lock_to_use=True)
        delivery = session.get(WebhookDelivery, delivery_id, with_for_update=True)
        if delivery is None or delivery.webhook_id != webhook.id:
            raise NotFound(f"There is no delivery {delivery_id!r} of a webhook {webhook_id!r}.")
        _check_enabled(webhook)
        if delivery.lease_until is not None and delivery.lease_until > datetime.now(UTC):
            raise Conflict(
                "The message is being sent just now.",
                state=delivery.state,
                headers={"Retry-After": "10"},
            )
        delivery.state = DeliveryState.PENDING
        delivery.next_attempt_at = func.now()
        delivery.lease_until = delivery.finished_at = None
        delivery.tries_left = MAX_TRIES
        record(session, TrailAction.DELIVERY_RESEND, delivery_id, tenant=tenant)
        session.flush()
        session.refresh(delivery)
    return delivery


def _check_enabled(webhook: Webhook) -> None:
    if webhook.disabled_at is not None:
        raise Conflict(f"The webhook is disabled: {webhook.disabled_reason} Make a new one.")


def _find(
    session: Session,
    tenant: str,
    webhook_id: str,
    *,
    lock: bool = False,
    lock_to_use: bool = False,
) -> Webhook:
    statement = select(Webhook).where(Webhook.id == webhook_id, Webhook.tenant == tenant)
    if lock or lock_to_use:
        statement = statement.with_for_update(read=lock_to_use, key_share=lock_to_use)
    webhook = session.scalars(statement).one_or_none()
    if webhook is None:
        raise NotFound(f"There is no webhook {webhook_id!r}.")
    return webhook
