"""What is told of a thing that runs: the data of events."""

from pydantic import BaseModel, Field

from app.audits.answers import Waiting, WaitingField
from app.audits.models import AuditState, RankingState
from app.experiments.models import ExperimentState
from app.work.models import Stage


class Progress(BaseModel):
    """The data of an event `progress`: where an audit, a ranking or an experiment stands."""

    id: str
    state: AuditState | RankingState | ExperimentState
    done: bool
    stage: Stage | None = Field(None, description="Of an audit that runs.")
    progress: float = Field(ge=0, le=1, description="It never goes back.")
    waiting: Waiting = WaitingField
    samples_per_second: float | None = Field(None, description="Of an audit, over all workers.")
    eta_seconds: float | None = Field(None, description="Of an audit: seconds of work left.")
    version: int = Field(description="The event's id, and the ETag of the thing itself.")


class Done(Progress):
    """The data of the last event, `done`."""

    links: dict[str, str] = Field(description="The paths that make sense now.")


EventData = Progress | Done
"""What OpenAPI says of the events."""
