"""Errors of the API: every one leaves as an RFC 9457 problem document (docs/errors.md)."""

import errno
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any, Self

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi_problem.error import Problem, StatusProblem
from fastapi_problem.handler import ExceptionHandler, add_exception_handler, new_exception_handler
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette_problem.handler import http_exception_handler_

PROBLEM_TYPE = "urn:winnow:problem:{type}"
PROBLEM_MEDIA_TYPE = "application/problem+json"
_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class ProblemItem(BaseModel):
    """One thing that is wrong with a request, and where."""

    pointer: str = Field(
        description="JSON pointer into the body (#/train/reference), or the parameter's name.",
        examples=["#/train/reference"],
    )
    detail: str


class ProblemDocument(BaseModel):
    """What every error looks like (RFC 9457); docs/errors.md lists the types."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="Stable.", examples=["urn:winnow:problem:invalid-request"])
    title: str
    status: int
    detail: str = Field(description="What happened this time and what to change.")
    errors: list[ProblemItem] = Field([], description="The fields concerned, if it is about any.")


class AppError(StatusProblem):
    """Base of the errors that a caller can understand and act on."""


class NotFound(AppError):
    """There is no such thing, or it belongs to somebody else."""

    type_ = "not-found"
    title = "Not found"
    status = HTTPStatus.NOT_FOUND


class Conflict(AppError):
    """The thing is not in the state that the call needs."""

    type_ = "conflict"
    title = "Conflict with the current state"
    status = HTTPStatus.CONFLICT


class NotAuthenticated(AppError):
    """The caller did not say who it is."""

    type_ = "not-authenticated"
    title = "API key missing or not valid"
    status = HTTPStatus.UNAUTHORIZED
    headers_: MutableMapping[str, str] | None = {"WWW-Authenticate": "Bearer"}  # noqa: RUF012  as the base class has it


class NotPermitted(AppError):
    """The caller may not do this from where it is."""

    type_ = "not-permitted"
    title = "Not permitted"
    status = HTTPStatus.FORBIDDEN


class MissingScope(AppError):
    """The caller's key does not have the scope that the call needs."""

    type_ = "missing-scope"
    title = "The key lacks a scope"
    status = HTTPStatus.FORBIDDEN


class RateExceeded(AppError):
    """The caller's key was used too often within a minute."""

    type_ = "rate-exceeded"
    title = "Too many requests"
    status = HTTPStatus.TOO_MANY_REQUESTS


class QuotaExceeded(AppError):
    """The caller's tenant has used up what it may."""

    type_ = "quota-exceeded"
    title = "Quota used up"
    status = HTTPStatus.TOO_MANY_REQUESTS


class Busy(AppError):
    """The server does as much of this as it can at once."""

    type_ = "busy"
    title = "Busy"
    status = HTTPStatus.SERVICE_UNAVAILABLE


class HeadTooSlow(AppError):
    """The line and headers of a request did not come in time."""

    type_ = "http-request-timeout"
    title = "Request Timeout"
    status = HTTPStatus.REQUEST_TIMEOUT


class RangeNotSatisfiable(AppError):
    """The part of a file that was asked for does not exist."""

    type_ = "range-not-satisfiable"
    title = "Range not satisfiable"
    status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE


class NotReady(AppError):
    """A part that the call needs cannot be reached just now."""

    type_ = "not-ready"
    title = "Not ready"
    status = HTTPStatus.SERVICE_UNAVAILABLE


class StorageFull(AppError):
    """The data directory has no room left."""

    type_ = "storage-full"
    title = "No storage left"
    status = HTTPStatus.INSUFFICIENT_STORAGE


class InvalidRequest(AppError):
    """The request is well formed, but says something that cannot be done."""

    type_ = "invalid-request"
    title = "The request is not valid"
    status = HTTPStatus.UNPROCESSABLE_ENTITY

    @classmethod
    def at(cls, pointer: str, detail: str) -> Self:
        """Return the error for one field, named by its JSON pointer."""
        return cls(detail, errors=[{"pointer": pointer, "detail": detail}])


class FieldConflict(ValueError):
    """Raised by a validator of a whole model, about one of its fields."""

    def __init__(self, *path: str | int, message: str) -> None:
        super().__init__(message)
        self.path = path


class BodyTooLarge(HTTPException):
    """The body is larger than this server takes."""

    def __init__(self, limit: int, setting: str) -> None:
        super().__init__(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body is larger than the {limit:,} bytes that this server takes here ({setting}).",
        )


class BodyTooSlow(HTTPException):
    """The body comes too slowly, or has stopped to come."""

    def __init__(self, seconds: float, rate: int) -> None:
        super().__init__(
            HTTPStatus.REQUEST_TIMEOUT,
            f"The body came too slowly. This server waits {seconds:g} s for a part of it "
            f"(WINNOW_SLOW_CLIENT_SECONDS), and beyond those takes {rate:,} bytes a second or more "
            "(WINNOW_MIN_BODY_RATE).",
            headers={"Connection": "close"},
        )


def _pointer(error: Mapping[str, Any], body: object) -> str:
    """Return where an error is: a JSON pointer into the body, or the parameter's name."""
    place, *path = error["loc"]
    if place != "body":
        return ".".join(str(part) for part in error["loc"])
    if error["type"] == "json_invalid":  # the rest of the place is a position in the text
        return "#"
    path = list(_in_body(path, body, is_absent=error["type"] == "missing"))
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, FieldConflict):
        path.extend(cause.path)
    return "#" + "".join(f"/{_escaped(part)}" for part in path)


def _detail(error: Mapping[str, Any]) -> str:
    if error["type"] == "json_invalid":
        return f"not JSON at character {error['loc'][-1]}: {error['ctx']['error']}"
    return str(error["msg"]).removeprefix("Value error, ")


def _in_body(path: Sequence[str | int], body: object, *, is_absent: bool) -> Iterator[str | int]:
    """Yield the parts of a place that the body has, without those that name a kind of a union."""
    for number, part in enumerate(path, start=1):
        if isinstance(body, Mapping) and part in body:  # noqa: SIM114  the checker tells them apart by branch
            body = body[part]
        elif isinstance(body, list) and isinstance(part, int):
            body = body[part]
        elif not (is_absent and number == len(path)):
            continue
        yield part


def _escaped(part: str | int) -> str:
    return str(part).replace("~", "~0").replace("/", "~1")


def _validation_problem(
    _handler: ExceptionHandler, _request: Request, error: RequestValidationError
) -> Problem:
    # each kind of a union says by itself what it would take
    details: dict[str, list[str]] = {}
    for item in error.errors():
        found = details.setdefault(_pointer(item, error.body), [])
        found.append(_detail(item))
    errors = [
        {"pointer": pointer, "detail": "; or: ".join(dict.fromkeys(found))}
        for pointer, found in details.items()
    ]
    first = f"{errors[0]['pointer']}: {errors[0]['detail']}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return InvalidRequest(first + more, errors=errors)


def _http_problem(handler: ExceptionHandler, request: Request, error: HTTPException) -> Problem:
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        # Starlette names the methods of the first route alone that has the path
        allowed = (
            method
            for method in _METHODS
            for scope in ({**request.scope, "method": method},)
            if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
        )
        error.headers = {**(error.headers or {}), "Allow": ", ".join(allowed)}
    return http_exception_handler_(handler, request, error)


def _database_problem(_handler: ExceptionHandler, _request: Request, _error: Exception) -> Problem:
    return NotReady(
        "The database cannot be reached. Nothing was stored; try again in a few seconds.",
        headers={"Retry-After": "5"},
    )


def _data_problem(_handler: ExceptionHandler, _request: Request, error: DataError) -> Problem:
    structlog.get_logger().warning("value_not_storable", error=str(error.orig))
    return InvalidRequest(
        "The request holds a value that cannot be stored: a NUL character, or a number out of "
        "range."
    )


def _storage_problem(handler: ExceptionHandler, request: Request, error: OSError) -> Problem:
    if error.errno not in DISK_FULL:
        return _internal_problem(handler, request, error)
    structlog.get_logger().error("storage_full", error=str(error))
    return StorageFull(
        "The server's disk is full. Nothing was stored; delete audits or datasets that are not "
        "needed any more, or ask the operator for more room."
    )


def _internal_problem(_handler: ExceptionHandler, request: Request, error: Exception) -> Problem:
    request_id = request.scope.get("state", {}).get("request_id")
    structlog.get_logger().error(
        "request_failed", path=request.url.path, request_id=request_id, exc_info=error
    )
    return Problem(
        title="Internal error",
        type_="internal-error",
        detail="The server made an error. The log has its details under this request's id.",
        status=HTTPStatus.INTERNAL_SERVER_ERROR,
        request_id=request_id,
    )


def problem_responses(*errors: type[AppError]) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI says of the errors that a route may answer."""
    responses: dict[int | str, dict[str, Any]] = {}
    for error in errors:
        example = error("What happened and what to change.").marshal(uri=PROBLEM_TYPE)
        responses[int(error.status)] = {
            "description": error.title,
            "content": {
                PROBLEM_MEDIA_TYPE: {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "example": example,
                }
            },
        }
    return responses


def problem_response(problem: Problem) -> JSONResponse:
    """Return a problem as a response, for middleware, which no error handler surrounds."""
    return JSONResponse(
        problem.marshal(uri=PROBLEM_TYPE),
        status_code=problem.status,
        headers=problem.headers,
        media_type=PROBLEM_MEDIA_TYPE,
    )


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of `app` a problem document."""
    handlers: dict[Any, Any] = {
        OperationalError: _database_problem,
        PoolTimeout: _database_problem,
        DataError: _data_problem,
        OSError: _storage_problem,
    }
    handler = new_exception_handler(
        handlers=handlers,
        http_exception_handler=_http_problem,
        request_validation_handler=_validation_problem,
        documentation_uri_template=PROBLEM_TYPE,
    )
    add_exception_handler(app, handler, generic_swagger_defaults=False)
    for error_class in (OperationalError, PoolTimeout, DataError, OSError):
        app.add_exception_handler(error_class, handler)

    _describe_problems(app)

    def internal_error(request: Request, error: Exception) -> Any:  # noqa: ANN401  the library says no more
        return handler(request, _internal_problem(handler, request, error))

    app.add_exception_handler(Exception, internal_error)


def _describe_problems(app: FastAPI) -> None:
    """Put our own schema of problems into the OpenAPI document, in place of the library's."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        schemas = document["components"]["schemas"]
        schemas.pop("HTTPValidationError", None)
        reference = "#/components/schemas/{model}"
        problem = ProblemDocument.model_json_schema(ref_template=reference)
        schemas.update(problem.pop("$defs"))
        schemas["Problem"] = problem
        _describe_bodies(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _describe_bodies(document: dict[str, Any]) -> None:
    """Say of every call with a body that the body may be unreadable or too large."""
    refusals = problem_responses(_UnreadableBody, _TooLargeBody)
    for operations in document["paths"].values():
        for operation in operations.values():
            if "requestBody" in operation:
                for status, response in refusals.items():
                    operation["responses"].setdefault(str(status), response)


class _UnreadableBody(AppError):
    """As FastAPI's own HTTPException leaves here."""

    type_ = "http-bad-request"
    title = "Bad request"
    status = HTTPStatus.BAD_REQUEST


class _TooLargeBody(AppError):
    """As `BodyTooLarge` leaves here."""

    type_ = "http-request-entity-too-large"
    title = "Request entity too large"
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
