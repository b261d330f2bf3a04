"""HTTP: webhooks and their deliveries."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from app.dependencies import EngineDep, SettingsDep, TenantDep
from app.errors import Conflict, InvalidRequest, NotFound, problem_responses
from app.pagination import Cursor, Limit, Page, cut_page, decode_cursor, encode_cursor, link_next
from app.webhooks import models, schemas, service

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])

WebhookId = Annotated[str, Path(max_length=100, description="As POST /v1/webhooks answered it.")]
DeliveryId = Annotated[str, Path(max_length=100, description="As the list of deliveries has it.")]


@router.post(
    "",
    status_code=201,
    summary="Make a webhook",
    responses=problem_responses(InvalidRequest, Conflict),
)
def create_webhook(
    body: schemas.WebhookRequest,
    response: Response,
    engine: EngineDep,
    settings: SettingsDep,
    tenant: TenantDep,
) -> schemas.NewWebhook:
    """Be told when audits, rankings and experiments end; the answer alone shows the secret.

    Messages are signed by Standard Webhooks, tried 8 times over about a day, and may come twice:
    `webhook-id` tells.
    """
    webhook = service.create(engine, settings, tenant=tenant, request=body)
    response.headers["Location"] = _path(webhook.id)
    return _with_secret(webhook)


@router.get("", summary="List webhooks", responses=problem_responses(InvalidRequest))
def list_webhooks(
    *,
    request: Request,
    response: Response,
    engine: EngineDep,
    tenant: TenantDep,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[schemas.Webhook]:
    """List your webhooks, the newest first."""
    before_id = decode_cursor(cursor, str) if cursor else None
    rows = service.list_webhooks(engine, tenant=tenant, limit=limit, before_id=before_id)
    rows, has_more = cut_page(rows, limit)
    next_cursor = encode_cursor(rows[-1].id) if has_more else None
    link_next(request, response, next_cursor)
    data = [_answer(row) for row in rows]
    return Page(data=data, next_cursor=next_cursor, has_more=has_more)


@router.get("/{webhook_id}", summary="Get a webhook", responses=problem_responses(NotFound))
def get_webhook(engine: EngineDep, tenant: TenantDep, webhook_id: WebhookId) -> schemas.Webhook:
    """Get a webhook; its secret is not shown again."""
    return _answer(service.get_webhook(engine, tenant=tenant, webhook_id=webhook_id))


@router.delete(
    "/{webhook_id}",
    status_code=204,
    summary="Delete a webhook",
    responses=problem_responses(NotFound),
)
def delete_webhook(engine: EngineDep, tenant: TenantDep, webhook_id: WebhookId) -> None:
    """Remove a webhook with its deliveries; what it is still owed is not sent."""
    service.delete(engine, tenant=tenant, webhook_id=webhook_id)


@router.post(
    "/{webhook_id}/rotate",
    summary="Rotate a webhook's secret",
    responses=problem_responses(NotFound),
)
def rotate_webhook(
    engine: EngineDep, tenant: TenantDep, webhook_id: WebhookId
) -> schemas.NewWebhook:
    """Get a new secret; for a day messages carry the signature of the one before it too."""
    return _with_secret(service.rotate(engine, tenant=tenant, webhook_id=webhook_id))


@router.post(
    "/{webhook_id}/test",
    status_code=202,
    summary="Test a webhook",
    responses=problem_responses(NotFound, Conflict),
)
def send_test(engine: EngineDep, tenant: TenantDep, webhook_id: WebhookId) -> schemas.Delivery:
    """Send a message of type webhook.test; the list of deliveries tells how it went."""
    return _delivery(service.send_test(engine, tenant=tenant, webhook_id=webhook_id))


@router.get(
    "/{webhook_id}/deliveries",
    summary="List a webhook's deliveries",
    responses=problem_responses(NotFound, InvalidRequest),
)
def list_deliveries(
    *,
    request: Request,
    response: Response,
    engine: EngineDep,
    tenant: TenantDep,
    webhook_id: WebhookId,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[schemas.Delivery]:
    """List what a webhook was told, or will be, the newest first; kept for 30 days."""
    before_id = decode_cursor(cursor, str) if cursor else None
    rows = service.list_deliveries(
        engine, tenant=tenant, webhook_id=webhook_id, limit=limit, before_id=before_id
    )
    rows, has_more = cut_page(rows, limit)
    next_cursor = encode_cursor(rows[-1].id) if has_more else None
    link_next(request, response, next_cursor)
    data = [_delivery(row) for row in rows]
    return Page(data=data, next_cursor=next_cursor, has_more=has_more)


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/redeliver",
    status_code=202,
    summary="Send a message again",
    responses=problem_responses(NotFound, Conflict),
)
def redeliver(
    engine: EngineDep, tenant: TenantDep, webhook_id: WebhookId, delivery_id: DeliveryId
) -> schemas.Delivery:
    """Send a message again, now, under the same `webhook-id` and with all tries anew."""
    row = service.redeliver(engine, tenant=tenant, webhook_id=webhook_id, delivery_id=delivery_id)
    return _delivery(row)


def _path(webhook_id: str, *rest: str) -> str:
    return "/".join(("/v1/webhooks", webhook_id, *rest))


def _answer(row: models.Webhook) -> schemas.Webhook:
    return schemas.Webhook.model_validate(_fields(row))


def _with_secret(row: models.Webhook) -> schemas.NewWebhook:
    return schemas.NewWebhook.model_validate(_fields(row) | {"secret": row.secret})


def _fields(row: models.Webhook) -> dict[str, object]:
    names = schemas.Webhook.model_fields.keys() - {"links"}
    links = {"self": _path(row.id), "deliveries": _path(row.id, "deliveries")}
    return {name: getattr(row, name) for name in names} | {"links": links}


def _delivery(row: models.WebhookDelivery) -> schemas.Delivery:
    return schemas.Delivery.model_validate(row, from_attributes=True)
