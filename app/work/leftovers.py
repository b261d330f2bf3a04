"""Files that a killed process left behind: noted before they can be left, removed when due.

Rows of the database name the folders of things that are being deleted, or are not yet there; so a
folder is never removed because a database does not know it. Files that are being written carry
temporary names, which no process looks for after its death.
"""

import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import chain
from pathlib import Path

import structlog
from sqlalchemy import Engine, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.audits.models import Audit, Ranking
from app.datasets.models import Dataset
from app.db import transaction
from app.settings import Settings
from app.shared_files import folders_in, last_written_here, remove_folder
from app.work.keeping import may_tidy
from app.work.models import Leftover

TEMPORARY = "*.partial"
_FOLDERS = ("audits", "datasets", "cache")
MAX_PER_ROUND = 100
COPIES_KEPT_SECONDS = 24 * 3600.0
COPIES_LOOKED_AT_SECONDS = 3600.0
LOOKED_THROUGH = ".copies"

log = structlog.get_logger()


def note_leftover(session: Session, settings: Settings, folder: Path) -> None:
    """Let a folder be removed later, unless what it is named after is there then.

    Whoever deletes a thing removes its folder at once too; this is for the case that it dies before
    it has, or that a worker still writes there.
    """
    due = func.now() + timedelta(seconds=settings.leftover_seconds)
    path = str(folder.relative_to(settings.data_dir))
    session.execute(insert(Leftover).values(path=path, due_at=due).on_conflict_do_nothing())


def remove_leftovers(engine: Engine, settings: Settings) -> list[str]:
    """Remove the folders that are due and belong to nothing; return their paths."""
    removed = []
    with Session(engine) as session:
        due = select(Leftover.path).where(Leftover.due_at < func.now())
        # in any order: what cannot go must not stand in the way of others
        paths = list(session.scalars(due.order_by(func.random()).limit(MAX_PER_ROUND)))
    for path in paths:
        with transaction(engine) as session:
            if not may_tidy(session):
                break
            is_needed = _is_there(session, Path(path).name)
            folder = settings.data_dir / path
            if not is_needed:
                was_here = folder.exists()
                if not remove_folder(folder):
                    log.error("leftover_not_removed", path=path)
                    break  # a store that does not answer takes a minute to say so
                removed += [path] if was_here else []
            session.execute(delete(Leftover).where(Leftover.path == path))
    if removed:
        log.info("leftovers_removed", paths=removed)
    return removed


def _is_there(session: Session, thing_id: str) -> bool:
    tables = (Audit, Ranking, Dataset)
    return any(session.get(table, thing_id) is not None for table in tables)


def forget_copies(engine: Engine, settings: Settings) -> list[Path]:
    """Remove old copies that this machine has of what is in a bucket, or was deleted elsewhere.

    Of audits those that nothing was written of for a day, of datasets those that are no more. What
    was here before there was a bucket, and belongs to something, is no copy. They are looked
    through once an hour.

    Returns:
        The folders that are gone.
    """
    mark, now = settings.data_dir / LOOKED_THROUGH, time.time()
    if settings.artifacts is None:
        return []
    if mark.exists() and now - mark.stat().st_mtime < COPIES_LOOKED_AT_SECONDS:
        return []
    mark.touch()
    shared = folders_in(settings.data_dir / "audits")
    before = now - COPIES_KEPT_SECONDS
    copies = [
        folder
        for name in ("audits", "datasets")
        for folder in (settings.data_dir / name).glob("*")
        if last_written_here(folder) < before
    ]
    with Session(engine) as session:
        old = [one for one in copies if one in shared or not _is_there(session, one.name)]
    for folder in old:
        shutil.rmtree(folder, ignore_errors=True)
    return old


def temporary_files(settings: Settings) -> Iterator[Path]:
    """Yield files and folders under temporary names that nobody has written to for long."""
    before = time.time() - settings.leftover_seconds
    found = ((settings.data_dir / name).rglob(TEMPORARY) for name in _FOLDERS)
    for path in (*chain.from_iterable(found), *(settings.data_dir / "tmp").glob("*")):
        if last_written_here(path) < before:
            yield path
