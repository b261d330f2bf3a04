"""Audits: submit, look at, cancel, remove."""

import math
from dataclasses import dataclass

import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.audits import repository
from app.audits.checks import check_request, missing_upload, uploads_of
from app.audits.folders import audit_folder
from app.audits.idempotency import KeyedCall
from app.audits.models import Audit, AuditState, Ranking
from app.audits.repository import NamedSample
from app.audits.schemas import AuditRequest
from app.datasets.repository import keep_datasets
from app.db import new_id, transaction
from app.errors import AppError, Conflict, NotFound
from app.failpoints import reach
from app.limits.quotas import check_audits
from app.settings import Settings
from app.shared_files import remove_folder
from app.storage import require_room
from app.trail.service import TrailAction, record
from app.work.leftovers import note_leftover
from app.work.models import Stage
from app.work.repository import add_units, request_cancel
from app.work.states import enter_state

QUEUED_RETRY_SECONDS = 2
RUNNING_RETRY_SECONDS = (5, 15)
POLLS_PER_AUDIT = 10
SUBMIT_ROUTE = "POST /v1/audits"

log = structlog.get_logger()


@dataclass(frozen=True)
class Submission:
    """An accepted audit.

    Attributes:
        unit_ids: units that are ready to be sent.
        is_replay: whether an earlier call with the same key made the audit.
    """

    audit: Audit
    unit_ids: list[str]
    is_replay: bool


def submit(
    engine: Engine,
    settings: Settings,
    *,
    tenant: str,
    request: AuditRequest,
    idempotency_key: str | None,
) -> Submission:
    """Accept an audit: its row, its first unit of work and its key in one transaction.

    Raises:
        InvalidRequest: the field that is wrong, or a key that came with another body.
        Conflict: the key's audit was deleted.
        QuotaExceeded: the tenant may not submit one now.
        StorageFull: the data directory has no room.
    """
    call = None
    if idempotency_key is not None:
        call = KeyedCall.of(
            request, tenant=tenant, route=SUBMIT_ROUTE, key=idempotency_key, thing="audit"
        )
        with Session(engine, expire_on_commit=False) as session:
            first = _first_answer(session, call)
        if first is not None:
            return Submission(first, [], is_replay=True)
    require_room(settings)
    checked = check_request(engine, settings, tenant=tenant, request=request)
    audit = Audit(
        id=new_id("aud"),
        tenant=tenant,
        request=checked.stored(),
        metadata_=checked.metadata,
        state_times={},
        version=0,
    )
    enter_state(audit, AuditState.QUEUED)
    with transaction(engine) as session:
        if call is not None and not call.claim(session, audit.id):
            first = _first_answer(session, call)
            if first is not None:
                return Submission(first, [], is_replay=True)
        check_audits(session, settings, tenant=tenant)
        _keep_uploads(session, tenant, checked)
        session.add(audit)
        session.flush()
        unit_ids = add_units(session, audit.id, Stage.PREPARE)
        record(session, TrailAction.AUDIT_SUBMIT, audit.id, tenant=tenant)
        reach("submit.before_commit", "audit")
    reach("submit.after_commit", "audit")
    log.info("audit_accepted", audit_id=audit.id, tenant=tenant)
    return Submission(audit, unit_ids, is_replay=False)


def _first_answer(session: Session, call: KeyedCall) -> Audit | None:
    """Return the audit that a key was given before; None for a key that is new."""
    audit_id = call.first_answer(session)
    if audit_id is None:
        return None
    audit = repository.find_audit(session, call.tenant, audit_id)
    if audit is None:
        raise call.is_gone(audit_id)
    return audit


def _keep_uploads(session: Session, tenant: str, request: AuditRequest) -> None:
    """Hold the uploads until the audit is committed; from then on it protects them itself."""
    pointer_of = uploads_of(request)
    kept = keep_datasets(session, tenant, pointer_of.keys())
    for dataset_id, pointer in pointer_of.items():
        if dataset_id not in kept:
            raise missing_upload(pointer, dataset_id)


def get_audit(engine: Engine, *, tenant: str, audit_id: str) -> Audit:
    """Return a tenant's audit.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    with Session(engine) as session:
        return existing(repository.find_audit(session, tenant, audit_id), audit_id)


def cancel(engine: Engine, *, tenant: str, audit_id: str) -> Audit:
    """Ask for an audit's end; asking again changes nothing.

    Raises:
        NotFound: there is none, or it is another tenant's.
        Conflict: it has ended otherwise.
    """
    with transaction(engine) as session:
        audit = existing(repository.find_audit(session, tenant, audit_id, lock=True), audit_id)
        state = AuditState(audit.state)
        if state in {AuditState.SUCCEEDED, AuditState.FAILED}:
            raise Conflict(
                f"The audit has {state.value} and cannot be cancelled any more.", state=state.value
            )
        if state is not AuditState.CANCELLED:
            if audit.cancel_requested_at is None:
                record(session, TrailAction.AUDIT_CANCEL, audit.id, tenant=tenant)
            request_cancel(session, audit)
            session.flush()
            session.refresh(audit)
            log.info("cancel_requested", audit_id=audit.id)
        return audit


def delete(engine: Engine, settings: Settings, *, tenant: str, audit_id: str) -> None:
    """Remove an ended audit with its results and files.

    Raises:
        NotFound: there is none, or it is another tenant's.
        Conflict: it has not ended.
    """
    with transaction(engine) as session:
        audit = existing(repository.find_audit(session, tenant, audit_id, lock=True), audit_id)
        if not AuditState(audit.state).is_final:
            raise Conflict(
                f"The audit is {audit.state}. Cancel it and wait for its end, then delete it.",
                state=audit.state,
                headers={"Retry-After": str(retry_after(audit))},
            )
        if audit.experiment_id is not None:
            raise Conflict(
                f"The audit is part of the experiment {audit.experiment_id}, whose tables need it. "
                f"Delete that with DELETE /v1/experiments/{audit.experiment_id}.",
                state=audit.state,
            )
        unfinished = repository.lock_unfinished_rankings(session, audit.id)
        if unfinished:
            raise Conflict(
                f"Ranking {unfinished[0]} of this audit has not ended. Wait for its end or delete "
                "it, then delete the audit.",
                state=audit.state,
                headers={"Retry-After": str(QUEUED_RETRY_SECONDS)},
            )
        note_leftover(session, settings, audit_folder(settings.data_dir, audit_id))
        session.delete(audit)
        record(session, TrailAction.AUDIT_DELETE, audit_id, tenant=tenant)
    remove_folder(audit_folder(settings.data_dir, audit_id))
    log.info("audit_deleted", audit_id=audit_id)


def retry_after(audit: Audit) -> int:
    """Return after how many seconds it makes sense to look again."""
    if audit.state == AuditState.QUEUED:
        return QUEUED_RETRY_SECONDS
    least, most = RUNNING_RETRY_SECONDS
    if audit.eta_seconds is None:
        return least
    soon_over = 1 + math.ceil(audit.eta_seconds)
    return min(soon_over, most, max(least, math.ceil(audit.eta_seconds / POLLS_PER_AUDIT)))


@dataclass(frozen=True)
class Results:
    """A finished audit with one of its rankings, inside the session that reads on."""

    session: Session
    audit: Audit
    ranking: Ranking

    def sample(self, index: int) -> NamedSample:
        """Return a training sample's place with the samples that it names.

        Raises:
            NotFound: the training set has no such row.
        """
        row = repository.find_sample(self.session, self.ranking, index)
        if row is None:
            raise NotFound(
                f"The training set has no sample {index}; it has {self.audit.num_train}, "
                "counted from 0."
            )
        ranked, sample, _ = row
        affected = [*ranked.harmed_validation, *ranked.helped_validation]
        alike = [*(sample.alike_training or ()), *(sample.opposed_training or ())]
        return NamedSample(
            row,
            repository.validation_samples(self.session, self.audit.id, affected),
            repository.training_samples(self.session, self.audit.id, alike),
            self.audit.summary["labels"],
        )


def results_of(session: Session, *, tenant: str, audit_id: str) -> Results:
    """Return what a finished audit found.

    Raises:
        NotFound: there is no such audit, or it is another tenant's.
        Conflict: it has no results: it has not ended yet, failed or was cancelled.
    """
    audit = existing(repository.find_audit(session, tenant, audit_id), audit_id)
    if audit.state != AuditState.SUCCEEDED:
        raise no_results(audit)
    return Results(session, audit, repository.ranking_of(session, tenant, audit_id))


def no_results(audit: Audit) -> AppError:
    """Return the error for an audit that has found nothing, or nothing yet."""
    state = AuditState(audit.state)
    if state is AuditState.FAILED:
        return Conflict(
            f"The audit failed and has no results: {audit.error_message}",
            state=state.value,
            code=audit.error_code,
        )
    if state is AuditState.CANCELLED:
        return Conflict("The audit was cancelled and has no results.", state=state.value)
    return Conflict(
        f"The audit is {state.value} and has no results yet ({audit.progress:.0%} done).",
        state=state.value,
        headers={"Retry-After": str(retry_after(audit))},
    )


def existing(audit: Audit | None, audit_id: str) -> Audit:
    """Return an audit that was looked up.

    Raises:
        NotFound: there is none.
    """
    if audit is None:
        raise NotFound(f"There is no audit {audit_id!r}.")
    return audit
