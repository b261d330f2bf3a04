"""After a stop of the whole service: nobody holds any work, and no message is left."""

from sqlalchemy import Engine, update

from app.db import transaction
from app.work.models import UnitState, WorkUnit


def give_back_all_work(engine: Engine) -> int:
    """Make every unit that was held ready again, without counting the attempt.

    Call it only when no worker can be alive and the broker is new. A worker that is alive after
    all loses its hold, and its result is dropped.

    Returns:
        How many units were held.
    """
    with transaction(engine) as session:
        session.execute(
            update(WorkUnit).where(WorkUnit.state == UnitState.READY).values(sent_at=None)
        )
        held = session.execute(
            update(WorkUnit)
            .where(WorkUnit.state == UnitState.RUNNING)
            .values(
                state=UnitState.READY,
                attempts=WorkUnit.attempts - 1,
                owner=None,
                lease_until=None,
                sent_at=None,
                last_error="the service was stopped",
            )
            .returning(WorkUnit.id)
        )
        return len(held.all())
