"""The calls about audits and their rankings."""

from collections.abc import AsyncGenerator, Callable, Mapping
from datetime import datetime
from typing import Any

from winnow.calls.base import Calls, audit_path, once, path_of, ranking_parts
from winnow.events import follow
from winnow.requests import AuditRequest, RankingRequest
from winnow.results import Audit, LayerTable, Page, Progress, Ranking
from winnow.waiting import wait_until_done


class AuditCalls(Calls):
    """Submit audits, follow, list, cancel and remove them; rank again."""

    async def submit(
        self, request: AuditRequest | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> Audit:
        """Submit an audit; it is accepted for good when this returns.

        Args:
            request: what to audit and how, typed or as the JSON body.
            idempotency_key: the same key answers the same audit for a day. Set by itself for one
                call, so that a lost answer never submits twice; pass your own to make the same
                promise over restarts of your program.
        """
        body = request.body() if isinstance(request, AuditRequest) else dict(request)
        headers = once(idempotency_key)
        return await self._connection.ask(
            Audit, "POST", path_of("audits"), json=body, headers=headers
        )

    async def get(self, audit_id: str) -> Audit:
        """Return an audit and where it stands."""
        return await self._connection.ask(Audit, "GET", audit_path(audit_id))

    def audits(
        self,
        *,
        state: str | None = None,
        model: str | None = None,
        dataset: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        page_size: int = 100,
    ) -> AsyncGenerator[Audit, None]:
        """Yield your audits, the newest first.

        Args:
            state: only those in this state.
            model: only those of this reference to a model.
            dataset: only those of this reference to a training set.
            created_after: only from this time on; with a time zone.
            created_before: only before this time; with a time zone.
            page_size: audits in one call, up to 1,000.
        """
        params = {
            "state": state,
            "model": model,
            "dataset": dataset,
            "created_after": created_after and created_after.isoformat(),
            "created_before": created_before and created_before.isoformat(),
            "limit": page_size,
        }
        return self._pages(Page[Audit], path_of("audits"), params)

    async def wait(
        self,
        audit_id: str,
        *,
        progress: Callable[[Audit], None] | None = None,
        poll_seconds: float | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  of the audit
    ) -> Audit:
        """Return an audit when it is done, whichever way it ended: look at its `state`.

        Args:
            audit_id: the audit.
            progress: called with the audit at first and whenever it has changed.
            poll_seconds: pause between two looks; as long as the service asks for by default.
            timeout: seconds after which to give up waiting; never by default.

        Raises:
            NotDoneInTime: the timeout passed; the audit goes on.
        """
        return await wait_until_done(
            self._connection,
            Audit,
            audit_path(audit_id),
            progress=progress,
            poll_seconds=poll_seconds,
            timeout=timeout,
        )

    def events(self, audit_id: str) -> AsyncGenerator[Progress, None]:
        """Yield an audit's progress as the service sends it, the event `done` last.

        A connection that breaks is taken up again after the last event that came. A service that
        sends no events is polled instead.
        """
        return follow(self._connection, audit_path(audit_id))

    async def cancel(self, audit_id: str) -> Audit:
        """Ask an audit to stop; it ends within seconds, as `wait` will show."""
        return await self._connection.ask(Audit, "POST", audit_path(audit_id, "cancel"))

    async def delete(self, audit_id: str) -> None:
        """Remove an ended audit with its rankings and files."""
        await self._delete(audit_path(audit_id))

    async def rank(
        self,
        audit_id: str,
        request: RankingRequest | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
    ) -> Ranking:
        """Ask for another ranking of a finished audit; `wait_for_ranking` returns its results.

        Args:
            audit_id: the audit.
            request: which influence ranks, typed or as the JSON body.
            idempotency_key: the same key answers the same ranking for a day; set by itself for one
                call.
        """
        body = request.body() if isinstance(request, RankingRequest) else dict(request)
        path = audit_path(audit_id, "rankings")
        return await self._connection.ask(
            Ranking, "POST", path, json=body, headers=once(idempotency_key)
        )

    def rankings(self, audit_id: str, *, page_size: int = 100) -> AsyncGenerator[Ranking, None]:
        """Yield an audit's rankings: its own first, then the others as they were asked for."""
        return self._pages(Page[Ranking], audit_path(audit_id, "rankings"), {"limit": page_size})

    async def ranking(self, audit_id: str, ranking_id: str) -> Ranking:
        """Return a ranking and where it stands."""
        path = audit_path(audit_id, *ranking_parts(ranking_id))
        return await self._connection.ask(Ranking, "GET", path)

    async def wait_for_ranking(
        self,
        audit_id: str,
        ranking_id: str,
        *,
        progress: Callable[[Ranking], None] | None = None,
        poll_seconds: float | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  of the ranking
    ) -> Ranking:
        """Return a ranking when it is done, whichever way it ended: look at its `state`.

        Args:
            audit_id: the audit.
            ranking_id: the ranking.
            progress: called with the ranking at first and whenever it has changed.
            poll_seconds: pause between two looks; as long as the service asks for by default.
            timeout: seconds after which to give up waiting; never by default.

        Raises:
            NotDoneInTime: the timeout passed; the ranking goes on.
        """
        return await wait_until_done(
            self._connection,
            Ranking,
            audit_path(audit_id, *ranking_parts(ranking_id)),
            progress=progress,
            poll_seconds=poll_seconds,
            timeout=timeout,
        )

    async def delete_ranking(self, audit_id: str, ranking_id: str) -> None:
        """Remove a ranking with its files; the audit's own goes with the audit only."""
        await self._delete(audit_path(audit_id, *ranking_parts(ranking_id)))

    async def layers(self, audit_id: str, *, ranking_id: str | None = None) -> LayerTable:
        """Return every configuration that was computed, and how well each found known noise.

        Of another ranking than the audit's own: its estimator and aggregation on every layer group.
        """
        path = audit_path(audit_id, *ranking_parts(ranking_id), "layers")
        return await self._connection.ask(LayerTable, "GET", path)
