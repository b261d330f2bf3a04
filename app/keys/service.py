"""API keys: made once, shown once, kept as a hash."""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine, func, or_, select, update
from sqlalchemy.orm import Session

from app.db import new_id, transaction
from app.errors import NotFound
from app.keys.models import ApiKey

KEY_PREFIX = "wnw_"
LAST_USED_PRECISION = timedelta(minutes=1)  # a write per request would cost more than it tells


@dataclass(frozen=True)
class Caller:
    """Who calls: the tenant, and the name of the key; None where no keys are used."""

    tenant: str
    key_name: str | None = None


@dataclass(frozen=True)
class NewKey:
    """A fresh key; `secret` is never stored and cannot be shown again."""

    id: str
    secret: str
    expires_at: datetime


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def create_key(engine: Engine, *, tenant: str, name: str, valid_days: int) -> NewKey:
    """Make a key for a tenant: 32 random bytes, of which only the SHA-256 is stored."""
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(
        id=new_id("key"),
        tenant=tenant,
        name=name,
        sha256=_digest(secret),
        expires_at=datetime.now(UTC) + timedelta(days=valid_days),
    )
    with transaction(engine) as session:
        session.add(key)
    return NewKey(key.id, secret, key.expires_at)


def list_keys(engine: Engine) -> list[ApiKey]:
    """Return all keys, oldest first."""
    with Session(engine) as session:
        return list(session.scalars(select(ApiKey).order_by(ApiKey.id)))


def revoke_key(engine: Engine, key_id: str) -> None:
    """End a key at once.

    Raises:
        NotFound: there is no such key.
    """
    with transaction(engine) as session:
        key = session.get(ApiKey, key_id)
        if key is None:
            raise NotFound(f"There is no key {key_id!r}.")
        key.revoked_at = key.revoked_at or datetime.now(UTC)


def caller_of(engine: Engine, secret: str) -> Caller | None:
    """Return whom a key belongs to, or None when it is unknown, revoked or over."""
    with transaction(engine) as session:
        key = session.scalars(
            select(ApiKey).where(
                ApiKey.sha256 == _digest(secret),
                ApiKey.revoked_at.is_(None),
                ApiKey.expires_at > func.now(),
            )
        ).one_or_none()
        if key is None:
            return None
        session.execute(
            update(ApiKey)
            .where(
                ApiKey.id == key.id,
                or_(
                    ApiKey.last_used_at.is_(None),
                    ApiKey.last_used_at < func.now() - LAST_USED_PRECISION,
                ),
            )
            .values(last_used_at=func.now())
        )
        return Caller(key.tenant, key.name)


def has_active_keys(engine: Engine) -> bool:
    """Return whether anybody could call a server that asks for keys."""
    statement = select(ApiKey.id).where(ApiKey.revoked_at.is_(None), ApiKey.expires_at > func.now())
    with Session(engine) as session:
        return session.scalars(statement.limit(1)).first() is not None
