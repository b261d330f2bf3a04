"""`winnow trail`: who changed what."""

from itertools import islice
from typing import Annotated

import typer

from winnow.commands.session import Session, verb


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("trail")(verb(trail))


def trail(
    session: Session,
    *,
    action: Annotated[str | None, typer.Option(help="Only this, such as audit.submit.")] = None,
    object_id: Annotated[
        str | None, typer.Option("--object", help="Only what was done to this.")
    ] = None,
    key_id: Annotated[str | None, typer.Option("--key", help="Only what this key did.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most entries.")] = 50,
) -> None:
    """List who changed what and when, the newest first.

    Examples:
        winnow trail --object aud_…
    """
    with session.client() as client:
        found = list(islice(client.trail(action=action, object_id=object_id, key_id=key_id), limit))
    if session.as_json:
        session.answer(found)
        return
    for entry in found:
        typer.echo(
            f"{entry.at:%Y-%m-%d %H:%M:%S}  {entry.actor}  {entry.action}  {entry.object_id}"
        )
