"""Delete audits whose time is over, and files that belong to nothing any more."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import ColumnElement, Engine, Select, and_, delete, exists, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from app.audits.folders import audit_folder
from app.audits.models import Audit, Ranking
from app.datasets.models import Dataset
from app.db import transaction
from app.experiments.models import Experiment
from app.settings import Settings
from app.shared_files import folders_in, last_written, remove_folder
from app.work.keeping import may_tidy
from app.work.leftovers import note_leftover, temporary_files

MAX_PER_ROUND = 10
SWEPT = ".swept"  # its time of change says when the data directory was last looked through

log = structlog.get_logger()


@dataclass(frozen=True)
class Purged:
    """What was deleted: ids of audits, and paths below the data directory."""

    audits: list[str]
    orphans: list[str]


def purge(
    engine: Engine, settings: Settings, *, days: float | None, dry_run: bool = False
) -> Purged:
    """Delete what is old, and files that belong to nothing; results that are deleted are gone.

    Args:
        engine: the whole database.
        settings: name the data directory.
        days: audits that ended longer ago go; None is the setting, and 0 of the setting is none.
        dry_run: only say what would be deleted.

    Raises:
        NotReady: the bucket cannot be reached.
    """
    wanted = settings.audit_days or None if days is None else days
    audits = _old_audits(engine, wanted, limit=None) if wanted is not None else []
    temporary = list(temporary_files(settings))
    folders = list(_folders_without_rows(engine, settings))
    if not dry_run:
        audits = _delete_all(engine, settings, audits, wanted)
        temporary = [path for path in temporary if _remove(engine, path)]
        folders = [path for path in folders if _remove(engine, path, for_all=True)]
    orphans = (str(path.relative_to(settings.data_dir)) for path in (*temporary, *folders))
    return Purged(audits, sorted(orphans))


def expire_audits(engine: Engine, settings: Settings) -> list[str]:
    """Delete some audits that are older than WINNOW_AUDIT_DAYS; return their ids."""
    if not settings.audit_days:
        return []
    found = _old_audits(engine, settings.audit_days, limit=MAX_PER_ROUND)
    return _delete_all(engine, settings, found, settings.audit_days)


def sweep(engine: Engine, settings: Settings) -> list[Path]:
    """Remove what dead processes left half written, at most once in `leftover_seconds`.

    Folders that belong to no row are left: a service that was given the wrong database would take
    every folder for one. `winnow purge` removes them.
    """
    mark = settings.data_dir / SWEPT
    try:
        if mark.exists() and time.time() - mark.stat().st_mtime < settings.leftover_seconds:
            return []
        mark.touch()
    except OSError:
        return []  # /readyz tells of a data directory that is missing or full
    gone = [path for path in temporary_files(settings) if _remove(engine, path)]
    if gone:
        log.info("leftovers_removed", paths=len(gone))
    return gone


def _folders_without_rows(engine: Engine, settings: Settings) -> Iterator[Path]:
    with Session(engine) as session:
        known = {
            "audits": set(session.scalars(select(Audit.id))),
            "datasets": set(session.scalars(select(Dataset.id))),
        }
    before = time.time() - settings.leftover_seconds
    for parent, ids in known.items():
        folder = settings.data_dir / parent
        for path in {*folder.glob("*"), *folders_in(folder)}:
            # it may have been made after the look at the rows
            is_known = path.name in ids or path.name.startswith(".")
            if not is_known and last_written(path) < before:
                yield path


def _remove(engine: Engine, path: Path, *, for_all: bool = False) -> bool:
    with transaction(engine) as session:
        if not may_tidy(session):
            return False
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return not path.exists() and (not for_all or remove_folder(path))


def _old_audits(engine: Engine, days: float, *, limit: int | None) -> list[str]:
    with Session(engine) as session:
        return list(session.scalars(_old(days).order_by(func.random()).limit(limit)))


def _old(days: float) -> Select[str]:
    """Select audits that may go: ended long ago, as all others of their experiment."""
    other = aliased(Audit)
    is_young = or_(other.finished_at.is_(None), ~_ended_before(other.finished_at, days))
    of_the_same = and_(other.experiment_id == Audit.experiment_id, is_young)
    is_ranked = exists().where(Ranking.audit_id == Audit.id, Ranking.finished_at.is_(None))
    return select(Audit.id).where(
        _ended_before(Audit.finished_at, days), ~is_ranked, ~exists().where(of_the_same)
    )


def _ended_before(column: InstrumentedAttribute[Any], days: float) -> ColumnElement[bool]:
    return column < func.now() - timedelta(days=days)


def _delete_all(
    engine: Engine, settings: Settings, audit_ids: list[str], days: float | None
) -> list[str]:
    if days is None:
        return []
    return [gone for audit_id in audit_ids for gone in _delete(engine, settings, audit_id, days)]


def _delete(engine: Engine, settings: Settings, audit_id: str, days: float) -> list[str]:
    """Delete an audit, or the experiment that it is part of, unless that became wrong meanwhile.

    Returns:
        Ids of the audits that are gone.
    """
    with transaction(engine) as session:
        locked = select(Audit).where(Audit.id == audit_id).with_for_update(skip_locked=True)
        audit = session.scalars(locked).one_or_none() if may_tidy(session) else None
        if audit is None or not session.scalar(_old(days).where(Audit.id == audit_id)):
            return []
        if audit.experiment_id is None:
            gone = [audit_id]
            session.delete(audit)
        else:
            of_it = select(Audit.id).where(Audit.experiment_id == audit.experiment_id)
            gone = list(session.scalars(of_it))
            session.execute(delete(Experiment).where(Experiment.id == audit.experiment_id))
        for one in gone:
            note_leftover(session, settings, audit_folder(settings.data_dir, one))
    for one in gone:
        remove_folder(audit_folder(settings.data_dir, one))
    log.info("audits_expired", audit_ids=gone)
    return gone
