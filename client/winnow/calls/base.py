"""What all calls have in common."""

import uuid
from collections.abc import AsyncGenerator
from typing import Any, TypeVar
from urllib.parse import quote

from winnow.connection import Answer, Connection, parse
from winnow.results import Page, Result

Item = TypeVar("Item", bound=Result)


class Calls:
    """Base of the calls; they share one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def _pages(
        self, kind: type[Page[Item]], path: str, params: dict[str, Any]
    ) -> AsyncGenerator[Item, None]:
        """Yield the items of a list, fetching its pages as they are needed."""
        params = given(params)
        while True:
            page = await self._connection.ask(kind, "GET", path, params=params)
            for item in page.data:
                yield item
            if page.next_cursor is None:
                return
            params["cursor"] = page.next_cursor

    async def _post_once(
        self, kind: type[Answer], path: str, body: dict[str, Any] | None = None
    ) -> Answer:
        """Make a call that must not run twice: it is not sent again when its answer is lost."""
        response = await self._connection.retry(
            lambda: self._connection.send("POST", path, json=body), may_run_twice=False
        )
        return parse(kind, response)

    async def _delete(self, path: str) -> None:
        """Remove something; not tried again when the answer is lost, for then it would be 404."""
        await self._connection.retry(
            lambda: self._connection.send("DELETE", path), may_run_twice=False
        )


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given: the service's defaults hold for the others."""
    return {name: value for name, value in options.items() if value is not None}


def once(key: str | None) -> dict[str, str]:
    """Return the header by which the same call, sent twice, acts once."""
    return {"Idempotency-Key": key or str(uuid.uuid4())}


def audit_path(audit_id: str, *rest: str) -> str:
    """Return the path of an audit, or of something under it."""
    return path_of("audits", audit_id, *rest)


def path_of(*parts: str) -> str:
    """Return a path of the API; ids stay inside their part of it."""
    return "/".join(["/v1", *(quote(part, safe="") for part in parts)])


def ranking_parts(ranking_id: str | None) -> tuple[str, ...]:
    """Return the parts of a path that name one of an audit's rankings; none for its own."""
    return () if ranking_id is None else ("rankings", ranking_id)
