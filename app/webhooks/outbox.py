"""What webhooks are owed, written in the transaction that ends an audit, ranking or experiment."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from zlib import crc32

from sqlalchemy import any_, func, literal, select
from sqlalchemy.orm import Session

from app.audits.assemble import audit_links, ranking_links
from app.audits.models import Audit, AuditState, Ranking, RankingState
from app.db import new_id
from app.experiments.standing import Standing
from app.webhooks.models import EventType, Webhook, WebhookDelivery

_EXPERIMENT_LOCK = 0x77_68_6B  # a class of advisory locks


def owe_end(session: Session, ended: Audit | Ranking) -> None:
    """Owe every webhook that asks for it a message of an end, if the caller's transaction holds.

    The last audit of an experiment is the experiment's end too.
    """
    data: dict[str, Any] = {"id": ended.id}
    if isinstance(ended, Ranking):
        ranking_state = RankingState(ended.state)
        data |= {"audit_id": ended.audit_id, "links": ranking_links(ended, ranking_state)}
        kind = "ranking"
    else:
        data |= {"links": audit_links(ended.id, AuditState(ended.state))}
        if ended.experiment_id is not None:
            data["experiment_id"] = ended.experiment_id
        kind = "audit"
    data |= {"state": ended.state}
    if ended.error_code is not None:
        data |= {"error": {"code": ended.error_code, "message": ended.error_message}}
    _owe(session, ended.tenant, EventType(f"{kind}.{ended.state}"), data)
    if isinstance(ended, Audit) and ended.experiment_id is not None:
        _owe_experiment(session, ended.tenant, ended.experiment_id)


def _owe_experiment(session: Session, tenant: str, experiment_id: str) -> None:
    # Two last audits that end at once do not see each other; the lock lets the second one see.
    number = crc32(experiment_id.encode()) - 2**31
    session.execute(select(func.pg_advisory_xact_lock(_EXPERIMENT_LOCK, number)))
    columns = (Audit.state, Audit.version, Audit.progress)
    audits: list[Any] = list(
        session.execute(select(*columns).where(Audit.experiment_id == experiment_id))
    )
    standing = Standing(experiment_id, audits)
    if standing.state.is_final:
        data = {"id": experiment_id, "state": standing.state, "links": standing.links}
        _owe(session, tenant, EventType.EXPERIMENT_DONE, data)


def _owe(session: Session, tenant: str, type_: EventType, data: Mapping[str, Any]) -> None:
    # Held, so that none is deleted before the message that refers to it is there.
    asking = select(Webhook.id).where(
        Webhook.tenant == tenant,
        Webhook.disabled_at.is_(None),
        literal(type_.value) == any_(Webhook.events),
    )
    for webhook_id in session.scalars(asking.with_for_update(read=True, key_share=True)):
        session.add(new_delivery(webhook_id, type_, data))


def new_delivery(webhook_id: str, type_: str, data: Mapping[str, Any]) -> WebhookDelivery:
    """Return a message that is owed at once."""
    timestamp = datetime.now(UTC).isoformat()
    payload = {"type": str(type_), "timestamp": timestamp, "data": dict(data)}
    return WebhookDelivery(
        id=new_id("msg"), webhook_id=webhook_id, type=str(type_), payload=payload
    )
