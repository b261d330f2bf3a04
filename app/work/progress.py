"""How far an audit is, told by the units at work."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.audits.models import Audit
from app.work.models import Stage, UnitState, WorkUnit
from app.work.stages import busy_seconds, overall_progress, seconds_left


def report_progress(session: Session, audit: Audit, stage: Stage) -> None:
    """Add up what the units of a stage tell: how far they are, and how fast all together."""
    share_of_unit = func.least(1.0, WorkUnit.done * 1.0 / func.greatest(WorkUnit.total, 1))
    is_running = WorkUnit.state == UnitState.RUNNING
    fraction, speed, now = session.execute(
        select(
            func.avg(share_of_unit),
            func.sum(WorkUnit.samples_per_second).filter(is_running),
            func.now(),
        ).where(WorkUnit.audit_id == audit.id, WorkUnit.stage == stage)
    ).one()
    progress = overall_progress(audit.request, stage, float(fraction or 0.0))
    # a unit that is done again begins from its start; what was told stands until it is further
    audit.progress = max(audit.progress, progress)
    audit.busy_seconds = busy_seconds(audit.busy_seconds, since=audit.busy_until, now=now)
    audit.busy_until = now
    audit.eta_seconds = seconds_left(audit.busy_seconds, audit.progress)
    # between two units nobody tells a speed; the last one is nearer to the truth than none
    audit.samples_per_second = speed if speed is not None else audit.samples_per_second
    audit.version += 1
