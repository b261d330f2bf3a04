"""How often a key may call, with the broker and without."""

import socket
import time
from collections.abc import Callable

import pytest
from celery import Celery
from fastapi import FastAPI
from fastapi.testclient import TestClient
from redis import Redis
from sqlalchemy import Engine

from app.jobs import make_celery
from app.keys.service import create_key
from app.limits.quotas import set_limits
from app.limits.rates import Rates
from app.main import create_app
from app.settings import Settings

Ask = Callable[[], int]


@pytest.fixture
def api(settings: Settings, engine: Engine, celery: Celery) -> FastAPI:
    return create_app(settings.model_copy(update={"requests_per_minute": 3}), engine, celery)


def caller(api: FastAPI, engine: Engine, *, tenant: str = "one", own: int | None = None) -> Ask:
    key = create_key(engine, tenant=tenant, name="k", valid_days=1, requests_per_minute=own)
    client = TestClient(api, headers={"Authorization": f"Bearer {key.secret}"})
    return lambda: client.get("/v1/audits").status_code


def test_one_too_many_is_told_when_to_come_again(client: TestClient) -> None:
    standing = [client.get("/v1/audits").headers["RateLimit"] for _ in range(3)]
    assert [each.split(";")[1] for each in standing] == ["r=2", "r=1", "r=0"]
    refused = client.get("/v1/audits")
    assert refused.status_code == 429
    assert refused.json()["type"] == "urn:winnow:problem:rate-exceeded"
    assert "WINNOW_REQUESTS_PER_MINUTE" in refused.json()["detail"]
    assert 55 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.headers["RateLimit-Policy"] == '"requests";q=3;w=60'


def test_each_key_counts_by_itself(api: FastAPI, engine: Engine) -> None:
    one, two = caller(api, engine), caller(api, engine)
    assert [one() for _ in range(4)] == [200, 200, 200, 429]
    assert two() == 200


def test_a_key_or_a_tenant_may_have_its_own_limit(api: FastAPI, engine: Engine) -> None:
    set_limits(engine, "busy", {"requests_per_minute": 5})
    busy = caller(api, engine, tenant="busy")
    assert [busy() for _ in range(6)] == [200] * 5 + [429]
    quiet = caller(api, engine, tenant="busy", own=1)
    assert [quiet() for _ in range(2)] == [200, 429]
    free = caller(api, engine, tenant="busy", own=0)
    assert [free() for _ in range(8)] == [200] * 8


def test_all_processes_count_together(settings: Settings, broker: Redis) -> None:
    processes = [Rates(settings.require_broker_url()) for _ in range(2)]
    over = [processes[place % 2].count("key_1", 3).is_over for place in range(4)]
    assert over == [False, False, False, True]


def test_after_a_while_a_key_may_call_again(settings: Settings, broker: Redis) -> None:
    rates = Rates(settings.require_broker_url())
    assert [rates.count("key_1", 1).is_over for _ in range(2)] == [False, True]
    broker.flushall()  # as a minute does
    assert not rates.count("key_1", 1).is_over


def test_without_a_broker_the_api_answers_and_counts_by_itself(
    settings: Settings, engine: Engine
) -> None:
    absent = settings.model_copy(update={"requests_per_minute": 2})
    absent = Settings.model_validate(
        absent.model_dump(exclude={"database_url", "broker_url"})
        | {"database_url": settings.require_database_url(), "broker_url": "redis://127.0.0.1:1/0"}
    )
    api = create_app(absent, engine, make_celery(absent))
    ask = caller(api, engine)
    assert [ask() for _ in range(3)] == [200, 200, 429]


def test_a_frozen_broker_is_waited_for_once_and_not_by_every_caller() -> None:
    """It takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        rates = Rates(f"redis://127.0.0.1:{frozen.getsockname()[1]}/0")
        began = time.monotonic()
        over = [rates.count("key_1", 2).is_over for _ in range(3)]
        assert time.monotonic() - began < 3
    assert over == [False, False, True]


def test_without_a_limit_nothing_is_counted(
    settings: Settings, engine: Engine, celery: Celery, broker: Redis
) -> None:
    ask = caller(create_app(settings, engine, celery), engine)
    assert {ask() for _ in range(5)} == {200}
    assert broker.keys("winnow-rates*") == []
