"""The service's own verbs without the client's: how `winnow serve` starts its workers."""

import typer

from app.commands import register


def main() -> None:
    """Run one verb."""
    verbs = typer.Typer(no_args_is_help=True)
    register(verbs)
    verbs()


if __name__ == "__main__":
    main()
