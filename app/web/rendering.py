"""Templates, and the headers that every page carries."""

import base64
import hashlib
from collections.abc import Callable, Coroutine
from datetime import datetime
from functools import cache
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi_problem.error import Problem
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from app.errors import NotAuthenticated
from app.keys.service import Caller
from app.version import VERSION
from app.web import names, pictures
from app.web.own_files import COMMON_HEADERS, STATIC, static_version

# Nothing but this server's own files: no inline script or style, no frame around a page.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    **COMMON_HEADERS,
    "Content-Security-Policy": PAGE_POLICY,
    "Cache-Control": "private, no-store",
}


@cache
def environment() -> Environment:
    """Return the templates; all of them escape what they are given."""
    made = Environment(
        loader=PackageLoader("app.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "count": names.count,
        "share": names.share,
        "score": names.score,
        "moment": _moment,
        "duration": names.duration,
        "model_name": names.model_name,
        "sparkline": pictures.sparkline,
    }
    made.globals |= {"version": VERSION, "static": f"/static/{static_version()}"}
    return made


def _moment(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M")


def page(
    template: str,
    request: Request,
    *,
    status: int = HTTPStatus.OK,
    headers: dict[str, str] | None = None,
    **values: object,
) -> HTMLResponse:
    """Return a page, or a part of one."""
    settings = request.app.state.settings
    caller: Caller | None = getattr(request.state, "caller", None)
    text = (
        environment()
        .get_template(template)
        .render(
            needs_keys=settings.require_keys,
            may=lambda scope: caller is not None and scope in caller.scopes,
            **values,
        )
    )
    return HTMLResponse(text, status_code=status, headers={**PAGE_HEADERS, **(headers or {})})


@cache
def stylesheet() -> str:
    """Return our stylesheet, for the one file of a report."""
    return (STATIC / "winnow.css").read_text(encoding="utf-8")


def report_policy() -> str:
    """Return what a report may load: its own inline style, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(stylesheet().encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


class PageRoute(APIRoute):
    """A route whose errors are pages too; who is not signed in is sent to do so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler with errors as pages."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except NotAuthenticated:
                url = request.url
                where = quote(url.path + (f"?{url.query}" if url.query else ""), safe="")
                return RedirectResponse(f"/sign-in?next={where}", HTTPStatus.SEE_OTHER)
            except Problem as problem:
                return page(
                    "problem.html",
                    request,
                    status=problem.status,
                    title=problem.title,
                    detail=problem.detail,
                )
            except RequestValidationError as error:
                first = error.errors()[0]
                return page(
                    "problem.html",
                    request,
                    status=HTTPStatus.UNPROCESSABLE_ENTITY,
                    title="The address is not valid",
                    detail=f"{first['loc'][-1]}: {first['msg']}",
                )

        return handle
