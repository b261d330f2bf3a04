"""A unit that holds the end of a stage back may have a second worker: who has it beside the first"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("work_units", sa.Column("slower_epoch", sa.Integer))
    op.add_column("work_units", sa.Column("slower_owner", sa.String))


def downgrade() -> None:
    op.drop_column("work_units", "slower_owner")
    op.drop_column("work_units", "slower_epoch")
