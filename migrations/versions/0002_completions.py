"""Samples without labels, and samples whose gradients are not finite"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

LABELS = (
    ("training_samples", "given_label"),
    ("training_samples", "predicted_label"),
    ("validation_samples", "given_label"),
    ("validation_samples", "predicted_label"),
    ("ranked_samples", "given_label"),
)


def upgrade() -> None:
    for table, column in LABELS:
        op.alter_column(table, column, existing_type=sa.String(), nullable=True)
    op.add_column(
        "training_samples",
        sa.Column("non_finite", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )


def downgrade() -> None:
    op.drop_column("training_samples", "non_finite")
    for table, column in LABELS:
        # an earlier version knows no samples without labels; an empty one loses nothing
        op.execute(
            sa.update(sa.table(table, sa.column(column)))
            .where(sa.column(column).is_(None))
            .values({column: ""})
        )
        op.alter_column(table, column, existing_type=sa.String(), nullable=False)
