"""While a backup copies the files, nobody tidies up."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

KEEP_LOCK = 0x77_69_6E_6B  # held by a backup; those who delete hold it together


def may_tidy(session: Session) -> bool:
    """Return whether no backup runs; none begins before the caller's transaction ends."""
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock_shared(KEEP_LOCK))))
