"""Make status_jobs fit for its claims.

Revision ID: 92d1c1e63636
Revises:

Made by: atomic-claim migration --table examples.migrations.tables:status
"""

from alembic import op

revision = "92d1c1e63636"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what the claims need."""
    dialect = op.get_context().dialect.name
    if dialect == "postgresql":
        # Serves the search for free rows, in the order of the claim.
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute(
                "CREATE INDEX CONCURRENTLY status_jobs_claim_free ON status_jobs (priority DESC, "
                "created_at, run_at) WHERE status = 'waiting'"
            )
        # Serves the search behind free rows that are not due, or have spent their attempts.
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute(
                "CREATE INDEX CONCURRENTLY status_jobs_claim_due ON status_jobs (run_at NULLS "
                "FIRST, priority DESC, created_at) WHERE status = 'waiting'"
            )
    elif dialect in {"mysql", "mariadb"}:
        # Serves the search for free rows, in the order of the claim.
        op.execute(
            "ALTER TABLE status_jobs ADD INDEX status_jobs_claim_free (status, priority DESC, "
            "created_at, run_at), ALGORITHM=INPLACE, LOCK=NONE"
        )
        # Serves the search behind free rows that are not due, or have spent their attempts.
        op.execute(
            "ALTER TABLE status_jobs ADD INDEX status_jobs_claim_due (status, run_at, priority "
            "DESC, created_at), ALGORITHM=INPLACE, LOCK=NONE"
        )
    elif dialect == "sqlite":
        # Serves the search for free rows, in the order of the claim.
        op.execute(
            "CREATE INDEX status_jobs_claim_free ON status_jobs (status, priority DESC, "
            "created_at, run_at) WHERE status = 'waiting'"
        )
        # Serves the search behind free rows that are not due, or have spent their attempts.
        op.execute(
            "CREATE INDEX status_jobs_claim_due ON status_jobs (status, run_at, priority DESC, "
            "created_at) WHERE status = 'waiting'"
        )


def downgrade() -> None:
    """Take it away again."""
    dialect = op.get_context().dialect.name
    if dialect == "postgresql":
        # Undo: serves the search behind free rows that are not due, or have spent their attempts.
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute("DROP INDEX CONCURRENTLY status_jobs_claim_due")
        # Undo: serves the search for free rows, in the order of the claim.
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute("DROP INDEX CONCURRENTLY status_jobs_claim_free")
    elif dialect in {"mysql", "mariadb"}:
        # Undo: serves the search behind free rows that are not due, or have spent their attempts.
        op.execute(
            "ALTER TABLE status_jobs DROP INDEX status_jobs_claim_due, ALGORITHM=INPLACE, LOCK=NONE"
        )
        # Undo: serves the search for free rows, in the order of the claim.
        op.execute(
            "ALTER TABLE status_jobs DROP INDEX status_jobs_claim_free, ALGORITHM=INPLACE, "
            "LOCK=NONE"
        )
    elif dialect == "sqlite":
        # Undo: serves the search behind free rows that are not due, or have spent their attempts.
        op.execute("DROP INDEX status_jobs_claim_due")
        # Undo: serves the search for free rows, in the order of the claim.
        op.execute("DROP INDEX status_jobs_claim_free")
