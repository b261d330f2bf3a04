"""What can go wrong, as the service said it."""

from collections.abc import Sequence

import httpx2
from pydantic import BaseModel, ValidationError


class ErrorItem(BaseModel):
    """One thing that is wrong with a request, and where."""

    pointer: str
    """A JSON pointer into the body (`#/train/reference`), or the name of a parameter."""
    detail: str


class WinnowError(Exception):
    """A call that the service refused or could not answer.

    Attributes:
        title: what kind of error it is, in a few words.
        detail: what happened this time and what to change.
        errors: the fields concerned, where it is about fields.
        status: the HTTP status, None when no answer came.
        type: the problem's stable type, `urn:winnow:problem:…`; docs/errors.md lists them.
        request_id: names the call in the service's log.
        retry_after: seconds after which the service says to try again.
    """

    def __init__(
        self,
        title: str,
        *,
        detail: str | None = None,
        errors: Sequence[ErrorItem] = (),
        status: int | None = None,
        type: str | None = None,  # noqa: A002  the problem document's own word
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{title}: {detail}" if detail else title)
        self.title = title
        self.detail = detail
        self.errors = tuple(errors)
        self.status = status
        self.type = type
        self.request_id = request_id
        self.retry_after = retry_after


class KeyExpiresSoon(UserWarning):
    """The API key will open the service no more than two weeks from now."""


class ServiceUnreachable(WinnowError):
    """No answer came, however often it was tried."""


class NotDoneInTime(WinnowError):
    """The audit still ran when the caller's patience ended; it goes on."""


class DownloadDamaged(WinnowError):
    """The bytes that came are not the file that the service meant to send."""


class _ProblemDocument(BaseModel):
    """RFC 9457, as far as it is read here."""

    title: str
    detail: str | None = None
    type: str | None = None
    errors: list[ErrorItem] = []


def error_of(response: httpx2.Response) -> WinnowError:
    """Return the error that an answer stands for; its body must have been read."""
    request_id = response.headers.get("x-request-id")
    retry_after = seconds_of(response.headers.get("retry-after"))
    try:
        problem = _ProblemDocument.model_validate_json(response.content)
    except ValidationError:  # a proxy's page, or not this service at all
        return WinnowError(
            f"HTTP {response.status_code} {response.reason_phrase}",
            detail=f"{response.request.url} did not answer as a Winnow service would.",
            status=response.status_code,
            request_id=request_id,
            retry_after=retry_after,
        )
    return WinnowError(
        problem.title,
        detail=problem.detail,
        errors=problem.errors,
        status=response.status_code,
        type=problem.type,
        request_id=request_id,
        retry_after=retry_after,
    )


def seconds_of(retry_after: str | None) -> float | None:
    """Return the seconds of a Retry-After header; None for none, or for a date."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


class MissingExtra(ImportError):
    """A library that this call needs is not installed; the message says how to install it."""

    def __init__(self, library: str, *, extra: str) -> None:
        super().__init__(
            f"This needs {library}, which is not installed: pip install 'winnow-client[{extra}]'"
        )
