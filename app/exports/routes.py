"""HTTP: the training set with what was decided on it."""

import re
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from app.audits.documented import AuditId, OfRanking
from app.audits.downloads import MEDIA_TYPES
from app.dependencies import EngineDep, SettingsDep, TenantDep
from app.errors import Conflict, InvalidRequest, NotFound, problem_responses
from app.exports import service
from app.exports.changes import Mode
from app.exports.service import Export

router = APIRouter(prefix="/v1/audits/{audit_id}/export", tags=["decisions"])

_UNUSUAL = re.compile(r"[^A-Za-z0-9._ -]")

WhichChanges = Annotated[
    Mode,
    Query(
        description="decisions: what reviewers decided; drop: without the flagged samples; "
        "correct: flagged samples get their suggested label, where they have one."
    ),
]


@router.get(
    "",
    summary="Export the corrected training set",
    response_class=Response,
    responses={
        200: {
            "description": "The training file with the changes, in its own format.",
            "content": {kind: {} for kind in MEDIA_TYPES.values()},
        },
        **problem_responses(NotFound, Conflict, InvalidRequest),
    },
)
def export_dataset(
    *,
    engine: EngineDep,
    settings: SettingsDep,
    tenant: TenantDep,
    audit_id: AuditId,
    suspects: WhichChanges = "decisions",
    ranking_id: OfRanking = None,
) -> Response:
    """Download the training set in its own format, with all its columns and rows in their order.

    Rows that were dropped are left out; rows whose suggestion was accepted, or that were edited,
    have the new label (or completion) in the type of the column. Everything else stays as it is: in
    CSV and JSONL to the byte, in Parquet to the value, with schema, metadata and compression. A
    split of the hub comes as Parquet.

    Cells that begin with =, +, - or @ stay too: it is data, to train with. Do not open it in a
    spreadsheet without care.

    Where the audit planted noise, the file is your own, without it. A planted label is not the
    file's, so a drop, a flag or a suggestion on such a sample changes nothing; the label or
    completion that a reviewer accepted or wrote is taken.

    The file is read and hashed first; where it is gone or has changed since the audit, the answer
    is 409.
    """
    return _answer(
        service.export(
            engine,
            settings,
            tenant=tenant,
            audit_id=audit_id,
            ranking_id=ranking_id,
            mode=suspects,
        )
    )


@router.get(
    "/patch",
    summary="Export the changes alone",
    response_class=Response,
    responses={
        200: {
            "description": 'One line a changed row: {"index", "change": "drop", "relabel" or '
            '"rewrite", "column", "before", "after", "reviewer", "decided_at"}.',
            "content": {"application/jsonl": {}},
        },
        **problem_responses(NotFound, Conflict, InvalidRequest),
    },
)
def export_patch(
    *,
    engine: EngineDep,
    settings: SettingsDep,
    tenant: TenantDep,
    audit_id: AuditId,
    suspects: WhichChanges = "decisions",
    ranking_id: OfRanking = None,
) -> Response:
    """Download what the export changes, row by row, in the order of the rows.

    `before` and `after` are the values of `column`, as the file has them; a row that is left out
    has neither. `index` is the row of the training file, from 0. `reviewer` and `decided_at` are
    null where no decision stands behind it.
    """
    return _answer(
        service.patch(
            engine,
            settings,
            tenant=tenant,
            audit_id=audit_id,
            ranking_id=ranking_id,
            mode=suspects,
        )
    )


def _answer(export: Export) -> Response:
    # RFC 6266: a plain form for old programs, another for every name
    plain = _UNUSUAL.sub("_", export.name)
    every = quote(export.name, safe="")
    disposition = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{every}"
    return StreamingResponse(
        export.parts,
        media_type=MEDIA_TYPES[export.format],
        headers={"Content-Disposition": disposition, "Cache-Control": "private, no-store"},
    )
