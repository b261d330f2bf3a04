"""HTTP: decisions on the samples of a finished audit."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from sqlalchemy.orm import Session

from app.audits.documented import REPLAYED, AuditId, IdempotencyKey, OfRanking
from app.audits.ranking_service import results_for
from app.decisions import answers, service
from app.decisions.models import DecisionBatch
from app.decisions.schemas import DecisionRequest, UndoRequest
from app.decisions.service import Stored
from app.dependencies import CallerDep, EngineDep, SettingsDep, TenantDep
from app.errors import Conflict, InvalidRequest, NotFound, problem_responses
from app.pagination import Cursor, Limit, Page, cut_page, decode_cursor, encode_cursor, link_next

router = APIRouter(prefix="/v1/audits/{audit_id}/decisions", tags=["decisions"])

BatchId = Annotated[
    str, Path(max_length=100, description="As POST /v1/audits/{audit_id}/decisions answered it.")
]


@router.post(
    "",
    status_code=201,
    summary="Decide on samples",
    responses={
        201: {"description": "Stored, all of it.", "headers": REPLAYED},
        **problem_responses(NotFound, Conflict, InvalidRequest),
    },
)
def decide(
    *,
    body: DecisionRequest,
    response: Response,
    engine: EngineDep,
    settings: SettingsDep,
    caller: CallerDep,
    audit_id: AuditId,
    idempotency_key: IdempotencyKey = None,
) -> answers.DecisionBatch:
    """Decide the same on samples that are named, or on all that match a filter.

    All of it is stored, or nothing. Decisions are the audit's, whichever ranking they were made
    in, and stay as long as the audit. With `as_of`, nothing is stored where somebody else decided
    on one of the samples since; the answer (409) names the first of them.
    """
    stored = service.decide(
        engine,
        settings,
        caller=caller,
        audit_id=audit_id,
        request=body,
        idempotency_key=idempotency_key,
    )
    return _answer(response, stored)


@router.post(
    "/preview",
    summary="Preview a decision",
    responses=problem_responses(NotFound, Conflict, InvalidRequest),
)
def preview_decision(
    body: DecisionRequest,
    engine: EngineDep,
    settings: SettingsDep,
    caller: CallerDep,
    audit_id: AuditId,
) -> answers.DecisionPreview:
    """Count the samples that a decision would be about, and store nothing."""
    return service.preview(engine, settings, caller=caller, audit_id=audit_id, request=body)


@router.get(
    "", summary="List batches of decisions", responses=problem_responses(NotFound, InvalidRequest)
)
def list_decisions(
    *,
    request: Request,
    response: Response,
    engine: EngineDep,
    tenant: TenantDep,
    audit_id: AuditId,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[answers.DecisionBatch]:
    """List who decided what and when, the newest first."""
    rows = service.list_batches(
        engine,
        tenant=tenant,
        audit_id=audit_id,
        limit=limit,
        before_version=decode_cursor(cursor, int) if cursor else None,
    )
    rows, has_more = cut_page(rows, limit)
    next_cursor = encode_cursor(rows[-1].version) if has_more else None
    link_next(request, response, next_cursor)
    data = [_assemble(row) for row in rows]
    return Page(data=data, next_cursor=next_cursor, has_more=has_more)


@router.get(
    "/precision",
    summary="Get the precision by the decisions so far",
    responses=problem_responses(NotFound, Conflict),
)
def get_precision(
    engine: EngineDep, tenant: TenantDep, audit_id: AuditId, ranking_id: OfRanking = None
) -> answers.Precision:
    """Get which share of the decided samples among the k most suspect is wrong.

    Wrong is what was dropped, or was given another label or completion than it had.
    """
    with Session(engine) as session:
        results = results_for(session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id)
        return service.precision(results)


@router.post(
    "/{batch_id}/undo",
    summary="Undo a batch of decisions",
    responses={
        200: {"headers": REPLAYED},
        **problem_responses(NotFound, Conflict, InvalidRequest),
    },
)
def undo_decision(
    *,
    body: UndoRequest | None = None,
    response: Response,
    engine: EngineDep,
    caller: CallerDep,
    audit_id: AuditId,
    batch_id: BatchId,
    idempotency_key: IdempotencyKey = None,
) -> answers.DecisionBatch:
    """Take a batch back: its samples stand as if it had never been.

    Samples that were decided again since stay as they are, and are counted in `num_skipped`.
    """
    stored = service.undo(
        engine,
        caller=caller,
        audit_id=audit_id,
        batch_id=batch_id,
        request=body or UndoRequest(),
        idempotency_key=idempotency_key,
    )
    return _answer(response, stored)


def _answer(response: Response, stored: Stored) -> answers.DecisionBatch:
    if stored.is_replay:
        response.headers["Idempotent-Replayed"] = "true"
    return _assemble(stored.batch)


def _assemble(batch: DecisionBatch) -> answers.DecisionBatch:
    names = answers.DecisionBatch.model_fields.keys() - {"num_skipped", "decision_version"}
    is_undone = batch.undone_at is not None
    return answers.DecisionBatch.model_validate(
        {name: getattr(batch, name) for name in names}
        | {
            "num_skipped": batch.num_kept if is_undone else batch.num_skipped,
            "decision_version": batch.undone_version if is_undone else batch.version,
        }
    )
