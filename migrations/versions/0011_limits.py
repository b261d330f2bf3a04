"""Scopes and rotation of keys, limits of tenants, what their work takes, and who did what"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

ROLE = "winnow_tenant"
TIME = sa.DateTime(timezone=True)
OWN = {"tenant_limits": "SELECT", "worker_usage": "SELECT", "trail": "SELECT, INSERT"}
MINE = "tenant = current_setting('winnow.tenant', true)"


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("scopes", sa.ARRAY(sa.String()), nullable=True))
    op.add_column("api_keys", sa.Column("requests_per_minute", sa.Integer(), nullable=True))
    op.add_column("api_keys", sa.Column("previous_sha256", sa.LargeBinary(), nullable=True))
    op.add_column("api_keys", sa.Column("previous_until", TIME, nullable=True))
    op.create_index("ix_api_keys_previous_sha256", "api_keys", ["previous_sha256"], unique=True)
    op.add_column("work_units", sa.Column("charged_until", TIME, nullable=True))
    op.create_table(
        "tenant_limits",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("requests_per_minute", sa.Integer(), nullable=True),
        sa.Column("max_open_audits", sa.Integer(), nullable=True),
        sa.Column("max_dataset_rows", sa.BigInteger(), nullable=True),
        sa.Column("max_dataset_bytes", sa.BigInteger(), nullable=True),
        sa.Column("worker_minutes_per_day", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("tenant", name=op.f("pk_tenant_limits")),
    )
    op.create_table(
        "worker_usage",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("served_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "day", name=op.f("pk_worker_usage")),
    )
    op.create_table(
        "trail",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("at", TIME, server_default=sa.func.now(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("object_id", sa.String(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_trail")),
    )
    op.create_index("ix_trail_tenant_id", "trail", ["tenant", "id"])
    op.create_index("ix_trail_object_id", "trail", ["object_id"])
    op.create_index("ix_trail_at", "trail", ["at"])
    for table, rights in OWN.items():
        op.execute(f"GRANT {rights} ON {table} TO {ROLE}")
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY tenant ON {table} TO {ROLE} USING ({MINE}) WITH CHECK ({MINE})")


def downgrade() -> None:
    for table in ("trail", "worker_usage", "tenant_limits"):
        op.drop_table(table)
    op.drop_column("work_units", "charged_until")
    op.drop_index("ix_api_keys_previous_sha256", "api_keys")
    for column in ("previous_until", "previous_sha256", "requests_per_minute", "scopes"):
        op.drop_column("api_keys", column)
