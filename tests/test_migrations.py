"""Migrations: up, down and up again, and what they make is what the models say."""

from collections.abc import Iterator

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import CheckConstraint, Engine, inspect, text

import app.tables  # noqa: F401  registers every table
from app.db import Base, make_engine
from app.embedded import EmbeddedServers
from app.migrate import migrate
from app.settings import Settings


@pytest.fixture
def empty(servers: EmbeddedServers) -> Iterator[Engine]:
    """A database of this test's own, without tables."""
    url = Settings(database_url=servers.database_url).require_database_url()
    outside = make_engine(url).execution_options(isolation_level="AUTOCOMMIT")
    with outside.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS migrated"))
        connection.execute(text("CREATE DATABASE migrated"))
    engine = make_engine(url.replace("/postgres?", "/migrated?"))
    yield engine
    engine.dispose()
    outside.dispose()


def tables(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names()) - {"alembic_version"}


def test_up_down_and_up_again(empty: Engine) -> None:
    migrate(empty)
    assert tables(empty) == set(Base.metadata.tables)
    migrate(empty, "base")
    assert tables(empty) == set()
    migrate(empty)
    migrate(empty)  # nothing is left to do
    assert tables(empty) == set(Base.metadata.tables)


def test_samples_without_labels_outlive_a_way_back(empty: Engine) -> None:
    """The version before knows no such samples; what it cannot hold becomes empty, not lost."""
    migrate(empty)
    row = (
        "INSERT INTO training_samples "
        "VALUES ('a', 0, 'text', NULL, NULL, NULL, 1, 1, 0, NULL, true)"
    )
    with empty.begin() as connection:
        connection.execute(text("SET session_replication_role = replica"))  # no audit is needed
        connection.execute(text(row))
    migrate(empty, "-1")
    with empty.connect() as connection:
        labels = "SELECT given_label, predicted_label FROM training_samples"
        assert connection.execute(text(labels)).all() == [("", "")]
    migrate(empty)
    with empty.connect() as connection:
        kept = connection.execute(text("SELECT text, non_finite FROM training_samples")).all()
    assert kept == [("text", False)]


def test_the_migrations_make_what_the_models_say(empty: Engine) -> None:
    migrate(empty)
    options = {"compare_type": True, "compare_server_default": True}
    with empty.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_checks_and_partial_indexes_are_those_of_the_models(empty: Engine) -> None:
    """What Alembic's comparison does not look at."""
    migrate(empty)
    inspector = inspect(empty)
    for table in Base.metadata.sorted_tables:
        made = {str(check["name"]) for check in inspector.get_check_constraints(table.name)}
        meant = {
            str(constraint.name)
            for constraint in table.constraints
            if isinstance(constraint, CheckConstraint)
        }
        assert made == meant, table.name
        partial = {
            str(index["name"])
            for index in inspector.get_indexes(table.name)
            if index.get("dialect_options", {}).get("postgresql_where")
        }
        assert partial == {
            str(index.name)
            for index in table.indexes
            if index.dialect_options["postgresql"]["where"] is not None
        }, table.name
