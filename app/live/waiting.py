"""Long polling: an answer that waits until there is something new."""

from typing import Annotated

from fastapi import Query

from app.conditional import entity_tag, is_unchanged
from app.live.snapshots import Snapshot, Thing
from app.live.watcher import Watcher

Wait = Annotated[
    int | None,
    Query(
        ge=1,
        le=60,
        description="Seconds to wait for news: the answer comes when the ETag differs from "
        "If-None-Match, or without that when something changes or all is done, and after this "
        "time in any case.",
    ),
]


async def wait_for_news(
    watcher: Watcher, thing: Thing, *, seconds: float, if_none_match: str | None
) -> None:
    """Return when a caller who has what If-None-Match names should get an answer."""
    first: Snapshot | None = None

    def is_news(snapshot: Snapshot) -> bool:
        nonlocal first
        first = first or snapshot
        if if_none_match is not None:
            return not is_unchanged(if_none_match, entity_tag(str(snapshot.version)))
        return snapshot.is_final or snapshot.version != first.version

    await watcher.wait(thing, is_news, seconds=seconds)
