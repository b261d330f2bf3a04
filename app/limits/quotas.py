"""What a tenant may use at once or in a day; asked in the transaction that would use it."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zlib import crc32

from sqlalchemy import Engine, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.audits.models import Audit
from app.datasets.models import Dataset
from app.db import transaction
from app.errors import QuotaExceeded
from app.limits.models import TenantLimits, WorkerUsage
from app.settings import Settings
from app.trail.service import TrailAction, record

LIMITS = (
    "requests_per_minute",
    "max_open_audits",
    "max_dataset_rows",
    "max_dataset_bytes",
    "worker_minutes_per_day",
)

_LOCK = 0x71_75_6F  # a class of advisory locks
_RETRY_SECONDS = (5, 600)
_STORAGE_RETRY_SECONDS = 3600  # time alone makes no room; a colleague who deletes something does


@dataclass(frozen=True)
class _Quota:
    """One limit of a tenant, and how it is called where it can be changed."""

    name: str
    limit: int

    @property
    def setting(self) -> str:
        return f"WINNOW_{self.name.upper()}"

    def exceeded(self, detail: str, *, used: float, retry_after: int) -> QuotaExceeded:
        return QuotaExceeded(
            f"{detail} The operator sets the limit, by {self.setting} or for one tenant by "
            "`winnow limits set`.",
            quota=self.name,
            limit=self.limit,
            used=used,
            headers={"Retry-After": str(retry_after)},
        )


def _quota(session: Session, settings: Settings, tenant: str, name: str) -> _Quota | None:
    """Return a tenant's limit; None where there is none."""
    own = session.scalars(
        select(getattr(TenantLimits, name)).where(TenantLimits.tenant == tenant)
    ).one_or_none()
    limit = getattr(settings, name) if own is None else own
    return _Quota(name, limit) if limit else None


def _one_at_a_time(session: Session, quota: _Quota, tenant: str) -> None:
    """Let calls that count the same thing wait for each other, until the transaction ends."""
    number = crc32(f"{quota.name} {tenant}".encode()) - 2**31
    session.execute(select(func.pg_advisory_xact_lock(_LOCK, number)))


def check_audits(session: Session, settings: Settings, *, tenant: str, num_new: int = 1) -> None:
    """Check that a tenant may submit audits: not too many at once, and workers' time is left.

    Raises:
        QuotaExceeded: it may not now; `Retry-After` says when it may.
    """
    check_worker_time(session, settings, tenant=tenant)
    quota = _quota(session, settings, tenant, "max_open_audits")
    if quota is None:
        return
    _one_at_a_time(session, quota, tenant)
    is_open = (Audit.tenant == tenant) & Audit.finished_at.is_(None)
    used, soonest = session.execute(
        select(func.count(), func.min(Audit.eta_seconds)).where(is_open)
    ).one()
    if used + num_new > quota.limit:
        least, most = _RETRY_SECONDS
        raise quota.exceeded(
            f"{used} audits have not ended and {num_new} would be new; there may be "
            f"{quota.limit} at once. Wait for the end of some, or cancel them.",
            used=used,
            retry_after=min(most, max(least, math.ceil(soonest or least))),
        )


def check_worker_time(session: Session, settings: Settings, *, tenant: str) -> None:
    """Check that workers' time is left to a tenant today (UTC); accepted work goes on without.

    Raises:
        QuotaExceeded: there is none; `Retry-After` is the next day.
    """
    quota = _quota(session, settings, tenant, "worker_minutes_per_day")
    if quota is None:
        return
    now = datetime.now(UTC)
    today = (WorkerUsage.tenant == tenant) & (WorkerUsage.day == now.date())
    minutes = (session.scalars(select(WorkerUsage.seconds).where(today)).one_or_none() or 0.0) / 60
    if minutes >= quota.limit:
        tomorrow = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
        raise quota.exceeded(
            f"Workers gave {minutes:.0f} minutes today, of {quota.limit} a day. What was accepted "
            "goes on; the next day begins at 00:00 UTC.",
            used=round(minutes, 1),
            retry_after=math.ceil((tomorrow - now).total_seconds()),
        )


def check_room(
    session: Session, settings: Settings, *, tenant: str, num_rows: int = 0, num_bytes: int = 0
) -> None:
    """Check that a dataset of this size has room beside the tenant's others.

    Raises:
        QuotaExceeded: it has not; only what is deleted makes room.
    """
    for name, column, unit, new in (
        ("max_dataset_rows", Dataset.num_rows, "rows", num_rows),
        ("max_dataset_bytes", Dataset.num_bytes, "bytes", num_bytes),
    ):
        quota = _quota(session, settings, tenant, name)
        if quota is None:
            continue
        _one_at_a_time(session, quota, tenant)
        stored = select(func.coalesce(func.sum(column), 0)).where(Dataset.tenant == tenant)
        used = int(session.scalars(stored).one())
        if used + new > quota.limit:
            raise quota.exceeded(
                f"The datasets have {used:,} {unit} and this one {new:,}; there may be "
                f"{quota.limit:,}. Delete datasets that are not needed any more.",
                used=used,
                retry_after=_STORAGE_RETRY_SECONDS,
            )


def set_limits(engine: Engine, tenant: str, changes: dict[str, int | None]) -> None:
    """Set some limits of a tenant: None for the setting's, 0 for none at all."""
    with transaction(engine) as session:
        row = insert(TenantLimits).values(tenant=tenant, **changes)
        session.execute(row.on_conflict_do_update(index_elements=["tenant"], set_=changes))
        record(session, TrailAction.LIMITS_SET, tenant, tenant=tenant)


def list_limits(engine: Engine) -> list[TenantLimits]:
    """Return the tenants that have limits of their own, by name."""
    with Session(engine) as session:
        return list(session.scalars(select(TenantLimits).order_by(TenantLimits.tenant)))
