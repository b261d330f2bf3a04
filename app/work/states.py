"""Set the state of an audit or a ranking, with its time and the row's version."""

from datetime import UTC, datetime

from sqlalchemy import func

from app.audits.models import Audit, AuditState, Ranking, RankingState


def finish(audit: Audit, state: AuditState) -> None:
    """Set a final state."""
    enter_state(audit, state)
    audit.finished_at = func.now()
    audit.stage = None
    audit.waiting = None
    audit.eta_seconds = None
    audit.samples_per_second = None


def enter_state(audit: Audit, state: AuditState) -> None:
    """Set a state, note when, and raise the row's version (its ETag)."""
    if audit.state != state:
        audit.state = state
        audit.state_times = {**audit.state_times, state.value: datetime.now(UTC).isoformat()}
    audit.version += 1


def enter_ranking_state(ranking: Ranking, state: RankingState) -> None:
    """Set a ranking's state and raise its version; a final state is its end."""
    ranking.state = state
    ranking.version += 1
    if state.is_final:
        ranking.finished_at = func.now()
        ranking.waiting = None
