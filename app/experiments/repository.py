"""Queries on experiments; the tenant is in every one."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session, defer

from app.audits.models import Audit
from app.experiments.models import Experiment


def find_experiment(
    session: Session, tenant: str, experiment_id: str, *, lock: bool = False
) -> Experiment | None:
    """Return a tenant's experiment."""
    statement = select(Experiment).where(
        Experiment.id == experiment_id, Experiment.tenant == tenant
    )
    return session.scalars(statement.with_for_update() if lock else statement).one_or_none()


def list_experiments(
    session: Session, tenant: str, *, limit: int, before_id: str | None = None
) -> list[Experiment]:
    """Return a tenant's experiments, the newest first, one more than `limit` if there are more."""
    statement = select(Experiment).where(Experiment.tenant == tenant)
    if before_id is not None:
        statement = statement.where(Experiment.id < before_id)
    return list(session.scalars(statement.order_by(Experiment.id.desc()).limit(limit + 1)))


def audits_of(
    session: Session,
    experiment_ids: Sequence[str],
    *,
    with_summaries: bool = False,
    lock: bool = False,
) -> dict[str, list[Audit]]:
    """Return the audits of experiments, by experiment and in their order.

    Args:
        session: the transaction.
        experiment_ids: of experiments that the caller may see.
        with_summaries: read what they found too, which is long.
        lock: hold the rows until the transaction ends.
    """
    statement = select(Audit).where(Audit.experiment_id.in_(experiment_ids))
    if not with_summaries:
        statement = statement.options(defer(Audit.summary), defer(Audit.request))
    if lock:
        statement = statement.order_by(Audit.id).with_for_update()
    audits: dict[str, list[Audit]] = {experiment_id: [] for experiment_id in experiment_ids}
    for audit in session.scalars(statement):
        audits[audit.experiment_id or ""].append(audit)
    for members in audits.values():
        members.sort(key=lambda audit: audit.experiment_position or 0)
    return audits
