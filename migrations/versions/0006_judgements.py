"""How likely a ranked sample is wrong, and which label it should rather have"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("ranked_samples", sa.Column("noise_probability", sa.REAL(), nullable=True))
    op.add_column("ranked_samples", sa.Column("suggested_label", sa.String(), nullable=True))
    op.add_column("ranked_samples", sa.Column("suggested_probability", sa.REAL(), nullable=True))


def downgrade() -> None:
    for name in ("noise_probability", "suggested_label", "suggested_probability"):
        op.drop_column("ranked_samples", name)
