"""The client of the service's HTTP API."""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, get_args
from urllib.parse import quote

import httpx2

from winnow import download
from winnow.connection import Connection, parse
from winnow.experiments import Experiments
from winnow.requests import AuditRequest, Columns, RankingRequest
from winnow.results import (
    Aggregation,
    Audit,
    Dataset,
    Estimator,
    FileFormat,
    LayerTable,
    Ranking,
    RankingPage,
    SampleDetail,
    Suspect,
    SuspectPage,
)
from winnow.waiting import wait_until_done

UPLOAD_TIMEOUT_SECONDS = 600.0  # the service checks every row before it answers


class Client(AbstractContextManager["Client"]):
    """Talks to one Winnow service.

    Every call raises WinnowError when the service refuses it, and ServiceUnreachable when no
    answer comes. Calls are tried again, with growing pauses, when the connection breaks or the
    service asks for patience (429, 503); none of them can act twice.

    Args:
        base_url: where the service is, such as http://127.0.0.1:8000.
        api_key: a key of `winnow keys create`, where the service asks for one.
        timeout: seconds without a byte after which a try is given up.
        attempts: tries of one call, the first included.

    Attributes:
        experiments: comparisons over tasks and seeds.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        attempts: int = 8,
    ) -> None:
        self._connection = Connection(base_url, api_key=api_key, timeout=timeout, attempts=attempts)
        self.experiments = Experiments(self._connection)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def upload_dataset(
        self,
        data: Path | str | bytes,
        *,
        columns: Columns | None = None,
        name: str | None = None,
        file_format: FileFormat | None = None,
    ) -> Dataset:
        """Upload a table; the service checks it row by row.

        Args:
            data: the path of a Parquet, JSONL or CSV file, or its bytes.
            columns: which columns hold what; the service tells by the header by default: text
                and label, else prompt and completion, else messages.
            name: what to call it; the file's own name by default.
            file_format: parquet, jsonl or csv; the service tells by itself by default.
        """
        filename = "dataset" if isinstance(data, bytes) else Path(data).name
        names = (columns or Columns()).body()
        fields = {f"{field}_column": column for field, column in names.items()}
        options = {"name": name, "format": file_format}
        fields |= {option: value for option, value in options.items() if value is not None}

        def upload() -> httpx2.Response:
            def send(content: Any) -> httpx2.Response:  # noqa: ANN401  bytes or an open file
                return self._connection.send(
                    "POST",
                    "/v1/datasets",
                    files={"file": (filename, content, "application/octet-stream")},
                    data=fields,
                    timeout=UPLOAD_TIMEOUT_SECONDS,
                )

            if isinstance(data, bytes):
                return send(data)
            with Path(data).open("rb") as file:
                return send(file)

        return parse(Dataset, self._connection.retry(upload, may_run_twice=False))

    def submit(
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
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return parse(Audit, self._connection.call("POST", "/v1/audits", json=body, headers=headers))

    def get(self, audit_id: str) -> Audit:
        """Return an audit and where it stands."""
        return parse(Audit, self._connection.call("GET", _path(audit_id)))

    def wait(
        self,
        audit_id: str,
        *,
        progress: Callable[[Audit], None] | None = None,
        poll_seconds: float | None = None,
        timeout: float | None = None,
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
        return wait_until_done(
            self._connection,
            Audit,
            _path(audit_id),
            progress=progress,
            poll_seconds=poll_seconds,
            timeout=timeout,
        )

    def cancel(self, audit_id: str) -> Audit:
        """Ask an audit to stop; it ends within seconds, as `wait` will show."""
        return parse(Audit, self._connection.call("POST", _path(audit_id, "cancel")))

    def rank(
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
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        path = _path(audit_id, "rankings")
        return parse(Ranking, self._connection.call("POST", path, json=body, headers=headers))

    def rankings(self, audit_id: str, *, page_size: int = 100) -> Iterator[Ranking]:
        """Yield an audit's rankings: its own first, then the others as they were asked for."""
        params: dict[str, Any] = {"limit": page_size}
        while True:
            path = _path(audit_id, "rankings")
            page = parse(RankingPage, self._connection.call("GET", path, params=params))
            yield from page.data
            if page.next_cursor is None:
                return
            params["cursor"] = page.next_cursor

    def ranking(self, audit_id: str, ranking_id: str) -> Ranking:
        """Return a ranking and where it stands."""
        path = _path(audit_id, *_ranking(ranking_id))
        return parse(Ranking, self._connection.call("GET", path))

    def wait_for_ranking(
        self,
        audit_id: str,
        ranking_id: str,
        *,
        poll_seconds: float | None = None,
        timeout: float | None = None,
    ) -> Ranking:
        """Return a ranking when it is done, whichever way it ended: look at its `state`.

        Raises:
            NotDoneInTime: the timeout passed; the ranking goes on.
        """
        return wait_until_done(
            self._connection,
            Ranking,
            _path(audit_id, *_ranking(ranking_id)),
            poll_seconds=poll_seconds,
            timeout=timeout,
        )

    def delete_ranking(self, audit_id: str, ranking_id: str) -> None:
        """Remove a ranking with its files; the audit's own goes with the audit only."""
        path = _path(audit_id, *_ranking(ranking_id))
        self._connection.retry(lambda: self._connection.send("DELETE", path), may_run_twice=False)

    def suspects(
        self,
        audit_id: str,
        *,
        ranking_id: str | None = None,
        flagged: bool | None = None,
        label: str | None = None,
        min_score: float | None = None,
        max_score: float | None = None,
        page_size: int = 500,
    ) -> Iterator[Suspect]:
        """Yield the training samples of a finished audit, the most suspect first.

        Pages are fetched as they are needed.

        Args:
            audit_id: the audit.
            ranking_id: one of its rankings; its own by default.
            flagged: only those that are flagged, or only the others.
            label: only those given this label.
            min_score: only scores from here on.
            max_score: only scores up to here.
            page_size: samples in one call, up to 1,000.
        """
        filters = {
            "flagged": flagged,
            "label": label,
            "min_score": min_score,
            "max_score": max_score,
            "limit": page_size,
        }
        params = {name: value for name, value in filters.items() if value is not None}
        while True:
            path = _path(audit_id, *_ranking(ranking_id), "suspects")
            response = self._connection.call("GET", path, params=params)
            page = parse(SuspectPage, response)
            yield from page.data
            if page.next_cursor is None:
                return
            params["cursor"] = page.next_cursor

    def sample(self, audit_id: str, index: int, *, ranking_id: str | None = None) -> SampleDetail:
        """Return one training sample, by its row in the training file, with the evidence.

        Its score, rank and layers are those of the audit's own ranking, or of another one.
        """
        path = _path(audit_id, *_ranking(ranking_id), "samples", str(index))
        return parse(SampleDetail, self._connection.call("GET", path))

    def layers(self, audit_id: str, *, ranking_id: str | None = None) -> LayerTable:
        """Return every configuration that was computed, and how well each found known noise.

        Of another ranking than the audit's own: its estimator and aggregation on every layer group.
        """
        path = _path(audit_id, *_ranking(ranking_id), "layers")
        return parse(LayerTable, self._connection.call("GET", path))

    def download(
        self,
        audit_id: str,
        path: Path | str,
        *,
        file_format: FileFormat | None = None,
        ranking_id: str | None = None,
    ) -> Path:
        """Save the whole ranking as one file, checked against its SHA-256.

        Args:
            audit_id: the audit.
            path: where to; it appears there only when it is complete.
            file_format: parquet, csv or jsonl; by default the path's ending says which.
            ranking_id: one of the audit's rankings; its own by default.

        Raises:
            DownloadDamaged: other bytes came than the service meant to send.
            ValueError: the ending says no format, and neither does `file_format`.
        """
        path = Path(path)
        ending = file_format or path.suffix.removeprefix(".")
        if ending not in get_args(FileFormat):
            raise ValueError(
                f"{path.name!r} does not say a format: end it in .parquet, .csv or .jsonl, "
                "or pass file_format"
            )

        def save() -> None:
            source = _path(audit_id, *_ranking(ranking_id), f"suspects.{ending}")
            with self._connection.stream(source) as response:
                download.save(response, path)

        self._connection.retry(save)
        return path

    def estimators(self) -> list[Estimator]:
        """Return the estimators that the service offers."""
        return parse(list[Estimator], self._connection.call("GET", "/v1/estimators"))

    def aggregations(self) -> list[Aggregation]:
        """Return the aggregations that the service offers."""
        return parse(list[Aggregation], self._connection.call("GET", "/v1/aggregations"))


def _path(audit_id: str, *rest: str) -> str:
    return "/".join(["/v1/audits", *(quote(part, safe="") for part in (audit_id, *rest))])


def _ranking(ranking_id: str | None) -> tuple[str, ...]:
    return () if ranking_id is None else ("rankings", ranking_id)
