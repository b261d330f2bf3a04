"""Alembic's entry: run migrations on the connection that the caller hands over."""

from alembic import context
from sqlalchemy import Connection, create_engine, text

import app.tables  # noqa: F401  registers every table
from app.db import Base
from app.settings import get_settings

# A change of a table waits for what reads it, and whoever comes later waits behind the change: so
# it gives up soon, and is tried again (app/migrate.py).
LOCK_TIMEOUT = "SET LOCAL lock_timeout = '3s'"


def run_on(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata)
    with context.begin_transaction():
        connection.execute(text(LOCK_TIMEOUT))
        context.run_migrations()


def run_migrations() -> None:
    connection = context.config.attributes.get("connection")
    if connection is not None:
        run_on(connection)
        return
    engine = create_engine(get_settings().require_database_url())
    with engine.begin() as fresh:
        run_on(fresh)


run_migrations()
