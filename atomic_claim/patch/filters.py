"""A legacy call's own filter, data and sort, as SQLAlchemy's expressions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, or_
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import BooleanClauseList, ClauseElement, ColumnClause
from sqlalchemy.sql.selectable import FromClause

from atomic_claim import predicates
from atomic_claim.errors import ClaimError, PatchError
from atomic_claim.job_table import JobTable

from .selects import speaks_only_of

Operator = Callable[[Any, Any], ColumnElement[bool]]
OPERATORS: Mapping[str, Operator] = {
    "equals": lambda column, value: column == value,
    "not_equals": lambda column, value: column.is_distinct_from(value),
    "in": lambda column, value: column.in_(value),
    "not_in": lambda column, value: column.not_in(value),
    "exists": lambda column, value: column.is_not(None) if value else column.is_(None),
    "less_than": lambda column, value: column < value,
    "less_than_equal": lambda column, value: column <= value,
    "greater_than": lambda column, value: column > value,
    "greater_than_equal": lambda column, value: column >= value,
    "like": lambda column, value: column.contains(value, autoescape=True),
}
LISTS = (list, tuple, set, frozenset)


def conditions(job_table: JobTable, given: Any) -> list[ColumnElement[bool]]:
    """Convert a filter to a list of expressions that must all hold.

    Args:
        job_table: whose columns a dictionary names.
        given: an expression, a list of filters, or a dictionary: of columns to values (None is
            NULL, a list any of its values), or to dictionaries of the operators that Payload
            has (``{"wait_until": {"less_than": now}}``); under ``"and"`` and ``"or"`` stand lists
            of such dictionaries.

    Raises:
        PatchError: an operator or the filter itself is not understood.
        ClaimError: a column is not one of the table's.
    """
    if given is None:
        return []
    if isinstance(given, Mapping):
        return [each for name, value in given.items() for each in _named(job_table, name, value)]
    if isinstance(given, (list, tuple)):
        return [each for part in given for each in conditions(job_table, part)]
    if hasattr(given, "__clause_element__"):
        given = given.__clause_element__()
    if not isinstance(given, ClauseElement) or isinstance(given, Select):
        raise PatchError(
            f"where is {given!r}; expected an SQLAlchemy expression, a dictionary of columns to "
            "values, or a list of them"
        )
    return [given]  # type: ignore[list-item]


def _named(job_table: JobTable, name: Any, value: Any) -> list[ColumnElement[bool]]:
    if isinstance(name, str) and name.lower() in {"and", "or"}:
        parts = [and_(*each) for part in value if (each := conditions(job_table, part))]
        join = and_ if name.lower() == "and" else or_
        return [join(*parts)] if parts else []
    column = job_table.column(name, "where")
    if not isinstance(value, Mapping):
        operator = "in" if isinstance(value, LISTS) else "equals"
        return [OPERATORS[operator](column, value)]
    if unknown := set(value) - set(OPERATORS):
        raise PatchError(
            f"where has {', '.join(map(repr, sorted(unknown)))} for {name!r}; the operators are "
            f"{', '.join(OPERATORS)}"
        )
    return [OPERATORS[operator](column, wanted) for operator, wanted in value.items()]


def beside_the_lease(
    job_table: JobTable, given: Iterable[ColumnElement[bool]]
) -> list[ColumnElement[bool]]:
    """Relax the conditions so that a row with an expired lease meets those on the state.

    A legacy filter asks for what is free (``status = 'pending'``), which a dead worker's row no
    longer bears; what it asks of other columns stands.
    """
    if job_table.lease is None:
        return list(given)
    state, others = parted(given, job_table.table, job_table)
    return [*others, or_(and_(*state), predicates.is_running(job_table))] if state else others


def parted(
    given: Iterable[Any], place: FromClause, job_table: JobTable
) -> tuple[list[Any], list[Any]]:
    """Split conditions into those on columns that a claim writes, and all others.

    Args:
        given: the conditions.
        place: the table, or the alias of it, whose columns they use.
        job_table: what a claim writes.
    """
    names = written(job_table)
    state: list[Any] = []
    others: list[Any] = []
    for condition in conjuncts_of(given):
        used = {each.name for each in visitors.iterate(condition) if isinstance(each, ColumnClause)}
        is_state = not used.isdisjoint(names) and speaks_only_of(condition, place)
        (state if is_state else others).append(condition)
    return state, others


def conjuncts_of(given: Iterable[ColumnElement[bool]]) -> Iterator[ColumnElement[bool]]:
    """Yield the conditions with every AND split into its parts."""
    for condition in given:
        if isinstance(condition, BooleanClauseList) and condition.operator is operators.and_:
            yield from conjuncts_of(condition.clauses)
        else:
            yield condition


def written(job_table: JobTable) -> set[str]:
    """Return the names of the columns that a claim writes."""
    columns = [*job_table.claimed, *job_table.stamps, job_table.worker, job_table.token]
    columns += [job_table.lease, job_table.attempts]
    return {column.name for column in columns if column is not None}


def order(job_table: JobTable, given: Any) -> list[ColumnElement[Any]] | None:
    """Convert a sort to terms: expressions, or column names with ``-`` for descending.

    Several are a list, or names with commas between them.

    Raises:
        ClaimError: a column is not one of the table's.
    """
    if given is None or (isinstance(given, (str, *LISTS)) and not given):
        return None
    if isinstance(given, str):
        given = [part.strip() for part in given.split(",")]
    if not isinstance(given, (list, tuple)):
        given = [given]
    return list(job_table.terms(given))


def lease(given: Any) -> timedelta | None:
    """Convert a lease from a timedelta or seconds."""
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return timedelta(seconds=given)
    if given is not None and not isinstance(given, timedelta):
        raise ClaimError(f"lease is {given!r}; expected a timedelta, or seconds")
    return given
