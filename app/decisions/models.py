"""Tables of decisions: what stands now, and what each batch changed.

The two tables that have a row a sample have no foreign keys, whose check of every row would take
most of the time of a batch. Triggers delete their rows with the audit, and with the batch.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, Text, func
from sqlalchemy import text as sql
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class Action(StrEnum):
    """What is decided on a sample."""

    ACCEPT = "accept"
    KEEP = "keep"
    DROP = "drop"
    EDIT = "edit"


CLEAR = "clear"  # of a batch: takes back what was decided
ACTIONS = ", ".join(f"'{action}'" for action in Action)


class DecisionBatch(Base):
    """One call of a reviewer: the same action on some samples.

    `version` counts the batches and undos of an audit; it is the audit's `decision_version` after
    this one.
    """

    __tablename__ = "decision_batches"

    id: Mapped[str] = mapped_column(primary_key=True)
    audit_id: Mapped[str] = mapped_column(ForeignKey("audits.id", ondelete="CASCADE"))
    tenant: Mapped[str]
    version: Mapped[int]
    ranking_id: Mapped[str]  # whose suggestions and filter; it may be deleted later
    action: Mapped[str]  # of Action, or clear
    label: Mapped[str | None]
    text: Mapped[str | None] = mapped_column(Text)
    filter: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    reviewer: Mapped[str]
    num_samples: Mapped[int]
    num_changed: Mapped[int]
    num_skipped: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    undone_at: Mapped[datetime | None]
    undone_by: Mapped[str | None]
    undone_version: Mapped[int | None]
    num_kept: Mapped[int | None]  # samples that the undo left alone: decided again since

    __table_args__ = (
        CheckConstraint(f"action IN ({ACTIONS}, 'clear')", name="action"),
        Index("ix_decision_batches_audit_id_version", "audit_id", "version", unique=True),
    )


class Decision(Base):
    """What stands on a sample; a row without an action says that a decision was taken back.

    Attributes:
        version: of the batch that decided.
        batch_id: that batch; None where every batch was undone.
        changed_version: of the batch or the undo that changed the row last.
        changed_by: whose it was.
    """

    __tablename__ = "decisions"

    audit_id: Mapped[str] = mapped_column(primary_key=True)
    sample_index: Mapped[int] = mapped_column(primary_key=True)
    action: Mapped[str | None]
    label: Mapped[str | None]
    text: Mapped[str | None] = mapped_column(Text)
    reviewer: Mapped[str | None]
    decided_at: Mapped[datetime | None]
    version: Mapped[int | None]
    batch_id: Mapped[str | None]
    changed_version: Mapped[int]
    changed_by: Mapped[str]

    __table_args__ = (
        CheckConstraint(f"action IN ({ACTIONS})", name="action"),
        Index(
            "ix_decisions_action",
            *("audit_id", "action", "sample_index"),
            postgresql_where=sql("action IS NOT NULL"),
        ),
    )


class DecisionChange(Base):
    """What stood on a sample before a batch: what its undo puts back."""

    __tablename__ = "decision_changes"

    batch_id: Mapped[str] = mapped_column(primary_key=True)
    sample_index: Mapped[int] = mapped_column(primary_key=True)
    action: Mapped[str | None]
    label: Mapped[str | None]
    text: Mapped[str | None] = mapped_column(Text)
    reviewer: Mapped[str | None]
    decided_at: Mapped[datetime | None]
    version: Mapped[int | None]
    before_id: Mapped[str | None]  # the batch that had decided

    __table_args__ = (
        Index(
            "ix_decision_changes_before_id",
            *("before_id", "sample_index"),
            postgresql_where=sql("before_id IS NOT NULL"),
        ),
    )
