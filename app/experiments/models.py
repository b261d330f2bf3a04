"""The table of experiments; what they are made of are rows of audits."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Index, func
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class ExperimentState(StrEnum):
    """Where an experiment stands, as its audits tell; the last three are final."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether every audit of it has ended."""
        return self is not ExperimentState.RUNNING


class Experiment(Base):
    """What was asked for. Its state is that of its audits, which name it."""

    __tablename__ = "experiments"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    request: Mapped[dict[str, Any]]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    cancel_requested_at: Mapped[datetime | None]

    __table_args__ = (Index("ix_experiments_tenant_id", "tenant", "id"),)
