"""The API in this process, on the real servers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import pytest
from celery import Celery
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.audits.models import Audit
from app.keys.service import create_key
from app.main import create_app
from app.settings import Settings
from tests.app.deciding import Desk
from tests.app.exporting import Make, audited
from tests.factories import make_finished_audit, suggest_labels


@pytest.fixture
def api(settings: Settings, engine: Engine, celery: Celery) -> FastAPI:
    """The application; its lifespan has not begun, so no reconciler acts beside a test."""
    return create_app(settings, engine, celery)


@pytest.fixture
def new_client(api: FastAPI, engine: Engine) -> Iterator[Callable[..., TestClient]]:
    """Makes clients with a key of the tenant that is named."""
    with ExitStack() as stack:

        def make(tenant: str) -> TestClient:
            key = create_key(engine, tenant=tenant, name="test", valid_days=1)
            client = TestClient(
                api,
                headers={"Authorization": f"Bearer {key.secret}"},
                raise_server_exceptions=False,
            )
            stack.callback(client.close)
            return client

        yield make


@pytest.fixture
def client(new_client: Callable[..., TestClient]) -> TestClient:
    """A client of the tenant that the factories build for."""
    return new_client("default")


@pytest.fixture
def finished(engine: Engine, settings: Settings) -> Audit:
    """Ten samples; sample i stands at rank 9 - i, even ones are pos, the rest neg."""
    return make_finished_audit(engine, settings)


@pytest.fixture
def desk(client: TestClient, engine: Engine, finished: Audit) -> Desk:
    """Where the finished audit is reviewed; its samples have suggested labels."""
    suggest_labels(engine, finished.summary["ranking_id"])
    return Desk(client, finished)


@pytest.fixture
def make_export(client: TestClient, engine: Engine, settings: Settings) -> Make:
    """Uploads a file and makes a finished audit of it."""
    return partial(audited, client, engine, settings)
