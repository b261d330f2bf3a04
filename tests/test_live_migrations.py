"""Migrations on a database at work: what they lock, for how long, and what squawk says of them."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import OperationalError

from app import migrate as migrating
from app.migrate import MigrationBlocked, alembic_config, head_revision, migrate
from tests.test_migrations import empty, take_back

__all__ = ["empty"]

SQUAWK = shutil.which("squawk", path=str(Path(sys.executable).parent)) or shutil.which("squawk")
# of all migrations
NOT_ASKED = {
    "prefer-text-field": "varchar without a length is text",
    "prefer-bigint-over-int": "positions and counts of samples: a dataset has 2 million at most",
    "prefer-identity": "ids are made by the service",
    "prefer-robust-stmts": "a migration is one transaction: all of it is there, or nothing",
    "require-statement-timeout": "a change of data takes as long as the data; locks have a limit",
}
FEW = "a table with a row an audit, or a few: it is gone through in milliseconds"
STOPPED = "older code could not go on: this release says to stop workers and API (upgrading.md)"
LARGE = "minutes on tables of many million samples; upgrading.md tells how to be spared them"
# revision and rule: why it may be
EXPLAINED = {
    ("0002", "ban-drop-not-null"): "older code cannot make the audits whose labels are empty",
    ("0003", "adding-foreign-key-constraint"): FEW,
    ("0003", "ban-drop-constraint"): "replaced by a wider one in the same transaction",
    ("0003", "ban-drop-default"): STOPPED,
    ("0003", "constraint-missing-not-valid"): FEW,
    ("0003", "disallowed-unique-constraint"): FEW,
    ("0003", "renaming-column"): STOPPED,
    ("0003", "require-concurrent-index-creation"): FEW,
    ("0003", "require-concurrent-index-deletion"): FEW,
    ("0004", "ban-drop-constraint"): "replaced by a wider one in the same transaction",
    ("0004", "constraint-missing-not-valid"): FEW,
    ("0005", "adding-foreign-key-constraint"): FEW,
    ("0005", "constraint-missing-not-valid"): FEW,
    ("0005", "require-concurrent-index-creation"): FEW,
    ("0008", "require-concurrent-index-creation"): LARGE,
    ("0011", "require-concurrent-index-creation"): "a table with a row a key",
    ("0013", "require-concurrent-index-creation"): FEW,
}


@pytest.fixture
def statements(empty: Engine) -> dict[str, list[str]]:
    """The SQL of every migration, as it reaches an empty database."""
    said: dict[str, list[str]] = defaultdict(list)
    done: list[str] = []

    def listen(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if re.match(r"\s*(ALTER|CREATE|DROP|GRANT|REVOKE|SET LOCAL|COMMENT|DO)\b", statement):
            done.append(statement.strip().rstrip(";") + ";")
        moved = re.search(r"(?:SET version_num=|VALUES \()'(\d{4})'", statement)
        if moved:
            said[moved[1]] += done
            done.clear()

    event.listen(empty, "before_cursor_execute", listen)
    migrate(empty)
    event.remove(empty, "before_cursor_execute", listen)
    return said


def test_squawk_finds_nothing_that_is_not_explained(
    statements: dict[str, list[str]], tmp_path: Path
) -> None:
    """Locks that block readers or writers, rewrites, and changes that older code cannot read."""
    assert max(statements) == head_revision()
    if SQUAWK is None:
        reason = "squawk is not installed here: its wheel fits only some systems"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    found = set()
    for revision, lines in statements.items():
        file = tmp_path / f"{revision}.sql"
        file.write_text("SET LOCAL lock_timeout = '3s';\n" + "\n".join(lines) + "\n")
        command = [SQUAWK, "--assume-in-transaction", "--pg-version=17", "--reporter=json"]
        done = subprocess.run(
            [*command, f"--exclude={','.join(NOT_ASKED)}", str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
        for one in json.loads(done.stdout or "[]"):
            found.add((revision, one["rule_name"]))
            line = file.read_text().splitlines()[one["line"]]
            assert (revision, one["rule_name"]) in EXPLAINED, f"{revision}: {one['message']} {line}"
    assert found == set(EXPLAINED), "an explanation of something that is not there any more"


def test_squawk_would_find_something(tmp_path: Path) -> None:
    if SQUAWK is None:
        pytest.skip("squawk is not installed here")
    file = tmp_path / "bad.sql"
    file.write_text("ALTER TABLE audits ADD COLUMN x int NOT NULL DEFAULT random();")
    done = subprocess.run([SQUAWK, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode != 0


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A caller who has read the audits, and whose transaction stays open."""
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT count(*) FROM audits"))
        yield connection


@pytest.fixture
def before(empty: Engine) -> Engine:
    """A database as the version before a change of the audits left it."""
    migrate(empty)
    script = ScriptDirectory.from_config(alembic_config()).get_revision("0013")
    take_back(empty, str(script.down_revision))
    return empty


def test_readers_are_never_kept_longer_than_the_lock_timeout(before: Engine) -> None:
    """A migration waits behind one, and others behind it; then it gives way, and comes back."""
    waited: list[float] = []
    with reading(before):
        thread = threading.Thread(target=migrate, args=(before,))
        thread.start()
        end = time.monotonic() + 6
        while time.monotonic() < end:
            started = time.monotonic()
            with before.connect() as connection:
                connection.execute(text("SELECT count(*) FROM audits"))
            waited.append(time.monotonic() - started)
            time.sleep(0.05)
    thread.join(60)
    assert max(waited) > 1, "nobody had to wait, so nothing was tried"
    assert max(waited) < 5
    with before.connect() as connection:
        version = connection.scalar(text("SELECT version_num FROM alembic_version"))
    assert version == head_revision()


def test_a_table_that_is_never_free_is_said(
    before: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrating, "PAUSES", ())
    with reading(before), pytest.raises(MigrationBlocked, match="pg_stat_activity") as blocked:
        migrate(before)
    cause = blocked.value.__cause__
    assert isinstance(cause, OperationalError)
    assert isinstance(cause.orig, LockNotAvailable)
    migrate(before)
