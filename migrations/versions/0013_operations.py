"""What operators see: a worker's GPU memory, the trace an audit belongs to, when units ended"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("worker_heartbeats", sa.Column("gpu_memory_used", sa.BigInteger))
    op.add_column("worker_heartbeats", sa.Column("gpu_memory_total", sa.BigInteger))
    op.add_column("audits", sa.Column("traceparent", sa.String))
    op.add_column("rankings", sa.Column("traceparent", sa.String))
    op.create_index(
        "ix_work_units_finished",
        "work_units",
        ["finished_at"],
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_work_units_finished", "work_units")
    op.drop_column("rankings", "traceparent")
    op.drop_column("audits", "traceparent")
    op.drop_column("worker_heartbeats", "gpu_memory_total")
    op.drop_column("worker_heartbeats", "gpu_memory_used")
