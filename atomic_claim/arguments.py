"""The arguments of one claim, checked against the table's declaration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import Column, ColumnElement
from sqlalchemy.sql.elements import ClauseElement, ColumnClause, False_, True_
from sqlalchemy.sql.selectable import SelectBase

from .errors import ClaimError
from .job_table import JobTable
from .sql_elements import DatabaseTime, InlineLiteral


def check_worker(job_table: JobTable, worker: Any) -> None:
    """Raise if the worker's name is no ``str`` or has no column."""
    if worker is None:
        return
    if not isinstance(worker, str):
        raise ClaimError(f"worker is {worker!r}; expected the worker's name, a str")
    if job_table.worker is None:
        raise ClaimError(
            f"worker={worker!r} needs a column to go to, and {job_table.table.fullname!r} has "
            "none that is known: name it with JobTable(worker=...)"
        )


def check_lease(job_table: JobTable, lease: Any) -> None:
    """Raise if the lease is no ``timedelta`` above zero or has no columns."""
    if lease is None:
        return
    if not isinstance(lease, timedelta) or lease <= timedelta(0):
        raise ClaimError(f"lease is {lease!r}; expected a timedelta above zero")
    for role, type_ in (("lease", "TIMESTAMP NULL"), ("token", "VARCHAR(32) NULL")):
        if getattr(job_table, role) is None:
            raise ClaimError(
                f"lease={lease!r} needs a {role} column, and {job_table.table.fullname!r} has "
                f"none that is known: name it with JobTable({role}=...), or add one: ALTER TABLE "
                f"{job_table.table.fullname} ADD COLUMN claim_{role} {type_}"
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
        declared, value = job_table.claimed[column], values[column]
        if isinstance(declared, DatabaseTime) and value is not None:
            continue
        if not _is_mark(declared, value):
            raise ClaimError(
                f"values sets {column.name!r} to {value!r}, but a claimed row is marked by "
                f"{column.name} = {getattr(declared, 'value', declared)}: leave it out, or "
                "declare another JobTable(claimed=...)"
            )
        del values[column]
    return values


def _is_mark(declared: Any, value: Any) -> bool:
    """Check whether a value given by the call equals the mark that the claim writes."""
    if isinstance(value, ClauseElement) or isinstance(declared, DatabaseTime):
        return False
    if isinstance(declared, (True_, False_)):
        return value is not None and bool(value) == isinstance(declared, True_)
    if isinstance(declared, InlineLiteral):
        return bool(declared.value == value)
    return declared is None and value is None


def conditions(where: Any) -> tuple[Any, ...]:
    """Return the conditions of ``where``, or raise if one is no expression."""
    if where is None:
        return ()
    given = tuple(where) if isinstance(where, (list, tuple)) else (where,)
    for condition in given:
        if not isinstance(condition, ClauseElement) and not hasattr(
            condition, "__clause_element__"
        ):
            raise ClaimError(
                f"where={condition!r}: expected an SQLAlchemy expression such as "
                "table.c.queue == 'mail', or a list of them"
            )
    return given


def order_terms(job_table: JobTable, order_by: Any) -> tuple[ColumnElement[Any], ...]:
    """Return the terms of ``order_by``."""
    given = order_by if isinstance(order_by, (list, tuple)) else (order_by,)
    return tuple(job_table.term(term) for term in given)


def check_tables(job_table: JobTable, clauses: Iterable[Any]) -> None:
    """Refuse columns of other tables, which would multiply the rows or lock too many."""
    mapper = job_table.mapper
    own = list(mapper.tables) if mapper is not None else [job_table.table]
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
    for clause in clauses:
        element = clause.__clause_element__() if hasattr(clause, "__clause_element__") else clause
        if isinstance(element, SelectBase):
            continue
        if isinstance(element, ColumnClause):
            if element.table is not None:
                yield element
        else:
            yield from _outer_columns(element.get_children())
