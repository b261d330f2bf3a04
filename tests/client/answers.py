"""Answers of the service as they travel, for tests of the client's own behaviour."""

import hashlib
from typing import Any

from starlette.responses import JSONResponse, Response


def audit_json(**changes: Any) -> dict[str, Any]:
    """Return a queued audit's JSON."""
    return {
        "id": "aud_1",
        "state": "queued",
        "done": False,
        "stage": None,
        "progress": 0.0,
        "samples_per_second": None,
        "eta_seconds": None,
        "created_at": "2026-11-24T05:00:00Z",
        "finished_at": None,
        "state_times": {},
        "cancel_requested_at": None,
        "request": {},
        "metadata": {},
        "num_train": None,
        "num_validation": None,
        "provenance": {},
        "timings": {},
        "results": None,
        "error": None,
        "links": {},
        "a_field_of_a_newer_service": 1,
    } | changes


def audit(*, etag: str = '"1"', retry_after: str = "0", **changes: Any) -> Response:
    headers = {"etag": etag, "retry-after": retry_after}
    return JSONResponse(audit_json(**changes), headers=headers)


def problem(status: int, *, retry_after: str | None = None, **members: Any) -> Response:
    headers = {"retry-after": retry_after} if retry_after is not None else {}
    return JSONResponse(
        {"type": "urn:winnow:problem:not-ready", "title": "Not ready", "status": status} | members,
        status_code=status,
        media_type="application/problem+json",
        headers=headers | {"x-request-id": "req_1"},
    )


def file(content: bytes, *, etag_of: bytes | None = None) -> Response:
    """Return a download whose ETag is the hash of its content, or of other bytes."""
    sha256 = hashlib.sha256(content if etag_of is None else etag_of).hexdigest()
    return Response(content, headers={"etag": f'"{sha256}"'})
