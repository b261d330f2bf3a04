"""Who did what: written in the transaction of the change itself, so that neither is without it."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.db import new_id
from app.trail.models import TrailEntry

OPERATOR = "operator"


class TrailAction(StrEnum):
    """What can be done."""

    AUDIT_SUBMIT = "audit.submit"
    AUDIT_CANCEL = "audit.cancel"
    AUDIT_DELETE = "audit.delete"
    RANKING_SUBMIT = "ranking.submit"
    RANKING_DELETE = "ranking.delete"
    EXPERIMENT_SUBMIT = "experiment.submit"
    EXPERIMENT_CANCEL = "experiment.cancel"
    EXPERIMENT_DELETE = "experiment.delete"
    DATASET_UPLOAD = "dataset.upload"
    DATASET_DELETE = "dataset.delete"
    DECISION_MAKE = "decision.make"
    DECISION_UNDO = "decision.undo"
    WEBHOOK_CREATE = "webhook.create"
    WEBHOOK_ROTATE = "webhook.rotate"
    WEBHOOK_TEST = "webhook.test"
    WEBHOOK_DELETE = "webhook.delete"
    DELIVERY_RESEND = "delivery.resend"
    KEY_CREATE = "key.create"
    KEY_ROTATE = "key.rotate"
    KEY_REVOKE = "key.revoke"
    LIMITS_SET = "limits.set"
    SIGN_IN = "page.sign_in"


@dataclass(frozen=True)
class Actor:
    """Who acts: a key by its id and name, or the operator at the command line."""

    name: str = OPERATOR
    key_id: str | None = None
    request_id: str | None = None


def acting(engine: Engine, actor: Actor) -> Engine:
    """Return the engine for what somebody does: `record` finds the name there."""
    return engine.execution_options(winnow_actor=actor)


def record(session: Session, action: TrailAction, object_id: str, *, tenant: str) -> None:
    """Note a change, if the caller's transaction holds.

    Args:
        session: of an engine of `acting`; without one it is the operator who acts.
        action: what is done.
        object_id: what it is done to.
        tenant: whose that is.
    """
    actor = session.get_bind().get_execution_options().get("winnow_actor") or Actor()
    session.add(
        TrailEntry(
            id=new_id("trl"),
            tenant=tenant,
            key_id=actor.key_id,
            actor=actor.name,
            action=action.value,
            object_id=object_id,
            request_id=actor.request_id,
        )
    )


def list_entries(
    session: Session,
    tenant: str,
    *,
    limit: int,
    before_id: str | None = None,
    action: TrailAction | None = None,
    object_id: str | None = None,
    key_id: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
) -> list[TrailEntry]:
    """Return a tenant's entries, the newest first, one more than `limit` if there are more."""
    conditions = [TrailEntry.tenant == tenant]
    if before_id is not None:
        conditions.append(TrailEntry.id < before_id)
    if action is not None:
        conditions.append(TrailEntry.action == action.value)
    if object_id is not None:
        conditions.append(TrailEntry.object_id == object_id)
    if key_id is not None:
        conditions.append(TrailEntry.key_id == key_id)
    if created_after is not None:
        conditions.append(TrailEntry.at >= created_after)
    if created_before is not None:
        conditions.append(TrailEntry.at < created_before)
    statement = select(TrailEntry).where(*conditions).order_by(TrailEntry.id.desc())
    return list(session.scalars(statement.limit(limit + 1)))
