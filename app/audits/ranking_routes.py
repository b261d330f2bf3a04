"""HTTP: rankings of a finished audit, from the influence that it computed."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse
from sqlalchemy.orm import Session

from app.audits import answers
from app.audits import ranking_service as service
from app.audits.answers import FileFormat
from app.audits.assemble import (
    assemble_layers,
    assemble_ranking,
    assemble_sample,
    ranking_path,
)
from app.audits.documented import (
    DOWNLOAD,
    ETAG,
    LOCATION,
    NOT_MODIFIED,
    REPLAYED,
    RETRY_AFTER,
    AuditId,
    IdempotencyKey,
    RankingId,
    RequestedRange,
    SampleIndex,
    SuspectQuery,
)
from app.audits.downloads import ranking_file
from app.audits.folders import audit_folder
from app.audits.models import Ranking, RankingState
from app.audits.schemas import RankingRequest
from app.conditional import IfNoneMatch, entity_tag, is_unchanged
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

router = APIRouter(prefix="/v1/audits/{audit_id}/rankings", tags=["rankings"])


@router.post(
    "",
    status_code=202,
    summary="Ask for another ranking",
    responses={
        202: {
            "description": "Accepted for good: it is in the database.",
            "headers": {**LOCATION, **RETRY_AFTER, **REPLAYED},
        },
        **problem_responses(NotFound, Conflict, InvalidRequest, StorageFull),
    },
)
def submit_ranking(
    *,
    body: RankingRequest,
    response: Response,
    background: BackgroundTasks,
    engine: EngineDep,
    settings: SettingsDep,
    sender: SenderDep,
    tenant: TenantDep,
    audit_id: AuditId,
    idempotency_key: IdempotencyKey = None,
) -> answers.Ranking:
    """Rank a finished audit's samples by another estimator, other layers or aggregation.

    It takes the influence that the audit computed, so it is a matter of seconds and needs no GPU.
    """
    submission = service.submit(
        engine,
        settings,
        tenant=tenant,
        audit_id=audit_id,
        request=body,
        idempotency_key=idempotency_key,
    )
    if submission.unit_ids:
        background.add_task(sender.send, submission.unit_ids)
    if submission.is_replay:
        response.headers["Idempotent-Replayed"] = "true"
    response.headers["Location"] = ranking_path(submission.ranking)
    _tell_state(response, submission.ranking)
    return assemble_ranking(submission.ranking)


@router.get("", summary="List rankings", responses=problem_responses(NotFound, InvalidRequest))
def list_rankings(
    *,
    request: Request,
    response: Response,
    engine: EngineDep,
    tenant: TenantDep,
    audit_id: AuditId,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[answers.Ranking]:
    """List an audit's rankings: its own first, then the others as they were asked for."""
    after_id = decode_cursor(cursor, str) if cursor else None
    rows = service.list_rankings(
        engine, tenant=tenant, audit_id=audit_id, limit=limit, after_id=after_id
    )
    rows, has_more = cut_page(rows, limit)
    next_cursor = encode_cursor(rows[-1].id) if has_more else None
    link_next(request, response, next_cursor)
    data = [assemble_ranking(row) for row in rows]
    return Page(data=data, next_cursor=next_cursor, has_more=has_more)


def _watched(
    engine: EngineDep,
    tenant: TenantDep,
    audit_id: AuditId,
    ranking_id: RankingId,
    last_event_id: LastEventId = None,
) -> Thing:
    ranking = service.get_ranking(engine, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id)
    is_final = RankingState(ranking.state).is_final
    check_for_more(last_event_id, version=ranking.version, is_final=is_final)
    return Thing(Kind.RANKING, ranking_id)


async def _news(
    *,
    engine: EngineDep,
    watcher: WatcherDep,
    tenant: TenantDep,
    audit_id: AuditId,
    ranking_id: RankingId,
    if_none_match: IfNoneMatch = None,
    wait: Wait = None,
) -> None:
    """Wait, if asked to, until there is news of a ranking."""
    if wait is not None:
        thing = await run_in_threadpool(_watched, engine, tenant, audit_id, ranking_id)
        await wait_for_news(watcher, thing, seconds=wait, if_none_match=if_none_match)


@router.get(
    "/{ranking_id}",
    summary="Get a ranking",
    response_model=answers.Ranking,
    responses={
        200: {"headers": {**ETAG, **RETRY_AFTER}},
        **NOT_MODIFIED,
        **problem_responses(NotFound),
    },
    dependencies=[Depends(_news)],
)
def get_ranking(
    *,
    response: Response,
    engine: EngineDep,
    tenant: TenantDep,
    audit_id: AuditId,
    ranking_id: RankingId,
    if_none_match: IfNoneMatch = None,
) -> answers.Ranking | Response:
    """Get a ranking and where it stands: state, progress, results or error."""
    ranking = service.get_ranking(engine, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id)
    _tell_state(response, ranking)
    if is_unchanged(if_none_match, response.headers["ETag"]):
        return Response(status_code=304, headers=dict(response.headers))
    return assemble_ranking(ranking)


@router.get(
    "/{ranking_id}/events",
    summary="Follow a ranking",
    response_class=EventSourceResponse,
    responses={**EVENT_STREAM, **problem_responses(NotFound)},
)
async def stream_ranking(
    watcher: WatcherDep,
    thing: Annotated[Thing, Depends(_watched)],
    last_event_id: LastEventId = None,
) -> AsyncIterator[EventData]:
    """Follow a ranking by server-sent events, until it has ended."""
    async for event in events_of(watcher, thing, last_event_id):
        yield event


@router.delete(
    "/{ranking_id}",
    status_code=204,
    summary="Delete a ranking",
    responses=problem_responses(NotFound, Conflict),
)
def delete_ranking(
    engine: EngineDep,
    settings: SettingsDep,
    tenant: TenantDep,
    audit_id: AuditId,
    ranking_id: RankingId,
) -> None:
    """Remove a ranking with its files, also while it is being made; not the audit's own."""
    service.delete(engine, settings, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id)


@router.get(
    "/{ranking_id}/suspects",
    summary="Page through a ranking",
    responses=problem_responses(NotFound, Conflict, InvalidRequest),
)
def list_ranking_suspects(
    *,
    request: Request,
    response: Response,
    engine: EngineDep,
    tenant: TenantDep,
    audit_id: AuditId,
    ranking_id: RankingId,
    query: SuspectQuery,
) -> answers.SuspectPage:
    """Page through the training samples, the most suspect first: the lowest score is suspect."""
    with Session(engine) as session:
        results = service.results_of(
            session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id
        )
        page = query.page(results)
    link_next(request, response, page.next_cursor)
    return page


@router.head("/{ranking_id}/suspects.{file_format}", include_in_schema=False)
@router.get(
    "/{ranking_id}/suspects.{file_format}",
    summary="Download a ranking",
    response_class=Response,
    responses={**DOWNLOAD, **problem_responses(NotFound, Conflict, RangeNotSatisfiable)},
)
def download_ranking_suspects(
    *,
    engine: EngineDep,
    settings: SettingsDep,
    tenant: TenantDep,
    audit_id: AuditId,
    ranking_id: RankingId,
    file_format: FileFormat,
    if_none_match: IfNoneMatch = None,
    requested_range: RequestedRange = None,
) -> Response:
    """Download the whole ranking as one file; the ETag is its SHA-256."""
    with Session(engine) as session:
        results = service.results_of(
            session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id
        )
    return ranking_file(
        audit_folder(settings.data_dir, audit_id),
        results.ranking,
        file_format,
        if_none_match=if_none_match,
        requested_range=requested_range,
    )


@router.get(
    "/{ranking_id}/samples/{index}",
    summary="Explain one training sample by a ranking",
    responses=problem_responses(NotFound, Conflict),
)
def get_ranking_sample(
    engine: EngineDep,
    tenant: TenantDep,
    audit_id: AuditId,
    ranking_id: RankingId,
    index: SampleIndex,
) -> answers.SampleDetail:
    """Get one training sample with its standing by layer group and whom it harms and helps."""
    with Session(engine) as session:
        results = service.results_of(
            session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id
        )
        return assemble_sample(results.ranking, results.sample(index))


@router.get(
    "/{ranking_id}/layers",
    summary="Compare the layers of a ranking",
    responses=problem_responses(NotFound, Conflict),
)
def get_ranking_layers(
    engine: EngineDep, tenant: TenantDep, audit_id: AuditId, ranking_id: RankingId
) -> answers.LayerTable:
    """Get the ranking's estimator and aggregation on every layer group.

    The audit's own ranking has every estimator and aggregation that the audit computed.
    """
    with Session(engine) as session:
        results = service.results_of(
            session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id
        )
    return assemble_layers(results.ranking.summary)


def _tell_state(response: Response, ranking: Ranking) -> None:
    response.headers["ETag"] = entity_tag(str(ranking.version))
    if not RankingState(ranking.state).is_final:
        response.headers["Retry-After"] = str(service.RETRY_SECONDS)
