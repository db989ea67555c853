"""Make payload_jobs fit for its claims.

Revision ID: d7c2c4d4fef9
Revises:

Made by: atomic-claim migration --table examples.migrations.tables:payload_jobs
"""

from alembic import op

revision = "d7c2c4d4fef9"
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
                "CREATE INDEX CONCURRENTLY payload_jobs_claim_free ON payload_jobs (created_at, "
                "wait_until) WHERE processing = false AND completed_at IS NULL AND has_error IS "
                "NOT true"
            )
        # Serves the search behind free rows that are not due, or have spent their attempts.
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute(
                "CREATE INDEX CONCURRENTLY payload_jobs_claim_due ON payload_jobs (wait_until "
                "NULLS FIRST, created_at) WHERE processing = false AND completed_at IS NULL AND "
                "has_error IS NOT true"
            )
    elif dialect in {"mysql", "mariadb"}:
        # Serves the search for free rows, in the order of the claim.
        op.execute(
            "ALTER TABLE payload_jobs ADD INDEX payload_jobs_claim_free (processing, completed_at, "
            "created_at, wait_until), ALGORITHM=INPLACE, LOCK=NONE"
        )
        # Serves the search behind free rows that are not due, or have spent their attempts.
        op.execute(
            "ALTER TABLE payload_jobs ADD INDEX payload_jobs_claim_due (processing, completed_at, "
            "wait_until, created_at), ALGORITHM=INPLACE, LOCK=NONE"
        )
    elif dialect == "sqlite":
        # Serves the search for free rows, in the order of the claim.
        op.execute(
            "CREATE INDEX payload_jobs_claim_free ON payload_jobs (processing, completed_at, "
            "created_at, wait_until) WHERE processing = 0 AND completed_at IS NULL AND has_error "
            "IS NOT 1"
        )
        # Serves the search behind free rows that are not due, or have spent their attempts.
        op.execute(
            "CREATE INDEX payload_jobs_claim_due ON payload_jobs (processing, completed_at, "
            "wait_until, created_at) WHERE processing = 0 AND completed_at IS NULL AND has_error "
            "IS NOT 1"
        )


def downgrade() -> None:
    """Take it away again."""
    dialect = op.get_context().dialect.name
    if dialect == "postgresql":
        # Undo: serves the search behind free rows that are not due, or have spent their attempts.
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute("DROP INDEX CONCURRENTLY payload_jobs_claim_due")
        # Undo: serves the search for free rows, in the order of the claim.
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute("DROP INDEX CONCURRENTLY payload_jobs_claim_free")
    elif dialect in {"mysql", "mariadb"}:
        # Undo: serves the search behind free rows that are not due, or have spent their attempts.
        op.execute(
            "ALTER TABLE payload_jobs DROP INDEX payload_jobs_claim_due, ALGORITHM=INPLACE, "
            "LOCK=NONE"
        )
        # Undo: serves the search for free rows, in the order of the claim.
        op.execute(
            "ALTER TABLE payload_jobs DROP INDEX payload_jobs_claim_free, ALGORITHM=INPLACE, "
            "LOCK=NONE"
        )
    elif dialect == "sqlite":
        # Undo: serves the search behind free rows that are not due, or have spent their attempts.
        op.execute("DROP INDEX payload_jobs_claim_due")
        # Undo: serves the search for free rows, in the order of the claim.
        op.execute("DROP INDEX payload_jobs_claim_free")
