"""Idempotency keys: the same key with the same body is the same audit (SERVICE.md, section 1)."""

import hashlib
import json

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.audits.models import Audit, IdempotencyKey
from app.audits.repository import find_audit
from app.audits.schemas import AuditRequest
from app.errors import Conflict, InvalidRequest

SUBMIT_ROUTE = "POST /v1/audits"


def body_digest(request: AuditRequest) -> str:
    """Return the SHA-256 of what a request says; spaces and the order of fields do not count."""
    body = request.model_dump(mode="json", exclude_unset=True)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def claim_key(session: Session, *, tenant: str, key: str, digest: str, audit_id: str) -> bool:
    """Bind a key to a new audit in the caller's transaction.

    A twin that is in another transaction is waited for.

    Returns:
        Whether the key was free.
    """
    row = insert(IdempotencyKey).values(
        tenant=tenant, route=SUBMIT_ROUTE, key=key, body_sha256=digest, audit_id=audit_id
    )
    claimed = session.execute(row.on_conflict_do_nothing().returning(IdempotencyKey.key))
    return claimed.first() is not None


def find_first_answer(session: Session, *, tenant: str, key: str, digest: str) -> Audit | None:
    """Return the audit that a key was given before; None for a key that is new.

    Raises:
        InvalidRequest: the key came with another body.
        Conflict: the key's audit was deleted.
    """
    bound = session.scalars(
        select(IdempotencyKey).where(
            IdempotencyKey.tenant == tenant,
            IdempotencyKey.route == SUBMIT_ROUTE,
            IdempotencyKey.key == key,
        )
    ).one_or_none()
    if bound is None:
        return None
    if bound.body_sha256 != digest:
        raise InvalidRequest.at(
            "header.Idempotency-Key",
            "This key came with another body before. Send the body as it was, or a new key for a "
            "new audit.",
        )
    audit = find_audit(session, tenant, bound.audit_id)
    if audit is None:
        raise Conflict(
            f"This key's audit, {bound.audit_id}, was deleted. Send a new key for a new audit."
        )
    return audit
