"""The API as a server, for callers who stay."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx2
import pytest
from celery import Celery
from fastapi import FastAPI
from sqlalchemy import Engine

from app.keys.service import create_key
from app.live.watcher import Watcher
from app.main import create_app
from app.settings import Settings
from tests.client.conftest import serving

NewClient = Callable[[str], httpx2.Client]


@pytest.fixture
def api(settings: Settings, engine: Engine, celery: Celery) -> FastAPI:
    return create_app(settings, engine, celery)


@pytest.fixture
def watcher(api: FastAPI) -> Watcher:
    watcher: Watcher = api.state.watcher
    return watcher


@pytest.fixture
def new_client(api: FastAPI, engine: Engine) -> Iterator[NewClient]:
    """Makes clients of the server, with a key of the tenant that is named."""
    with ExitStack() as stack, serving(api) as url:

        def make(tenant: str) -> httpx2.Client:
            key = create_key(engine, tenant=tenant, name="test", valid_days=1)
            limits = httpx2.Limits(max_connections=None)
            headers = {"Authorization": f"Bearer {key.secret}"}
            client = httpx2.Client(base_url=url, headers=headers, timeout=20, limits=limits)
            return stack.enter_context(client)

        yield make


@pytest.fixture
def client(new_client: NewClient) -> httpx2.Client:
    return new_client("default")
