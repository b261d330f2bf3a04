"""The table of uploaded datasets."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Index, func
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class Dataset(Base):
    """An uploaded, checked file; its bytes lie under the data directory."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    name: Mapped[str]
    format: Mapped[str]
    columns: Mapped[dict[str, Any]]
    num_rows: Mapped[int]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    summary: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (Index("ix_datasets_tenant_id", "tenant", "id"),)
