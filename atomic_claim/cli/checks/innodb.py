"""Checks specific to MySQL and MariaDB that no query of their catalog makes."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from atomic_claim.backends import backend_for
from atomic_claim.backends.innodb import SKEW

from .findings import Finding, Level, Patient, Reading

DENIED = {1142, 1143}
HIDDEN = {
    "mysql": ("is_visible = 'NO'", "VISIBLE"),
    "mariadb": ("ignored = 'YES'", "NOT IGNORED"),
}


def hidden_indexes(patient: Patient) -> dict[str, str]:
    """Return the statements that bring back the indexes that the planner is to ignore, by name."""
    condition, word = HIDDEN[patient.product]
    query = text(
        "SELECT DISTINCT index_name FROM information_schema.statistics "  # noqa: S608 - constants
        f"WHERE {condition} AND table_schema = COALESCE(:schema, DATABASE()) AND table_name = :name"
    )
    given = {"schema": patient.table.schema, "name": patient.table.name}
    return {
        name: f"ALTER TABLE {patient.name} ALTER INDEX {patient.quoted(name)} {word}"
        for name in patient.connection.scalars(query, given)
    }


def rights(reading: Reading) -> Iterator[Finding]:
    """Check the right to write by EXPLAIN of an UPDATE, which requires it."""
    patient = reading.patient
    names = [patient.quoted(column.name) for column in reading.written]
    changes = ", ".join(f"{name} = {name}" for name in names)
    update = f"EXPLAIN UPDATE {patient.name} SET {changes} WHERE 1 = 0"  # noqa: S608 - not run
    # Not in the transaction that only reads, which refuses it to everybody.
    with patient.connection.engine.connect() as connection:
        user = str(connection.scalar(text("SELECT CURRENT_USER()")))
        try:
            connection.execute(text(update.replace(":", r"\:")))
        except DBAPIError as error:
            if error.orig is None or error.orig.args[0] not in DENIED:
                raise
        else:
            yield Finding("rights", Level.FINE, "the user may claim")
            return
    name, _, host = user.rpartition("@")
    yield Finding(
        "rights",
        Level.PROBLEM,
        f"{user} may not UPDATE all columns that a claim writes",
        "a claim locks its rows and marks them, so that this user's claims fail",
        "look as the user of the workers, or grant the right:",
        (f"GRANT UPDATE ON {patient.name} TO '{name}'@'{host}'",),
    )


def clock(reading: Reading) -> Iterator[Finding]:
    """Report naive datetime columns if the session's time zone is not UTC."""
    connection = reading.patient.connection
    names = backend_for(connection.dialect).naive_columns(reading.job_table)
    skew = int(connection.scalar(select(SKEW)) or 0) if names else 0
    if skew:
        yield naive_times(names, f"{skew / 3600:+g} h from UTC")


def naive_times(names: list[str], zone: str) -> Finding:
    """Return the finding for naive datetime columns in a session whose time zone is not UTC."""
    return Finding(
        "time zone",
        Level.PROBLEM,
        f"the session's is {zone}, and {', '.join(names)} hold times without one",
        "a job would be due hours too early or too late, so that every claim is refused",
        'say what they hold: JobTable(naive_times="utc") or JobTable(naive_times="server")',
    )
