"""Samples without labels, samples whose gradients are not finite, and other stages"""

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
UPGRADED = "The service was upgraded while the audit ran; submit it again."


def upgrade() -> None:
    for table, column in LABELS:
        op.alter_column(table, column, existing_type=sa.String(), nullable=True)
    op.add_column(
        "training_samples",
        sa.Column("non_finite", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
    end_what_cannot_go_on()


def end_what_cannot_go_on() -> None:
    """Fail the audits that have begun: their files and units of work mean something else now.

    Queued ones have nothing yet, and go on. A column of known noise in their validation set, which
    0.1.0 took over from the upload and never looked at, would be refused now.
    """
    audits = sa.table(
        "audits",
        *(sa.column(name) for name in ("id", "state", "stage", "version", "state_times")),
        *(sa.column(name) for name in ("error_code", "error_message")),
        *(sa.column(name) for name in ("finished_at", "eta_seconds", "cancel_requested_at")),
    )
    units = sa.table("work_units", sa.column("audit_id"), sa.column("state"))
    begun = sa.and_(audits.c.finished_at.is_(None), audits.c.state != "queued")
    op.execute(
        sa.delete(units).where(
            units.c.audit_id.in_(sa.select(audits.c.id).where(begun)),
            units.c.state.in_(("ready", "running")),
        )
    )
    asked_to_end = audits.c.cancel_requested_at.is_not(None)
    for state, which, error in (
        ("cancelled", asked_to_end, {}),
        ("failed", ~asked_to_end, {"error_code": "upgraded", "error_message": UPGRADED}),
    ):
        ended = sa.func.jsonb_build_object(state, sa.func.now())
        op.execute(
            sa.update(audits)
            .where(begun, which)
            .values(
                state=state,
                stage=None,
                finished_at=sa.func.now(),
                eta_seconds=None,
                state_times=audits.c.state_times.op("||")(ended),
                version=audits.c.version + 1,
                **error,
            )
        )
    op.execute(
        "UPDATE audits SET request = request #- '{validation,columns,noise}' WHERE state = 'queued'"
    )
    op.execute(sa.update(audits).where(audits.c.stage == "precondition").values(stage="curvature"))


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
