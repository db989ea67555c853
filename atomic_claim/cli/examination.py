"""All checks of a job table, one after the other, on a connection that only reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Engine, Table, inspect
from sqlalchemy.exc import DBAPIError, SAWarning

from atomic_claim.columns import mapper_of
from atomic_claim.errors import ClaimError
from atomic_claim.job_table import JobTable
from atomic_claim.testing.database import CommandError, one_line, server_title
from atomic_claim.testing.names import TableName, load_table

from .checks import catalog, columns, declared, plan, rights, rows
from .checks.findings import Finding, JobCheck, Level, Patient, Reading
from .indexes import INNODB
from .targets import advice, name_of
from .texts import DIALECTS

CLAIM_CHECKS: tuple[JobCheck, ...] = (
    catalog.of_claims,
    rights.of_update,
    declared.types,
    plan.plan,
    declared.states,
    rows.nulls,
    rows.stuck,
    rows.spent,
)
ONLY_READ = {
    **dict.fromkeys(INNODB, "SET SESSION TRANSACTION READ ONLY"),
    "sqlite": "PRAGMA query_only = 1",
}


@dataclass(frozen=True)
class Examination:
    """The result of all checks of one table.

    Attributes:
        server: the database's product and version.
        table: the table's name.
        findings: what every check has found, in order.
        statement: the claim that was explained; none if there is no claim of this table.
    """

    server: str
    table: str
    findings: tuple[Finding, ...]
    statement: str | None

    @property
    def ails(self) -> list[Finding]:
        """Return the findings that are not fine."""
        return [finding for finding in self.findings if finding.level is not Level.FINE]

    def number(self, level: Level) -> int:
        """Count the findings of a level."""
        return sum(finding.level is level for finding in self.findings)


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Yield a read-only connection, and suppress the warnings of reflection."""
    name = engine.dialect.name
    with warnings.catch_warnings():
        # What SQLAlchemy cannot reflect, such as an index on an expression, is looked at otherwise.
        warnings.simplefilter("ignore", SAWarning)
        with engine.connect() as connection:
            if name in ONLY_READ:
                connection.exec_driver_sql(ONLY_READ[name])
                connection.rollback()
            else:
                connection.execution_options(postgresql_readonly=True)
            try:
                yield connection
            finally:
                # Its settings must not return to the pool, and a replica of PostgreSQL cannot
                # restore them.
                connection.invalidate()


def read_without_locks(connection: Connection) -> None:
    """Keep a SERIALIZABLE session of MySQL or MariaDB from waiting for locked rows."""
    if connection.dialect.name in INNODB:
        connection.rollback()
        connection.exec_driver_sql("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        connection.rollback()


def examine(
    engine: Engine,
    spec: TableName,
    stuck_after: timedelta,
    transaction_after: timedelta,
    *more: JobCheck,
) -> Examination:
    """Run all checks.

    Args:
        engine: a database that answers.
        spec: ``MODULE:NAME``, the name of a table, or a declaration in a file of patches.
        stuck_after: how long a job may run without a lease.
        transaction_after: how long a transaction may be open.
        more: further checks, such as ``trial.trial``.

    Raises:
        CommandError: there is no such table, or no such database is known.
    """
    with reading(engine) as connection:
        if connection.dialect.name not in DIALECTS:
            raise CommandError(
                f"doctor knows PostgreSQL, MySQL, MariaDB and SQLite, not {connection.dialect.name}"
            )
        given, table = target(connection, spec)
        patient = Patient(connection, table, stuck_after, transaction_after, name_of(spec))
        server = server_title(connection)
        found = [Finding("database", Level.FINE, server), *columns.key(patient)]
        found += columns.columns(patient)
        job_table, statement = None, None
        if all(finding.level is Level.FINE for finding in found):
            job_table, meaning = columns.read(given)
            found.append(meaning)
        found += catalog.of_database(patient)
        found += rights.of_file(patient)
        read_without_locks(connection)
        if job_table is not None:
            # Of a class in several tables, the one that holds the state.
            claim = Reading(**vars(patient) | {"table": job_table.table}, job_table=job_table)
            statement = _examine_claim(claim, (*CLAIM_CHECKS, *more), found)
    return Examination(server, table.fullname, tuple(found), statement)


def _examine_claim(claim: Reading, checks: Sequence[JobCheck], found: list[Finding]) -> str | None:
    """Add what the checks of a claim find, until one is refused; return the claim's statement."""
    try:
        for check in checks:
            found += check(claim)
        return plan.statement_of(claim)
    except (ClaimError, DBAPIError) as error:
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            raise
        claim.connection.rollback()
        found.append(catalog.finding("refused", found=one_line(error)))
    return None


def target(connection: Connection, spec: TableName) -> tuple[Any, Table]:
    """Resolve ``--table`` to the given object and its table, which must exist in the database.

    Raises:
        CommandError: it is no table, or the database has none of this name.
    """
    name = name_of(spec)
    try:
        given = load_table(spec, connection)
    except ClaimError as error:
        raise CommandError(f"--table {name}: {'; '.join(advice(error))}") from None
    mapper = mapper_of(given)
    found = given.table if isinstance(given, JobTable) else given
    found = found if mapper is None else mapper.local_table
    if not isinstance(found, Table):
        raise CommandError(
            f"--table {name} is {given!r}; expected a Table, a mapped class or a JobTable"
        )
    if not inspect(connection).has_table(found.name, schema=found.schema):
        raise CommandError(f"--table {name}: the database has no table {found.fullname!r}")
    return given, found
