"""The training samples most like each, and the probabilities of its classes"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

NUMBERS = ("alike_training", "opposed_training", "shown_classes")
VALUES = (
    *("alike_cosine", "opposed_cosine"),
    *("class_probabilities", "out_of_sample_probabilities"),
)


def upgrade() -> None:
    for names, kind in ((NUMBERS, sa.Integer()), (VALUES, sa.REAL())):
        for name in names:
            op.add_column("training_samples", sa.Column(name, sa.ARRAY(kind), nullable=True))


def downgrade() -> None:
    for name in (*NUMBERS, *VALUES):
        op.drop_column("training_samples", name)
