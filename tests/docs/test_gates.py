"""The gates of docs/how-to/gates.md, in the orchestrators that they are written for."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.docs.conftest import Place
from tests.docs.pages import ROOT, Block, blocks_of
from tests.docs.running import LIMIT_SECONDS, Reader, environment

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("docs"), pytest.mark.timeout(900)]

PAGE = "docs/how-to/gates.md"
TOOLS = ROOT / ".venv-docs" / "bin"
COMMANDS = {
    "airflow": ["sh", "-c", "airflow db migrate >/dev/null 2>&1; exec airflow dags test retrain"],
    "dagster": ["dagster", "asset", "materialize", "--select", "*", "-f", "definitions.py"],
    "prefect": ["python", "flows/retrain.py"],
}
PASSES, STOPS = "20%", "2%"  # 15 % are wrong


def block_for(tool: str) -> Block:
    (block,) = [block for block in blocks_of(PAGE) if block.marks.get("needs") == tool]
    return block


@pytest.fixture(scope="module")
def reader(place: Place) -> Reader:
    """A reader of the gates' page, who has written its request and its script."""
    reader = place.reader("gates-in-orchestrators")
    for block in blocks_of(PAGE):
        if "file" in block.marks:
            reader.do(block)
    return reader


@pytest.mark.parametrize("tool", COMMANDS)
def test_training_waits_for_the_gate(place: Place, reader: Reader, tool: str) -> None:
    """It runs when few are suspect, and does not when too many are."""
    if not (TOOLS / tool).exists():
        pytest.skip(f"{tool} is not there; requirements-docs.txt says how to install it")
    script = reader.folder / block_for(tool).marks["file"]
    trained = reader.folder / "trained"
    for limit, goes_on in ((PASSES, True), (STOPS, False)):
        trained.unlink(missing_ok=True)
        script.write_text(block_for(tool).code.replace(PASSES, limit))
        done = subprocess.run(
            COMMANDS[tool],
            cwd=reader.folder,
            env=surroundings(place, reader.folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_SECONDS,
            check=False,
            text=True,
        )
        assert trained.exists() == goes_on, done.stdout
        assert ("Too many suspects" in done.stdout) != goes_on, done.stdout
        assert (done.returncode == 0) == goes_on, done.stdout


def surroundings(place: Place, folder: Path) -> dict[str, str]:
    """Return the environment of an orchestrator: quiet, alone, and with its state in the folder."""
    own = environment(
        place.address,
        AIRFLOW_HOME=str(folder / "airflow"),
        AIRFLOW__CORE__DAGS_FOLDER=str(folder / "dags"),
        AIRFLOW__CORE__LOAD_EXAMPLES="false",
        DAGSTER_HOME=str(folder),
        DAGSTER_DISABLE_TELEMETRY="true",
        DO_NOT_TRACK="1",
        PREFECT_HOME=str(folder / "prefect"),
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
    )
    return own | {"PATH": f"{TOOLS}{os.pathsep}{own['PATH']}"}


def test_a_workflow_stops_and_keeps_the_suspects(reader: Reader) -> None:
    """The commands of the GitHub workflow's steps, in the order and under the conditions given."""
    (block,) = [block for block in blocks_of(PAGE) if "steps" in block.marks]
    workflow = yaml.safe_load(block.code)
    codes: dict[str, int] = {}
    for step in workflow["jobs"]["audit"]["steps"]:
        if "run" not in step or "pip install" in step["run"]:
            continue  # an action of GitHub's; the client is installed here
        if any(codes.values()) == (step.get("if") == "failure()"):
            codes[step["name"]] = reader.shell(step["run"]).returncode
    assert codes == {"Audit": 1, "Save the suspects": 0}
    assert (reader.folder / "suspects.csv").stat().st_size > 0
