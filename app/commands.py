"""The service's verbs of the command `winnow`, from serve to purge; and its doctor.

The client loads this module for every call, so it only declares them: `app.verbs` imports what is
heavy, when a verb is run.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from winnow.commands.findings import Finding, add_checks
from winnow.commands.session import Json

if TYPE_CHECKING:
    from app.keys.service import NewKey

DEFAULT_KEY_DAYS = 365
DEFAULT_OVERLAP_HOURS = 24.0
AS_SETTING = "default"
SHOWN_OF_KEY = (
    *("id", "tenant", "name", "scopes", "requests_per_minute", "created_at", "expires_at"),
    *("previous_until", "revoked_at", "last_used_at"),
)

Host = Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")]
Port = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Port to listen on. [default: 8000]")
]
DataDir = Annotated[
    Path | None, typer.Option(help="Where everything is kept. [default: ./.winnow]")
]
OwnLimit = Annotated[
    str | None, typer.Option(metavar="N", help="A number; 0: no limit; default: as the setting.")
]


def register(app: typer.Typer) -> None:
    """Add the service's verbs to a command line, and its checks to `winnow doctor`."""
    add_checks("service", look_around)
    for verb in (serve, api, worker, migrate):
        app.command()(_explaining(verb))
    keys = typer.Typer(no_args_is_help=True, help="API keys of this service.")
    keys.command("create")(_explaining(create_key))
    keys.command("list")(_explaining(list_keys))
    keys.command("rotate")(_explaining(rotate_key))
    keys.command("revoke")(_explaining(revoke_key))
    app.add_typer(keys, name="keys")
    limits = typer.Typer(no_args_is_help=True, help="What each tenant may use.")
    limits.command("set")(_explaining(set_limits))
    limits.command("list")(_explaining(list_limits))
    app.add_typer(limits, name="limits")
    for keeping in (backup, restore, purge):
        app.command()(_explaining(keeping))


def look_around() -> Iterable[Finding]:
    """Return what `winnow doctor` finds of the service that is installed here."""
    from app import doctor

    return doctor.look_around()


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
    from app import verbs

    verbs.serve(host=host, port=port, data_dir=data_dir, num_workers=workers)


def api(*, host: Host = None, port: Port = None) -> None:
    """Run the API alone; it asks every caller for a key."""
    from app import verbs

    verbs.api(host=host, port=port)


def worker(
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Only say by the exit code whether one runs here.")
    ] = False,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Only rankings of ended audits, which need no GPU.")
    ] = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Only audits; leave rankings to other workers.")
    ] = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Only what audits begin with: bring their files here.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="All but that, for a worker without a network.")
    ] = False,
) -> None:
    """Run one worker, on the GPU that it sees or else on the CPU; it takes all work by default."""
    from app import verbs
    from app.jobs import CPU_QUEUE_NAME, FETCH_QUEUE_NAME, QUEUE_NAME

    if cpu + gpu + fetch > 1 or (fetch and offline):
        raise typer.BadParameter(
            "give one of --cpu, --gpu and --fetch, or none of them for a worker that takes all; "
            "--offline goes with the first two, or alone"
        )
    if check:
        raise typer.Exit(verbs.check_worker())
    choice = {
        QUEUE_NAME: not (cpu or fetch),
        CPU_QUEUE_NAME: not (gpu or fetch),
        FETCH_QUEUE_NAME: not (cpu or offline),
    }
    raise typer.Exit(verbs.worker(queues=[name for name, is_taken in choice.items() if is_taken]))


def migrate(*, as_json: Json = False) -> None:
    """Bring the database to the schema of this version."""
    from app import verbs

    verbs.migrate()
    if as_json:
        _answer({"migrated": True})
    else:
        typer.echo("The database has the schema of this version.")


def create_key(
    *,
    name: Annotated[str, typer.Option(help="What the key is for.")] = "key",
    tenant: Annotated[str, typer.Option(help="Whose audits and datasets it opens.")] = "default",
    days: Annotated[
        int, typer.Option(min=1, max=3650, help="How long it is valid.")
    ] = DEFAULT_KEY_DAYS,
    scopes: Annotated[
        str | None,
        typer.Option(help="What it may do, such as audits:read,decisions:write. [default: all]"),
    ] = None,
    requests_per_minute: Annotated[
        int | None,
        typer.Option(min=0, help="How often it may call; 0: no limit. [default: as its tenant]"),
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Make an API key and print it, once: only its hash is kept."""
    from app import verbs

    try:
        key = verbs.create_key(
            data_dir=data_dir,
            tenant=tenant,
            name=name,
            valid_days=days,
            scopes=scopes,
            requests_per_minute=requests_per_minute,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--scopes") from error
    _show_secret(key, as_json=as_json)


def rotate_key(
    key_id: Annotated[str, typer.Argument(help="As `winnow keys list` shows it.")],
    *,
    overlap_hours: Annotated[
        float, typer.Option(min=0, help="How long the secret before it opens on.")
    ] = DEFAULT_OVERLAP_HOURS,
    days: Annotated[
        int, typer.Option(min=1, max=3650, help="How long the new secret is valid.")
    ] = DEFAULT_KEY_DAYS,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Give a key a new secret and print it, once; the old one opens on for a while."""
    from app import verbs

    key = verbs.rotate_key(key_id, data_dir=data_dir, valid_days=days, overlap_hours=overlap_hours)
    _show_secret(key, as_json=as_json)


def _show_secret(key: "NewKey", *, as_json: bool) -> None:
    if as_json:
        _answer(asdict(key))
        return
    typer.echo(f"{key.id} of tenant {key.tenant}, valid until {key.expires_at:%Y-%m-%d}:", err=True)
    typer.echo(key.secret)


def list_keys(*, data_dir: DataDir = None, as_json: Json = False) -> None:
    """List the keys, without their secrets; those that soon end are marked."""
    from app import verbs

    keys = verbs.list_keys(data_dir=data_dir)
    if as_json:
        _answer([{name: getattr(key, name) for name in SHOWN_OF_KEY} for key in keys])
        return
    for key in keys:
        used = f"{key.last_used_at:%Y-%m-%d}" if key.last_used_at else "never"
        scopes = "all scopes" if key.scopes is None else ",".join(key.scopes)
        typer.echo(
            f"{key.id}  {key.tenant}  {key.name}  {verbs.standing_of(key)}  {scopes}  used: {used}"
        )


def revoke_key(
    key_id: Annotated[str, typer.Argument(help="As `winnow keys list` shows it.")],
    *,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """End a key at once."""
    from app import verbs

    verbs.revoke_key(key_id, data_dir=data_dir)
    if as_json:
        _answer({"id": key_id, "revoked": True})
    else:
        typer.echo(f"{key_id} is revoked.")


def set_limits(
    tenant: Annotated[str, typer.Argument(help="Whose limits.")],
    *,
    requests_per_minute: OwnLimit = None,
    max_open_audits: OwnLimit = None,
    max_dataset_rows: OwnLimit = None,
    max_dataset_bytes: OwnLimit = None,
    worker_minutes_per_day: OwnLimit = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Set what a tenant may use, in place of the WINNOW_… settings of the same names."""
    from app import verbs

    given = {
        "requests_per_minute": requests_per_minute,
        "max_open_audits": max_open_audits,
        "max_dataset_rows": max_dataset_rows,
        "max_dataset_bytes": max_dataset_bytes,
        "worker_minutes_per_day": worker_minutes_per_day,
    }
    changes = {
        name: None if value == AS_SETTING else _whole(name, value)
        for name, value in given.items()
        if value is not None
    }
    if not changes:
        raise typer.BadParameter("give one limit or more; --help lists them")
    verbs.set_limits(tenant, data_dir=data_dir, changes=changes)
    if as_json:
        _answer({"tenant": tenant, **changes})
    else:
        typer.echo(f"The limits of {tenant} are set.")


def _whole(name: str, value: str) -> int:
    if not value.isdecimal():
        option = f"--{name.replace('_', '-')}"
        raise typer.BadParameter(
            f"{value!r} is neither a number nor {AS_SETTING}", None, None, option
        )
    return int(value)


def list_limits(*, data_dir: DataDir = None, as_json: Json = False) -> None:
    """List the tenants that have limits of their own."""
    from app import verbs
    from app.limits.quotas import LIMITS

    rows = [
        {"tenant": row.tenant, **{name: getattr(row, name) for name in LIMITS}}
        for row in verbs.list_limits(data_dir=data_dir)
    ]
    if as_json:
        _answer(rows)
        return
    for row in rows:
        tenant = row.pop("tenant")
        own = (f"{name}={value or 'none'}" for name, value in row.items() if value is not None)
        typer.echo(f"{tenant}  {'  '.join(own) or 'as the settings say'}")


def backup(
    target: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
    *,
    data_dir: DataDir = None,
    cache: Annotated[bool, typer.Option(help="Also copy what was fetched from hubs.")] = True,
    as_json: Json = False,
) -> None:
    """Copy database and files into a folder, while the service runs or not."""
    from dataclasses import asdict

    from app import verbs

    manifest = verbs.back_up(target=target, data_dir=data_dir, with_cache=cache)
    if as_json:
        _answer(asdict(manifest))
    else:
        typer.echo(
            f"{manifest.num_audits} audits, {manifest.num_files} files, "
            f"{manifest.num_bytes / 1024**2:.1f} MiB in {target}."
        )


def restore(
    source: Annotated[Path, typer.Argument(help="A folder of `winnow backup`.")],
    *,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Set a backup up in an empty data directory and an empty database."""
    from app import verbs

    incomplete = verbs.restore(source=source, data_dir=data_dir)
    if as_json:
        _answer({"restored": True, "incomplete": incomplete})
        return
    typer.echo("Restored; start the service as before.")
    for audit_id in incomplete:
        typer.echo(f"{audit_id} lacks files of its results: it was deleted meanwhile.", err=True)


def purge(
    *,
    days: Annotated[
        float | None,
        typer.Option(min=0, help="Delete audits that ended longer ago. [default: none]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be deleted.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Delete old audits, and files that belong to none; results that are deleted are gone."""
    from dataclasses import asdict

    from app import verbs

    purged = verbs.purge(days=days, dry_run=dry_run, data_dir=data_dir)
    if as_json:
        _answer(asdict(purged) | {"dry_run": dry_run})
        return
    said = "Would delete" if dry_run else "Deleted"
    typer.echo(f"{said} {len(purged.audits)} audits and {len(purged.orphans)} files or folders.")
    for name in (*purged.audits, *purged.orphans):
        typer.echo(name)


def _answer(value: Any) -> None:  # noqa: ANN401  what JSON knows
    from pydantic_core import to_json

    typer.echo(to_json(value, indent=2).decode())


def _explaining(verb: Callable[..., None]) -> Callable[..., None]:
    """Print the errors that a person can act on as one sentence, without a traceback."""

    @wraps(verb)
    def run(*arguments: Any, **options: Any) -> None:
        from app import verbs

        try:
            verb(*arguments, **options)
        except verbs.EXPLAINED as error:
            typer.echo(f"winnow: {verbs.explain(error)}", err=True)
            raise typer.Exit(1) from error

    return run
