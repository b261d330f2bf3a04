"""Bring a database to the current schema."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, text

import migrations

MIGRATION_LOCK = (
    0x77_69_6E_6E  # "winn": two services that start at once migrate one after the other
)


def alembic_config() -> Config:
    """Return Alembic's configuration without a file on disk."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return config


def migrate(engine: Engine, revision: str = "head") -> None:
    """Upgrade (or downgrade) the schema to `revision` in one transaction."""
    config = alembic_config()
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        config.attributes["connection"] = connection
        if revision == "base" or revision.startswith("-"):
            command.downgrade(config, revision)
        else:
            command.upgrade(config, revision)
