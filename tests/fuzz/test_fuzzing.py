"""A short turn of every fuzzer; `python -m tests.fuzz TARGET` takes longer ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS

FOUND = Path(__file__).with_name("found")


@pytest.mark.parametrize("target", TARGETS)
def test_what_fuzzing_begins_with_is_no_fault(target: str) -> None:
    for seed in SEEDS[target]:
        TARGETS[target](seed)
        TARGETS[target](seed[: len(seed) // 2])


@pytest.mark.parametrize("path", sorted(FOUND.iterdir()), ids=lambda path: path.name)
def test_what_fuzzing_found_is_mended(path: Path) -> None:
    TARGETS[path.name.partition("-")[0]](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_a_short_turn_finds_nothing(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="there is no atheris for this system")
    turn = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", target, "--seconds=4", f"--keep={tmp_path}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert turn.returncode == 0, turn.stderr[-3000:]
    executed = re.search(r"number_of_executed_units: (\d+)", turn.stderr)
    assert executed is not None
    assert int(executed[1]) > len(SEEDS[target])
    assert not list(tmp_path.glob("crash-*"))
