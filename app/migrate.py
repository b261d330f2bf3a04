"""Bring a database to the current schema."""

import time
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, Engine, literal, literal_column, select, text
from sqlalchemy.exc import OperationalError

import migrations

MIGRATION_LOCK = (
    0x77_69_6E_6E  # "winn": two services that start at once migrate one after the other
)


TENANT_ROLE = "winnow_tenant"
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds between the tries

log = structlog.get_logger()


class MigrationBlocked(Exception):
    """The tables could not be had; the message says what to do."""


def make_tenant_role(connection: Connection) -> None:
    """Make the role of callers' queries where the server lacks it, as migration 0010 does."""
    known = select(literal(1)).where(literal_column("rolname") == TENANT_ROLE)
    if not connection.scalar(known.select_from(text("pg_roles"))):
        connection.execute(text(f"CREATE ROLE {TENANT_ROLE} NOLOGIN"))
    connection.execute(text(f"GRANT {TENANT_ROLE} TO CURRENT_USER"))


def head_revision() -> str | None:
    """Return the schema that this version needs."""
    return ScriptDirectory.from_config(alembic_config()).get_current_head()


def current_revision(engine: Engine) -> str | None:
    """Return the schema that a database has; None without tables."""
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def alembic_config() -> Config:
    """Return Alembic's configuration without a file on disk."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return config


def migrate(engine: Engine, revision: str = "head") -> None:
    """Upgrade (or downgrade) the schema to `revision` in one transaction.

    On a live database a change waits at most a few seconds for those who use a table, and gives
    way to those who wait behind it before it tries again.

    Raises:
        MigrationBlocked: somebody kept a table all the time; nothing was changed.
    """
    for pause in (*PAUSES, None):
        try:
            _migrate(engine, revision)
        except OperationalError as error:
            if not isinstance(error.orig, LockNotAvailable):
                raise
            log.warning("migration_waits", again_in_seconds=pause)
            if pause is None:
                raise MigrationBlocked(
                    "Others use the tables all the time, so the schema could not be changed, and "
                    "was not. Look for long transactions in pg_stat_activity, and migrate again."
                ) from error
            time.sleep(pause)
        else:
            return


def _migrate(engine: Engine, revision: str) -> None:
    config = alembic_config()
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        config.attributes["connection"] = connection
        if revision == "base" or revision.startswith("-"):
            command.downgrade(config, revision)
        else:
            command.upgrade(config, revision)
