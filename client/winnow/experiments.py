"""The calls about experiments."""

import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from winnow.connection import Connection, parse
from winnow.requests import ExperimentRequest
from winnow.results import Experiment, ExperimentPage, ExperimentResults
from winnow.waiting import wait_until_done


class Experiments:
    """Compare estimators, layer groups and aggregations over tasks and seeds, in one request."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def submit(
        self, request: ExperimentRequest | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> Experiment:
        """Submit an experiment; it is accepted for good, with all its audits, when this returns.

        Args:
            request: what to compare, typed or as the JSON body.
            idempotency_key: the same key answers the same experiment for a day; set by itself for
                one call.
        """
        body = request.body() if isinstance(request, ExperimentRequest) else dict(request)
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        response = self._connection.call("POST", "/v1/experiments", json=body, headers=headers)
        return parse(Experiment, response)

    def get(self, experiment_id: str) -> Experiment:
        """Return an experiment and where it stands."""
        return parse(Experiment, self._connection.call("GET", _path(experiment_id)))

    def list(self, *, page_size: int = 100) -> Iterator[Experiment]:
        """Yield your experiments, the newest first."""
        params: dict[str, Any] = {"limit": page_size}
        while True:
            response = self._connection.call("GET", "/v1/experiments", params=params)
            page = parse(ExperimentPage, response)
            yield from page.data
            if page.next_cursor is None:
                return
            params["cursor"] = page.next_cursor

    def wait(
        self,
        experiment_id: str,
        *,
        progress: Callable[[Experiment], None] | None = None,
        poll_seconds: float | None = None,
        timeout: float | None = None,
    ) -> Experiment:
        """Return an experiment when all its audits have ended: look at its `state`.

        Args:
            experiment_id: the experiment.
            progress: called with it at first and whenever it has changed.
            poll_seconds: pause between two looks; as long as the service asks for by default.
            timeout: seconds after which to give up waiting; never by default.

        Raises:
            NotDoneInTime: the timeout passed; the experiment goes on.
        """
        return wait_until_done(
            self._connection,
            Experiment,
            _path(experiment_id),
            progress=progress,
            poll_seconds=poll_seconds,
            timeout=timeout,
        )

    def results(self, experiment_id: str) -> ExperimentResults:
        """Return the tables, once every audit has ended; of what there is if some have failed."""
        return parse(
            ExperimentResults, self._connection.call("GET", _path(experiment_id, "results"))
        )

    def download(self, experiment_id: str, path: Path | str) -> Path:
        """Save a line for every configuration and baseline of every audit as CSV."""
        path = Path(path)
        response = self._connection.call("GET", _path(experiment_id, "results.csv"))
        path.write_bytes(response.content)
        return path

    def cancel(self, experiment_id: str) -> Experiment:
        """Ask all its audits that have not ended to stop; they do within seconds."""
        return parse(Experiment, self._connection.call("POST", _path(experiment_id, "cancel")))

    def delete(self, experiment_id: str) -> None:
        """Remove an ended experiment with its audits."""
        self._connection.call("DELETE", _path(experiment_id))


def _path(experiment_id: str, *rest: str) -> str:
    return "/".join(["/v1/experiments", quote(experiment_id, safe=""), *rest])
