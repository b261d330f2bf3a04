"""The command `winnow`, with the service installed and without it."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
from typer.testing import CliRunner
from winnow import cli

CLIENT_VERBS = {"audit", "suspects", "export", "rank", "doctor", "version"}
SERVICE_VERBS = {"serve", "api", "worker", "migrate", "keys"}


def listed(help_text: str) -> set[str]:
    return {line.strip(" │").partition(" ")[0] for line in help_text.splitlines()}


def test_an_installed_service_adds_its_verbs() -> None:
    result = CliRunner().invoke(cli.make_app(), ["--help"])
    assert result.exit_code == 0
    assert listed(result.output) >= SERVICE_VERBS | CLIENT_VERBS


def test_without_the_service_the_client_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with one verb only, `winnow version` is a verb and not the whole command."""
    monkeypatch.setattr(metadata, "entry_points", lambda **_: ())
    result = CliRunner().invoke(cli.make_app(), ["--help"])
    assert "version" in listed(result.output)
    assert not SERVICE_VERBS & listed(result.output)
    assert CliRunner().invoke(cli.make_app(), ["version"]).exit_code == 0


def test_the_versions_are_shown() -> None:
    result = CliRunner().invoke(cli.make_app(), ["version"])
    assert result.output.split() == [
        "winnow-client",
        metadata.version("winnow-client"),
        "winnow",
        metadata.version("winnow"),
    ]


def test_versions_in_json() -> None:
    result = CliRunner().invoke(cli.make_app(), ["version", "--json"])
    assert json.loads(result.stdout)["winnow-client"] == metadata.version("winnow-client")


@pytest.mark.parametrize(
    "verb",
    [
        *(("audit", name) for name in ("run", "list", "show", "wait", "cancel", "delete")),
        *((name,) for name in ("suspects", "export", "rank", "doctor")),
    ],
    ids=" ".join,
)
def test_every_verb_helps_with_examples_and_takes_the_common_options(verb: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli.make_app(), [*verb, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"winnow {' '.join(verb)}" in result.output.partition("Examples:")[2]
    for option in ("--url", "--api-key", "--json"):
        assert option in result.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_it(shell: str) -> None:
    program = "import sys; sys.argv[0] = 'winnow'; from winnow.cli import main; main()"

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    assert "Traceback" not in run("--show-completion").stderr  # it asks which shell it runs in
    assert "_WINNOW_COMPLETE" in run(_WINNOW_COMPLETE=f"source_{shell}").stdout


def test_words_are_completed() -> None:
    program = "import sys; sys.argv[0] = 'winnow'; from winnow.cli import main; main()"
    words = {"COMP_WORDS": "winnow audit ca", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **words, "_WINNOW_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["cancel"]


def test_help_loads_neither_http_nor_the_service() -> None:
    program = """
import sys
sys.argv = ["winnow", "--help"]
from winnow.cli import main
try:
    main()
except SystemExit:
    pass
print([name for name in ("httpx2", "pydantic", "sqlalchemy", "fastapi") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip().endswith("[]")
