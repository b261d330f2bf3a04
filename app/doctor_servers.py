"""What `winnow doctor` finds out from the database and the broker."""

import time
from collections.abc import Iterator
from datetime import timedelta

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError
from sqlalchemy import Engine, func, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from winnow.commands.findings import Finding

from app.db import make_engine
from app.health import check_broker, check_worker
from app.jobs import make_celery
from app.keys.models import ApiKey
from app.migrate import TENANT_ROLE, current_revision, head_revision
from app.settings import Settings
from app.version import VERSION
from app.work.models import WorkerHeartbeat

MOST_SKEW_SECONDS = 5.0
EXPIRING = timedelta(days=14)
IN_USE = timedelta(days=30)

# the tables that a policy of row-level security limits, and those whose policy is not enforced
_POLICIES = text(
    "SELECT count(*), count(*) FILTER (WHERE NOT relrowsecurity) FROM pg_class "
    "WHERE oid IN (SELECT polrelid FROM pg_policy)"
)
_MAY_BE_TENANT = text("SELECT pg_has_role(current_user, :role, 'MEMBER')")


def check_servers(settings: Settings) -> Iterator[Finding]:
    """Ask the database, the broker and, in the database, for workers and keys."""
    engine = make_engine(settings.require_database_url())
    try:
        database = check_database(engine)
        yield database
        if database.status == "ok":
            yield check_tenants(engine)
            yield check_clock(engine)
        if settings.broker_url is None:
            advice = "Set it to a Redis or Valkey address, redis://host:6379/0."
            yield Finding("broker", "fail", "WINNOW_BROKER_URL is not set.", advice)
        else:
            yield check_broker_server(make_celery(settings))
        workers = check_worker(engine, settings)
        yield Finding("workers", "ok" if workers.ok else "fail", workers.detail)
        if database.status == "ok":
            yield check_versions(engine, settings)
            yield check_keys(engine, settings)
    finally:
        engine.dispose()


def check_database(engine: Engine) -> Finding:
    """Compare the database's schema with what this version needs."""
    head = head_revision()
    try:
        current = current_revision(engine)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        advice = "Start PostgreSQL, or correct WINNOW_DATABASE_URL."
        return Finding("database", "fail", f"It cannot be reached: {reason}", advice)
    if current != head:
        has = f"It has the schema {current}" if current else "It has no tables"
        return Finding(
            "database", "fail", f"{has}; this version needs {head}.", "Run `winnow migrate`."
        )
    return Finding("database", "ok", f"It answers and has the schema {head}.")


def check_tenants(engine: Engine) -> Finding:
    """Look whether a caller's queries are limited to its tenant by the database itself."""
    try:
        with engine.connect() as connection:
            is_member = connection.scalar(_MAY_BE_TENANT, {"role": TENANT_ROLE})
            num_tables, num_off = connection.execute(_POLICIES).one()
    except SQLAlchemyError:  # there is no such role
        is_member, num_tables, num_off = False, 0, 0
    if not is_member:
        advice = f"As an administrator: CREATE ROLE {TENANT_ROLE} NOLOGIN; GRANT it to the user."
        detail = f"The database's user may not act as {TENANT_ROLE}: callers' queries fail."
        return Finding("tenants", "fail", detail, advice)
    if num_off or not num_tables:
        detail = f"Row-level security is off for {num_off} of {num_tables} tables with policies."
        advice = "ALTER TABLE … ENABLE ROW LEVEL SECURITY on each; see migrations/versions/0010."
        return Finding("tenants", "fail", detail, advice)
    return Finding("tenants", "ok", f"Row-level security limits callers in {num_tables} tables.")


def check_clock(engine: Engine) -> Finding:
    """Compare this machine's clock with the database's, which leases and dates go by."""
    with engine.connect() as connection:
        connection.scalar(select(1))
        before = time.time()
        of_database = float(
            connection.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0
        )
        ahead = (before + time.time()) / 2 - of_database
    if abs(ahead) > MOST_SKEW_SECONDS:
        detail = f"It is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the database's."
        return Finding("clock", "warn", detail, "Let NTP set the clocks of both machines.")
    return Finding("clock", "ok", f"Within {MOST_SKEW_SECONDS:.0f} s of the database's.")


def check_broker_server(celery: Celery) -> Finding:
    """Look whether the broker answers and never throws messages away."""
    broker = check_broker(celery)
    if not broker.ok:
        return Finding("broker", "fail", broker.detail)
    try:
        with celery.connection_for_read() as connection:
            memory = connection.default_channel.client.info("memory")
    except (OperationalError, RedisError, OSError) as error:
        return Finding("broker", "warn", f"It does not tell its policy: {error}")
    policy = str(memory.get("maxmemory_policy", "unknown"))
    if policy != "noeviction":
        detail = f"{broker.detail} Its maxmemory-policy is {policy}: full, it drops messages."
        return Finding("broker", "warn", detail, "Set maxmemory-policy to noeviction.")
    return Finding("broker", "ok", f"{broker.detail} It evicts nothing.")


def check_versions(engine: Engine, settings: Settings) -> Finding:
    """Compare the workers' versions with what is installed here."""
    stale = timedelta(seconds=settings.worker_stale_seconds)
    alive = select(WorkerHeartbeat).where(WorkerHeartbeat.seen_at > func.now() - stale)
    with Session(engine) as session:
        others = {
            worker.name: worker.engine_version
            for worker in session.scalars(alive)
            if worker.engine_version != VERSION
        }
    if others:
        named = ", ".join(f"{name} has {version}" for name, version in sorted(others.items()))
        advice = "Workers of two versions must not run at once: docs/upgrading.md."
        return Finding("versions", "fail", f"Here is {VERSION}; {named}.", advice)
    return Finding("versions", "ok", f"Every worker has {VERSION}, as this machine.")


def check_keys(engine: Engine, settings: Settings) -> Finding:
    """Look for keys in use that end soon."""
    ends_soon = select(ApiKey).where(
        ApiKey.revoked_at.is_(None),
        ApiKey.expires_at.between(func.now(), func.now() + EXPIRING),
        ApiKey.last_used_at > func.now() - IN_USE,
    )
    active = select(func.count()).where(ApiKey.revoked_at.is_(None), ApiKey.expires_at > func.now())
    with Session(engine) as session:
        ending = [
            f"{key.id} ({key.tenant}, {key.name}) on {key.expires_at:%Y-%m-%d}"
            for key in session.scalars(ends_soon.order_by(ApiKey.expires_at))
        ]
        num_active = session.scalar(active) or 0
    if ending:
        detail = f"In use, and ending soon: {'; '.join(ending)}."
        return Finding("keys", "warn", detail, "Make new ones with `winnow keys create`.")
    if not num_active and settings.require_keys:
        return Finding("keys", "warn", "There are none.", "`winnow keys create` makes one.")
    return Finding("keys", "ok", f"{num_active} are valid.")
