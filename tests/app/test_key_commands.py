"""`winnow keys` and `winnow limits`, on the database of the settings."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, update
from typer import Typer
from typer.testing import CliRunner, Result

from app.commands import register
from app.db import transaction
from app.embedded import EmbeddedServers
from app.keys.models import ApiKey
from app.keys.service import caller_of
from app.settings import get_settings
from tests.factories import long_ago

Run = Callable[..., Result]


@pytest.fixture
def run(engine: Engine, servers: EmbeddedServers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setenv("WINNOW_DATABASE_URL", servers.database_url)
    get_settings.cache_clear()
    app = Typer()
    register(app)
    yield lambda *words: CliRunner().invoke(app, list(words))
    get_settings.cache_clear()


def answer(run: Run, *words: str) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


class TestKeys:
    def test_with_scopes_and_a_rate(self, run: Run, engine: Engine) -> None:
        words = ("--scopes", "decisions:write,audits:read", "--requests-per-minute", "90")
        made = answer(run, "keys", "create", "--name", "review", *words)
        assert made["scopes"] == ["audits:read", "decisions:write"]
        caller = caller_of(engine, made["secret"])
        assert caller is not None
        assert (set(caller.scopes), caller.requests_per_minute) == (set(made["scopes"]), 90)
        (listed,) = answer(run, "keys", "list")
        assert (listed["scopes"], listed["requests_per_minute"]) == (made["scopes"], 90)
        assert "audits:read,decisions:write" in run("keys", "list").stdout

    def test_a_scope_that_there_is_not_is_refused(self, run: Run) -> None:
        refused = run("keys", "create", "--scopes", "audits:all")
        assert refused.exit_code == 2
        assert "audits:all is no scope" in " ".join(refused.output.split())
        assert answer(run, "keys", "list") == []

    def test_rotated_both_secrets_open_and_the_list_says_how_long(
        self, run: Run, engine: Engine
    ) -> None:
        old = answer(run, "keys", "create", "--days", "30")
        new = answer(run, "keys", "rotate", old["id"], "--overlap-hours", "12")
        assert new["id"] == old["id"]
        assert all(caller_of(engine, key["secret"]) for key in (old, new))
        assert ", its old secret 20" in run("keys", "list").stdout
        run("keys", "revoke", old["id"])
        refused = run("keys", "rotate", old["id"])
        assert refused.exit_code == 1
        assert "was revoked. Make a new one." in refused.stderr

    def test_the_list_marks_what_ends_soon_and_what_has_ended(
        self, run: Run, engine: Engine
    ) -> None:
        answer(run, "keys", "create", "--days", "10")
        assert "soon" not in run("keys", "list").stdout
        with transaction(engine) as session:
            session.execute(update(ApiKey).values(created_at=long_ago()))
        assert "(soon: rotate it)" in run("keys", "list").stdout
        with transaction(engine) as session:
            session.execute(update(ApiKey).values(expires_at=long_ago()))
        assert "over since 2020-01-01" in run("keys", "list").stdout


class TestLimits:
    def test_are_set_one_by_one_and_listed(self, run: Run) -> None:
        answer(run, "limits", "set", "acme", "--max-open-audits", "5", "--max-dataset-rows", "0")
        answer(run, "limits", "set", "acme", "--max-open-audits", "default")
        (row,) = answer(run, "limits", "list")
        assert row == {
            "tenant": "acme",
            "requests_per_minute": None,
            "max_open_audits": None,
            "max_dataset_rows": 0,
            "max_dataset_bytes": None,
            "worker_minutes_per_day": None,
        }
        assert run("limits", "list").stdout == "acme  max_dataset_rows=none\n"

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ((), "give one limit or more"),
            (("--max-open-audits", "many"), "neither a number nor default"),
            (("--max-open-audits", "-1"), "neither a number nor default"),
        ],
    )
    def test_what_is_no_limit_is_refused(self, run: Run, words: tuple[str, ...], said: str) -> None:
        refused = run("limits", "set", "acme", *words)
        assert refused.exit_code == 2
        assert said in " ".join(refused.output.replace("│", "").split())
