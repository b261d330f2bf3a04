"""Alembic's entry: run migrations on the connection that the caller hands over."""

from alembic import context
from sqlalchemy import create_engine

import app.tables  # noqa: F401  registers every table
from app.db import Base
from app.settings import get_settings


def run_migrations() -> None:
    connection = context.config.attributes.get("connection")
    if connection is not None:
        context.configure(connection=connection, target_metadata=Base.metadata)
        with context.begin_transaction():
            context.run_migrations()
        return
    engine = create_engine(get_settings().require_database_url())
    with engine.begin() as fresh:
        context.configure(connection=fresh, target_metadata=Base.metadata)
        context.run_migrations()


run_migrations()
