"""Rankings that are asked after an audit's end, and how long influence is kept"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

QUEUES = "ARRAY['winnow', 'winnow-cpu']"
# What an audit's summary says of its ranking; the rest is about the audit.
OF_THE_RANKING = (
    *("num_flagged", "files", "detection", "warnings", "group_order", "layer_groups"),
    *("layer_group_order", "configurations", "module_cancellation"),
)


def upgrade() -> None:
    op.add_column("audits", sa.Column("influence_bytes", sa.BigInteger()))
    op.add_column("audits", sa.Column("influence_deleted_at", sa.DateTime(timezone=True)))
    op.create_index(
        "ix_audits_kept",
        "audits",
        ["finished_at"],
        postgresql_where=sa.text("influence_deleted_at IS NULL"),
    )
    op.alter_column("idempotency_keys", "audit_id", new_column_name="answer_id")
    op.add_column(
        "worker_heartbeats",
        sa.Column("queues", sa.ARRAY(sa.String()), server_default=sa.text(QUEUES), nullable=False),
    )
    op.alter_column("worker_heartbeats", "queues", server_default=None)
    give_rankings_a_life()
    op.add_column(
        "work_units",
        sa.Column(
            "ranking_id",
            sa.String(),
            sa.ForeignKey("rankings.id", name=op.f("fk_work_units_ranking_id"), ondelete="CASCADE"),
        ),
    )
    op.create_index(
        "ix_work_units_ranking",
        "work_units",
        ["ranking_id"],
        postgresql_where=sa.text("ranking_id IS NOT NULL"),
    )
    op.drop_constraint(op.f("uq_work_units_audit_id_stage_position"), "work_units")
    op.create_unique_constraint(
        op.f("uq_work_units_audit_id_ranking_id_stage_position"),
        "work_units",
        ["audit_id", "ranking_id", "stage", "position"],
        postgresql_nulls_not_distinct=True,
    )


def give_rankings_a_life() -> None:
    """Give rankings a state; those that are there are the audits' own, and have succeeded."""
    for column in (
        sa.Column("is_own", sa.Boolean(), server_default=sa.true(), nullable=False),
        sa.Column("flag", postgresql.JSONB(), server_default="{}", nullable=False),
        sa.Column("state", sa.String(), server_default="succeeded", nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("progress", sa.REAL(), server_default="1", nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.Column("seconds", sa.REAL()),
        sa.Column("summary", postgresql.JSONB(), server_default="{}", nullable=False),
        sa.Column("folder", sa.String(), server_default="results", nullable=False),
        sa.Column("error_code", sa.String()),
        sa.Column("error_message", sa.Text()),
        sa.Column("error_field", sa.String()),
    ):
        op.add_column("rankings", column)
        if column.server_default is not None:
            op.alter_column("rankings", column.name, server_default=None)
    take_over = sa.text(
        "UPDATE rankings SET flag = COALESCE(audits.request -> 'flag', '{}'), "
        "finished_at = audits.finished_at, summary = (SELECT "
        "COALESCE(jsonb_object_agg(part.key, part.value), '{}') "
        "FROM jsonb_each(audits.summary) AS part WHERE part.key = ANY(:names)) "
        "FROM audits WHERE audits.id = rankings.audit_id"
    )
    op.execute(take_over.bindparams(names=list(OF_THE_RANKING)))
    op.create_check_constraint(
        op.f("ck_rankings_state"),
        "rankings",
        "state IN ('queued', 'running', 'succeeded', 'failed')",
    )
    op.create_check_constraint(
        op.f("ck_rankings_error"), "rankings", "(state = 'failed') = (error_code IS NOT NULL)"
    )
    op.drop_index(op.f("ix_rankings_audit_id"), "rankings")
    op.create_index("ix_rankings_audit_id", "rankings", ["audit_id", "id"])
    op.create_index(
        "ix_rankings_own",
        "rankings",
        ["audit_id"],
        unique=True,
        postgresql_where=sa.text("is_own"),
    )


def downgrade() -> None:
    # an earlier version knows one ranking of an audit; units of others go with them
    op.execute("DELETE FROM rankings WHERE NOT is_own")
    op.drop_constraint(op.f("uq_work_units_audit_id_ranking_id_stage_position"), "work_units")
    op.drop_index("ix_work_units_ranking", "work_units")
    op.drop_column("work_units", "ranking_id")
    op.create_unique_constraint(
        op.f("uq_work_units_audit_id_stage_position"),
        "work_units",
        ["audit_id", "stage", "position"],
    )
    op.drop_index("ix_rankings_own", "rankings")
    op.drop_index("ix_rankings_audit_id", "rankings")
    op.create_index(op.f("ix_rankings_audit_id"), "rankings", ["audit_id"])
    for name in ("error", "state"):
        op.drop_constraint(op.f(f"ck_rankings_{name}"), "rankings")
    for name in (
        *("error_field", "error_message", "error_code", "folder", "summary", "seconds"),
        *("finished_at", "progress", "version", "state", "flag", "is_own"),
    ):
        op.drop_column("rankings", name)
    op.drop_column("worker_heartbeats", "queues")
    op.execute("DELETE FROM idempotency_keys WHERE route <> 'POST /v1/audits'")
    op.alter_column("idempotency_keys", "answer_id", new_column_name="audit_id")
    op.drop_index("ix_audits_kept", "audits")
    op.drop_column("audits", "influence_deleted_at")
    op.drop_column("audits", "influence_bytes")
