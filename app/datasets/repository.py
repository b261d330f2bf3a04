"""Queries on datasets; the tenant is in every one."""

from collections.abc import Collection

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.datasets.models import Dataset


def find_dataset(
    session: Session, tenant: str, dataset_id: str, *, lock: bool = False
) -> Dataset | None:
    """Return a tenant's dataset."""
    statement = select(Dataset).where(Dataset.id == dataset_id, Dataset.tenant == tenant)
    return session.scalars(statement.with_for_update() if lock else statement).one_or_none()


def list_datasets(
    session: Session,
    tenant: str,
    *,
    limit: int,
    before_id: str | None = None,
    sha256: str | None = None,
) -> list[Dataset]:
    """Return a tenant's datasets, the newest first, one more than `limit` when there are more."""
    statement = select(Dataset).where(Dataset.tenant == tenant)
    if sha256 is not None:
        statement = statement.where(Dataset.sha256 == sha256)
    if before_id is not None:
        statement = statement.where(Dataset.id < before_id)
    return list(session.scalars(statement.order_by(Dataset.id.desc()).limit(limit + 1)))


def keep_datasets(session: Session, tenant: str, dataset_ids: Collection[str]) -> set[str]:
    """Hold datasets against deletion until the transaction ends; return those that exist."""
    statement = (
        select(Dataset.id)
        .where(Dataset.id.in_(dataset_ids), Dataset.tenant == tenant)
        .order_by(Dataset.id)  # one order for everybody: no deadlocks
        .with_for_update(read=True, key_share=True)
    )
    return set(session.scalars(statement))
