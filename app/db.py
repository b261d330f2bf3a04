"""The database: engine, sessions, base class of the tables, ids."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import Connection, DateTime, Engine, MetaData, create_engine, event, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Session


class Base(DeclarativeBase):
    """Base of all tables; constraint names are fixed so that migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        list[Any]: JSONB,
    }


# A machine that is gone says nothing: without these a call to it ends after a quarter of an hour.
_PATIENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 20_000,
}
_MAX_NAME = 63  # of an application, in PostgreSQL


def make_engine(url: str, *, owner: str | None = None) -> Engine:
    """Return an engine whose connections are checked before use, so that a restart heals.

    Args:
        url: the database, in SQLAlchemy's form.
        owner: the worker that its sessions belong to, by which others can end them.
    """
    options: dict[str, Any] = dict(_PATIENCE)
    if owner is not None:
        options["application_name"] = session_name(owner)
    return create_engine(
        url,
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=20,
        pool_timeout=10,
        connect_args=options,
    )


def connect_arguments(engine: Engine) -> dict[str, Any]:
    """Return what psycopg connects with, to the same database with the same patience."""
    _, arguments = engine.dialect.create_connect_args(engine.url)
    return {**arguments, **_PATIENCE}


def session_name(owner: str) -> str:
    """Return what the sessions of a worker are called in the database."""
    return f"winnow {owner}"[-_MAX_NAME:]  # the end tells processes apart


# The role has no rights but on the rows of the tenant that is set (migrations/versions/0010).
_BE_TENANT = text(
    "SELECT set_config('role', 'winnow_tenant', true), set_config('winnow.tenant', :tenant, true)"
)


def of_tenant(engine: Engine, tenant: str) -> Engine:
    """Return the engine for a caller: to its transactions other tenants' rows do not exist.

    It shares the connections of `engine`; what is set ends with each transaction.
    """
    return engine.execution_options(winnow_tenant=tenant)


@event.listens_for(Engine, "begin")
def _limit_to_tenant(connection: Connection) -> None:
    tenant = connection.get_execution_options().get("winnow_tenant")
    if tenant is not None:
        connection.execute(_BE_TENANT, {"tenant": tenant})


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """Open a session whose work is committed at the end of the block, or not at all."""
    with Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


def new_id(prefix: str) -> str:
    """Return `<prefix>_` and a UUIDv7 (RFC 9562): ids sort by the time of their making."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds << 80) | int.from_bytes(os.urandom(10))
    value = (value & ~(0xF << 76)) | (0x7 << 76)
    value = (value & ~(0x3 << 62)) | (0x2 << 62)
    return f"{prefix}_{value:032x}"
