"""The time that workers give to each tenant, and when they last gave any."""

from sqlalchemy import Date, cast, func, literal, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.audits.models import Audit
from app.limits.models import WorkerUsage
from app.work.models import WorkUnit

TODAY = cast(func.timezone("UTC", func.now()), Date)


def charge(session: Session, unit: WorkUnit, *, begins: bool = False) -> None:
    """Charge a unit's tenant with the time since the last charge, in the caller's transaction.

    The row of the tenant's day is locked until then; every caller locks it last.

    Args:
        session: that holds the unit.
        unit: that a worker is at.
        begins: whether the worker begins just now: what was before is not its own.
    """
    now = func.clock_timestamp()
    since = func.coalesce(WorkUnit.charged_until, now)
    passed = func.greatest(0.0, func.extract("epoch", now - since))
    seconds = literal(0.0) if begins else passed
    row = insert(WorkerUsage).from_select(
        ["tenant", "day", "seconds", "served_at"],
        select(Audit.tenant, TODAY, seconds, now)
        .join(WorkUnit, WorkUnit.audit_id == Audit.id)
        .where(WorkUnit.id == unit.id),
    )
    more = {
        "seconds": WorkerUsage.seconds + row.excluded.seconds,
        "served_at": row.excluded.served_at,
    }
    session.execute(row.on_conflict_do_update(index_elements=["tenant", "day"], set_=more))
    unit.charged_until = now
