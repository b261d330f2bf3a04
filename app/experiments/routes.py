"""HTTP: experiments."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Depends, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse
from sqlalchemy.orm import Session

from app.audits.documented import (
    ETAG,
    LOCATION,
    NOT_MODIFIED,
    REPLAYED,
    RETRY_AFTER,
    IdempotencyKey,
)
from app.conditional import IfNoneMatch, entity_tag, is_unchanged
from app.dependencies import EngineDep, SenderDep, SettingsDep, TenantDep, WatcherDep
from app.errors import Conflict, InvalidRequest, NotFound, StorageFull, problem_responses
from app.experiments import answers, repository, service
from app.experiments.assemble import (
    assemble_experiment,
    assemble_results,
    rows_of,
    write_csv,
)
from app.experiments.schemas import ExperimentRequest
from app.experiments.service import ExperimentWithAudits
from app.experiments.standing import experiment_path
from app.live.answers import EventData
from app.live.events import EVENT_STREAM, LastEventId, check_for_more, events_of
from app.live.snapshots import Kind, Thing
from app.live.waiting import Wait, wait_for_news
from app.pagination import Cursor, Limit, Page, cut_page, decode_cursor, encode_cursor, link_next

CSV_TYPE = "text/csv; charset=utf-8"

router = APIRouter(prefix="/v1/experiments", tags=["experiments"])

ExperimentId = Annotated[
    str, Path(max_length=100, description="As POST /v1/experiments answered it.")
]


@router.post(
    "",
    status_code=202,
    summary="Submit an experiment",
    responses={
        202: {
            "description": "Accepted for good: it is in the database with all its audits.",
            "headers": {**LOCATION, **RETRY_AFTER, **REPLAYED},
        },
        **problem_responses(InvalidRequest, Conflict, StorageFull),
    },
)
def submit_experiment(
    *,
    body: ExperimentRequest,
    response: Response,
    background: BackgroundTasks,
    engine: EngineDep,
    settings: SettingsDep,
    sender: SenderDep,
    tenant: TenantDep,
    idempotency_key: IdempotencyKey = None,
) -> answers.Experiment:
    """Compare estimators, layer groups and aggregations over tasks and seeds.

    One audit is made for every task and seed, with planted noise; all configurations share its
    fine-tuning and gradients. Then the model is fine-tuned again without what each configuration
    puts lowest, and measured on the test set.
    """
    submission = service.submit(
        engine, settings, tenant=tenant, request=body, idempotency_key=idempotency_key
    )
    if submission.unit_ids:
        background.add_task(sender.send, submission.unit_ids)
    if submission.is_replay:
        response.headers["Idempotent-Replayed"] = "true"
    response.headers["Location"] = experiment_path(submission.made.experiment.id)
    _tell_state(response, submission.made)
    return assemble_experiment(submission.made)


@router.get("", summary="List experiments", responses=problem_responses(InvalidRequest))
def list_experiments(
    *,
    request: Request,
    response: Response,
    engine: EngineDep,
    tenant: TenantDep,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[answers.Experiment]:
    """List your experiments, the newest first."""
    before_id = decode_cursor(cursor, str) if cursor else None
    with Session(engine) as session:
        rows = repository.list_experiments(session, tenant, limit=limit, before_id=before_id)
        rows, has_more = cut_page(rows, limit)
        data = [assemble_experiment(found) for found in service.with_audits(session, rows)]
    next_cursor = encode_cursor(data[-1].id) if has_more else None
    link_next(request, response, next_cursor)
    return Page(data=data, next_cursor=next_cursor, has_more=has_more)


def _watched(
    engine: EngineDep,
    tenant: TenantDep,
    experiment_id: ExperimentId,
    last_event_id: LastEventId = None,
) -> Thing:
    with Session(engine) as session:
        found = service.get_experiment(session, tenant=tenant, experiment_id=experiment_id)
        check_for_more(last_event_id, version=found.version, is_final=found.state.is_final)
    return Thing(Kind.EXPERIMENT, experiment_id)


async def _news(
    *,
    engine: EngineDep,
    watcher: WatcherDep,
    tenant: TenantDep,
    experiment_id: ExperimentId,
    if_none_match: IfNoneMatch = None,
    wait: Wait = None,
) -> None:
    """Wait, if asked to, until there is news of an experiment."""
    if wait is not None:
        thing = await run_in_threadpool(_watched, engine, tenant, experiment_id)
        await wait_for_news(watcher, thing, seconds=wait, if_none_match=if_none_match)


@router.get(
    "/{experiment_id}",
    summary="Get an experiment",
    response_model=answers.Experiment,
    responses={
        200: {"headers": {**ETAG, **RETRY_AFTER}},
        **NOT_MODIFIED,
        **problem_responses(NotFound),
    },
    dependencies=[Depends(_news)],
)
def get_experiment(
    response: Response,
    engine: EngineDep,
    tenant: TenantDep,
    experiment_id: ExperimentId,
    if_none_match: IfNoneMatch = None,
) -> answers.Experiment | Response:
    """Get an experiment and where it stands, with every audit of it."""
    with Session(engine) as session:
        found = service.get_experiment(session, tenant=tenant, experiment_id=experiment_id)
        _tell_state(response, found)
        if is_unchanged(if_none_match, response.headers["ETag"]):
            return Response(status_code=304, headers=dict(response.headers))
        return assemble_experiment(found)


@router.get(
    "/{experiment_id}/events",
    summary="Follow an experiment",
    response_class=EventSourceResponse,
    responses={**EVENT_STREAM, **problem_responses(NotFound)},
)
async def stream_experiment(
    watcher: WatcherDep,
    thing: Annotated[Thing, Depends(_watched)],
    last_event_id: LastEventId = None,
) -> AsyncIterator[EventData]:
    """Follow an experiment by server-sent events, until all its audits have ended."""
    async for event in events_of(watcher, thing, last_event_id):
        yield event


@router.post(
    "/{experiment_id}/cancel",
    status_code=202,
    summary="Cancel an experiment",
    responses=problem_responses(NotFound, Conflict),
)
def cancel_experiment(
    response: Response, engine: EngineDep, tenant: TenantDep, experiment_id: ExperimentId
) -> answers.Experiment:
    """Ask all audits of it that have not ended to end; asking again changes nothing."""
    found = service.cancel(engine, tenant=tenant, experiment_id=experiment_id)
    response.headers["Location"] = experiment_path(experiment_id)
    _tell_state(response, found)
    return assemble_experiment(found)


@router.delete(
    "/{experiment_id}",
    status_code=204,
    summary="Delete an experiment",
    responses=problem_responses(NotFound, Conflict),
)
def delete_experiment(
    engine: EngineDep, settings: SettingsDep, tenant: TenantDep, experiment_id: ExperimentId
) -> None:
    """Remove an ended experiment with its audits and their files."""
    service.delete(engine, settings, tenant=tenant, experiment_id=experiment_id)


@router.get(
    "/{experiment_id}/results",
    summary="Get the tables of an experiment",
    responses=problem_responses(NotFound, Conflict),
)
def get_results(
    engine: EngineDep, tenant: TenantDep, experiment_id: ExperimentId
) -> answers.ExperimentResults:
    """Get win rates, rank correlations and the best configurations, once every audit has ended."""
    with Session(engine) as session:
        found = service.results_of(session, tenant=tenant, experiment_id=experiment_id)
        return assemble_results(found)


@router.get(
    "/{experiment_id}/results.csv",
    summary="Download the rows of an experiment",
    response_class=Response,
    responses={
        200: {
            "description": "A line for every configuration and baseline of every audit.",
            "content": {"text/csv": {}},
        },
        **problem_responses(NotFound, Conflict),
    },
)
def download_rows(engine: EngineDep, tenant: TenantDep, experiment_id: ExperimentId) -> Response:
    """Download every configuration and baseline of every audit as CSV."""
    with Session(engine) as session:
        found = service.results_of(session, tenant=tenant, experiment_id=experiment_id)
        rows = rows_of(found)
    name = f'attachment; filename="{experiment_id}.csv"'
    return Response(write_csv(rows), media_type=CSV_TYPE, headers={"Content-Disposition": name})


def _tell_state(response: Response, found: ExperimentWithAudits) -> None:
    response.headers["ETag"] = entity_tag(str(found.version))
    if not found.state.is_final:
        response.headers["Retry-After"] = str(service.RETRY_SECONDS)
