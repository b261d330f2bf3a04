"""The real servers, once per test process; every test starts on empty tables."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from redis import Redis
from sqlalchemy import Engine, text

from app.db import Base, make_engine
from app.embedded import EmbeddedServers, embedded_postgres, embedded_valkey
from app.jobs import make_celery
from app.migrate import migrate
from app.settings import Settings

# Tests run in several processes, and tiny models gain nothing from threads, which would only wait
# for one another. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServers]:
    """PostgreSQL and Valkey of this test process."""
    folder = tmp_path_factory.mktemp("servers")
    with embedded_postgres(folder) as database_url, embedded_valkey() as broker_url:
        yield EmbeddedServers(database_url=database_url, broker_url=broker_url)


@pytest.fixture(scope="session")
def migrated_engine(servers: EmbeddedServers) -> Iterator[Engine]:
    """The database with its tables."""
    engine = make_engine(Settings(database_url=servers.database_url).require_database_url())
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def settings(servers: EmbeddedServers, tmp_path: Path) -> Settings:
    """Settings as the service has them, with folders of this test."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    root = tmp_path / "files"
    root.mkdir()
    return Settings(
        database_url=servers.database_url,
        broker_url=servers.broker_url,
        data_dir=data_dir,
        file_roots=(root,),
    )


@pytest.fixture
def engine(migrated_engine: Engine) -> Engine:
    """The database with empty tables."""
    tables = ", ".join(table.name for table in Base.metadata.sorted_tables)
    with migrated_engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {tables} CASCADE"))
    return migrated_engine


@pytest.fixture
def broker(servers: EmbeddedServers) -> Iterator[Redis]:
    """The broker, empty."""
    client = Redis(unix_socket_path=servers.broker_url.removeprefix("redis+socket://"))
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def celery(settings: Settings, broker: Redis) -> Iterator[Celery]:
    """The queue on the empty broker."""
    celery = make_celery(settings)
    yield celery
    celery.close()
