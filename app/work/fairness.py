"""Whose turn it is: one tenant's thousand audits do not stand before another's one.

Messages come in the order of their sending, but say no more than "look": whoever gets one takes
the unit whose turn it is. As many messages as units wait, so none is left over.
"""

from sqlalchemy import Engine, and_, func, or_, select
from sqlalchemy.orm import Session

from app.audits.models import Audit
from app.jobs import queue_of, stages_of_queue
from app.limits.models import WorkerUsage
from app.limits.usage import TODAY
from app.work.claims import Claim
from app.work.models import Stage, UnitState, WorkUnit
from app.work.repository import claim

MAX_RIVALS = 20


def claim_in_turn(
    engine: Engine,
    unit_id: str,
    *,
    owner: str,
    lease_seconds: float,
    straggler_seconds: float | None = None,
) -> Claim | None:
    """Take the unit whose turn it is, of those that wait in the queue of the one that is named.

    The named one is taken where none waits, which is when its lease has run out, or when it holds
    its stage back (`repository.claim`). None when there is nothing to take.
    """
    tried: list[str] = []
    while len(tried) < MAX_RIVALS:
        following = _next_unit(engine, unit_id, but=tried)
        if following is None:
            break
        held = claim(engine, following, owner=owner, lease_seconds=lease_seconds)
        if held is not None:
            return held
        tried.append(following)  # another worker was quicker
    return claim(
        engine,
        unit_id,
        owner=owner,
        lease_seconds=lease_seconds,
        straggler_seconds=straggler_seconds,
    )


def _next_unit(engine: Engine, unit_id: str, *, but: list[str]) -> str | None:
    """Return the unit whose turn it is.

    The tenant with the fewest units at work is first, then the one that waited longest for a
    worker. Of its own audits the oldest goes on before the next begins.
    """
    with Session(engine) as session:
        stage = session.scalars(select(WorkUnit.stage).where(WorkUnit.id == unit_id)).one_or_none()
        if stage is None:
            return None
        at_work = (
            select(Audit.tenant, func.count().label("num_units"))
            .join(WorkUnit, WorkUnit.audit_id == Audit.id)
            .where(WorkUnit.state == UnitState.RUNNING, WorkUnit.lease_until > func.now())
            .group_by(Audit.tenant)
            .subquery()
        )
        goes_on = and_(Audit.finished_at.is_(None), Audit.cancel_requested_at.is_(None))
        waiting = (
            select(WorkUnit.id)
            .join(Audit, Audit.id == WorkUnit.audit_id)
            .outerjoin(at_work, at_work.c.tenant == Audit.tenant)
            .outerjoin(
                WorkerUsage, and_(WorkerUsage.tenant == Audit.tenant, WorkerUsage.day == TODAY)
            )
            .where(
                WorkUnit.state == UnitState.READY,
                WorkUnit.sent_at.is_not(None),  # what failed waits for the reconciler first
                WorkUnit.stage.in_(stages_of_queue(queue_of(Stage(stage)))),
                WorkUnit.id.not_in(but),
                or_(WorkUnit.ranking_id.is_not(None), goes_on),
            )
            .order_by(
                func.coalesce(at_work.c.num_units, 0),
                WorkerUsage.served_at.asc().nulls_first(),
                WorkUnit.audit_id,
                WorkUnit.id,
            )
        )
        return session.scalars(waiting.limit(1)).first()
