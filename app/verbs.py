"""What the verbs of the command line do."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app import backup, supervisor
from app.backup import BackupRefused, Manifest
from app.db import make_engine
from app.embedded import (
    DataDirectoryInUse,
    ServerDidNotStart,
    data_directory,
    embedded_postgres,
)
from app.errors import Conflict, NotFound, NotReady
from app.keys import service as keys
from app.keys.models import ApiKey
from app.keys.scopes import read_scopes
from app.keys.service import NewKey
from app.limits import quotas
from app.limits.models import TenantLimits
from app.migrate import MigrationBlocked
from app.migrate import migrate as upgrade
from app.server import RefusedToStart, open_socket, run_api
from app.settings import MissingSetting, Settings, get_settings
from app.shared_files import share_files
from app.work import purging
from app.work.models import WorkerHeartbeat
from app.work.purging import Purged

EXPLAINED = (
    BackupRefused,
    Conflict,
    DataDirectoryInUse,
    MigrationBlocked,
    MissingSetting,
    NotFound,
    NotReady,
    OperationalError,
    RefusedToStart,
    ServerDidNotStart,
    ValidationError,
)


def explain(error: Exception) -> str:
    """Return one of the explained errors as a sentence."""
    if isinstance(error, (Conflict, NotReady)):
        return str(error.detail)
    if isinstance(error, NotFound):
        return f"{error.detail} `winnow keys list` shows those there are."
    if isinstance(error, OperationalError):
        return f"The database cannot be reached: {error.orig}"
    if isinstance(error, ValidationError):
        return "; ".join(
            f"WINNOW_{str(item['loc'][0]).upper()}: {item['msg']}" for item in error.errors()
        )
    return str(error)


def serve(
    *, host: str | None, port: int | None, data_dir: Path | None, num_workers: int | None
) -> None:
    """Run the whole service until it is told to stop."""
    if num_workers != 0:
        _require_torch()
    supervisor.serve(_settings(host=host, port=port, data_dir=data_dir), num_workers=num_workers)


def api(*, host: str | None, port: int | None) -> None:
    """Run the API alone, with keys."""
    settings = _settings(host=host, port=port, require_keys=True)
    with open_socket(settings.host, settings.port) as listener:
        run_api(settings, listener)


def worker(*, queues: Sequence[str]) -> int:
    """Run one worker on some queues and return its exit code."""
    _require_torch()
    from workers.celery_app import run_worker  # noqa: PLC0415  the API is installed without it

    return run_worker(queues)


def check_worker() -> int:
    """Return 0 when a worker of this host gave a sign of life of late, else 1."""
    settings = get_settings()
    engine = make_engine(settings.require_database_url())
    is_of_this_host = WorkerHeartbeat.name.startswith(f"{socket.gethostname()}:", autoescape=True)
    age = timedelta(seconds=settings.worker_stale_seconds)
    alive = select(WorkerHeartbeat.name).where(
        is_of_this_host, WorkerHeartbeat.seen_at > func.now() - age
    )
    with Session(engine) as session:
        return 0 if session.scalars(alive.limit(1)).first() else 1


def migrate() -> None:
    """Bring the database to the current schema."""
    engine = make_engine(get_settings().require_database_url())
    upgrade(engine)
    engine.dispose()


def create_key(
    *,
    data_dir: Path | None,
    tenant: str,
    name: str,
    valid_days: int,
    scopes: str | None,
    requests_per_minute: int | None,
) -> NewKey:
    """Make an API key.

    Raises:
        ValueError: a scope that there is not.
    """
    chosen = None if scopes is None else read_scopes(scopes)
    with _database(data_dir) as (engine, _):
        return keys.create_key(
            engine,
            tenant=tenant,
            name=name,
            valid_days=valid_days,
            scopes=chosen,
            requests_per_minute=requests_per_minute,
        )


def rotate_key(
    key_id: str, *, data_dir: Path | None, valid_days: int, overlap_hours: float
) -> NewKey:
    """Give a key a new secret.

    Raises:
        NotFound: there is no such key.
        Conflict: it was revoked.
    """
    with _database(data_dir) as (engine, _):
        return keys.rotate_key(engine, key_id, valid_days=valid_days, overlap_hours=overlap_hours)


def set_limits(tenant: str, *, data_dir: Path | None, changes: dict[str, int | None]) -> None:
    """Set some limits of a tenant."""
    with _database(data_dir) as (engine, _):
        quotas.set_limits(engine, tenant, changes)


def list_limits(*, data_dir: Path | None) -> list[TenantLimits]:
    """Return the tenants that have limits of their own."""
    with _database(data_dir) as (engine, _):
        return quotas.list_limits(engine)


def list_keys(*, data_dir: Path | None) -> list[ApiKey]:
    """Return all keys."""
    with _database(data_dir) as (engine, _):
        return keys.list_keys(engine)


def standing_of(key: ApiKey) -> str:
    """Return in words how long a key opens."""
    until = f"until {key.expires_at:%Y-%m-%d}"
    now = datetime.now(UTC)
    if key.revoked_at:
        return "revoked"
    if key.expires_at <= now:
        return f"over since {key.expires_at:%Y-%m-%d}"
    if keys.is_ending(key):
        until += " (soon: rotate it)"
    if key.previous_until and key.previous_until > now:
        until += f", its old secret {key.previous_until:%Y-%m-%d %H:%M} UTC"
    return until


def revoke_key(key_id: str, *, data_dir: Path | None) -> None:
    """End a key.

    Raises:
        NotFound: there is no such key.
    """
    with _database(data_dir) as (engine, _):
        keys.revoke_key(engine, key_id)


def back_up(*, target: Path, data_dir: Path | None, with_cache: bool) -> Manifest:
    """Copy the service's database and files, while it runs or not.

    Raises:
        BackupRefused: the folder holds something, or the database cannot be dumped.
    """
    with _database(data_dir, migrated=False) as (engine, settings):
        return backup.back_up(engine, settings, target, with_cache=with_cache)


def restore(*, source: Path, data_dir: Path | None) -> list[str]:
    """Set a copy up in an empty place; return the ids of audits whose results it lacks.

    Raises:
        BackupRefused: the copy is not whole, or the place is not empty.
        DataDirectoryInUse: a service runs there.
    """
    with ExitStack() as stack:
        if _settings(data_dir=data_dir).database_url is None:
            stack.enter_context(data_directory(_settings(data_dir=data_dir).data_dir))
        engine, settings = stack.enter_context(_database(data_dir, migrated=False))
        return backup.restore(engine, settings, source)


def purge(*, days: float | None, dry_run: bool, data_dir: Path | None) -> Purged:
    """Delete audits that ended longer ago than some days, and files that belong to nothing."""
    with _database(data_dir) as (engine, settings):
        return purging.purge(engine, settings, days=days, dry_run=dry_run)


def _require_torch() -> None:
    if find_spec("torch") is None:
        raise RefusedToStart(
            "This installation has no torch, which workers need. Install the worker extra: "
            "pip install 'winnow[worker]'"
        )


def _settings(**options: Any) -> Settings:
    """Return the environment's settings with the options that were given on top."""
    given = {name: value for name, value in options.items() if value is not None}
    if "data_dir" in given:
        given["data_dir"] = given["data_dir"].absolute()
    return get_settings().model_copy(update=given)


@contextmanager
def _database(data_dir: Path | None, *, migrated: bool = True) -> Iterator[tuple[Engine, Settings]]:
    """Connect to the database of the settings, or else to the embedded one, running or not."""
    settings = _settings(data_dir=data_dir)
    share_files(settings)
    with ExitStack() as stack:
        if settings.database_url is None:
            url = stack.enter_context(embedded_postgres(settings.data_dir))
            settings = settings.model_copy(update={"database_url": SecretStr(url)})
        engine = make_engine(settings.require_database_url())
        stack.callback(engine.dispose)
        if migrated:
            upgrade(engine)
        yield engine, settings
