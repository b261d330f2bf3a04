"""Pages by key: an opaque cursor says where the last page ended."""

import base64
import binascii
from typing import Annotated, Generic, TypeVar

from fastapi import Query, Request, Response
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from app.errors import InvalidRequest

Item = TypeVar("Item")
Key = TypeVar("Key", int, str)

Limit = Annotated[int, Query(ge=1, le=1000, description="Most items on the page.")]
Cursor = Annotated[
    str | None, Query(max_length=200, description="`next_cursor` of the page before.")
]


class Page(BaseModel, Generic[Item]):
    """One page of a list."""

    data: list[Item]
    next_cursor: str | None = Field(description="Pass as `cursor` for the next page.")
    has_more: bool


def encode_cursor(key: int | str) -> str:
    """Return the cursor that stands behind `key`."""
    return base64.urlsafe_b64encode(TypeAdapter(int | str).dump_json(key)).decode().rstrip("=")


def decode_cursor(cursor: str, key_type: type[Key]) -> Key:
    """Return the key of a cursor.

    Raises:
        InvalidRequest: this server made no such cursor.
    """
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        return TypeAdapter(key_type).validate_json(raw, strict=True)
    except (binascii.Error, ValidationError, ValueError) as error:
        raise InvalidRequest.at(
            "query.cursor", "Not a cursor of this list: pass `next_cursor` as it came, or nothing."
        ) from error


def cut_page(rows: list[Item], limit: int) -> tuple[list[Item], bool]:
    """Return the page and whether more follow, from rows that were read one beyond the limit."""
    return rows[:limit], len(rows) > limit


def link_next(request: Request, response: Response, next_cursor: str | None) -> None:
    """Set the Link header of a page (RFC 8288), as a reference relative to this server."""
    if next_cursor is not None:
        url = request.url.include_query_params(cursor=next_cursor)
        response.headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
