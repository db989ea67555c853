"""Make locked_jobs fit for its claims.

Revision ID: a14867a71e0e
Revises:

Made by: atomic-claim migration --table examples.migrations.tables:locked --add lease,token,attempts
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "a14867a71e0e"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what the claims need."""
    dialect = op.get_context().dialect.name
    # Until when a claim holds: a dead worker's row comes back.
    op.add_column(
        "locked_jobs",
        sa.Column(
            "lease_until",
            sa.DateTime(timezone=True).with_variant(mysql.TIMESTAMP(fsp=6), "mysql", "mariadb"),
            nullable=True,
        ),
    )
    # Whose claim it is: a late worker cannot overwrite its successor's result.
    op.add_column("locked_jobs", sa.Column("claim_token", sa.String(32), nullable=True))
    # How often a row was claimed.
    op.add_column("locked_jobs", sa.Column("attempts", sa.Integer(), nullable=True))
    # Serves the search for free rows, in the order of the claim.
    if dialect == "postgresql":
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute(
                "CREATE INDEX CONCURRENTLY locked_jobs_claim_free ON locked_jobs (created_at) "
                "WHERE locked_at IS NULL AND finished_at IS NULL"
            )
    elif dialect in {"mysql", "mariadb"}:
        op.execute(
            "ALTER TABLE locked_jobs ADD INDEX locked_jobs_claim_free (locked_at, finished_at, "
            "created_at), ALGORITHM=INPLACE, LOCK=NONE"
        )
    elif dialect == "sqlite":
        op.execute(
            "CREATE INDEX locked_jobs_claim_free ON locked_jobs (locked_at, finished_at, "
            "created_at) WHERE locked_at IS NULL AND finished_at IS NULL"
        )
    # Serves the search for rows whose lease has run out.
    if dialect == "postgresql":
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute(
                "CREATE INDEX CONCURRENTLY locked_jobs_claim_expired ON locked_jobs (lease_until) "
                "WHERE locked_at IS NOT NULL AND finished_at IS NULL"
            )
    elif dialect in {"mysql", "mariadb"}:
        op.execute(
            "ALTER TABLE locked_jobs ADD INDEX locked_jobs_claim_expired (finished_at, "
            "lease_until), ALGORITHM=INPLACE, LOCK=NONE"
        )
    elif dialect == "sqlite":
        op.execute(
            "CREATE INDEX locked_jobs_claim_expired ON locked_jobs (finished_at, lease_until) "
            "WHERE locked_at IS NOT NULL AND finished_at IS NULL"
        )


def downgrade() -> None:
    """Take it away again."""
    dialect = op.get_context().dialect.name
    # Undo: serves the search for rows whose lease has run out.
    if dialect == "postgresql":
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute("DROP INDEX CONCURRENTLY locked_jobs_claim_expired")
    elif dialect in {"mysql", "mariadb"}:
        op.execute(
            "ALTER TABLE locked_jobs DROP INDEX locked_jobs_claim_expired, ALGORITHM=INPLACE, "
            "LOCK=NONE"
        )
    elif dialect == "sqlite":
        op.execute("DROP INDEX locked_jobs_claim_expired")
    # Undo: serves the search for free rows, in the order of the claim.
    if dialect == "postgresql":
        # CONCURRENTLY stops no writer, and cannot be part of a transaction.
        with op.get_context().autocommit_block():
            op.execute("DROP INDEX CONCURRENTLY locked_jobs_claim_free")
    elif dialect in {"mysql", "mariadb"}:
        op.execute(
            "ALTER TABLE locked_jobs DROP INDEX locked_jobs_claim_free, ALGORITHM=INPLACE, "
            "LOCK=NONE"
        )
    elif dialect == "sqlite":
        op.execute("DROP INDEX locked_jobs_claim_free")
    # Undo: how often a row was claimed.
    op.drop_column("locked_jobs", "attempts")
    # Undo: whose claim it is: a late worker cannot overwrite its successor's result.
    op.drop_column("locked_jobs", "claim_token")
    # Undo: until when a claim holds: a dead worker's row comes back.
    op.drop_column("locked_jobs", "lease_until")
