"""The guard inside the database as a step of a migration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Column, Dialect, MetaData, Table
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import ClauseElement, ColumnClause

from atomic_claim.errors import ClaimError
from atomic_claim.guard import Guard, guard
from atomic_claim.job_table import JobTable
from atomic_claim.testing.database import CommandError, one_line

from .operations import AddedColumn, Step
from .texts import dialect_of

COMMENT = (
    "Refuses a second claim of a job. The loop must claim in one transaction, and roll it back "
    "after the error."
)


def guard_step(
    job_table: JobTable,
    columns: Sequence[AddedColumn],
    names: Sequence[str],
    *,
    full_rows: bool,
) -> Step:
    """Build the migration step that creates the guard's triggers.

    Args:
        job_table: what the columns mean.
        columns: those that the same migration adds, which the guard then knows.
        names: the databases that are meant: all of them are guarded, or none is.
        full_rows: whether some program writes whole rows.

    Raises:
        CommandError: the table cannot be guarded on one of the databases.
    """
    made: dict[str, Guard] = {}
    refused: dict[str, ClaimError] = {}
    for name in names:
        dialect = dialect_of(name)
        whole = _grown(job_table, columns, dialect) if columns else job_table
        try:
            made[name] = guard(whole, dialect, full_rows=full_rows)
        except ClaimError as error:
            refused[name] = error
    if refused:
        said = f"--guard on {', '.join(refused)}: {one_line(next(iter(refused.values())))}"
        if made:
            said += f"; or guard the others: {' '.join(f'--dialect {name}' for name in made)}"
        raise CommandError(said)
    up = {name: each.upgrade for name, each in made.items()}
    down = {name: each.downgrade for name, each in made.items()}
    return Step(COMMENT, up, down)


def _grown(job_table: JobTable, columns: Sequence[AddedColumn], dialect: Dialect) -> JobTable:
    """Return a copy of the job table as it will be after the migration."""
    own: Table = job_table.table
    table = own.to_metadata(MetaData())
    for column in columns:
        # Of several types for several databases the one that the database has.
        table.append_column(Column(column.name, column.type_.dialect_impl(dialect)))

    def replaced(element: Any, **_: Any) -> Any:
        found = own.corresponding_column(element) if isinstance(element, ColumnClause) else None
        return None if found is None else table.columns[found.key]

    def moved(given: Any) -> Any:
        if isinstance(given, Mapping):
            return {moved(column): moved(value) for column, value in given.items()}
        if isinstance(given, tuple):
            return tuple(moved(each) for each in given)
        if isinstance(given, ClauseElement):
            return visitors.replacement_traverse(given, {}, replaced)
        return given

    names = [each.name for each in fields(job_table) if each.init and each.name != "table"]
    said: dict[str, Any] = {name: moved(getattr(job_table, name)) for name in names}
    said |= {column.role: column.name for column in columns}
    return JobTable(table, **said)
