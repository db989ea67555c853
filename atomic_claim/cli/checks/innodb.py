"""Checks specific to MySQL and MariaDB."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import select, text

from atomic_claim.backends import backend_for
from atomic_claim.backends.innodb import SKEW

from .findings import Finding, Level, Patient, Reading

VARIABLES = {"mysql": "transaction_isolation", "mariadb": "tx_isolation"}


def checks(patient: Patient) -> Iterator[Finding]:
    """Check the session's isolation level and the table's storage engine."""
    yield _isolation(patient)
    yield from _engine(patient)


def _isolation(patient: Patient) -> Finding:
    variable = VARIABLES[patient.product]
    level = str(patient.connection.scalar(text(f"SELECT @@{variable}"))).replace("-", " ")
    check = "isolation level"
    sql = (f"SET GLOBAL {variable} = 'READ-COMMITTED'",)
    fix = 'create_engine(..., isolation_level="READ COMMITTED"), or, for all new connections:'
    if level == "SERIALIZABLE":
        why = (
            "there InnoDB's plain reads wait for the rows that other workers hold, so that a claim "
            "is refused"
        )
        return Finding(check, Level.PROBLEM, level, why, fix, sql)
    if level == "REPEATABLE READ":
        return Finding(
            "gap locks",
            Level.NOTE,
            f"isolation level {level}, InnoDB's default",
            "a loop that locks by anything but the primary key also locks the gaps between rows, "
            "and no producer can insert there until it commits; a claim in a transaction of yours "
            "reads from its snapshot, so that its order is best effort",
            fix,
            sql,
        )
    return Finding(check, Level.FINE, level)


def _engine(patient: Patient) -> Iterator[Finding]:
    asked = text(
        "SELECT engine FROM information_schema.tables "
        "WHERE table_schema = COALESCE(:schema, DATABASE()) AND table_name = :name"
    )
    given = {"schema": patient.table.schema, "name": patient.table.name}
    engine = patient.connection.scalar(asked, given)
    # A view has none.
    if engine is None:
        return
    if engine.lower() == "innodb":
        yield Finding("storage engine", Level.FINE, engine)
        return
    yield Finding(
        "storage engine",
        Level.PROBLEM,
        engine,
        "it has no row locks that a claim could rest on, so that every claim is refused",
        "convert the table",
        (f"ALTER TABLE {patient.name} ENGINE=InnoDB",),
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
