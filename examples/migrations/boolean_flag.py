"""Make flagged_jobs fit for its claims.

Revision ID: a12b1d660268
Revises:

Made by: atomic-claim migration --table examples.migrations.tables:flagged
"""

from alembic import op

revision = "a12b1d660268"
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
                "CREATE INDEX CONCURRENTLY flagged_jobs_claim_free ON flagged_jobs (created_at) "
                "WHERE processing = false AND finished_at IS NULL"
            )
    elif dialect in {"mysql", "mariadb"}:
        # Serves the search for free rows, in the order of the claim.
        op.execute(
            "ALTER TABLE flagged_jobs ADD INDEX flagged_jobs_claim_free (processing, finished_at, "
            "created_at), ALGORITHM=INPLACE, LOCK=NONE"
        )
    elif dialect == "sqlite":
        # Serves the search for free rows, in the order of the claim.
        op.execute(
            "CREATE INDEX flagged_jobs_claim_free ON flagged_jobs (processing, finished_at, "
            "created_at) WHERE processing = 0 AND finished_at IS NULL"
        )


def downgrade() -> None:
    """Take it away again."""
    dialect = op.get_context().dialect.name
    if dialect == "postgresql":
        # Undo: serves the search for free rows, in the order of the claim.
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute("DROP INDEX CONCURRENTLY flagged_jobs_claim_free")
    elif dialect in {"mysql", "mariadb"}:
        # Undo: serves the search for free rows, in the order of the claim.
        op.execute(
            "ALTER TABLE flagged_jobs DROP INDEX flagged_jobs_claim_free, ALGORITHM=INPLACE, "
            "LOCK=NONE"
        )
    elif dialect == "sqlite":
        # Undo: serves the search for free rows, in the order of the claim.
        op.execute("DROP INDEX flagged_jobs_claim_free")
