"""Rotation of keys without a gap, and warnings before they end."""

from datetime import UTC, datetime, timedelta

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, update

from app.db import transaction
from app.errors import Conflict, NotFound
from app.keys.models import ApiKey
from app.keys.scopes import Scope
from app.keys.service import caller_of, create_key, revoke_key, rotate_key
from tests.factories import long_ago


def ask(api: FastAPI, secret: str) -> TestClient:
    return TestClient(api, headers={"Authorization": f"Bearer {secret}"})


def test_both_secrets_open_until_the_overlap_is_over(engine: Engine) -> None:
    old = create_key(engine, tenant="one", name="k", valid_days=1, scopes=[Scope.AUDITS_READ])
    new = rotate_key(engine, old.id, valid_days=30, overlap_hours=2)
    assert (new.id, new.secret == old.secret) == (old.id, False)
    callers = [caller_of(engine, secret) for secret in (old.secret, new.secret)]
    for caller in callers:
        assert caller is not None
        assert (caller.key_id, set(caller.scopes)) == (old.id, {Scope.AUDITS_READ})
    with transaction(engine) as session:
        session.execute(update(ApiKey).values(previous_until=long_ago()))
    assert caller_of(engine, old.secret) is None
    assert caller_of(engine, new.secret) is not None


def test_rotated_twice_the_first_secret_is_over(engine: Engine) -> None:
    first = create_key(engine, tenant="one", name="k", valid_days=1)
    second, third = (rotate_key(engine, first.id, valid_days=1, overlap_hours=24) for _ in range(2))
    opens = [caller_of(engine, key.secret) is not None for key in (first, second, third)]
    assert opens == [False, True, True]


def test_without_an_overlap_the_old_secret_is_over_at_once(engine: Engine) -> None:
    old = create_key(engine, tenant="one", name="k", valid_days=1)
    rotate_key(engine, old.id, valid_days=1, overlap_hours=0)
    assert caller_of(engine, old.secret) is None


def test_the_overlap_is_no_longer_than_the_old_secret_was_valid(engine: Engine) -> None:
    old = create_key(engine, tenant="one", name="k", valid_days=1)
    rotate_key(engine, old.id, valid_days=365, overlap_hours=24 * 300)
    caller = caller_of(engine, old.secret)
    assert caller is not None
    assert caller.expires_at == old.expires_at


def test_a_revoked_key_opens_with_neither_secret_and_is_not_rotated(engine: Engine) -> None:
    old = create_key(engine, tenant="one", name="k", valid_days=1)
    new = rotate_key(engine, old.id, valid_days=1, overlap_hours=24)
    revoke_key(engine, old.id)
    assert [caller_of(engine, key.secret) for key in (old, new)] == [None, None]
    with pytest.raises(Conflict) as refused:
        rotate_key(engine, old.id, valid_days=1, overlap_hours=24)
    assert "was revoked" in str(refused.value.detail)
    with pytest.raises(NotFound):
        rotate_key(engine, "key_none", valid_days=1, overlap_hours=24)


def test_answers_warn_of_a_key_that_soon_ends(api: FastAPI, engine: Engine) -> None:
    key = create_key(engine, tenant="one", name="k", valid_days=1)
    path = "/v1/audits"
    assert "Winnow-Key-Expires" not in ask(api, key.secret).get(path).headers
    soon = datetime.now(UTC) + timedelta(days=13)
    with transaction(engine) as session:
        session.execute(update(ApiKey).values(expires_at=soon, created_at=long_ago()))
    for answered in (path, "/v1/audits/aud_none"):  # a refusal too
        said = ask(api, key.secret).get(answered).headers["Winnow-Key-Expires"]
        assert said == soon.isoformat(timespec="seconds")
    new = rotate_key(engine, key.id, valid_days=365, overlap_hours=24)
    assert "Winnow-Key-Expires" in ask(api, key.secret).get(path).headers
    assert "Winnow-Key-Expires" not in ask(api, new.secret).get(path).headers
