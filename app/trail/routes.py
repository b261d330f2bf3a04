"""HTTP: who did what."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from app.dependencies import EngineDep, TenantDep
from app.errors import InvalidRequest, problem_responses
from app.pagination import Cursor, Limit, Page, cut_page, decode_cursor, encode_cursor, link_next
from app.trail import service
from app.trail.service import TrailAction

router = APIRouter(prefix="/v1/trail", tags=["trail"])

Id = Annotated[str | None, Query(max_length=100)]


class TrailEntry(BaseModel):
    """One change that somebody made."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(examples=["trl_0192f0c1a1b27c3d8e4f5a6b7c8d9e0f"])
    at: datetime
    actor: str = Field(description="The key's name; `operator` at the command line.")
    key_id: str | None = Field(description="Null where no key was used.")
    action: TrailAction
    object_id: str = Field(description="What it was done to.")
    request_id: str | None = Field(
        description="The call's `X-Request-Id`, as in the service's log; null at the command line."
    )


@router.get("", summary="List who did what", responses=problem_responses(InvalidRequest))
def list_trail(
    *,
    request: Request,
    response: Response,
    engine: EngineDep,
    tenant: TenantDep,
    action: Annotated[TrailAction | None, Query(description="Only this.")] = None,
    object_id: Annotated[Id, Query(description="Only what was done to this.")] = None,
    key_id: Annotated[Id, Query(description="Only what this key did.")] = None,
    created_after: Annotated[AwareDatetime | None, Query(description="From this time on.")] = None,
    created_before: Annotated[AwareDatetime | None, Query(description="Before this time.")] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[TrailEntry]:
    """List every change that was made, the newest first; entries cannot be changed.

    An entry is written in the transaction of the change. What changed nothing has none: a call
    that was refused, a second cancel, the answer to a repeated `Idempotency-Key`.
    """
    with Session(engine) as session:
        rows = service.list_entries(
            session,
            tenant,
            limit=limit,
            before_id=decode_cursor(cursor, str) if cursor else None,
            action=action,
            object_id=object_id,
            key_id=key_id,
            created_after=created_after,
            created_before=created_before,
        )
    rows, has_more = cut_page(rows, limit)
    next_cursor = encode_cursor(rows[-1].id) if has_more else None
    link_next(request, response, next_cursor)
    data = [TrailEntry.model_validate(row) for row in rows]
    return Page(data=data, next_cursor=next_cursor, has_more=has_more)
