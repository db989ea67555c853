"""The arguments of one claim, checked against the table's declaration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sqlalchemy import Column
from sqlalchemy.sql.elements import ClauseElement, ColumnClause
from sqlalchemy.sql.selectable import SelectBase

from .columns import as_sql, clause, listed, tables_of
from .errors import ClaimError
from .job_table import JobTable
from .roles import check_duration
from .sql_elements import DatabaseTime
from .state_values import declared, is_same


def check_worker(job_table: JobTable, worker: Any) -> None:
    """Raise if the worker's name is no ``str`` or has no column."""
    if worker is None:
        return
    if not isinstance(worker, str):
        raise ClaimError(f"worker is {worker!r}; expected the worker's name, a str")
    job_table.needed("worker", f"worker={worker!r}")


def check_lease(job_table: JobTable, lease: Any) -> None:
    """Raise if the lease is no ``timedelta`` above zero or has no columns."""
    column = job_table.lease
    if lease is not None:
        check_duration("lease", lease)
        for role in ("lease", "token"):
            job_table.needed(role, f"lease={lease!r}")
    elif column is not None and (column is job_table.state or not column.nullable):
        reason = "is the state" if column is job_table.state else "is NOT NULL"
        raise ClaimError(
            f"{job_table.table.fullname}.{column.name} holds the lease and {reason}, so every "
            "claim needs lease=..., a timedelta"
        )


def checked_values(job_table: JobTable, given: Mapping[Any, Any]) -> dict[Column[Any], Any]:
    """Return the call's own values, or raise if they undo the mark of the claim."""
    values = job_table.values(given, "values")
    if job_table.exclusive_by in values:
        raise ClaimError(
            f"values sets {job_table.exclusive_by.name!r}, the key by which claims exclude each "
            "other: change it before or after the claim"
        )
    for column in list(values):
        if column not in job_table.claimed:
            continue
        mark, value = job_table.claimed[column], values[column]
        if isinstance(mark, DatabaseTime) and value is not None:
            continue
        written = value if value is None else declared(column, value, "values", job_table.now)
        if not is_same(mark, written):
            raise ClaimError(
                f"values sets {column.name!r} to {value!r}, but a claimed row is marked by "
                f"{column.name} = {getattr(mark, 'value', mark)}: leave it out, or "
                "declare another JobTable(claimed=...)"
            )
        del values[column]
    return values


def conditions_of(where: Any) -> tuple[Any, ...]:
    """Return the conditions of ``where``, or raise if one is no expression."""
    example = "an SQLAlchemy expression such as table.c.queue == 'mail', or a list of them"
    return tuple(as_sql(each, "where", example, ClauseElement) for each in listed(where))


def check_tables(job_table: JobTable, clauses: Iterable[Any]) -> None:
    """Refuse columns of other tables, which would multiply the rows or lock too many."""
    own = tables_of(job_table.entity or job_table.table)
    for column in _outer_columns(clauses):
        if not any(table.columns.contains_column(column) for table in own):
            name, other = job_table.table.fullname, getattr(column.table, "name", column.table)
            raise ClaimError(
                f"{column} is a column of {other}, and the claim is from {name} alone: use a "
                f"correlated subquery, such as exists().where({other}.c.job_id == "
                f"{name}.c.{job_table.key[0].key})"
            )


def _outer_columns(clauses: Iterable[Any]) -> Iterator[ColumnClause[Any]]:
    """Yield the columns of the clauses themselves, without those of their subqueries."""
    for each in clauses:
        element = clause(each)
        if isinstance(element, SelectBase):
            continue
        if isinstance(element, ColumnClause):
            if element.table is not None:
                yield element
        else:
            yield from _outer_columns(element.get_children())
