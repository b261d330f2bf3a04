"""Failpoints: nothing without an order, and each order once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app import failpoints
from app.failpoints import TAKEN, VARIABLE, reach

CHILD = "from app.failpoints import reach; reach('unit.claimed', 'prepare'); print('alive')"


def run(folder: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if folder is not None:
        environment[VARIABLE] = str(folder)
    command = [sys.executable, "-c", CHILD]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / TAKEN).mkdir()
    return tmp_path


def test_an_order_is_carried_out_once(folder: Path) -> None:
    (folder / "unit.claimed:kill:1").touch()
    assert run(folder).returncode == -9
    assert run(folder).stdout == "alive\n"
    assert [path.name[:19] for path in (folder / TAKEN).iterdir()] == ["unit.claimed:kill:1"]


def test_a_point_can_be_narrowed(folder: Path) -> None:
    (folder / "unit.claimed@verify:kill:1").touch()
    assert run(folder).stdout == "alive\n"
    (folder / "unit.claimed@prepare:kill:1").touch()
    assert run(folder).returncode == -9


def test_without_the_variable_nothing_is_looked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "unit.claimed:kill:1").touch()
    assert run(None).stdout == "alive\n"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(failpoints, "_obey", lambda *_: pytest.fail("it looked"))
    reach("unit.claimed")
