"""Conditional requests: entity tags and If-None-Match (RFC 9110, section 13)."""

from typing import Annotated

from fastapi import Header

IfNoneMatch = Annotated[
    str | None,
    Header(max_length=2000, description="ETags that the caller has; one of them is answered 304."),
]


def entity_tag(value: str) -> str:
    """Return a strong entity tag."""
    return f'"{value}"'


def is_unchanged(if_none_match: str | None, etag: str) -> bool:
    """Return whether the caller has the answer already."""
    if if_none_match is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or "*" in tags
