"""Make locked_jobs fit for its claims.

Revision ID: df26ed2802a4
Revises:

Made by: atomic-claim migration --table examples.migrations.tables:locked --add lease,token,attempts
"""

from alembic import op

revision = "df26ed2802a4"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what the claims need."""
    dialect = op.get_context().dialect.name
    if dialect == "postgresql":
        # Until when a claim holds: a dead worker's row comes back.
        op.execute("ALTER TABLE locked_jobs ADD COLUMN lease_until TIMESTAMP WITH TIME ZONE")
        # Whose claim it is: a late worker cannot overwrite its successor's result.
        op.execute("ALTER TABLE locked_jobs ADD COLUMN claim_token VARCHAR(32)")
        # How often a row was claimed.
        op.execute("ALTER TABLE locked_jobs ADD COLUMN attempts INTEGER")
        # Serves the search for free rows, in the order of the claim.
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute(
                "CREATE INDEX CONCURRENTLY locked_jobs_claim_free ON locked_jobs (created_at) "
                "WHERE locked_at IS NULL AND finished_at IS NULL"
            )
        # Serves the search for rows whose lease has run out.
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute(
                "CREATE INDEX CONCURRENTLY locked_jobs_claim_expired ON locked_jobs (lease_until) "
                "WHERE locked_at IS NOT NULL AND finished_at IS NULL"
            )
    elif dialect in {"mysql", "mariadb"}:
        # Until when a claim holds: a dead worker's row comes back.
        op.execute("ALTER TABLE locked_jobs ADD COLUMN lease_until TIMESTAMP(6) NULL")
        # Whose claim it is: a late worker cannot overwrite its successor's result.
        op.execute("ALTER TABLE locked_jobs ADD COLUMN claim_token VARCHAR(32) NULL")
        # How often a row was claimed.
        op.execute("ALTER TABLE locked_jobs ADD COLUMN attempts INTEGER NULL")
        # Serves the search for free rows, in the order of the claim.
        op.execute(
            "ALTER TABLE locked_jobs ADD INDEX locked_jobs_claim_free (locked_at, finished_at, "
            "created_at), ALGORITHM=INPLACE, LOCK=NONE"
        )
        # Serves the search for rows whose lease has run out.
        op.execute(
            "ALTER TABLE locked_jobs ADD INDEX locked_jobs_claim_expired (finished_at, "
            "lease_until), ALGORITHM=INPLACE, LOCK=NONE"
        )
    elif dialect == "sqlite":
        # Until when a claim holds: a dead worker's row comes back.
        op.execute("ALTER TABLE locked_jobs ADD COLUMN lease_until DATETIME")
        # Whose claim it is: a late worker cannot overwrite its successor's result.
        op.execute("ALTER TABLE locked_jobs ADD COLUMN claim_token VARCHAR(32)")
        # How often a row was claimed.
        op.execute("ALTER TABLE locked_jobs ADD COLUMN attempts INTEGER")
        # Serves the search for free rows, in the order of the claim.
        op.execute(
            "CREATE INDEX locked_jobs_claim_free ON locked_jobs (locked_at, finished_at, "
            "created_at) WHERE locked_at IS NULL AND finished_at IS NULL"
        )
        # Serves the search for rows whose lease has run out.
        op.execute(
            "CREATE INDEX locked_jobs_claim_expired ON locked_jobs (finished_at, lease_until) "
            "WHERE locked_at IS NOT NULL AND finished_at IS NULL"
        )


def downgrade() -> None:
    """Take it away again."""
    dialect = op.get_context().dialect.name
    if dialect == "postgresql":
        # Undo: serves the search for rows whose lease has run out.
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute("DROP INDEX CONCURRENTLY locked_jobs_claim_expired")
        # Undo: serves the search for free rows, in the order of the claim.
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute("DROP INDEX CONCURRENTLY locked_jobs_claim_free")
        # Undo: how often a row was claimed.
        op.execute("ALTER TABLE locked_jobs DROP COLUMN attempts")
        # Undo: whose claim it is: a late worker cannot overwrite its successor's result.
        op.execute("ALTER TABLE locked_jobs DROP COLUMN claim_token")
        # Undo: until when a claim holds: a dead worker's row comes back.
        op.execute("ALTER TABLE locked_jobs DROP COLUMN lease_until")
    elif dialect in {"mysql", "mariadb"}:
        # Undo: serves the search for rows whose lease has run out.
        op.execute(
            "ALTER TABLE locked_jobs DROP INDEX locked_jobs_claim_expired, ALGORITHM=INPLACE, "
            "LOCK=NONE"
        )
        # Undo: serves the search for free rows, in the order of the claim.
        op.execute(
            "ALTER TABLE locked_jobs DROP INDEX locked_jobs_claim_free, ALGORITHM=INPLACE, "
            "LOCK=NONE"
        )
        # Undo: how often a row was claimed.
        op.execute("ALTER TABLE locked_jobs DROP COLUMN attempts")
        # Undo: whose claim it is: a late worker cannot overwrite its successor's result.
        op.execute("ALTER TABLE locked_jobs DROP COLUMN claim_token")
        # Undo: until when a claim holds: a dead worker's row comes back.
        op.execute("ALTER TABLE locked_jobs DROP COLUMN lease_until")
    elif dialect == "sqlite":
        # Undo: serves the search for rows whose lease has run out.
        op.execute("DROP INDEX locked_jobs_claim_expired")
        # Undo: serves the search for free rows, in the order of the claim.
        op.execute("DROP INDEX locked_jobs_claim_free")
        # Undo: how often a row was claimed.
        op.execute("ALTER TABLE locked_jobs DROP COLUMN attempts")
        # Undo: whose claim it is: a late worker cannot overwrite its successor's result.
        op.execute("ALTER TABLE locked_jobs DROP COLUMN claim_token")
        # Undo: until when a claim holds: a dead worker's row comes back.
        op.execute("ALTER TABLE locked_jobs DROP COLUMN lease_until")
