"""Tables of what tenants may use and of the time that workers gave them."""

from datetime import date, datetime

from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class TenantLimits(Base):
    """Limits of one tenant in place of the settings': None for the setting, 0 for no limit."""

    __tablename__ = "tenant_limits"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    requests_per_minute: Mapped[int | None]
    max_open_audits: Mapped[int | None]
    max_dataset_rows: Mapped[int | None] = mapped_column(BigInteger)
    max_dataset_bytes: Mapped[int | None] = mapped_column(BigInteger)
    worker_minutes_per_day: Mapped[int | None]


class WorkerUsage(Base):
    """The seconds that workers gave to a tenant on one day (UTC), and when they did last."""

    __tablename__ = "worker_usage"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    seconds: Mapped[float]
    served_at: Mapped[datetime]
