"""Rankings that are asked when an audit has ended: ask, look at, remove."""

from dataclasses import dataclass
from datetime import UTC

import structlog
from pydantic import ValidationError
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from app.audits import repository, service
from app.audits.assemble import influence_until
from app.audits.folders import audit_folder
from app.audits.idempotency import KeyedCall
from app.audits.models import Audit, AuditState, Ranking, RankingState
from app.audits.ranking_fitting import check_later_ranking
from app.audits.schemas import AuditRequest, RankingRequest
from app.audits.service import Results, existing, no_results
from app.db import new_id, transaction
from app.errors import Conflict, FieldConflict, InvalidRequest, NotFound
from app.failpoints import reach
from app.limits.quotas import check_worker_time
from app.settings import Settings
from app.shared_files import remove_folder
from app.storage import require_room
from app.trail.service import TrailAction, record
from app.work.leftovers import note_leftover
from app.work.repository import add_ranking_unit

RETRY_SECONDS = 2

log = structlog.get_logger()


@dataclass(frozen=True)
class RankingSubmission:
    """An accepted ranking.

    Attributes:
        unit_ids: units that are ready to be sent.
        is_replay: whether an earlier call with the same key made the ranking.
    """

    ranking: Ranking
    unit_ids: list[str]
    is_replay: bool


def submit(
    engine: Engine,
    settings: Settings,
    *,
    tenant: str,
    audit_id: str,
    request: RankingRequest,
    idempotency_key: str | None,
) -> RankingSubmission:
    """Accept a ranking: its row, its unit of work and its key in one transaction.

    Raises:
        NotFound: there is no such audit, or it is another tenant's.
        Conflict: the audit has no results, or its influence files are gone; or the key's ranking.
        InvalidRequest: the field that is wrong, or a key that came with another body.
        QuotaExceeded: the tenant has had its time of workers for today.
        StorageFull: the data directory has no room.
    """
    call = None
    if idempotency_key is not None:
        route = f"POST /v1/audits/{audit_id}/rankings"
        call = KeyedCall.of(
            request, tenant=tenant, route=route, key=idempotency_key, thing="ranking"
        )
    with transaction(engine) as session:
        # The lock keeps the influence files from being deleted in between.
        audit = existing(
            repository.find_audit(session, tenant, audit_id, lock_to_use=True), audit_id
        )
        first = _first_answer(session, audit_id, call) if call else None
        if first is not None:
            return RankingSubmission(first, [], is_replay=True)
        require_room(settings)
        _check_influence(session, settings, audit)
        of_audit = _request_of(audit)
        try:
            check_later_ranking(of_audit, request)
        except FieldConflict as error:
            pointer = "#" + "".join(f"/{part}" for part in error.path)
            raise InvalidRequest.at(pointer, str(error)) from error
        ranking_id = new_id("rnk")
        ranking = Ranking(
            id=ranking_id,
            audit_id=audit.id,
            tenant=tenant,
            specification=request.specification().model_dump(mode="json"),
            flag=request.model_dump(mode="json")["flag"] or of_audit.stored()["flag"],
            folder=Ranking.folder_of(ranking_id),
        )
        if call is not None:
            call.claim(session, ranking.id)
        check_worker_time(session, settings, tenant=tenant)
        session.add(ranking)
        session.flush()
        unit_ids = add_ranking_unit(session, ranking)
        record(session, TrailAction.RANKING_SUBMIT, ranking.id, tenant=tenant)
        reach("submit.before_commit", "ranking")
    reach("submit.after_commit", "ranking")
    log.info("ranking_accepted", audit_id=audit_id, ranking_id=ranking.id, tenant=tenant)
    return RankingSubmission(ranking, unit_ids, is_replay=False)


def _first_answer(session: Session, audit_id: str, call: KeyedCall) -> Ranking | None:
    """Return the ranking that a key was given before; None for a key that is new."""
    ranking_id = call.first_answer(session)
    if ranking_id is None:
        return None
    ranking = repository.find_ranking(session, call.tenant, audit_id, ranking_id)
    if ranking is None:
        raise call.is_gone(ranking_id)
    return ranking


def _check_influence(session: Session, settings: Settings, audit: Audit) -> None:
    """Check that an audit has what a ranking is made from.

    Raises:
        Conflict: it has not, and why.
    """
    if audit.state != AuditState.SUCCEEDED:
        raise no_results(audit)
    until = influence_until(audit, settings.influence_days)
    # not now(), which is when the transaction began: it may have waited for the lock
    now = session.scalars(select(func.clock_timestamp())).one()
    if until is not None and (until <= now or audit.influence_deleted_at is not None):
        raise Conflict(
            f"The influence files of this audit were deleted on {until:%Y-%m-%d}, "
            "WINNOW_INFLUENCE_DAYS after its end, and no further ranking can be made from them. "
            "Submit the audit again with this ranking.",
            state=audit.state,
            deleted_at=until.astimezone(UTC).isoformat(),
        )


def _request_of(audit: Audit) -> AuditRequest:
    try:
        return AuditRequest.model_validate(audit.request)
    except ValidationError as error:
        raise Conflict(
            "The audit was made by an earlier version of the service, whose request this one does "
            "not take. Submit the audit again with this ranking."
        ) from error


def get_ranking(engine: Engine, *, tenant: str, audit_id: str, ranking_id: str) -> Ranking:
    """Return a ranking of a tenant's audit.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    with Session(engine) as session:
        ranking = repository.find_ranking(session, tenant, audit_id, ranking_id)
        return _existing(ranking, audit_id, ranking_id)


def list_rankings(
    engine: Engine, *, tenant: str, audit_id: str, limit: int, after_id: str | None
) -> list[Ranking]:
    """Return an audit's rankings, its own first, one more than `limit` when there are more.

    Raises:
        NotFound: there is no such audit, or it is another tenant's.
    """
    with Session(engine) as session:
        existing(repository.find_audit(session, tenant, audit_id), audit_id)
        return repository.list_rankings(session, tenant, audit_id, limit=limit, after_id=after_id)


def delete(
    engine: Engine, settings: Settings, *, tenant: str, audit_id: str, ranking_id: str
) -> None:
    """Remove a ranking with its files; a worker that is at it stops.

    Raises:
        NotFound: there is none, or it is another tenant's.
        Conflict: it is the audit's own.
    """
    with transaction(engine) as session:
        ranking = _existing(
            repository.find_ranking(session, tenant, audit_id, ranking_id, lock=True),
            audit_id,
            ranking_id,
        )
        if ranking.is_own:
            raise Conflict(
                "This is the audit's own ranking, which stays as long as the audit. "
                f"DELETE /v1/audits/{audit_id} removes both.",
                state=ranking.state,
            )
        folder = audit_folder(settings.data_dir, audit_id) / ranking.folder
        note_leftover(session, settings, folder)
        session.delete(ranking)
        record(session, TrailAction.RANKING_DELETE, ranking_id, tenant=tenant)
    remove_folder(folder)
    log.info("ranking_deleted", audit_id=audit_id, ranking_id=ranking_id)


def results_of(session: Session, *, tenant: str, audit_id: str, ranking_id: str) -> Results:
    """Return what a finished ranking found.

    Raises:
        NotFound: there is no such ranking, or it is another tenant's.
        Conflict: it has not ended, or it failed.
    """
    audit = existing(repository.find_audit(session, tenant, audit_id), audit_id)
    ranking = repository.find_ranking(session, tenant, audit_id, ranking_id)
    ranking = _existing(ranking, audit_id, ranking_id)
    state = RankingState(ranking.state)
    if state is RankingState.FAILED:
        raise Conflict(
            f"The ranking failed and has no results: {ranking.error_message}",
            state=state.value,
            code=ranking.error_code,
        )
    if state is not RankingState.SUCCEEDED:
        raise Conflict(
            f"The ranking is {state.value} and has no results yet.",
            state=state.value,
            headers={"Retry-After": str(RETRY_SECONDS)},
        )
    return Results(session, audit, ranking)


def results_for(session: Session, *, tenant: str, audit_id: str, ranking_id: str | None) -> Results:
    """Return what a ranking found, by default the audit's own.

    Raises:
        NotFound: there is no such audit or ranking, or it is another tenant's.
        Conflict: it has no results.
    """
    if ranking_id is None:
        return service.results_of(session, tenant=tenant, audit_id=audit_id)
    return results_of(session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id)


def _existing(ranking: Ranking | None, audit_id: str, ranking_id: str) -> Ranking:
    if ranking is None:
        raise NotFound(f"There is no ranking {ranking_id!r} of an audit {audit_id!r}.")
    return ranking
