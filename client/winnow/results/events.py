"""What is told of an audit while it runs."""

from winnow.results.base import Result


class Progress(Result):
    """The event `progress`: where an audit stands. Its fields are those of the audit itself.

    `version` is None where the service was polled.
    """

    id: str
    state: str
    done: bool
    stage: str | None = None
    progress: float
    waiting: str | None = None
    samples_per_second: float | None = None
    eta_seconds: float | None = None
    version: int | None = None


class Done(Progress):
    """The last event, `done`: the audit has ended, whichever way."""

    links: dict[str, str]
