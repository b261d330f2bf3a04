"""The one task: claim a unit of work, run its stage, save, say what is next."""

import os
import secrets
import signal
import socket
from contextlib import AbstractContextManager
from functools import lru_cache
from importlib import import_module

import structlog
from celery import Celery, shared_task
from celery.signals import setup_logging, worker_process_init, worker_process_shutdown
from sqlalchemy import Engine, select

from app.db import make_engine, transaction
from app.errors import NotReady
from app.failpoints import reach
from app.jobs import QUEUES, TASK_NAME, queue_of, send_units
from app.logs import configure_logging
from app.settings import Settings, get_settings
from app.shared_files import share_files
from app.storage import WAITING, is_disk_full
from app.tracing import note_failure, span, start_tracing, stop_tracing
from app.work import repository as work
from app.work.claims import CancelPending, Claim, Failure, LeaseLost
from app.work.fairness import claim_in_turn
from app.work.models import Stage, WorkUnit
from workers.lease import CancelRequested, Draining, Hold, HoldLost

DRAIN_SIGNAL = signal.SIGUSR2  # Celery and billiard use SIGUSR1 themselves

log = structlog.get_logger()

_held: list[Hold] = []  # at most one: a child runs one task at a time


@setup_logging.connect  # type: ignore[untyped-decorator]  # Celery has no types
def _configure_logging(**_: object) -> None:
    """Log as the rest of the service does, in the parent and in the spawned children."""
    configure_logging(get_settings().log_format)


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _trace(**_: object) -> None:
    """Trace the units that this child works on."""
    start_tracing("worker")


@worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def _send_last_spans(**_: object) -> None:
    stop_tracing()


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _listen_for_drain(**_: object) -> None:
    """Let the parent's signal end the unit at hand at its next batch."""

    def drain(_number: int, _frame: object) -> None:
        for hold in _held:
            hold.drain()

    signal.signal(DRAIN_SIGNAL, drain)


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _load(**_: object) -> None:
    """Load torch and transformers in the child that works, before there is any work for it.

    Not in Celery's parent process, which needs neither; and not after a claim, which may be over
    before they are loaded.
    """
    import_module("workers.pipeline.run")


@lru_cache
def _process_engine() -> Engine:
    """Return this process's own connections; children are spawned, so none is inherited."""
    return make_engine(get_settings().require_database_url(), owner=_owner())


@lru_cache
def _owner() -> str:
    """Return this process's name: no other has it, not even the one that it takes the place of."""
    return f"{socket.gethostname()}:{secrets.token_hex(4)}:{os.getpid()}"


@shared_task(name=TASK_NAME, bind=True)  # type: ignore[untyped-decorator]
def run_unit(self: object, unit_id: str) -> None:
    """Do the unit whose turn it is; the one that is named says only where to look."""
    settings = get_settings()
    engine = _process_engine()
    celery: Celery = self.app  # type: ignore[attr-defined]  # bound task
    came_by = (self.request.delivery_info or {}).get("routing_key")  # type: ignore[attr-defined]
    if _is_for_others(engine, unit_id, came_by):
        # sent by a version that had other queues; this worker may lack the network, or the GPU
        send_units(engine, celery, [unit_id])
        return
    claim = claim_in_turn(
        engine,
        unit_id,
        owner=_owner(),
        lease_seconds=settings.lease_seconds,
        straggler_seconds=settings.straggler_seconds or None,
    )
    if claim is None:
        log.info("nothing_to_claim", unit_id=unit_id)
        return
    reach("unit.claimed", claim.stage)
    context = {
        "audit_id": claim.audit_id,
        "ranking_id": claim.ranking_id,
        "unit_id": claim.unit_id,
        "stage": claim.stage.value,
        "position": claim.position,
        "attempt": claim.attempts,
    }
    with structlog.contextvars.bound_contextvars(**context):
        ready = execute(engine, settings, claim)
        if ready:
            send_units(engine, celery, ready)


def _is_for_others(engine: Engine, unit_id: str, came_by: str | None) -> bool:
    """Return whether a message came by a queue that its unit's stage does not wait in."""
    if came_by not in QUEUES:
        return False
    with transaction(engine) as session:
        stage = session.scalar(select(WorkUnit.stage).where(WorkUnit.id == unit_id))
    return stage is not None and queue_of(Stage(stage)) != came_by


def execute(engine: Engine, settings: Settings, claim: Claim) -> list[str]:
    """Run a claimed unit to its end, whatever that is.

    Returns:
        Ids of the units that became ready.
    """
    # ruff: noqa: PLC0415  the parent process imports this module too
    from workers.pipeline.rank import remove_if_deleted
    from workers.pipeline.run import run_stage

    share_files(settings)
    log.info("unit_started")
    with _span_of(claim), Hold(engine, settings, claim) as hold:
        _held.append(hold)
        try:
            reach("unit.started", claim.stage)
            output = run_stage(engine, settings, claim, hold)
            with hold.silence(), transaction(engine) as session:
                output.write(session)
                output.save(work.locked_owner(session, claim))
                ready = work.complete(session, claim, result=output.result)
                reach("unit.before_commit", claim.stage)
            reach("unit.after_commit", claim.stage)
        except (CancelRequested, CancelPending):
            work.stop_for_cancel(engine, claim)
            log.info("unit_cancelled")
        except Draining:
            work.release(engine, claim, reason="its worker was stopped", count_attempt=False)
            log.info("unit_given_back")
        except (HoldLost, LeaseLost):
            log.warning("unit_lost")
        except Exception as error:  # noqa: BLE001  whatever a stage raises has its place in the row
            _leave_failed(engine, settings, claim, error)
        else:
            log.info("unit_done", units_ready=len(ready))
            return ready
        finally:
            _held.remove(hold)
    if claim.ranking_id is not None:
        remove_if_deleted(engine, settings, claim)
    return []


def _leave_failed(engine: Engine, settings: Settings, claim: Claim, error: Exception) -> None:
    """Give a unit back if time can heal what went wrong; else end its audit or ranking."""
    from workers.pipeline.failures import INTERNAL_ERROR, failure_of, is_worth_retrying

    failure = failure_of(error)
    note_failure(failure.code)
    reason = _waits_for_storage(error)
    if reason is not None:
        log.error("unit_waits_for_storage", exc_info=error)
        work.release(engine, claim, reason=reason, count_attempt=False, waiting=WAITING)
    elif is_worth_retrying(error) and claim.attempts < settings.max_attempts:
        log.error("unit_failed_will_retry", code=failure.code, exc_info=error)
        work.release(engine, claim, reason=failure.message)
    else:
        what = "audit_failed" if claim.ranking_id is None else "ranking_failed"
        log.error(what, code=failure.code, exc_info=error)
        if failure.code == INTERNAL_ERROR:
            failure = _naming_part(failure, claim)
        work.fail(engine, claim, failure)


def _waits_for_storage(error: Exception) -> str | None:
    """Return why a unit can go on once files can be written and read; None where it is not that."""
    if isinstance(error, NotReady):
        return error.detail
    return "the disk is full" if is_disk_full(error) else None


def _span_of(claim: Claim) -> AbstractContextManager[object]:
    """Return the span of a unit, a child of the request that its audit or ranking came by."""
    return span(
        f"unit {claim.stage.value}",
        traceparent=claim.traceparent,
        audit_id=claim.audit_id,
        ranking_id=claim.ranking_id or "",
        unit_id=claim.unit_id,
        stage=claim.stage.value,
        position=claim.position,
        attempt=claim.attempts,
    )


def _naming_part(failure: Failure, claim: Claim) -> Failure:
    """Say which part failed where a retry could not help any more."""
    message = (
        f"Stage {claim.stage.value}, part {claim.position}, failed {claim.attempts} times: "
        f"{failure.message}"
    )
    return Failure(failure.code, message, failure.field)
