"""The migrations make exactly the tables of the models, and can be taken back."""

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect

from app.db import Base
from app.migrate import migrate


def test_migrations_go_up_down_and_up_again(migrated_engine: Engine) -> None:
    """Taken back to the base, nothing but Alembic's own table is left."""
    migrate(migrated_engine, "base")
    assert inspect(migrated_engine).get_table_names() == ["alembic_version"]
    migrate(migrated_engine)
    assert "audits" in inspect(migrated_engine).get_table_names()


def test_the_migrated_schema_is_that_of_the_models(migrated_engine: Engine) -> None:
    """Alembic finds nothing to add or drop."""
    with migrated_engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, Base.metadata) == []
