"""Row-level security: under every query of a caller, the rows of its tenant alone"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

ROLE = "winnow_tenant"
OWN = (
    "audits",
    "datasets",
    "decision_batches",
    "experiments",
    "idempotency_keys",
    "rankings",
    "webhooks",
)
# table: the row that says whose it is
PARTS = {
    "training_samples": ("audits", "audit_id"),
    "validation_samples": ("audits", "audit_id"),
    "decisions": ("audits", "audit_id"),
    "work_units": ("audits", "audit_id"),
    "ranked_samples": ("rankings", "ranking_id"),
    "decision_changes": ("decision_batches", "batch_id"),
    "webhook_deliveries": ("webhooks", "webhook_id"),
}
FORGETTING = ("forget_decisions", "forget_decision_changes")


def upgrade() -> None:
    # Roles are of the whole server, so another database may have made it.
    op.execute(
        f"""
        DO $$ BEGIN
            BEGIN
                IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{ROLE}') THEN
                    CREATE ROLE {ROLE} NOLOGIN;
                END IF;
            EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;  -- made this moment
            END;
            IF NOT pg_has_role(current_user, '{ROLE}', 'MEMBER') THEN
                GRANT {ROLE} TO CURRENT_USER;
            END IF;
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE EXCEPTION 'The database user may not make roles. Let an administrator run: '
                'CREATE ROLE {ROLE} NOLOGIN; GRANT {ROLE} TO %;', current_user;
        END $$
        """
    )
    op.execute(f"GRANT USAGE ON SCHEMA public TO {ROLE}")
    for function in FORGETTING:
        # What goes with an audit is nobody's any more when the trigger fires.
        op.execute(f"ALTER FUNCTION {function}() SECURITY DEFINER SET search_path = public")
    op.execute(f"GRANT MAINTAIN ON decisions, decision_changes TO {ROLE}")  # ANALYZE
    whose = "current_setting('winnow.tenant', true)"
    conditions = dict.fromkeys(OWN, f"tenant = {whose}")
    for table, (parent, key) in PARTS.items():
        # looked up once a query, unlike EXISTS
        conditions[table] = f"{key} IN (SELECT id FROM {parent})"  # noqa: S608  names of our own
    for table, condition in conditions.items():
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {ROLE}")
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        # A batch's own row is written behind its changes, which nobody can read without it.
        check = "true" if table == "decision_changes" else condition
        op.execute(
            f"CREATE POLICY tenant ON {table} TO {ROLE} USING ({condition}) WITH CHECK ({check})"
        )


def downgrade() -> None:
    for function in FORGETTING:
        op.execute(f"ALTER FUNCTION {function}() SECURITY INVOKER RESET search_path")
    for table in (*PARTS, *OWN):
        op.execute(f"DROP POLICY tenant ON {table}")
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
        op.execute(f"REVOKE ALL ON {table} FROM {ROLE}")
    op.execute(f"REVOKE USAGE ON SCHEMA public FROM {ROLE}")
