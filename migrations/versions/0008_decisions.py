"""What reviewers decide on samples, and indexes for pages by what is suggested"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

ACTIONS = "'accept', 'keep', 'drop', 'edit'"
COUNTS = ("decision_version", "num_decided")
# which rows go with which: foreign keys would check every row of a batch of a million
TRIGGERS = (
    ("decisions", "audits", "audit_id"),
    ("decision_changes", "decision_batches", "batch_id"),
)
INDEXES = (
    ("ix_ranked_samples_suggestion", ("ranking_id", "suggested_label", "rank")),
    ("ix_ranked_samples_probability", ("ranking_id", "noise_probability", "rank")),
)


def upgrade() -> None:
    for name in COUNTS:
        column = sa.Column(name, sa.Integer(), nullable=False, server_default=sa.text("0"))
        op.add_column("audits", column)
    for name, columns in INDEXES:
        op.create_index(name, "ranked_samples", list(columns))
    op.create_index(
        "ix_training_samples_non_finite",
        "training_samples",
        ["audit_id", "sample_index"],
        postgresql_where=sa.text("non_finite"),
    )
    time = sa.DateTime(timezone=True)
    op.create_table(
        "decision_batches",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("audit_id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("ranking_id", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("label", sa.String()),
        sa.Column("text", sa.Text()),
        sa.Column("filter", postgresql.JSONB()),
        sa.Column("reviewer", sa.String(), nullable=False),
        sa.Column("num_samples", sa.Integer(), nullable=False),
        sa.Column("num_changed", sa.Integer(), nullable=False),
        sa.Column("num_skipped", sa.Integer(), nullable=False),
        sa.Column("created_at", time, server_default=sa.func.clock_timestamp(), nullable=False),
        sa.Column("undone_at", time),
        sa.Column("undone_by", sa.String()),
        sa.Column("undone_version", sa.Integer()),
        sa.Column("num_kept", sa.Integer()),
        sa.CheckConstraint(
            f"action IN ({ACTIONS}, 'clear')", name=op.f("ck_decision_batches_action")
        ),
        sa.ForeignKeyConstraint(
            ["audit_id"],
            ["audits.id"],
            name=op.f("fk_decision_batches_audit_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_decision_batches")),
    )
    op.create_index(
        "ix_decision_batches_audit_id_version",
        "decision_batches",
        ["audit_id", "version"],
        unique=True,
    )
    op.create_table(
        "decisions",
        sa.Column("audit_id", sa.String(), nullable=False),
        sa.Column("sample_index", sa.Integer(), nullable=False),
        *_said(),
        sa.Column("batch_id", sa.String()),
        sa.Column("changed_version", sa.Integer(), nullable=False),
        sa.Column("changed_by", sa.String(), nullable=False),
        sa.CheckConstraint(f"action IN ({ACTIONS})", name=op.f("ck_decisions_action")),
        sa.PrimaryKeyConstraint("audit_id", "sample_index", name=op.f("pk_decisions")),
    )
    op.create_index(
        "ix_decisions_action",
        "decisions",
        ["audit_id", "action", "sample_index"],
        postgresql_where=sa.text("action IS NOT NULL"),
    )
    op.create_table(
        "decision_changes",
        sa.Column("batch_id", sa.String(), nullable=False),
        sa.Column("sample_index", sa.Integer(), nullable=False),
        *_said(),
        sa.Column("before_id", sa.String()),
        sa.PrimaryKeyConstraint("batch_id", "sample_index", name=op.f("pk_decision_changes")),
    )
    op.create_index(
        "ix_decision_changes_before_id",
        "decision_changes",
        ["before_id", "sample_index"],
        postgresql_where=sa.text("before_id IS NOT NULL"),
    )
    for table, of, key in TRIGGERS:
        forget = f"DELETE FROM {table} WHERE {key} = OLD.id"  # noqa: S608  names of our own
        op.execute(
            f"CREATE FUNCTION forget_{table}() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN {forget}; RETURN NULL; END $$"
        )
        op.execute(
            f"CREATE TRIGGER forget_{table} AFTER DELETE ON {of} "
            f"FOR EACH ROW EXECUTE FUNCTION forget_{table}()"
        )


def _said() -> list[sa.Column[Any]]:
    """Return the columns of what was decided."""
    return [
        sa.Column("action", sa.String()),
        sa.Column("label", sa.String()),
        sa.Column("text", sa.Text()),
        sa.Column("reviewer", sa.String()),
        sa.Column("decided_at", sa.DateTime(timezone=True)),
        sa.Column("version", sa.Integer()),
    ]


def downgrade() -> None:
    for table, of, _ in TRIGGERS:
        op.execute(f"DROP TRIGGER forget_{table} ON {of}")
        op.execute(f"DROP FUNCTION forget_{table}()")
    for table in ("decision_changes", "decisions", "decision_batches"):
        op.drop_table(table)
    op.drop_index("ix_training_samples_non_finite", "training_samples")
    for name, _ in INDEXES:
        op.drop_index(name, "ranked_samples")
    for name in COUNTS:
        op.drop_column("audits", name)
