"""The calls about who did what."""

from collections.abc import AsyncGenerator

from winnow.calls.base import Calls, path_of
from winnow.results import Page, TrailEntry


class TrailCalls(Calls):
    """Who changed what, and when."""

    def trail(
        self,
        *,
        action: str | None = None,
        object_id: str | None = None,
        key_id: str | None = None,
        page_size: int = 100,
    ) -> AsyncGenerator[TrailEntry, None]:
        """Yield the changes that were made, the newest first.

        Args:
            action: only this, such as audit.submit.
            object_id: only what was done to this.
            key_id: only what this key did.
            page_size: how many to fetch at once.
        """
        narrowed = {"action": action, "object_id": object_id, "key_id": key_id}
        return self._pages(Page[TrailEntry], path_of("trail"), {**narrowed, "limit": page_size})
