"""The table of who did what."""

from datetime import datetime

from sqlalchemy import Index, func
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class TrailEntry(Base):
    """One change; callers may add entries and read their own, and nothing else."""

    __tablename__ = "trail"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    key_id: Mapped[str | None]
    actor: Mapped[str]
    action: Mapped[str]
    object_id: Mapped[str]
    request_id: Mapped[str | None]

    __table_args__ = (
        Index("ix_trail_tenant_id", "tenant", "id"),
        Index("ix_trail_object_id", "object_id"),
        Index("ix_trail_at", "at"),
    )
