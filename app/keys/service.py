"""API keys: made once, shown once, kept as a hash; rotated without a gap."""

import hashlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine, bindparam, func, literal_column, or_, select, update
from sqlalchemy.orm import Session

from app.db import new_id, transaction
from app.errors import Conflict, NotFound
from app.keys.models import ApiKey
from app.keys.scopes import ALL_SCOPES, Scope, in_order
from app.limits.models import TenantLimits
from app.trail.service import TrailAction, record

KEY_PREFIX = "wnw_"
LAST_USED_PRECISION = "1 minute"  # a write per request would cost more than it tells
SOON = timedelta(days=14)
SOON_SHARE = 1 / 4  # of a key's life; one that is made for a week is not near its end at once


@dataclass(frozen=True)
class Caller:
    """Who calls: the tenant and the key; no key where none are used.

    Attributes:
        requests_per_minute: of the key or its tenant; None for the setting, 0 for no limit.
        expires_at: when what was sent opens no more.
        is_ending: whether that is soon, so that it is time for a new secret.
    """

    tenant: str
    key_name: str | None = None
    key_id: str | None = None
    scopes: frozenset[str] = ALL_SCOPES
    requests_per_minute: int | None = None
    expires_at: datetime | None = None
    is_ending: bool = False


@dataclass(frozen=True)
class NewKey:
    """A fresh secret; it is never stored and cannot be shown again."""

    id: str
    tenant: str
    name: str
    secret: str
    expires_at: datetime
    scopes: list[str]


def is_ending(key: ApiKey) -> bool:
    """Return whether it is time to rotate a key: it ends soon, by the length of its life."""
    life = key.expires_at - key.created_at
    return key.expires_at - datetime.now(UTC) < min(SOON, SOON_SHARE * life)


def digest_of(secret: str) -> bytes:
    """Return what is kept of a secret."""
    return hashlib.sha256(secret.encode()).digest()


def _new_secret() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def _shown(key: ApiKey, secret: str) -> NewKey:
    scopes = in_order(key.scopes if key.scopes is not None else ALL_SCOPES)
    return NewKey(key.id, key.tenant, key.name, secret, key.expires_at, scopes)


def create_key(
    engine: Engine,
    *,
    tenant: str,
    name: str,
    valid_days: int,
    scopes: Collection[Scope] | None = None,
    requests_per_minute: int | None = None,
) -> NewKey:
    """Make a key for a tenant: 32 random bytes, of which only the SHA-256 is stored.

    Args:
        engine: the whole database.
        tenant: whose things it opens.
        name: what it is for.
        valid_days: how long it opens them.
        scopes: what it may do; all by default, those that later versions add included.
        requests_per_minute: how often it may call; by default as its tenant may, 0: no limit.
    """
    secret = _new_secret()
    key = ApiKey(
        id=new_id("key"),
        tenant=tenant,
        name=name,
        sha256=digest_of(secret),
        expires_at=datetime.now(UTC) + timedelta(days=valid_days),
        scopes=None if scopes is None else in_order(scopes),
        requests_per_minute=requests_per_minute,
    )
    with transaction(engine) as session:
        session.add(key)
        record(session, TrailAction.KEY_CREATE, key.id, tenant=tenant)
    return _shown(key, secret)


def rotate_key(engine: Engine, key_id: str, *, valid_days: int, overlap_hours: float) -> NewKey:
    """Give a key a new secret; the one before it opens on for a while, but not beyond its date.

    Raises:
        NotFound: there is no such key.
        Conflict: it was revoked.
    """
    secret = _new_secret()
    now = datetime.now(UTC)
    with transaction(engine) as session:
        key = _find(session, key_id)
        if key.revoked_at is not None:
            raise Conflict(f"The key {key_id} was revoked. Make a new one.")
        key.previous_sha256 = key.sha256
        key.previous_until = min(key.expires_at, now + timedelta(hours=overlap_hours))
        key.sha256 = digest_of(secret)
        key.expires_at = now + timedelta(days=valid_days)
        record(session, TrailAction.KEY_ROTATE, key.id, tenant=key.tenant)
    return _shown(key, secret)


def list_keys(engine: Engine) -> list[ApiKey]:
    """Return all keys, oldest first."""
    with Session(engine) as session:
        return list(session.scalars(select(ApiKey).order_by(ApiKey.id)))


def revoke_key(engine: Engine, key_id: str) -> None:
    """End a key at once, with the secret before the last rotation.

    Raises:
        NotFound: there is no such key.
    """
    with transaction(engine) as session:
        key = _find(session, key_id)
        if key.revoked_at is None:
            key.revoked_at = datetime.now(UTC)
            record(session, TrailAction.KEY_REVOKE, key.id, tenant=key.tenant)


def _find(session: Session, key_id: str) -> ApiKey:
    key = session.get(ApiKey, key_id, with_for_update=True)
    if key is None:
        raise NotFound(f"There is no key {key_id!r}.")
    return key


_IS_OLD = (ApiKey.previous_sha256 == bindparam("digest")) & (ApiKey.previous_until > func.now())
FIND_KEY = (
    select(
        *(ApiKey.id, ApiKey.name, ApiKey.tenant, ApiKey.scopes, ApiKey.created_at),
        *(ApiKey.expires_at, ApiKey.previous_until, _IS_OLD.label("is_old_secret")),
        func.coalesce(ApiKey.requests_per_minute, TenantLimits.requests_per_minute).label(
            "requests_per_minute"
        ),
        or_(
            ApiKey.last_used_at.is_(None),
            ApiKey.last_used_at < func.now() - literal_column(f"interval '{LAST_USED_PRECISION}'"),
        ).label("is_use_to_note"),
    )
    .outerjoin(TenantLimits, TenantLimits.tenant == ApiKey.tenant)
    .where(
        (ApiKey.sha256 == bindparam("digest")) | _IS_OLD,
        ApiKey.revoked_at.is_(None),
        ApiKey.expires_at > func.now(),
    )
)
"""The key with a `digest`, unless it is revoked or over: asked at every call, so built once."""


def caller_of(engine: Engine, secret: str) -> Caller | None:
    """Return whom a key belongs to, or None when it is unknown, revoked or over."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        key = connection.execute(FIND_KEY, {"digest": digest_of(secret)}).one_or_none()
        if key is None:
            return None
        if key.is_use_to_note:
            noted = update(ApiKey).where(ApiKey.id == key.id)
            connection.execute(noted.values(last_used_at=func.now()))
        return as_caller(key)


def as_caller(key: Any) -> Caller:  # noqa: ANN401  a row of FIND_KEY
    """Return whom a row of `FIND_KEY` belongs to."""
    return Caller(
        key.tenant,
        key.name,
        key.id,
        scopes=ALL_SCOPES if key.scopes is None else frozenset(key.scopes),
        requests_per_minute=key.requests_per_minute,
        expires_at=key.previous_until if key.is_old_secret else key.expires_at,
        is_ending=key.is_old_secret or is_ending(key),
    )


def has_active_keys(engine: Engine) -> bool:
    """Return whether anybody could call a server that asks for keys."""
    statement = select(ApiKey.id).where(ApiKey.revoked_at.is_(None), ApiKey.expires_at > func.now())
    with Session(engine) as session:
        return session.scalars(statement.limit(1)).first() is not None
