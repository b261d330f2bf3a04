"""The command `winnow`; an installed service adds its verbs through an entry point."""

from importlib import metadata

import typer

SERVICE_COMMANDS = "winnow.commands"


def make_app() -> typer.Typer:
    """Return the command line: the client's verbs and those of an installed service."""
    app = typer.Typer(
        name="winnow",
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,  # they could hold keys
    )

    @app.callback()
    def winnow() -> None:
        """Winnow audits the training data of language models."""

    @app.command()
    def version() -> None:
        """Show the version of the client, and of the service where it is installed."""
        for distribution in ("winnow-client", "winnow"):
            try:
                typer.echo(f"{distribution} {metadata.version(distribution)}")
            except metadata.PackageNotFoundError:
                continue

    for entry_point in metadata.entry_points(group=SERVICE_COMMANDS):
        entry_point.load()(app)
    return app


def main() -> None:
    """Run the command line."""
    make_app()()
