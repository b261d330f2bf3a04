"""The command `winnow`; an installed service adds its verbs through an entry point."""

from importlib import metadata
from typing import Annotated

import typer

from winnow.commands import audit, doctor, export, rank, session, suspects, trail

SERVICE_COMMANDS = "winnow.commands"

HELP = """Winnow audits the training data of language models.

\b
Examples:
    winnow audit run --model ./model --train train.csv --validation good.csv --wait
    winnow suspects aud_…
    winnow export aud_… --apply correct

\b
Exit codes:
    0  all is well
    1  too many suspects (--fail-over), or something that doctor found
    2  a wrong option, or a request that the service refused
    3  an audit that failed, or a service that does not answer
"""


def make_app() -> typer.Typer:
    """Return the command line: the client's verbs and those of an installed service."""
    app = typer.Typer(
        name="winnow",
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,  # they could hold keys
    )

    @app.callback(help=HELP)
    def winnow(
        *,
        context: typer.Context,
        url: Annotated[
            str | None,
            typer.Option(
                envvar="WINNOW_URL", help=f"Where the service is. [{session.DEFAULT_URL}]"
            ),
        ] = None,
        api_key: Annotated[
            str | None,
            typer.Option(envvar="WINNOW_API_KEY", help="A key, where the service asks for one."),
        ] = None,
        as_json: session.Json = False,
    ) -> None:
        session.remember(context, url=url, api_key=api_key, as_json=as_json)

    audit.register(app)
    suspects.register(app)
    export.register(app)
    rank.register(app)
    trail.register(app)
    doctor.register(app)

    @app.command()
    @session.verb
    def version(session: session.Session) -> None:
        """Show the version of the client, and of the service where it is installed."""
        found = {}
        for distribution in ("winnow-client", "winnow"):
            try:
                found[distribution] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
        if session.as_json:
            session.answer(found)
        else:
            typer.echo("\n".join(f"{name} {number}" for name, number in found.items()))

    for entry_point in metadata.entry_points(group=SERVICE_COMMANDS):
        entry_point.load()(app)
    return app


def main() -> None:
    """Run the command line."""
    make_app()()
