"""HTTP: the pages. What they change, they change through the API."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from app.audits import repository, service
from app.audits.assemble import assemble_sample
from app.audits.documented import AuditId, SampleIndex
from app.audits.models import AuditState
from app.audits.ranking_service import results_for
from app.db import transaction
from app.dependencies import EngineDep, ServiceEngineDep, SettingsDep, TenantDep, engine_of
from app.keys.cookie import forget_key, keep_key, local_path, refuse_other_sites
from app.keys.scopes import Scope
from app.keys.service import caller_of
from app.pagination import cut_page
from app.trail.service import TrailAction, record
from app.web.addresses import query_string, read_filter
from app.web.names import DatasetNames
from app.web.overview import chosen_configurations, overview_of
from app.web.queries import counts_of
from app.web.rendering import PageRoute, page
from app.web.suspects import suspect_table
from app.web.views import view_of

AUDITS_PER_PAGE = 30

router = APIRouter(route_class=PageRoute, include_in_schema=False)
RankingChoice = Annotated[str | None, Query(alias="ranking", max_length=100)]


@router.get("/")
def audits_page(
    request: Request,
    engine: EngineDep,
    tenant: TenantDep,
    before: Annotated[str | None, Query(max_length=100)] = None,
) -> Response:
    """List the audits, the newest first, beside the form for a new one."""
    with Session(engine) as session:
        rows = repository.list_audits(session, tenant, limit=AUDITS_PER_PAGE, before_id=before)
        audits, has_more = cut_page(rows, AUDITS_PER_PAGE)
        return page(
            "audits.html",
            request,
            audits=audits,
            dataset_name=DatasetNames.of(session, audits),
            is_first=before is None,
            next_before=audits[-1].id if has_more else None,
        )


@router.get("/audits/{audit_id}")
def audit_page(
    request: Request,
    engine: EngineDep,
    tenant: TenantDep,
    audit_id: AuditId,
    ranking_id: RankingChoice = None,
) -> Response:
    """Show an audit: its progress, its error, or its suspects."""
    audit = service.get_audit(engine, tenant=tenant, audit_id=audit_id)
    with Session(engine) as session:
        names = DatasetNames.of(session, [audit])
        if audit.state != AuditState.SUCCEEDED:
            return page("progress.html", request, audit=audit, dataset_name=names)
        results = results_for(session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id)
        filters, place, errors = read_filter(request.query_params)
        return page(
            "audit.html",
            request,
            audit=results.audit,
            dataset_name=names,
            view=view_of(results),
            chosen=chosen_configurations(results.ranking),
            filters=filters,
            errors=errors,
            table=suspect_table(session, results.ranking, filters, place),
            kept_ranking=ranking_id,
            address_of_ranking=query_string({"ranking": ranking_id}),
            address=_addresses(ranking=ranking_id, **filters.said()),
        )


@router.get("/audits/{audit_id}/overview")
def overview_part(
    request: Request,
    engine: EngineDep,
    tenant: TenantDep,
    audit_id: AuditId,
    ranking_id: RankingChoice = None,
) -> Response:
    """Draw the pictures of a ranking: counted when first looked at, so apart from the page."""
    with Session(engine) as session:
        results = results_for(session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id)
        counts = counts_of(request.app.state.counts, session, results.audit, results.ranking)
        return page(
            "overview.html",
            request,
            audit=results.audit,
            ranking=results.ranking,
            overview=overview_of(results.audit, results.ranking, counts),
            address=_addresses(ranking=ranking_id),
        )


@router.get("/audits/{audit_id}/review")
def review_part(
    request: Request,
    engine: EngineDep,
    tenant: TenantDep,
    audit_id: AuditId,
    ranking_id: RankingChoice = None,
) -> Response:
    """Tell what was decided so far."""
    with Session(engine) as session:
        results = results_for(session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id)
        return page("review.html", request, view=view_of(results))


@router.get("/audits/{audit_id}/samples/{index}")
def sample_page(
    *,
    request: Request,
    engine: EngineDep,
    tenant: TenantDep,
    audit_id: AuditId,
    index: SampleIndex,
    ranking_id: RankingChoice = None,
    part: Annotated[bool, Query()] = False,
) -> Response:
    """Explain one sample: as a page, or as the part that the table opens below its row."""
    with Session(engine) as session:
        results = results_for(session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id)
        return page(
            "why.html" if part else "sample.html",
            request,
            audit=results.audit,
            sample=assemble_sample(results.ranking, results.sample(index)),
            address=_addresses(ranking=ranking_id),
        )


@router.get("/sign-in")
def sign_in_page(
    request: Request,
    settings: SettingsDep,
    to: Annotated[str, Query(alias="next", max_length=4000)] = "/",
) -> Response:
    """Ask for an API key."""
    if not settings.require_keys:
        return RedirectResponse(local_path(to), HTTPStatus.SEE_OTHER)
    return page("sign_in.html", request, to=local_path(to), error=None)


@router.post("/sign-in")
def sign_in(
    request: Request,
    engine: ServiceEngineDep,
    key: Annotated[str, Form(max_length=200)] = "",
    to: Annotated[str, Form(alias="next", max_length=4000)] = "/",
) -> Response:
    """Keep a key that opens this server in a cookie."""
    refuse_other_sites(request)
    secret = key.strip()
    caller = caller_of(engine, secret)
    error = None
    if caller is None:
        error = "This API key is unknown, revoked or over its date."
    elif Scope.AUDITS_READ not in caller.scopes:
        error = f"This API key lacks the scope {Scope.AUDITS_READ}, which the pages need."
    if caller is None or error is not None:
        status = HTTPStatus.UNAUTHORIZED if caller is None else HTTPStatus.FORBIDDEN
        return page("sign_in.html", request, status=status, to=local_path(to), error=error)
    with transaction(engine_of(request, engine, caller)) as session:
        record(session, TrailAction.SIGN_IN, caller.key_id or "", tenant=caller.tenant)
    response = RedirectResponse(local_path(to), HTTPStatus.SEE_OTHER)
    keep_key(response, request, secret)
    return response


@router.post("/sign-out")
def sign_out(request: Request) -> Response:
    """Forget the key."""
    refuse_other_sites(request)
    response = RedirectResponse("/sign-in", HTTPStatus.SEE_OTHER)
    forget_key(response)
    return response


def _addresses(**kept: object) -> Callable[..., str]:
    """Return what makes the query of an address: what is kept, and changes to it."""

    def address(**changes: Any) -> str:
        return query_string(kept, changes)

    return address
