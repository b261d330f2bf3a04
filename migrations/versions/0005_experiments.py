"""Experiments: sets of audits"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "experiments",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("request", JSONB(), nullable=False),
        sa.Column("metadata", JSONB(), nullable=False),
        sa.Column("created_at", TIME, server_default=sa.func.now(), nullable=False),
        sa.Column("cancel_requested_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_experiments")),
    )
    op.create_index("ix_experiments_tenant_id", "experiments", ["tenant", "id"])
    op.add_column("audits", sa.Column("experiment_id", sa.String(), nullable=True))
    op.add_column("audits", sa.Column("experiment_position", sa.Integer(), nullable=True))
    op.create_foreign_key(
        op.f("fk_audits_experiment_id"),
        "audits",
        "experiments",
        ["experiment_id"],
        ["id"],
        ondelete="CASCADE",
    )
    op.create_index(
        "ix_audits_experiment",
        "audits",
        ["experiment_id", "experiment_position"],
        unique=True,
        postgresql_where=sa.text("experiment_id IS NOT NULL"),
    )


def downgrade() -> None:
    # the audits stay, as audits of their own
    op.drop_index("ix_audits_experiment", table_name="audits")
    op.drop_constraint(op.f("fk_audits_experiment_id"), "audits", type_="foreignkey")
    op.drop_column("audits", "experiment_position")
    op.drop_column("audits", "experiment_id")
    op.execute("DELETE FROM idempotency_keys WHERE route = 'POST /v1/experiments'")
    op.drop_table("experiments")
