"""Checks specific to PostgreSQL that no query of its catalog makes."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, Engine, text

from atomic_claim.backends import backend_for
from atomic_claim.backends.postgresql import UTC_NAMES

from .findings import Finding, Level, Reading
from .innodb import naive_times


def clock(reading: Reading) -> Iterator[Finding]:
    """Report naive datetime columns if the session's time zone is not UTC."""
    connection = reading.patient.connection
    names = backend_for(connection.dialect).naive_columns(reading.job_table)
    zone = str(connection.scalar(text("SELECT current_setting('TimeZone')")))
    if names and zone.lower() not in UTC_NAMES:
        yield naive_times(names, zone)


def pooling(engine: Engine) -> Iterator[Finding]:
    """Report a pooler that assigns server sessions per transaction, such as PgBouncer.

    No connection tells. But of two that are open at once, both to the server, neither has the
    other's process, and none its own process changed.
    """
    with engine.connect() as one, engine.connect() as other:
        seen = [_process(one), _process(other), _process(one)]
    if seen[0] == seen[2] != seen[1]:
        return
    yield Finding(
        "connection pooling",
        Level.NOTE,
        "a pooler hands out the server's sessions by transaction, as PgBouncer's "
        "pool_mode=transaction does",
        "what a session is told does not last, and a statement that a driver has prepared may not "
        "be there in the next transaction; a claim of its own is one transaction, and safe",
        "have psycopg prepare nothing: create_engine(..., connect_args={'prepare_threshold': "
        "None}, poolclass=NullPool); or let the pooler do it (PgBouncer 1.21 and later: "
        "max_prepared_statements = 200)",
    )


def _process(connection: Connection) -> int:
    """Return the server process id of a transaction, and end the transaction."""
    found = connection.scalar(text("SELECT pg_backend_pid()"))
    connection.rollback()
    return int(found or 0)
