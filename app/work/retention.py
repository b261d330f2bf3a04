"""Retention: the influence files of audits that ended long ago are deleted, never their results."""

from datetime import timedelta

import structlog
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from app.audits.folders import audit_folder, remove_influence
from app.audits.models import Audit, Ranking
from app.db import transaction
from app.settings import Settings
from app.work.keeping import may_tidy

MAX_AUDITS_PER_ROUND = 10

log = structlog.get_logger()


def expire_influence(engine: Engine, settings: Settings) -> list[str]:
    """Delete the influence files of some audits whose time is over.

    Each audit is locked while its files go, so that no ranking can be asked for meanwhile; the
    others are not. A round that dies in between is done again.

    Returns:
        Ids of the audits whose files are gone now.
    """
    if not settings.influence_days:
        return []
    is_over = Audit.finished_at < func.now() - timedelta(days=settings.influence_days)
    over = select(Audit.id).where(Audit.influence_deleted_at.is_(None), is_over)
    with Session(engine) as session:
        # in any order: audits whose files cannot go must not stand in the way of others
        found = list(session.scalars(over.order_by(func.random()).limit(MAX_AUDITS_PER_ROUND)))
    return [audit_id for audit_id in found if _expire(engine, settings, audit_id)]


def _expire(engine: Engine, settings: Settings, audit_id: str) -> bool:
    with transaction(engine) as session:
        statement = select(Audit).where(Audit.id == audit_id, Audit.influence_deleted_at.is_(None))
        audit = session.scalars(
            statement.with_for_update(skip_locked=True, key_share=True)
        ).one_or_none()
        # asked after the lock: a ranking that was accepted before it is seen here
        unfinished = select(Ranking.id).where(
            Ranking.audit_id == audit_id, Ranking.finished_at.is_(None)
        )
        if audit is None or not may_tidy(session):
            return False
        if session.scalars(unfinished.limit(1)).first():
            return False
        left = remove_influence(audit_folder(settings.data_dir, audit_id))
        if left:
            log.error("influence_not_deleted", audit_id=audit_id, bytes_left=left)
            return False
        audit.influence_bytes = 0
        audit.influence_deleted_at = func.now()
        audit.version += 1
    log.info("influence_deleted", audit_id=audit_id)
    return True
