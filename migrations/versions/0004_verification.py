"""Audits that verify their ranking by fine-tuning again"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

BEFORE = ("queued", "preparing", "fine_tuning", "computing", "aggregating")
FINAL = ("succeeded", "failed", "cancelled")
DOWNGRADED = "The service was taken back to a version that cannot verify; submit it again."


def upgrade() -> None:
    allow_states(*BEFORE, "verifying", *FINAL)


def downgrade() -> None:
    # the version before has neither the state nor the units of work
    op.execute(
        "DELETE FROM work_units WHERE stage IN ('verify', 'conclude') "
        "AND state IN ('ready', 'running')"
    )
    op.execute(
        sa.text(
            "UPDATE audits SET state = 'failed', stage = NULL, finished_at = now(), "
            "eta_seconds = NULL, version = version + 1, error_code = 'upgraded', "
            "error_message = :message, "
            "state_times = state_times || jsonb_build_object('failed', now()) "
            "WHERE state = 'verifying'"
        ).bindparams(message=DOWNGRADED)
    )
    op.execute("UPDATE audits SET state_times = state_times - 'verifying'")
    allow_states(*BEFORE, *FINAL)


def allow_states(*states: str) -> None:
    op.drop_constraint(op.f("ck_audits_state"), "audits", type_="check")
    named = ", ".join(f"'{state}'" for state in states)
    op.create_check_constraint(op.f("ck_audits_state"), "audits", f"state IN ({named})")
