"""The calls about experiments."""

from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any

from winnow.calls.base import Calls, once, path_of
from winnow.requests import ExperimentRequest
from winnow.results import Experiment, ExperimentResults, Page
from winnow.waiting import wait_until_done


class ExperimentCalls(Calls):
    """Compare estimators, layer groups and aggregations over tasks and seeds, in one request."""

    async def submit(
        self, request: ExperimentRequest | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> Experiment:
        """Submit an experiment; it is accepted for good, with all its audits, when this returns.

        Args:
            request: what to compare, typed or as the JSON body.
            idempotency_key: the same key answers the same experiment for a day; set by itself for
                one call.
        """
        body = request.body() if isinstance(request, ExperimentRequest) else dict(request)
        headers = once(idempotency_key)
        return await self._connection.ask(
            Experiment, "POST", path_of("experiments"), json=body, headers=headers
        )

    async def get(self, experiment_id: str) -> Experiment:
        """Return an experiment and where it stands."""
        return await self._connection.ask(Experiment, "GET", path_of("experiments", experiment_id))

    def list(self, *, page_size: int = 100) -> AsyncGenerator[Experiment, None]:
        """Yield your experiments, the newest first."""
        return self._pages(Page[Experiment], path_of("experiments"), {"limit": page_size})

    async def wait(
        self,
        experiment_id: str,
        *,
        progress: Callable[[Experiment], None] | None = None,
        poll_seconds: float | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  of the experiment
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
        return await wait_until_done(
            self._connection,
            Experiment,
            path_of("experiments", experiment_id),
            progress=progress,
            poll_seconds=poll_seconds,
            timeout=timeout,
        )

    async def results(self, experiment_id: str) -> ExperimentResults:
        """Return the tables, once every audit has ended; of what there is if some have failed."""
        path = path_of("experiments", experiment_id, "results")
        return await self._connection.ask(ExperimentResults, "GET", path)

    async def download(self, experiment_id: str, path: Path | str) -> Path:
        """Save a line for every configuration and baseline of every audit as CSV."""
        path = Path(path)
        source = path_of("experiments", experiment_id, "results.csv")
        response = await self._connection.call("GET", source)
        path.write_bytes(response.content)
        return path

    async def cancel(self, experiment_id: str) -> Experiment:
        """Ask all its audits that have not ended to stop; they do within seconds."""
        path = path_of("experiments", experiment_id, "cancel")
        return await self._connection.ask(Experiment, "POST", path)

    async def delete(self, experiment_id: str) -> None:
        """Remove an ended experiment with its audits."""
        await self._delete(path_of("experiments", experiment_id))
