"""The table of work: what workers claim, hold and finish."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    ARRAY,
    REAL,
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    String,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base

SIGN_OF_LIFE_SECONDS = 10  # how often a worker writes its row


class Stage(StrEnum):
    """The stages of an audit in their order; all units of one end before the next begins."""

    PREPARE = "prepare"
    FINE_TUNE = "fine_tune"
    VALIDATION = "validation"
    GRADIENTS = "gradients"
    PROBES = "probes"
    CHECKPOINTS = "checkpoints"
    CURVATURE = "curvature"
    INFLUENCE = "influence"
    AGGREGATE = "aggregate"
    VERIFY = "verify"
    CONCLUDE = "conclude"
    RANK = "rank"  # of a ranking that was asked after the audit's end; no audit goes through it


class UnitState(StrEnum):
    """A unit is offered, held, or over."""

    READY = "ready"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class WorkUnit(Base):
    """The smallest piece of work that is redone after a crash: one stage, or one shard of it.

    It belongs to an audit's own run, or to a ranking that was asked later.
    The row is its own outbox entry: `ready` and not `sent_at` means that a message is owed.
    """

    __tablename__ = "work_units"

    id: Mapped[str] = mapped_column(primary_key=True)
    audit_id: Mapped[str] = mapped_column(ForeignKey("audits.id", ondelete="CASCADE"))
    ranking_id: Mapped[str | None] = mapped_column(ForeignKey("rankings.id", ondelete="CASCADE"))
    stage: Mapped[str]
    position: Mapped[int]
    state: Mapped[str] = mapped_column(default=UnitState.READY)
    epoch: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    owner: Mapped[str | None]
    # who had it before and goes on beside the owner; says nothing where it is not running
    slower_epoch: Mapped[int | None]
    slower_owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    sent_at: Mapped[datetime | None]
    done: Mapped[int] = mapped_column(default=0)
    total: Mapped[int] = mapped_column(default=1)
    samples_per_second: Mapped[float | None] = mapped_column(REAL)
    result: Mapped[dict[str, Any]] = mapped_column(default=dict)
    last_error: Mapped[str | None]
    waiting: Mapped[str | None]  # what for; nobody sends it before that is there
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    charged_until: Mapped[datetime | None]

    __table_args__ = (
        UniqueConstraint(
            *("audit_id", "ranking_id", "stage", "position"), postgresql_nulls_not_distinct=True
        ),
        CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name="lease"),
        CheckConstraint(
            "state IN ({})".format(", ".join(f"'{state}'" for state in UnitState)), name="state"
        ),
        Index(
            "ix_work_units_open", "state", postgresql_where=text("state IN ('ready', 'running')")
        ),
        Index(
            "ix_work_units_finished",
            "finished_at",
            postgresql_where=text("finished_at IS NOT NULL"),
        ),
        Index(
            "ix_work_units_ranking",
            "ranking_id",
            postgresql_where=text("ranking_id IS NOT NULL"),
        ),
    )


class WorkerHeartbeat(Base):
    """The last sign of life of each worker process."""

    __tablename__ = "worker_heartbeats"

    name: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str]
    queues: Mapped[list[str]] = mapped_column(ARRAY(String))
    engine_version: Mapped[str]
    gpu_memory_used: Mapped[int | None] = mapped_column(BigInteger)  # bytes, of whatever process
    gpu_memory_total: Mapped[int | None] = mapped_column(BigInteger)
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Leftover(Base):
    """A folder below the data directory that is removed when due, if it then belongs to nothing."""

    __tablename__ = "leftovers"

    path: Mapped[str] = mapped_column(primary_key=True)
    due_at: Mapped[datetime]
