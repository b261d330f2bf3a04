"""HTTP: audits."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse
from pydantic import AwareDatetime, BeforeValidator
from sqlalchemy.orm import Session

from app.audits import answers, repository, service
from app.audits.answers import FileFormat
from app.audits.assemble import assemble_audit, assemble_layers, assemble_sample, audit_path
from app.audits.documented import (
    DOWNLOAD,
    ETAG,
    LOCATION,
    NOT_MODIFIED,
    REPLAYED,
    RETRY_AFTER,
    AuditId,
    FilterQuery,
    IdempotencyKey,
    OfRanking,
    RequestedRange,
    SampleIndex,
    SuspectQuery,
)
from app.audits.downloads import ranking_file
from app.audits.folders import audit_folder
from app.audits.models import Audit, AuditState
from app.audits.polling import state_headers
from app.audits.ranking_service import results_for
from app.audits.schemas import AuditRequest, Reference
from app.audits.summaries import SuspectSummary, summarise
from app.conditional import IfNoneMatch, is_unchanged
from app.dependencies import EngineDep, SenderDep, SettingsDep, TenantDep, WatcherDep
from app.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    RangeNotSatisfiable,
    StorageFull,
    problem_responses,
)
from app.live.answers import EventData
from app.live.events import EVENT_STREAM, LastEventId, check_for_more, events_of
from app.live.snapshots import Kind, Thing
from app.live.waiting import Wait, wait_for_news
from app.pagination import Cursor, Limit, Page, cut_page, decode_cursor, encode_cursor, link_next
from app.settings import Settings

router = APIRouter(prefix="/v1/audits", tags=["audits"])
results_router = APIRouter(prefix="/v1/audits", tags=["results"])


def _no_number(value: object) -> object:
    """Refuse seconds since 1970, which pydantic would take and nobody means."""
    if isinstance(value, str) and "-" not in value.removeprefix("-"):
        raise ValueError("write the time as 2026-11-28T08:00:00Z")
    return value


Moment = Annotated[AwareDatetime, BeforeValidator(_no_number)]


@router.post(
    "",
    status_code=202,
    summary="Submit an audit",
    responses={
        202: {
            "description": "Accepted for good: it is in the database.",
            "headers": {**LOCATION, **RETRY_AFTER, **REPLAYED},
        },
        **problem_responses(InvalidRequest, Conflict, StorageFull),
    },
)
def submit_audit(
    *,
    body: AuditRequest,
    response: Response,
    background: BackgroundTasks,
    engine: EngineDep,
    settings: SettingsDep,
    sender: SenderDep,
    tenant: TenantDep,
    idempotency_key: IdempotencyKey = None,
) -> answers.Audit:
    """Submit an audit of a training set; poll the Location until it is done.

    An accepted audit is never lost: it survives restarts of every part of the service, and ends
    as succeeded, failed or cancelled.
    """
    submission = service.submit(
        engine, settings, tenant=tenant, request=body, idempotency_key=idempotency_key
    )
    if submission.unit_ids:
        # After the answer, and apart from it: a dead or frozen broker delays no caller.
        background.add_task(sender.send, submission.unit_ids)
    if submission.is_replay:
        response.headers["Idempotent-Replayed"] = "true"
    response.headers["Location"] = audit_path(submission.audit.id)
    _tell_state(response, submission.audit)
    return _answer(submission.audit, settings)


@router.get("", summary="List audits", responses=problem_responses(InvalidRequest))
def list_audits(
    *,
    request: Request,
    response: Response,
    engine: EngineDep,
    settings: SettingsDep,
    tenant: TenantDep,
    state: AuditState | None = None,
    model: Annotated[Reference | None, Query(description="The model's reference.")] = None,
    dataset: Annotated[Reference | None, Query(description="The training set's.")] = None,
    created_after: Annotated[Moment | None, Query(description="From this time on.")] = None,
    created_before: Annotated[Moment | None, Query(description="Before this time.")] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[answers.Audit]:
    """List your audits, the newest first."""
    with Session(engine) as session:
        rows = repository.list_audits(
            session,
            tenant,
            limit=limit,
            before_id=decode_cursor(cursor, str) if cursor else None,
            state=state,
            model=model,
            dataset=dataset,
            created_after=created_after,
            created_before=created_before,
        )
    rows, has_more = cut_page(rows, limit)
    next_cursor = encode_cursor(rows[-1].id) if has_more else None
    link_next(request, response, next_cursor)
    data = [_answer(row, settings) for row in rows]
    return Page(data=data, next_cursor=next_cursor, has_more=has_more)


def _watched(
    engine: EngineDep, tenant: TenantDep, audit_id: AuditId, last_event_id: LastEventId = None
) -> Thing:
    audit = service.get_audit(engine, tenant=tenant, audit_id=audit_id)
    is_final = AuditState(audit.state).is_final
    check_for_more(last_event_id, version=audit.version, is_final=is_final)
    return Thing(Kind.AUDIT, audit_id)


async def _news(
    *,
    engine: EngineDep,
    watcher: WatcherDep,
    tenant: TenantDep,
    audit_id: AuditId,
    if_none_match: IfNoneMatch = None,
    wait: Wait = None,
) -> None:
    """Wait, if asked to, until there is news of an audit."""
    if wait is not None:
        thing = await run_in_threadpool(_watched, engine, tenant, audit_id)
        await wait_for_news(watcher, thing, seconds=wait, if_none_match=if_none_match)


@router.get(
    "/{audit_id}",
    summary="Get an audit",
    response_model=answers.Audit,
    responses={
        200: {"headers": {**ETAG, **RETRY_AFTER}},
        **NOT_MODIFIED,
        **problem_responses(NotFound),
    },
    dependencies=[Depends(_news)],
)
def get_audit(
    *,
    response: Response,
    engine: EngineDep,
    settings: SettingsDep,
    tenant: TenantDep,
    audit_id: AuditId,
    if_none_match: IfNoneMatch = None,
) -> answers.Audit | Response:
    """Get an audit and where it stands: state, progress, time left, results or error."""
    audit = service.get_audit(engine, tenant=tenant, audit_id=audit_id)
    _tell_state(response, audit)
    if is_unchanged(if_none_match, response.headers["ETag"]):
        return Response(status_code=304, headers=dict(response.headers))
    return _answer(audit, settings)


@router.get(
    "/{audit_id}/events",
    summary="Follow an audit",
    response_class=EventSourceResponse,
    responses={**EVENT_STREAM, **problem_responses(NotFound)},
)
async def stream_audit(
    watcher: WatcherDep,
    thing: Annotated[Thing, Depends(_watched)],
    last_event_id: LastEventId = None,
) -> AsyncIterator[EventData]:
    """Follow an audit by server-sent events, until it has ended."""
    async for event in events_of(watcher, thing, last_event_id):
        yield event


@router.post(
    "/{audit_id}/cancel",
    status_code=202,
    summary="Cancel an audit",
    responses=problem_responses(NotFound, Conflict),
)
def cancel_audit(
    response: Response,
    engine: EngineDep,
    settings: SettingsDep,
    tenant: TenantDep,
    audit_id: AuditId,
) -> answers.Audit:
    """Ask an audit to end; it does within seconds. Asking again changes nothing."""
    audit = service.cancel(engine, tenant=tenant, audit_id=audit_id)
    response.headers["Location"] = audit_path(audit.id)
    _tell_state(response, audit)
    return _answer(audit, settings)


@router.delete(
    "/{audit_id}",
    status_code=204,
    summary="Delete an audit",
    responses=problem_responses(NotFound, Conflict),
)
def delete_audit(
    engine: EngineDep, settings: SettingsDep, tenant: TenantDep, audit_id: AuditId
) -> None:
    """Remove an ended audit with its ranking and files."""
    service.delete(engine, settings, tenant=tenant, audit_id=audit_id)


@results_router.get(
    "/{audit_id}/suspects",
    summary="Page through the ranking",
    responses=problem_responses(NotFound, Conflict, InvalidRequest),
)
def list_suspects(
    *,
    request: Request,
    response: Response,
    engine: EngineDep,
    tenant: TenantDep,
    audit_id: AuditId,
    query: SuspectQuery,
    ranking_id: OfRanking = None,
) -> answers.SuspectPage:
    """Page through the training samples, the most suspect first: the lowest score is suspect."""
    with Session(engine) as session:
        results = results_for(session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id)
        page = query.page(results)
    link_next(request, response, page.next_cursor)
    return page


@results_router.get(
    "/{audit_id}/suspects/summary",
    summary="Count the samples that match",
    responses=problem_responses(NotFound, Conflict, InvalidRequest),
)
def get_suspect_summary(
    engine: EngineDep,
    tenant: TenantDep,
    audit_id: AuditId,
    query: FilterQuery,
    ranking_id: OfRanking = None,
) -> SuspectSummary:
    """Count the samples that match: by labels, by decision and by score."""
    with Session(engine) as session:
        results = results_for(session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id)
        return summarise(session, results.ranking, query.filters())


@results_router.head("/{audit_id}/suspects.{file_format}", include_in_schema=False)
@results_router.get(
    "/{audit_id}/suspects.{file_format}",
    summary="Download the ranking",
    response_class=Response,
    responses={**DOWNLOAD, **problem_responses(NotFound, Conflict, RangeNotSatisfiable)},
)
def download_suspects(
    *,
    engine: EngineDep,
    settings: SettingsDep,
    tenant: TenantDep,
    audit_id: AuditId,
    file_format: FileFormat,
    if_none_match: IfNoneMatch = None,
    requested_range: RequestedRange = None,
) -> Response:
    """Download the whole ranking as one file; the ETag is its SHA-256."""
    with Session(engine) as session:
        ranking = service.results_of(session, tenant=tenant, audit_id=audit_id).ranking
    return ranking_file(
        audit_folder(settings.data_dir, audit_id),
        ranking,
        file_format,
        if_none_match=if_none_match,
        requested_range=requested_range,
    )


@results_router.get(
    "/{audit_id}/samples/{index}",
    summary="Explain one training sample",
    responses=problem_responses(NotFound, Conflict),
)
def get_sample(
    engine: EngineDep, tenant: TenantDep, audit_id: AuditId, index: SampleIndex
) -> answers.SampleDetail:
    """Get one training sample with its standing by layer group and whom it harms and helps."""
    with Session(engine) as session:
        results = service.results_of(session, tenant=tenant, audit_id=audit_id)
        return assemble_sample(results.ranking, results.sample(index))


@results_router.get(
    "/{audit_id}/layers",
    summary="Compare layers, estimators and aggregations",
    responses=problem_responses(NotFound, Conflict),
)
def get_layers(engine: EngineDep, tenant: TenantDep, audit_id: AuditId) -> answers.LayerTable:
    """Get every computed configuration, with its detection where the noise is known."""
    with Session(engine) as session:
        audit = service.results_of(session, tenant=tenant, audit_id=audit_id).audit
    return assemble_layers(audit.summary)


def _answer(audit: Audit, settings: Settings) -> answers.Audit:
    return assemble_audit(audit, influence_days=settings.influence_days)


def _tell_state(response: Response, audit: Audit) -> None:
    response.headers.update(state_headers(audit))
