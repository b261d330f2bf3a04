"""The command `winnow`, with the service installed and without it."""

from importlib import metadata

import pytest
from typer.testing import CliRunner
from winnow import cli

SERVICE_VERBS = {"serve", "api", "worker", "migrate", "keys"}


def listed(help_text: str) -> set[str]:
    return {line.strip(" │").partition(" ")[0] for line in help_text.splitlines()}


def test_an_installed_service_adds_its_verbs() -> None:
    result = CliRunner().invoke(cli.make_app(), ["--help"])
    assert result.exit_code == 0
    assert SERVICE_VERBS | {"version"} <= listed(result.output)


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
