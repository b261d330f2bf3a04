"""The service's verbs of the command `winnow`: serve, api, worker, migrate, keys.

The client loads this module for every call, so whatever is heavy is imported by the verb.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from app.settings import Settings

DEFAULT_KEY_DAYS = 365
NO_WORKER_EXTRA = (
    "This installation has no torch, which workers need. Install the worker extra: "
    "pip install 'winnow[worker]'"
)

Host = Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")]
Port = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Port to listen on. [default: 8000]")
]
DataDir = Annotated[
    Path | None, typer.Option(help="Where everything is kept. [default: ./.winnow]")
]


def register(app: typer.Typer) -> None:
    """Add the service's verbs to a command line."""
    for verb in (serve, api, worker, migrate):
        app.command()(_explaining(verb))
    keys = typer.Typer(no_args_is_help=True, help="API keys of this service.")
    for name, verb in (("create", create_key), ("list", list_keys), ("revoke", revoke_key)):
        keys.command(name)(_explaining(verb))
    app.add_typer(keys, name="keys")


def serve(
    *,
    host: Host = None,
    port: Port = None,
    data_dir: DataDir = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Worker processes. [default: one per GPU, or one]")
    ] = None,
) -> None:
    """Run the whole service here, until Ctrl-C: database, broker, workers, API."""
    from app.supervisor import serve as run

    if workers != 0 and find_spec("torch") is None:
        raise _Refusal(NO_WORKER_EXTRA)
    run(_settings(host=host, port=port, data_dir=data_dir), num_workers=workers)


def api(*, host: Host = None, port: Port = None) -> None:
    """Run the API alone; it asks every caller for a key."""
    from app.server import open_socket, run_api

    settings = _settings(host=host, port=port, require_keys=True)
    with open_socket(settings.host, settings.port) as listener:
        run_api(settings, listener)


def worker() -> None:
    """Run one worker, on the GPU that it sees or else on the CPU."""
    if find_spec("torch") is None:
        raise _Refusal(NO_WORKER_EXTRA)
    from workers.celery_app import run_worker

    raise typer.Exit(run_worker())


def migrate() -> None:
    """Bring the database to the schema of this version."""
    from app.db import make_engine
    from app.migrate import migrate as upgrade

    engine = make_engine(_settings().require_database_url())
    upgrade(engine)
    engine.dispose()
    typer.echo("The database has the schema of this version.")


def create_key(
    *,
    name: Annotated[str, typer.Option(help="What the key is for.")] = "key",
    tenant: Annotated[str, typer.Option(help="Whose audits and datasets it opens.")] = "default",
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long it is valid.")] = (
        DEFAULT_KEY_DAYS
    ),
    data_dir: DataDir = None,
) -> None:
    """Make an API key and print it, once: only its hash is kept."""
    from app.keys import service

    with _database(data_dir) as engine:
        key = service.create_key(engine, tenant=tenant, name=name, valid_days=days)
    typer.echo(f"{key.id} of tenant {tenant}, valid until {key.expires_at:%Y-%m-%d}:", err=True)
    typer.echo(key.secret)


def list_keys(*, data_dir: DataDir = None) -> None:
    """List the keys, without their secrets."""
    from app.keys import service

    with _database(data_dir) as engine:
        keys = service.list_keys(engine)
    for key in keys:
        state = "revoked" if key.revoked_at else f"until {key.expires_at:%Y-%m-%d}"
        used = f"{key.last_used_at:%Y-%m-%d}" if key.last_used_at else "never"
        typer.echo(f"{key.id}  {key.tenant}  {key.name}  {state}  used: {used}")


def revoke_key(
    key_id: Annotated[str, typer.Argument(help="As `winnow keys list` shows it.")],
    *,
    data_dir: DataDir = None,
) -> None:
    """End a key at once."""
    from app.errors import NotFound
    from app.keys import service

    with _database(data_dir) as engine:
        try:
            service.revoke_key(engine, key_id)
        except NotFound as error:
            raise _Refusal(f"{error.detail} `winnow keys list` shows those there are.") from error
    typer.echo(f"{key_id} is revoked.")


class _Refusal(Exception):
    """What a verb cannot do, and what to do instead."""


def _explaining(verb: Callable[..., None]) -> Callable[..., None]:
    """Print the errors that a person can act on as one sentence, without a traceback."""

    @wraps(verb)
    def run(*arguments: Any, **options: Any) -> None:  # noqa: ANN401
        try:
            verb(*arguments, **options)
        except Exception as error:
            if not isinstance(error, _explained()):
                raise
            typer.echo(f"winnow: {error}", err=True)
            raise typer.Exit(1) from error

    return run


def _explained() -> tuple[type[Exception], ...]:
    from app.embedded import DataDirectoryInUse, ServerDidNotStart
    from app.server import RefusedToStart
    from app.settings import MissingSetting

    return (_Refusal, DataDirectoryInUse, ServerDidNotStart, RefusedToStart, MissingSetting)


def _settings(**options: Any) -> "Settings":  # noqa: ANN401
    """Return the environment's settings with the options that were given on top."""
    from app.settings import get_settings

    given = {name: value for name, value in options.items() if value is not None}
    if "data_dir" in given:
        given["data_dir"] = given["data_dir"].absolute()
    return get_settings().model_copy(update=given)


@contextmanager
def _database(data_dir: Path | None) -> Iterator["Engine"]:
    """Connect to the database of the settings, or else to the embedded one, running or not."""
    from pydantic import SecretStr

    from app.db import make_engine
    from app.embedded import embedded_postgres
    from app.migrate import migrate as upgrade

    settings = _settings(data_dir=data_dir)
    with ExitStack() as stack:
        if settings.database_url is None:
            url = stack.enter_context(embedded_postgres(settings.data_dir))
            settings = settings.model_copy(update={"database_url": SecretStr(url)})
        engine = make_engine(settings.require_database_url())
        stack.callback(engine.dispose)
        upgrade(engine)
        yield engine
