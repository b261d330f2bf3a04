"""Errors of the API: every one leaves as an RFC 9457 problem document (docs/errors.md)."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar, Self

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi_problem.error import Problem, StatusProblem
from fastapi_problem.handler import ExceptionHandler, add_exception_handler, new_exception_handler
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

PROBLEM_TYPE = "urn:winnow:problem:{type}"


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
    headers_: ClassVar = {"WWW-Authenticate": "Bearer"}


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


class BodyTooLarge(HTTPException):
    """The body is larger than this server takes."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body is larger than the {limit:,} bytes that this server takes here.",
        )


def _pointer(error: Mapping[str, Any]) -> str:
    """Return where an error is: a JSON pointer into the body, or the parameter's name."""
    place, *path = error["loc"]
    if place != "body":
        return ".".join(str(part) for part in error["loc"])
    if error["type"] == "json_invalid":  # the rest of the place is a position in the text
        return "#"
    return "#" + "".join(f"/{part}" for part in path)


def _validation_problem(
    _handler: ExceptionHandler, _request: Request, error: RequestValidationError
) -> Problem:
    errors = [{"pointer": _pointer(item), "detail": item["msg"]} for item in error.errors()]
    first = f"{errors[0]['pointer']}: {errors[0]['detail']}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return InvalidRequest(first + more, errors=errors)


def _database_problem(_handler: ExceptionHandler, _request: Request, _error: Exception) -> Problem:
    return NotReady(
        "The database cannot be reached. Nothing was stored; try again in a few seconds.",
        headers={"Retry-After": "5"},
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


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of `app` a problem document."""
    handlers: dict[Any, Any] = {
        OperationalError: _database_problem,
        PoolTimeout: _database_problem,
    }
    handler = new_exception_handler(
        handlers=handlers,
        request_validation_handler=_validation_problem,
        documentation_uri_template=PROBLEM_TYPE,
    )
    add_exception_handler(app, handler)
    app.add_exception_handler(OperationalError, handler)
    app.add_exception_handler(PoolTimeout, handler)

    def internal_error(request: Request, error: Exception) -> Any:  # noqa: ANN401
        return handler(request, _internal_problem(handler, request, error))

    app.add_exception_handler(Exception, internal_error)
