"""What waits for room, and files that nobody may need any more"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

ROLE = "winnow_tenant"
WAITING = ("audits", "rankings", "work_units")


def upgrade() -> None:
    for table in WAITING:
        op.add_column(table, sa.Column("waiting", sa.String(), nullable=True))
    op.create_table(
        "leftovers",
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("path", name="pk_leftovers"),
    )
    # A caller's transaction notes what it may leave; it reads and removes nothing here.
    op.execute(f"GRANT INSERT ON leftovers TO {ROLE}")


def downgrade() -> None:
    op.drop_table("leftovers")
    for table in WAITING:
        op.drop_column(table, "waiting")
