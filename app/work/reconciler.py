"""The reconciler: offers lost work again and ends what has nobody to end it.

It runs in every API and every worker process; an advisory lock lets one at a time through. It is
what makes the promise true that no accepted audit is lost: everything that it needs is in the
database (SERVICE.md, section 3).
"""

import threading
from datetime import timedelta

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError
from sqlalchemy import Engine, Select, delete, func, select, text, update
from sqlalchemy.orm import Session

from app.audits.models import Audit, IdempotencyKey, Ranking
from app.db import session_name, transaction
from app.failpoints import reach
from app.jobs import QUEUES, queue_length, send_units, stages_of_queue
from app.limits.models import WorkerUsage
from app.settings import Settings
from app.storage import WAITING, has_room
from app.trail.models import TrailEntry
from app.webhooks.models import WebhookDelivery
from app.work.claims import Failure
from app.work.leftovers import forget_copies, remove_leftovers
from app.work.models import UnitState, WorkerHeartbeat, WorkUnit
from app.work.purging import expire_audits, sweep
from app.work.repository import Owner, fail_owner, settle_cancel
from app.work.retention import expire_influence
from app.work.stragglers import stragglers

RECONCILER_LOCK = 0x77_69_6E_6F
MAX_IDLE = "10s"
IDEMPOTENCY_KEPT = timedelta(hours=24)
HEARTBEAT_KEPT = timedelta(days=1)
DELIVERIES_KEPT = timedelta(days=30)
USAGE_KEPT = timedelta(days=90)
MAX_UNITS_PER_ROUND = 1000

# whoever may not (another role's, a superuser's) leaves it: the lease alone is the promise
_END_SESSIONS = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = :name"
    " AND datname = current_database() AND usename = current_user"
)

log = structlog.get_logger()


def reconcile(engine: Engine, celery: Celery, settings: Settings) -> list[str]:
    """Do one round.

    Returns:
        Ids of the units that were sent.
    """
    _end_sessions_of_lost_workers(engine)
    with transaction(engine) as session:
        # this process may be frozen while it holds the lock, and then nobody would reconcile
        session.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{MAX_IDLE}'"))
        if not session.scalar(select(func.pg_try_advisory_xact_lock(RECONCILER_LOCK))):
            return []
        _end_cancelled_audits(session)
        _take_back_expired_leases(session, settings)
        _forget_old_rows(session, settings)
        if has_room(settings.data_dir):
            _let_go_on(session)
        reach("reconcile.before_commit")
    reach("reconcile.after_commit")
    owed = _owed_units(engine, celery, settings)
    if owed:
        send_units(engine, celery, owed)
    expire_influence(engine, settings)
    remove_leftovers(engine, settings)
    expire_audits(engine, settings)
    sweep(engine, settings)
    return owed


def _end_sessions_of_lost_workers(engine: Engine) -> None:
    """End the database sessions of workers whose lease is over.

    One that is frozen in the middle of a transaction holds its locks as long as it is frozen, and
    nobody could go on with its unit. One that is alive after all is fenced off anyway.
    """
    is_lost = (WorkUnit.state == UnitState.RUNNING) & (WorkUnit.lease_until < func.now())
    with transaction(engine) as session:
        found = session.execute(select(WorkUnit.owner, WorkUnit.slower_owner).where(is_lost))
        for owner in {name for names in found for name in names if name is not None}:
            ended = session.execute(_END_SESSIONS, {"name": session_name(owner)}).all()
            if ended:
                log.warning("sessions_ended", owner=owner, count=len(ended))


def _end_cancelled_audits(session: Session) -> None:
    cancelling = select(Audit).where(
        Audit.finished_at.is_(None), Audit.cancel_requested_at.is_not(None)
    )
    for audit in session.scalars(cancelling.with_for_update(skip_locked=True, key_share=True)):
        settle_cancel(session, audit)


def _take_back_expired_leases(session: Session, settings: Settings) -> None:
    of_audits = select(Audit, WorkUnit).join(
        WorkUnit, (WorkUnit.audit_id == Audit.id) & WorkUnit.ranking_id.is_(None)
    )
    of_rankings = select(Ranking, WorkUnit).join(WorkUnit, WorkUnit.ranking_id == Ranking.id)
    for owner, unit in (*_expired(session, of_audits), *_expired(session, of_rankings)):
        log.warning(
            "lease_expired",
            audit_id=unit.audit_id,
            ranking_id=unit.ranking_id,
            unit_id=unit.id,
            stage=unit.stage,
            attempts=unit.attempts,
        )
        if unit.attempts >= settings.max_attempts:
            fail_owner(
                session,
                owner,
                Failure(
                    code="worker_lost",
                    message=f"Stage {unit.stage}, part {unit.position}, lost its worker "
                    f"{unit.attempts} times: the process was killed or stopped answering. It may "
                    "need more memory than the worker has; the worker's log has the details.",
                ),
            )
        else:
            unit.state = UnitState.READY
            unit.owner = None
            unit.lease_until = None
            unit.sent_at = None
            unit.last_error = "its worker was lost"


def _expired(
    session: Session, units: Select[Audit, WorkUnit] | Select[Ranking, WorkUnit]
) -> list[tuple[Owner, WorkUnit]]:
    """Return the units whose lease has run out with their owners, all of them locked."""
    is_lost = (WorkUnit.state == UnitState.RUNNING) & (WorkUnit.lease_until < func.now())
    found = session.execute(
        units.where(is_lost)
        .order_by(WorkUnit.audit_id)
        .with_for_update(skip_locked=True, key_share=True)
    )
    return [(owner, unit) for owner, unit in found]


def _let_go_on(session: Session) -> None:
    """Offer what waits for storage again: there is room."""
    waiting = update(WorkUnit).where(WorkUnit.state == UnitState.READY, WorkUnit.waiting == WAITING)
    session.execute(waiting.values(waiting=None))


def _forget_old_rows(session: Session, settings: Settings) -> None:
    session.execute(
        delete(IdempotencyKey).where(IdempotencyKey.created_at < func.now() - IDEMPOTENCY_KEPT)
    )
    session.execute(
        delete(WorkerHeartbeat).where(WorkerHeartbeat.seen_at < func.now() - HEARTBEAT_KEPT)
    )
    session.execute(
        delete(WebhookDelivery).where(WebhookDelivery.created_at < func.now() - DELIVERIES_KEPT)
    )
    session.execute(delete(WorkerUsage).where(WorkerUsage.served_at < func.now() - USAGE_KEPT))
    if settings.trail_days:
        kept = timedelta(days=settings.trail_days)
        session.execute(delete(TrailEntry).where(TrailEntry.at < func.now() - kept))


def _owed_units(engine: Engine, celery: Celery, settings: Settings) -> list[str]:
    """Return ready units that no message stands for: never sent, or sent and lost.

    And those that hold their stage back, where nothing else waits for a worker.
    """
    never_sent = WorkUnit.sent_at.is_(None)
    sent_long_ago = WorkUnit.sent_at < func.now() - timedelta(seconds=settings.reconcile_seconds)
    owed: list[str] = []
    with Session(engine) as session:
        for queue in QUEUES:
            ready = (
                select(WorkUnit.id)
                .where(WorkUnit.state == UnitState.READY, WorkUnit.waiting.is_(None))
                .where(WorkUnit.stage.in_(stages_of_queue(queue)))
                .order_by(WorkUnit.id)
                .limit(MAX_UNITS_PER_ROUND)
            )
            slow: list[str] = []
            if settings.straggler_seconds:
                late = stragglers(least_seconds=settings.straggler_seconds)
                late = late.where(WorkUnit.stage.in_(stages_of_queue(queue)))
                slow = list(session.scalars(late.limit(MAX_UNITS_PER_ROUND)))
            if not slow and not session.scalars(ready.limit(1)).first():
                continue
            # Messages that still wait in the broker are not lost; only an empty queue proves it.
            try:
                is_drained = queue_length(celery, queue) == 0
            except (OperationalError, RedisError, OSError):
                return []
            is_owed = never_sent | sent_long_ago if is_drained else never_sent
            owed += session.scalars(ready.where(is_owed))
            owed += slow if is_drained else []
    return owed


class Reconciler(threading.Thread):
    """Reconciles every few seconds until stopped."""

    def __init__(self, engine: Engine, celery: Celery, settings: Settings) -> None:
        super().__init__(name="reconciler", daemon=True)
        self._engine = engine
        self._celery = celery
        self._settings = settings
        self._stopped = threading.Event()

    def run(self) -> None:
        is_over = False
        while not is_over:
            try:
                reconcile(self._engine, self._celery, self._settings)
                forget_copies(self._engine, self._settings)
            except Exception as error:  # noqa: BLE001  whatever it was, the promises need a next round
                # The database may be restarting; the next round finds everything still there.
                log.warning("reconcile_failed", error=str(error))
            is_over = self._stopped.wait(self._settings.reconcile_seconds)

    def stop(self) -> None:
        """End the thread after its round."""
        self._stopped.set()
        self.join(timeout=5)
