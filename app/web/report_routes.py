"""HTTP: a ranking as one self-contained file, to attach to a ticket."""

from fastapi import APIRouter, Request
from markupsafe import Markup
from sqlalchemy.orm import Session
from starlette.responses import HTMLResponse

from app.audits import repository
from app.audits.assemble import assemble_sample
from app.audits.documented import AuditId, RankingId
from app.audits.filters import SuspectFilter
from app.audits.ranking_service import results_for
from app.audits.service import Results
from app.dependencies import EngineDep, TenantDep
from app.errors import Conflict, NotFound, problem_responses
from app.web.names import DatasetNames
from app.web.overview import chosen_configurations, overview_of
from app.web.own_files import COMMON_HEADERS
from app.web.queries import counts_of
from app.web.rendering import environment, report_policy, stylesheet
from app.web.views import view_of

NUM_SUSPECTS = 100

router = APIRouter(prefix="/v1/audits", tags=["results"])


@router.get(
    "/{audit_id}/report.html",
    summary="Get a report",
    response_class=HTMLResponse,
    responses=problem_responses(NotFound, Conflict),
)
def get_report(
    request: Request, engine: EngineDep, tenant: TenantDep, audit_id: AuditId
) -> HTMLResponse:
    """Get the audit's own ranking as one HTML file: choice, noise, pictures, top suspects.

    It refers to nothing outside, so that it can be read offline.
    """
    with Session(engine) as session:
        results = results_for(session, tenant=tenant, audit_id=audit_id, ranking_id=None)
        return _report(request, results)


@router.get(
    "/{audit_id}/rankings/{ranking_id}/report.html",
    summary="Get a ranking's report",
    response_class=HTMLResponse,
    responses=problem_responses(NotFound, Conflict),
)
def get_ranking_report(
    request: Request, engine: EngineDep, tenant: TenantDep, audit_id: AuditId, ranking_id: RankingId
) -> HTMLResponse:
    """Get a ranking as one HTML file, as the audit's own."""
    with Session(engine) as session:
        results = results_for(session, tenant=tenant, audit_id=audit_id, ranking_id=ranking_id)
        return _report(request, results)


def _report(request: Request, results: Results) -> HTMLResponse:
    session, audit, ranking = results.session, results.audit, results.ranking
    counts = counts_of(request.app.state.counts, session, audit, ranking)
    rows = repository.list_suspects(session, ranking, SuspectFilter(), limit=NUM_SUSPECTS)
    suspects = [
        assemble_sample(ranking, results.sample(row[0].sample_index)) for row in rows[:NUM_SUSPECTS]
    ]
    reference = audit.request["train"]["reference"]
    policy = report_policy()
    text = (
        environment()
        .get_template("report.html")
        .render(
            name=DatasetNames.of(session, [audit])(reference),
            style=Markup(stylesheet()),  # noqa: S704  a file of ours
            policy=policy,
            audit=audit,
            ranking=ranking,
            view=view_of(results),
            chosen=chosen_configurations(ranking),
            overview=overview_of(audit, ranking, counts),
            suspects=suspects,
            may=lambda _scope: False,  # it is a file: nothing can be changed from it
        )
    )
    name = f"{audit.id if ranking.is_own else ranking.id}-report.html"
    headers = {
        **COMMON_HEADERS,
        "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
        "Content-Disposition": f'attachment; filename="{name}"',
        "Cache-Control": "private, no-cache",
    }
    return HTMLResponse(text, headers=headers)
