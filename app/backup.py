"""Copy a service that runs, and set the copy up elsewhere.

The database is dumped first and the files are copied after it. Files appear by a rename and are
not written again, so what the dump speaks of is there and whole when it is copied; what came later
is only too much. While a copy is taken nothing is tidied up; what a caller deletes is gone.

Where a bucket has the files, its objects are copied, and put into the bucket that is set where the
copy is set up; the data directory holds only copies of them.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Engine, func, inspect, make_url, select
from sqlalchemy.orm import Session

from app.audits.folders import audit_folder
from app.audits.models import Audit, AuditState
from app.embedded import POSTGRES_BINARIES
from app.migrate import current_revision, make_tenant_role, migrate
from app.settings import Settings
from app.shared_files import WHOLE, bucket_of, folders_in
from app.version import VERSION
from app.work.keeping import KEEP_LOCK
from app.work.purging import SWEPT
from app.work.restart import give_back_all_work

DUMP = "database.dump"
FILES = "files"
MANIFEST = "backup.json"
CACHE = "cache"
SHARED = ("audits", "datasets", CACHE)  # what is in a bucket, if there is one
# of the place, not of its content: the embedded server, its lock, and what is half written
LEFT_OUT = frozenset({"postgres", "lock", "tmp", SWEPT})


class BackupRefused(Exception):
    """A copy cannot be taken or set up here; the message says why."""


@dataclass(frozen=True)
class Manifest:
    """What a copy holds; it is written last, so a folder with one is whole."""

    version: str
    schema: str
    created_at: str
    num_audits: int
    num_files: int
    num_bytes: int
    has_cache: bool
    in_bucket: bool = False


def back_up(engine: Engine, settings: Settings, target: Path, *, with_cache: bool) -> Manifest:
    """Copy database and files into a new folder, while the service runs or not.

    Args:
        engine: the database, by its owner.
        settings: name the data directory.
        target: a folder that is not there yet, or is empty.
        with_cache: copy fetched models and datasets too. Without them an audit that had begun on
            a model of the hub cannot go on after a restore; ended ones lose nothing.

    Raises:
        BackupRefused: the folder holds something, or pg_dump does not succeed.
        NotReady: the bucket cannot be reached.
    """
    bucket = bucket_of(settings)
    if target.exists() and any(target.iterdir()):
        raise BackupRefused(f"{target} is not empty. Name a folder for this backup alone.")
    target.mkdir(parents=True, exist_ok=True)
    with _nothing_is_deleted(engine):
        schema = current_revision(engine)
        if schema is None:
            raise BackupRefused("The database has no tables yet: there is nothing to back up.")
        with Session(engine) as session:
            num_audits = session.scalar(select(func.count()).select_from(Audit)) or 0
        _run("pg_dump", "--format=custom", "--no-owner", "--file", str(target / DUMP), of=engine)
        left_out = LEFT_OUT if with_cache else LEFT_OUT | {CACHE}
        if bucket is None:
            num_files, num_bytes = _copy(settings.data_dir, target / FILES, left_out=left_out)
        else:
            names = [name for name in SHARED if name not in left_out]
            saved = [
                bucket.save_folder(settings.data_dir / name, target / FILES / name)
                for name in names
            ]
            num_files, num_bytes = (sum(counts) for counts in zip(*saved, strict=True))
    manifest = Manifest(
        version=VERSION,
        schema=schema,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        num_audits=num_audits,
        num_files=num_files,
        num_bytes=num_bytes,
        has_cache=with_cache,
        in_bucket=bucket is not None,
    )
    (target / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    return manifest


def check_restore(engine: Engine, settings: Settings, source: Path) -> Manifest:
    """Return what a copy holds, if it can be set up here.

    Raises:
        BackupRefused: the copy is not whole, or there is something here already.
        NotReady: the bucket cannot be reached.
    """
    try:
        manifest = Manifest(**json.loads((source / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BackupRefused(
            f"{source} holds no whole backup: its {MANIFEST} is missing or damaged."
        ) from error
    if inspect(engine).get_table_names():
        raise BackupRefused("The database has tables already. Restore into an empty one.")
    folder, bucket = settings.data_dir, bucket_of(settings)
    if bucket is not None:
        if not manifest.in_bucket:
            raise BackupRefused(
                f"{source} is the copy of a data directory, without what marks whole folders in a "
                "bucket. Restore it without WINNOW_ARTIFACTS."
            )
        there = {name for name in SHARED if folders_in(folder / name)}
        place = f"The bucket folder {settings.artifacts} (WINNOW_ARTIFACTS)"
    else:
        there = {path.name for path in folder.iterdir()} - LEFT_OUT if folder.exists() else set()
        place = str(folder)
    if there:
        raise BackupRefused(f"{place} holds {', '.join(sorted(there))}. Name another folder.")
    return manifest


def restore(engine: Engine, settings: Settings, source: Path) -> list[str]:
    """Set a copy up in an empty database and an empty place for files; start the service after it.

    Returns:
        Ids of ended audits whose results are not all there: they were deleted while the copy was
        taken.

    Raises:
        BackupRefused: as `check_restore`, or pg_restore does not succeed.
    """
    check_restore(engine, settings, source)
    bucket = bucket_of(settings)
    if bucket is None:
        _copy(source / FILES, settings.data_dir, left_out=frozenset())
    else:
        bucket.load_folder(source / FILES, settings.data_dir)
    with engine.begin() as connection:
        make_tenant_role(connection)  # roles are no part of a dump
    dump = str(source / DUMP)
    _run("pg_restore", "--no-owner", "--exit-on-error", "--single-transaction", dump, of=engine)
    migrate(engine)
    give_back_all_work(engine)
    return _incomplete(engine, source / FILES)


def _incomplete(engine: Engine, files_dir: Path) -> list[str]:
    found = []
    with Session(engine) as session:
        ended = select(Audit.id, Audit.summary["ranking_id"].astext, Audit.summary["files"])
        for audit_id, ranking_id, files in session.execute(
            ended.where(Audit.state == AuditState.SUCCEEDED)
        ):
            folder = audit_folder(files_dir, audit_id) / "results" / str(ranking_id)
            names = {f"suspects.{name}": file["bytes"] for name, file in (files or {}).items()}
            if not all(_size(folder / name) == size for name, size in names.items()):
                found.append(audit_id)
    return found


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


@contextmanager
def _nothing_is_deleted(engine: Engine) -> Iterator[None]:
    """Keep every process from tidying up for as long as this one lives."""
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(select(func.pg_advisory_lock(KEEP_LOCK)))
        try:
            yield
        finally:
            connection.execute(select(func.pg_advisory_unlock(KEEP_LOCK)))


def _copy(source: Path, target: Path, *, left_out: frozenset[str]) -> tuple[int, int]:
    """Copy a tree with its links and times; return how many files and bytes there were.

    What vanishes meanwhile was deleted by somebody, and temporary files belong to nobody.
    """
    num_files = num_bytes = 0
    for folder, names, files in os.walk(source):
        here = Path(folder)
        names[:] = [
            name for name in names if not (here == source and name in left_out) and _is_kept(name)
        ]
        place = target / here.relative_to(source)
        place.mkdir(parents=True, exist_ok=True)
        linked = [name for name in names if (here / name).is_symlink()]
        for name in (*files, *linked):
            if (here == source and name in left_out) or not _is_kept(name):
                continue
            try:
                shutil.copy2(here / name, place / name, follow_symlinks=False)
                num_bytes += (place / name).lstat().st_size
            except FileNotFoundError:
                continue
            num_files += 1
    return num_files, num_bytes


def _is_kept(name: str) -> bool:
    if name == WHOLE:  # of the bucket that the copy was taken of
        return False
    return not name.endswith((".partial", ".incomplete", ".lock")) and "staging-" not in name


def _run(program: str, *arguments: str, of: Engine) -> None:
    """Run a program of PostgreSQL 18, which comes with the service, on a database."""
    url = make_url(of.url).set(drivername="postgresql")
    password = {"PGPASSWORD": url.password} if url.password else {}
    address = url.set(password=None).render_as_string(hide_password=False)
    done = subprocess.run(  # noqa: S603  a program of ours; the password is not on its command line
        [str(POSTGRES_BINARIES / program), "--dbname", address, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | password,
    )
    if done.returncode:
        raise BackupRefused(f"{program} did not succeed: {done.stderr.strip()[-1000:]}")
