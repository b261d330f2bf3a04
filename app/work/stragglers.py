"""Units that hold the end of a stage back: an idle worker does them too, and the first one counts.

What is left of a stage towards its end is in the hands of the slowest workers. A unit that takes
much longer than its siblings did, and will take longer still than another worker needs for the
whole of it, is offered again while its worker goes on. Both write the same files; the transaction
of the first to finish ends the unit, and the other is fenced off.
"""

from datetime import timedelta

from sqlalchemy import Select, Subquery, and_, func, select

from app.audits.models import Audit
from app.work.models import UnitState, WorkUnit

TIMES_AS_LONG = 2.0
LEAST_SIBLINGS = 3  # the median of fewer says little


def stragglers(*, least_seconds: float, unit_id: str | None = None) -> Select[str]:
    """Select ids of units that a second worker should take.

    Args:
        least_seconds: a unit that takes less holds nobody back.
        unit_id: the only one to look at; all by default.
    """
    of_stage = _ending_stages(unit_id)
    elapsed = func.extract("epoch", func.now() - WorkUnit.started_at)
    left = elapsed * (WorkUnit.total - WorkUnit.done) / func.nullif(WorkUnit.done, 0)
    found = (
        select(WorkUnit.id)
        .join(
            of_stage,
            and_(of_stage.c.audit_id == WorkUnit.audit_id, of_stage.c.stage == WorkUnit.stage),
        )
        .join(Audit, Audit.id == WorkUnit.audit_id)
        .where(
            WorkUnit.state == UnitState.RUNNING,
            WorkUnit.ranking_id.is_(None),
            WorkUnit.attempts == 1,  # so a unit is copied once, and its tries stay bounded
            WorkUnit.lease_until > func.now(),
            WorkUnit.started_at < func.now() - timedelta(seconds=least_seconds),
            elapsed > TIMES_AS_LONG * of_stage.c.typical,
            func.coalesce(left, elapsed) > of_stage.c.typical,
            Audit.finished_at.is_(None),
            Audit.cancel_requested_at.is_(None),
        )
    )
    return found if unit_id is None else found.where(WorkUnit.id == unit_id)


def _ending_stages(unit_id: str | None) -> Subquery:
    """Select the stages of which nothing waits, with the seconds that a unit of them took."""
    is_done = WorkUnit.state == UnitState.DONE
    seconds = func.extract("epoch", WorkUnit.finished_at - WorkUnit.started_at)
    at_work = select(WorkUnit.audit_id).where(WorkUnit.state == UnitState.RUNNING)
    if unit_id is not None:
        at_work = at_work.where(WorkUnit.id == unit_id)
    return (
        select(
            WorkUnit.audit_id,
            WorkUnit.stage,
            func.percentile_cont(0.5).within_group(seconds).filter(is_done).label("typical"),
        )
        .where(WorkUnit.audit_id.in_(at_work), WorkUnit.ranking_id.is_(None))
        .group_by(WorkUnit.audit_id, WorkUnit.stage)
        .having(
            func.count().filter(WorkUnit.state == UnitState.READY) == 0,
            func.count().filter(is_done) >= LEAST_SIBLINGS,
        )
        .subquery()
    )
