"""HTTP: datasets."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from app.audits.documented import LOCATION, REPLAYED, IdempotencyKey
from app.datasets import service
from app.datasets.models import Dataset as DatasetRow
from app.datasets.schemas import Dataset, UploadOptions
from app.dependencies import EngineDep, SettingsDep, TenantDep, upload_slot
from app.errors import Busy, Conflict, InvalidRequest, NotFound, StorageFull, problem_responses
from app.pagination import Cursor, Limit, Page, cut_page, decode_cursor, encode_cursor, link_next
from app.references import UploadReference

MAX_FORM_FIELDS = 20

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])
DatasetId = Annotated[str, Path(max_length=100, description="As POST /v1/datasets answered it.")]


def _upload_form() -> dict[str, Any]:
    """Describe the form; it is read by hand, after the caller's key was checked."""
    schema = UploadOptions.model_json_schema()
    file = {
        "type": "string",
        "format": "binary",
        "description": "A Parquet, JSONL or CSV file: one row per sample.",
    }
    properties = {"file": file, **schema["properties"]}
    form = {"type": "object", "required": ["file"], "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}


@router.post(
    "",
    status_code=201,
    summary="Upload a dataset",
    response_model=Dataset,
    openapi_extra=_upload_form(),
    responses={
        201: {"description": "Checked and kept.", "headers": {**LOCATION, **REPLAYED}},
        **problem_responses(InvalidRequest, Conflict, Busy, StorageFull),
    },
    dependencies=[Depends(upload_slot)],
)
async def upload_dataset(
    *,
    request: Request,
    response: Response,
    engine: EngineDep,
    settings: SettingsDep,
    tenant: TenantDep,
    idempotency_key: IdempotencyKey = None,
) -> Dataset:
    """Upload a table once and use it in many audits.

    A row is a labelled text, a prompt with its completion, or a chat. Every row is checked on
    arrival: columns, types, the set of labels, messages, empty texts, the number of rows. A file
    that is refused leaves nothing behind.
    """
    async with request.form(max_files=1, max_fields=MAX_FORM_FIELDS) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest.at(
                "#/file", "Send the table as multipart/form-data, in a field `file`."
            )
        fields = {name: value for name, value in form.multi_items() if name != "file"}
        try:
            options = UploadOptions.model_validate(fields)
        except ValidationError as error:
            raise RequestValidationError(
                [{**item, "loc": ("body", *item["loc"])} for item in error.errors()], body=fields
            ) from error
        stored = await run_in_threadpool(
            service.store_dataset,
            engine,
            settings,
            tenant=tenant,
            file=file.file,
            filename=file.filename or "dataset",
            options=options,
            idempotency_key=idempotency_key,
        )
    answer = _answer(stored.dataset)
    if stored.is_replay:
        response.headers["Idempotent-Replayed"] = "true"
    response.headers["Location"] = answer.links["self"]
    return answer


@router.get("", summary="List datasets", responses=problem_responses(InvalidRequest))
def list_datasets(
    *,
    request: Request,
    response: Response,
    engine: EngineDep,
    tenant: TenantDep,
    sha256: Annotated[
        str | None,
        Query(pattern="^[0-9a-f]{64}$", description="Only files with this SHA-256: uploaded yet?"),
    ] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[Dataset]:
    """List your datasets, the newest first."""
    before_id = decode_cursor(cursor, str) if cursor else None
    rows = service.list_datasets(
        engine, tenant=tenant, limit=limit, before_id=before_id, sha256=sha256
    )
    rows, has_more = cut_page(rows, limit)
    next_cursor = encode_cursor(rows[-1].id) if has_more else None
    link_next(request, response, next_cursor)
    return Page(data=[_answer(row) for row in rows], next_cursor=next_cursor, has_more=has_more)


@router.get("/{dataset_id}", summary="Get a dataset", responses=problem_responses(NotFound))
def get_dataset(engine: EngineDep, tenant: TenantDep, dataset_id: DatasetId) -> Dataset:
    """Get what is known of a dataset: its rows, labels and columns."""
    return _answer(service.get_dataset(engine, tenant=tenant, dataset_id=dataset_id))


@router.delete(
    "/{dataset_id}",
    status_code=204,
    summary="Delete a dataset",
    responses=problem_responses(NotFound, Conflict),
)
def delete_dataset(
    engine: EngineDep, settings: SettingsDep, tenant: TenantDep, dataset_id: DatasetId
) -> None:
    """Remove a dataset and its file; not while an audit that has not ended reads it."""
    service.delete_dataset(engine, settings, tenant=tenant, dataset_id=dataset_id)


def _answer(row: DatasetRow) -> Dataset:
    return Dataset.model_validate(
        {
            "id": row.id,
            "reference": str(UploadReference(row.id)),
            "name": row.name,
            "format": row.format,
            "columns": row.columns,
            "num_rows": row.num_rows,
            "num_bytes": row.num_bytes,
            "sha256": row.sha256,
            "summary": row.summary,
            "created_at": row.created_at,
            "links": {"self": f"/v1/datasets/{row.id}"},
        }
    )
