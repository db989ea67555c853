"""Make status_jobs fit for its claims.

Revision ID: 7668d00759c0
Revises:

Made by: atomic-claim migration --table examples.migrations.tables:status
"""

from alembic import op

revision = "7668d00759c0"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what the claims need."""
    dialect = op.get_context().dialect.name
    # Serves the search for free rows, in the order of the claim.
    if dialect == "postgresql":
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute(
                "CREATE INDEX CONCURRENTLY status_jobs_claim_free ON status_jobs (priority DESC, "
                "created_at) WHERE status = 'waiting'"
            )
    elif dialect in {"mysql", "mariadb"}:
        op.execute(
            "ALTER TABLE status_jobs ADD INDEX status_jobs_claim_free (status, priority DESC, "
            "created_at, run_at), ALGORITHM=INPLACE, LOCK=NONE"
        )
    elif dialect == "sqlite":
        op.execute(
            "CREATE INDEX status_jobs_claim_free ON status_jobs (status, priority DESC, "
            "created_at, run_at) WHERE status = 'waiting'"
        )


def downgrade() -> None:
    """Take it away again."""
    dialect = op.get_context().dialect.name
    # Undo: serves the search for free rows, in the order of the claim.
    if dialect == "postgresql":
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute("DROP INDEX CONCURRENTLY status_jobs_claim_free")
    elif dialect in {"mysql", "mariadb"}:
        op.execute(
            "ALTER TABLE status_jobs DROP INDEX status_jobs_claim_free, ALGORITHM=INPLACE, "
            "LOCK=NONE"
        )
    elif dialect == "sqlite":
        op.execute("DROP INDEX status_jobs_claim_free")
