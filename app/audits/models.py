"""Tables of an audit: its state, its rankings, its samples."""

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
    Integer,
    Text,
    false,
    func,
)
from sqlalchemy import text as sql
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, MappedColumn, mapped_column
from sqlalchemy.types import TypeEngine

from app.db import Base
from app.experiments.models import Experiment
from app.tracing import current_traceparent


class AuditState(StrEnum):
    """Where an audit stands; the last three are final."""

    QUEUED = "queued"
    PREPARING = "preparing"
    FINE_TUNING = "fine_tuning"
    COMPUTING = "computing"
    AGGREGATING = "aggregating"
    VERIFYING = "verifying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether the audit has ended."""
        return self in FINAL_STATES


FINAL_STATES = frozenset({AuditState.SUCCEEDED, AuditState.FAILED, AuditState.CANCELLED})


class RankingState(StrEnum):
    """Where a ranking stands; the last two are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """Whether the ranking has ended."""
        return self in {RankingState.SUCCEEDED, RankingState.FAILED}


class Audit(Base):
    """One audit. The row is the truth; messages only say "look at it"."""

    __tablename__ = "audits"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    state: Mapped[str] = mapped_column(default=AuditState.QUEUED)
    version: Mapped[int] = mapped_column(BigInteger, default=1)
    request: Mapped[dict[str, Any]]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)

    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]
    state_times: Mapped[dict[str, Any]] = mapped_column(default=dict)
    cancel_requested_at: Mapped[datetime | None]

    stage: Mapped[str | None]
    progress: Mapped[float] = mapped_column(REAL, default=0.0)
    samples_per_second: Mapped[float | None] = mapped_column(REAL)
    eta_seconds: Mapped[float | None] = mapped_column(REAL)
    busy_seconds: Mapped[float] = mapped_column(REAL, default=0.0, server_default=sql("0"))
    busy_until: Mapped[datetime | None]
    waiting: Mapped[str | None]  # what its work waits for, of which it cannot go on without

    num_train: Mapped[int | None]
    num_validation: Mapped[int | None]
    provenance: Mapped[dict[str, Any]] = mapped_column(default=dict)
    summary: Mapped[dict[str, Any]] = mapped_column(default=dict)
    timings: Mapped[dict[str, Any]] = mapped_column(default=dict)

    error_code: Mapped[str | None]
    error_message: Mapped[str | None] = mapped_column(Text)
    error_field: Mapped[str | None]

    experiment_id: Mapped[str | None] = mapped_column(ForeignKey(Experiment.id, ondelete="CASCADE"))
    experiment_position: Mapped[int | None]

    traceparent: Mapped[str | None] = mapped_column(default=current_traceparent)
    influence_bytes: Mapped[int | None] = mapped_column(BigInteger)
    influence_deleted_at: Mapped[datetime | None]

    decision_version: Mapped[int] = mapped_column(default=0, server_default=sql("0"))
    num_decided: Mapped[int] = mapped_column(default=0, server_default=sql("0"))

    __table_args__ = (
        CheckConstraint(
            "state IN ({})".format(", ".join(f"'{state}'" for state in AuditState)), name="state"
        ),
        CheckConstraint("(state = 'failed') = (error_code IS NOT NULL)", name="error"),
        Index("ix_audits_tenant_id", "tenant", "id"),
        Index("ix_audits_open", "id", postgresql_where=sql("finished_at IS NULL")),
        Index(
            "ix_audits_experiment",
            *("experiment_id", "experiment_position"),
            unique=True,
            postgresql_where=sql("experiment_id IS NOT NULL"),
        ),
        Index(
            "ix_audits_kept", "finished_at", postgresql_where=sql("influence_deleted_at IS NULL")
        ),
    )


class Ranking(Base):
    """One ordering of an audit's training samples: the audit's own, or one that was asked later.

    The audit's own appears when the audit has ended; a later one has a unit of work of its own.
    """

    __tablename__ = "rankings"

    id: Mapped[str] = mapped_column(primary_key=True)
    audit_id: Mapped[str] = mapped_column(ForeignKey("audits.id", ondelete="CASCADE"))
    tenant: Mapped[str]
    is_own: Mapped[bool] = mapped_column(default=False)
    specification: Mapped[dict[str, Any]]
    flag: Mapped[Any] = mapped_column(JSONB)  # auto, or an object
    state: Mapped[str] = mapped_column(default=RankingState.QUEUED)
    version: Mapped[int] = mapped_column(BigInteger, default=1)
    progress: Mapped[float] = mapped_column(REAL, default=0.0)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]
    seconds: Mapped[float | None] = mapped_column(REAL)
    waiting: Mapped[str | None]
    summary: Mapped[dict[str, Any]] = mapped_column(default=dict)
    folder: Mapped[str]  # of its files, below the audit's own
    traceparent: Mapped[str | None] = mapped_column(default=current_traceparent)

    error_code: Mapped[str | None]
    error_message: Mapped[str | None] = mapped_column(Text)
    error_field: Mapped[str | None]

    __table_args__ = (
        CheckConstraint(
            "state IN ({})".format(", ".join(f"'{state}'" for state in RankingState)), name="state"
        ),
        CheckConstraint("(state = 'failed') = (error_code IS NOT NULL)", name="error"),
        Index("ix_rankings_audit_id", "audit_id", "id"),
        Index("ix_rankings_own", "audit_id", unique=True, postgresql_where=sql("is_own")),
    )

    @staticmethod
    def folder_of(ranking_id: str) -> str:
        """Return where a ranking's files lie, below the audit's folder."""
        return f"results/{ranking_id}"


EVIDENCE = "evidence"


def evidence(of: type[TypeEngine[Any]]) -> MappedColumn[Any]:
    """Return a column of lists that is loaded only where it is asked for."""
    return mapped_column(ARRAY(of), deferred=True, deferred_group=EVIDENCE)


class TrainingSample(Base):
    """What an audit saw and the model said of one training sample."""

    __tablename__ = "training_samples"

    audit_id: Mapped[str] = mapped_column(
        ForeignKey("audits.id", ondelete="CASCADE"), primary_key=True
    )
    sample_index: Mapped[int] = mapped_column(Integer, primary_key=True)
    text: Mapped[str] = mapped_column(Text)
    text_pair: Mapped[str | None] = mapped_column(Text)
    given_label: Mapped[str | None]
    predicted_label: Mapped[str | None]
    predicted_probability: Mapped[float] = mapped_column(REAL)
    given_probability: Mapped[float] = mapped_column(REAL)
    loss: Mapped[float] = mapped_column(REAL)
    is_noisy: Mapped[bool | None]
    non_finite: Mapped[bool] = mapped_column(default=False, server_default=false())

    # read with a single sample only; pages of many do without
    alike_training: Mapped[list[int] | None] = evidence(Integer)
    alike_cosine: Mapped[list[float] | None] = evidence(REAL)
    opposed_training: Mapped[list[int] | None] = evidence(Integer)
    opposed_cosine: Mapped[list[float] | None] = evidence(REAL)
    shown_classes: Mapped[list[int] | None] = evidence(Integer)  # null for all of them
    class_probabilities: Mapped[list[float] | None] = evidence(REAL)
    out_of_sample_probabilities: Mapped[list[float] | None] = evidence(REAL)

    __table_args__ = (
        Index(
            "ix_training_samples_non_finite",
            *("audit_id", "sample_index"),
            postgresql_where=sql("non_finite"),
        ),
    )


class ValidationSample(Base):
    """What an audit saw and the model said of one validation sample."""

    __tablename__ = "validation_samples"

    audit_id: Mapped[str] = mapped_column(
        ForeignKey("audits.id", ondelete="CASCADE"), primary_key=True
    )
    sample_index: Mapped[int] = mapped_column(Integer, primary_key=True)
    text: Mapped[str] = mapped_column(Text)
    text_pair: Mapped[str | None] = mapped_column(Text)
    given_label: Mapped[str | None]
    predicted_label: Mapped[str | None]
    predicted_probability: Mapped[float] = mapped_column(REAL)
    loss: Mapped[float] = mapped_column(REAL)


class RankedSample(Base):
    """One place in a ranking: rank 0 is the most suspect."""

    __tablename__ = "ranked_samples"

    ranking_id: Mapped[str] = mapped_column(
        ForeignKey("rankings.id", ondelete="CASCADE"), primary_key=True
    )
    rank: Mapped[int] = mapped_column(Integer, primary_key=True)
    sample_index: Mapped[int]
    given_label: Mapped[str | None]
    score: Mapped[float] = mapped_column(REAL)
    flagged: Mapped[bool]
    noise_probability: Mapped[float | None] = mapped_column(REAL)
    suggested_label: Mapped[str | None]
    suggested_probability: Mapped[float | None] = mapped_column(REAL)
    group_scores: Mapped[list[float]] = mapped_column(ARRAY(REAL))
    group_ranks: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    harmed_validation: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    harmed_influence: Mapped[list[float]] = mapped_column(ARRAY(REAL))
    helped_validation: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    helped_influence: Mapped[list[float]] = mapped_column(ARRAY(REAL))

    __table_args__ = (
        Index("ix_ranked_samples_sample", "ranking_id", "sample_index", unique=True),
        Index("ix_ranked_samples_label", "ranking_id", "given_label", "rank"),
        Index("ix_ranked_samples_score", "ranking_id", "score", "rank"),
        Index("ix_ranked_samples_suggestion", "ranking_id", "suggested_label", "rank"),
        Index("ix_ranked_samples_probability", "ranking_id", "noise_probability", "rank"),
    )


class IdempotencyKey(Base):
    """The answer that a key was given, kept for a day (SERVICE.md, section 1)."""

    __tablename__ = "idempotency_keys"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    route: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    answer_id: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)
