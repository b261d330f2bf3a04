"""`winnow doctor`: what works, what does not, and what to do about it."""

from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING

import typer

from winnow.commands.findings import Finding, Status, added_findings
from winnow.commands.session import Session, verb

if TYPE_CHECKING:
    from winnow.client import Client

_COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "red"}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("doctor")(verb(doctor))


def doctor(session: Session) -> int:
    """Check what can be reached from here, and say what to do; exit with 1 when something fails.

    The service at --url is asked; where it is installed, its database, broker, workers, GPU, disk
    and libraries are looked at too, as the environment's WINNOW_… settings name them.

    Examples:
        winnow doctor
        winnow doctor --url https://winnow.example.org --json
    """
    findings = []
    for finding in (*_service(session), *added_findings()):
        findings.append(finding)
        if not session.as_json:
            typer.secho(f"{finding.status:<4}", fg=_COLOURS[finding.status], nl=False)
            typer.echo(f"  {finding.name:<12} {finding.detail}")
            if finding.advice:
                typer.echo(f"{'':19}→ {finding.advice}")
    is_well = all(finding.status != "fail" for finding in findings)
    if session.as_json:
        session.answer({"ok": is_well, "findings": [asdict(finding) for finding in findings]})
    return 0 if is_well else 1


def _service(session: Session) -> Iterator[Finding]:
    """Yield what the service says of itself."""
    from winnow.errors import WinnowError

    with session.client(attempts=2) as client:
        try:
            alive = client.alive()
        except WinnowError as error:
            yield Finding(
                "api",
                "fail",
                f"{error}",
                "Start it with `winnow serve`, or name another with --url or WINNOW_URL.",
            )
            return
        yield Finding("api", "ok", f"{session.url} answers, version {alive.version}.")
        yield _versions(alive.version)
        yield _key(client)
        try:
            readiness = client.readiness()
        except WinnowError as error:
            yield Finding("ready", "fail", str(error), "Look into the service's log.")
            return
    for name, check in readiness.checks.items():
        advice = None if check.ok else "On the service's machine `winnow doctor` tells more."
        yield Finding(f"its {name}", "ok" if check.ok else "fail", check.detail, advice)


def _versions(of_service: str) -> Finding:
    own = metadata.version("winnow-client")
    if own == of_service:
        return Finding("client", "ok", f"The client has the service's version, {own}.")
    return Finding(
        "client",
        "warn",
        f"The client is {own}, the service {of_service}.",
        f"pip install 'winnow-client=={of_service}'",
    )


def _key(client: "Client") -> Finding:
    from winnow.errors import WinnowError

    try:
        client.estimators()
    except WinnowError as error:
        advice = "Pass a key with --api-key or WINNOW_API_KEY; `winnow keys create` makes one."
        return Finding("key", "fail", str(error), advice)
    return Finding("key", "ok", "Calls are let in.")
