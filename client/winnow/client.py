"""The clients of the service's HTTP API: Client, and AsyncClient with the same methods.

Every call is written once, in `winnow.calls`, as AsyncClient's; Client runs them without an event
loop (see `winnow.transport`).
"""

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from winnow.calls.audits import AuditCalls
from winnow.calls.catalogue import CatalogueCalls
from winnow.calls.datasets import DatasetCalls
from winnow.calls.decisions import DecisionCalls
from winnow.calls.experiments import ExperimentCalls
from winnow.calls.suspects import SuspectCalls
from winnow.calls.trail import TrailCalls
from winnow.calls.webhooks import WebhookCalls
from winnow.connection import Connection
from winnow.tables import TableKind
from winnow.transport import blocking, iterating, run

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import pyarrow as pa


class AsyncClient(
    AuditCalls,
    SuspectCalls,
    DecisionCalls,
    DatasetCalls,
    TrailCalls,
    CatalogueCalls,
    AbstractAsyncContextManager["AsyncClient"],
):
    """Talks to one Winnow service, under asyncio.

    Every call raises WinnowError when the service refuses it, and ServiceUnreachable when no
    answer comes. Calls are tried again, with growing pauses, when the connection breaks or the
    service asks for up to a minute's patience (429, 503); none of them can act twice. Files are
    read and written without leaving the event loop.

    Args:
        base_url: where the service is, such as http://127.0.0.1:8000.
        api_key: a key of `winnow keys create`, where the service asks for one.
        timeout: seconds without a byte after which a try is given up.
        attempts: tries of one call, the first included.

    Attributes:
        experiments: comparisons over tasks and seeds.
        webhooks: addresses that are told when something ends.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        attempts: int = 8,
    ) -> None:
        self._connect(base_url, api_key, timeout=timeout, attempts=attempts, is_blocking=False)

    def _connect(self, base_url: str, api_key: str | None, **options: Any) -> None:
        super().__init__(Connection(base_url, api_key=api_key, **options))
        self.experiments = ExperimentCalls(self._connection)
        self.webhooks = WebhookCalls(self._connection)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()


class _CallsAtOnce(AsyncClient):
    """The same calls, each of which is over when it first returns."""

    def __init__(self, base_url: str, api_key: str | None, **options: Any) -> None:
        self._connect(base_url, api_key, is_blocking=True, **options)


class Client(AbstractContextManager["Client"]):
    """Talks to one Winnow service.

    Every call raises WinnowError when the service refuses it, and ServiceUnreachable when no
    answer comes. Calls are tried again, with growing pauses, when the connection breaks or the
    service asks for up to a minute's patience (429, 503); none of them can act twice.

    Args:
        base_url: where the service is, such as http://127.0.0.1:8000.
        api_key: a key of `winnow keys create`, where the service asks for one.
        timeout: seconds without a byte after which a try is given up.
        attempts: tries of one call, the first included.

    Attributes:
        experiments: comparisons over tasks and seeds.
        webhooks: addresses that are told when something ends.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        attempts: int = 8,
    ) -> None:
        self.calls = _CallsAtOnce(base_url, api_key, timeout=timeout, attempts=attempts)
        self.experiments = Experiments(self.calls.experiments)
        self.webhooks = Webhooks(self.calls.webhooks)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    close = blocking(AsyncClient.close)

    upload_dataset = blocking(AsyncClient.upload_dataset)
    dataset = blocking(AsyncClient.dataset)
    datasets = iterating(AsyncClient.datasets)
    delete_dataset = blocking(AsyncClient.delete_dataset)

    submit = blocking(AsyncClient.submit)
    get = blocking(AsyncClient.get)
    audits = iterating(AsyncClient.audits)
    wait = blocking(AsyncClient.wait)
    events = iterating(AsyncClient.events)
    cancel = blocking(AsyncClient.cancel)
    delete = blocking(AsyncClient.delete)

    rank = blocking(AsyncClient.rank)
    rankings = iterating(AsyncClient.rankings)
    ranking = blocking(AsyncClient.ranking)
    wait_for_ranking = blocking(AsyncClient.wait_for_ranking)
    delete_ranking = blocking(AsyncClient.delete_ranking)
    layers = blocking(AsyncClient.layers)

    suspects = iterating(AsyncClient.suspects)
    suspects_summary = blocking(AsyncClient.suspects_summary)
    sample = blocking(AsyncClient.sample)
    download = blocking(AsyncClient.download)

    decide = blocking(AsyncClient.decide)
    preview = blocking(AsyncClient.preview)
    decisions = iterating(AsyncClient.decisions)
    undo = blocking(AsyncClient.undo)
    precision = blocking(AsyncClient.precision)
    export = blocking(AsyncClient.export)
    patch = blocking(AsyncClient.patch)

    trail = iterating(AsyncClient.trail)

    estimators = blocking(AsyncClient.estimators)
    aggregations = blocking(AsyncClient.aggregations)
    alive = blocking(AsyncClient.alive)
    readiness = blocking(AsyncClient.readiness)

    @overload
    def suspects_table(
        self,
        audit_id: str,
        kind: Literal["pandas"] = "pandas",
        *,
        flagged: bool | None = None,
        ranking_id: str | None = None,
    ) -> "pd.DataFrame": ...

    @overload
    def suspects_table(
        self,
        audit_id: str,
        kind: Literal["polars"],
        *,
        flagged: bool | None = None,
        ranking_id: str | None = None,
    ) -> "pl.DataFrame": ...

    @overload
    def suspects_table(
        self,
        audit_id: str,
        kind: Literal["arrow"],
        *,
        flagged: bool | None = None,
        ranking_id: str | None = None,
    ) -> "pa.Table": ...

    def suspects_table(
        self,
        audit_id: str,
        kind: TableKind = "pandas",
        *,
        flagged: bool | None = None,
        ranking_id: str | None = None,
    ) -> Any:
        """Return the whole ranking as a table, the most suspect first, with typed columns.

        Args:
            audit_id: the audit.
            kind: pandas, polars or arrow: a DataFrame of the one or the other, or a pyarrow.Table.
                Each is an extra of this package: `pip install 'winnow-client[polars]'`.
            flagged: only those that are flagged, or only the others.
            ranking_id: one of the audit's rankings; its own by default.

        Raises:
            MissingExtra: the library is not installed.
        """
        table = self.calls.suspects_table  # by hand, for `blocking` would drop the overloads
        return run(table(audit_id, kind, flagged=flagged, ranking_id=ranking_id))


class Experiments:
    """Compare estimators, layer groups and aggregations over tasks and seeds, in one request."""

    def __init__(self, calls: ExperimentCalls) -> None:
        self.calls = calls

    submit = blocking(ExperimentCalls.submit)
    get = blocking(ExperimentCalls.get)
    list = iterating(ExperimentCalls.list)
    wait = blocking(ExperimentCalls.wait)
    results = blocking(ExperimentCalls.results)
    download = blocking(ExperimentCalls.download)
    cancel = blocking(ExperimentCalls.cancel)
    delete = blocking(ExperimentCalls.delete)


class Webhooks:
    """Be told when audits, rankings and experiments end; messages follow Standard Webhooks."""

    def __init__(self, calls: WebhookCalls) -> None:
        self.calls = calls

    create = blocking(WebhookCalls.create)
    list = iterating(WebhookCalls.list)
    get = blocking(WebhookCalls.get)
    delete = blocking(WebhookCalls.delete)
    rotate = blocking(WebhookCalls.rotate)
    test = blocking(WebhookCalls.test)
    deliveries = iterating(WebhookCalls.deliveries)
    redeliver = blocking(WebhookCalls.redeliver)
