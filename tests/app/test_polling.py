"""Polls answered by one statement say what the ordinary way says, and open to nobody else."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, text, update
from starlette.responses import Response
from starlette.types import Scope

from app.audits import polling
from app.audits.models import Audit
from app.audits.polling import QuickPolls
from app.db import transaction
from app.keys.models import ApiKey
from app.keys.scopes import Scope as KeyScope
from app.keys.service import NewKey, create_key, revoke_key
from app.limits.models import TenantLimits

Ask = Callable[..., tuple[Any, bool]]


@pytest.fixture
def ask(api: FastAPI, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """Asks a running application; says, too, whether one statement was enough."""
    answered: list[bool] = []
    answer_of = QuickPolls._answer

    async def noted(self: QuickPolls, scope: Scope) -> Response | None:
        answer = await answer_of(self, scope)
        if scope["type"] == "http":
            answered.append(answer is not None)
        return answer

    monkeypatch.setattr(QuickPolls, "_answer", noted)
    with TestClient(api, raise_server_exceptions=False) as client:

        def get(key: NewKey, audit: Audit, query: str = "", **headers: str) -> tuple[Any, bool]:
            bearer = {"Authorization": f"Bearer {key.secret}", **headers}
            response = client.get(f"/v1/audits/{audit.id}{query}", headers=bearer)
            return response, answered[-1]

        yield get


def used_key(engine: Engine, tenant: str = "default", **options: Any) -> NewKey:
    """Return a key whose use was just noted."""
    key = create_key(engine, tenant=tenant, name="k", valid_days=1, **options)
    change_key(engine, last_used_at=datetime.now(UTC))
    return key


def change_key(engine: Engine, **values: Any) -> None:
    with transaction(engine) as session:
        session.execute(update(ApiKey).values(values))


def test_it_answers_as_the_ordinary_way_does(engine: Engine, ask: Ask, finished: Audit) -> None:
    key = used_key(engine)
    polled, is_quick = ask(key, finished)
    ordinary, is_ordinary_quick = ask(key, finished, "?wait=1")
    assert (is_quick, is_ordinary_quick) == (True, False)
    assert polled.status_code == 200
    assert polled.content == ordinary.content
    polled.headers.pop("x-request-id"), ordinary.headers.pop("x-request-id")
    assert polled.headers == ordinary.headers


def test_who_has_the_version_is_told_so(engine: Engine, ask: Ask, finished: Audit) -> None:
    key = used_key(engine)
    etag = ask(key, finished)[0].headers["ETag"]
    unchanged, is_quick = ask(key, finished, **{"If-None-Match": etag})
    assert (unchanged.status_code, unchanged.content, is_quick) == (304, b"", True)
    assert ask(key, finished, **{"If-None-Match": '"0"'})[0].status_code == 200


def test_every_version_is_told_as_it_is(
    engine: Engine, ask: Ask, finished: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is kept of earlier answers, and however much of it."""
    monkeypatch.setattr(polling, "_MOST_BODIES", 2)
    key = used_key(engine)
    for version in range(finished.version + 1, finished.version + 5):
        changed = {"version": version, "num_decided": 10 * version}
        with transaction(engine) as session:
            session.execute(update(Audit).values(changed))
        for _ in range(2):
            answer, is_quick = ask(key, finished)
            assert (answer.json()["num_decided"], is_quick) == (10 * version, True)


def test_a_key_is_out_at_the_moment_it_is_revoked_or_over(
    engine: Engine, ask: Ask, finished: Audit
) -> None:
    for ends in ("revoked", "over"):
        key = used_key(engine)
        assert ask(key, finished)[1]
        if ends == "revoked":
            revoke_key(engine, key.id)
        else:
            change_key(engine, expires_at=datetime.now(UTC) - timedelta(seconds=1))
        refused, is_quick = ask(key, finished)
        assert (refused.status_code, is_quick) == (401, False)


def test_another_tenants_audit_is_not_there(engine: Engine, ask: Ask, finished: Audit) -> None:
    refused, is_quick = ask(used_key(engine, tenant="stranger"), finished)
    assert (refused.status_code, is_quick) == (404, False)


def test_a_key_without_the_scope_is_refused(engine: Engine, ask: Ask, finished: Audit) -> None:
    key = used_key(engine, scopes=[KeyScope.DATASETS_READ])
    refused, is_quick = ask(key, finished)
    assert (refused.status_code, is_quick) == (403, False)


@pytest.mark.parametrize("limited", ["key", "tenant"])
def test_a_call_that_counts_is_counted(
    limited: str, engine: Engine, ask: Ask, finished: Audit
) -> None:
    key = used_key(engine, requests_per_minute=5 if limited == "key" else None)
    if limited == "tenant":
        with transaction(engine) as session:
            session.add(TenantLimits(tenant="default", requests_per_minute=5))
    answer, is_quick = ask(key, finished)
    assert (answer.headers["RateLimit-Policy"], is_quick) == ('"requests";q=5;w=60', False)


def test_a_key_that_soon_ends_is_told_so(engine: Engine, ask: Ask, finished: Audit) -> None:
    key = used_key(engine)
    change_key(engine, created_at=datetime.now(UTC) - timedelta(days=30))
    answer, is_quick = ask(key, finished)
    assert ("Winnow-Key-Expires" in answer.headers, is_quick) == (True, False)


def test_the_use_of_a_key_is_noted_once_a_minute(engine: Engine, ask: Ask, finished: Audit) -> None:
    key = used_key(engine)
    change_key(engine, last_used_at=datetime.now(UTC) - timedelta(minutes=2))
    assert [ask(key, finished)[1] for _ in range(2)] == [False, True]


def test_a_database_that_came_back_is_asked_anew(engine: Engine, ask: Ask, finished: Audit) -> None:
    key = used_key(engine)
    assert ask(key, finished)[1]
    with engine.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
        )
    answers = [ask(key, finished) for _ in range(2)]
    assert [(answer.status_code, is_quick) for answer, is_quick in answers] == [
        (200, False),
        (200, True),
    ]
