"""Where an experiment stands, as its audits tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from app.audits.models import AuditState
from app.experiments.models import ExperimentState


class AuditStanding(Protocol):
    """What counts of an audit: a row of it, whole or in part."""

    @property
    def state(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def progress(self) -> float: ...


@dataclass(frozen=True)
class Standing:
    """An experiment's state, from all its audits.

    Attributes:
        experiment_id: whose.
        audits: all of them.
    """

    experiment_id: str
    audits: Sequence[AuditStanding]

    @property
    def state(self) -> ExperimentState:
        """Running until every audit has ended; then cancelled or failed if one was."""
        states = {AuditState(audit.state) for audit in self.audits}
        if not all(state.is_final for state in states):
            return ExperimentState.RUNNING
        for state in (AuditState.CANCELLED, AuditState.FAILED):
            if state in states:
                return ExperimentState(state.value)
        return ExperimentState.SUCCEEDED

    @property
    def version(self) -> int:
        """A number that rises whenever something changes."""
        return sum(audit.version for audit in self.audits)

    @property
    def num_ended(self) -> int:
        """How many audits have ended."""
        return sum(AuditState(audit.state).is_final for audit in self.audits)

    @property
    def progress(self) -> float:
        """Mean over the audits, 0 to 1; one that has ended is all done, however it ended."""
        shares = (
            1.0 if AuditState(audit.state).is_final else audit.progress for audit in self.audits
        )
        return sum(shares) / len(self.audits)

    @property
    def links(self) -> dict[str, str]:
        """The paths that make sense now."""
        links = {"self": experiment_path(self.experiment_id)}
        if not self.state.is_final:
            links["cancel"] = experiment_path(self.experiment_id, "cancel")
            links["events"] = experiment_path(self.experiment_id, "events")
        elif any(audit.state == AuditState.SUCCEEDED for audit in self.audits):
            links["results"] = experiment_path(self.experiment_id, "results")
            links["results_csv"] = experiment_path(self.experiment_id, "results.csv")
        return links


def experiment_path(experiment_id: str, *rest: str) -> str:
    """Return the path of an experiment, or of a part of it."""
    return "/".join(("/v1/experiments", experiment_id, *rest))
