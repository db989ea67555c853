"""Columns and tables as users name them: by ``Column``, mapped attribute or name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, ColumnElement, Table
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.sql.elements import ClauseElement, ColumnClause

from .errors import ClaimError
from .orm import is_mapper

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper


def mapper_of(given: Any) -> Mapper[Any] | None:
    """Return the mapper of a mapped class, or None for anything else."""
    if not isinstance(given, type):
        return None
    mapper: Any = sa_inspect(given, raiseerr=False)
    return mapper if is_mapper(mapper) else None


def tables_of(given: Any) -> list[Table]:
    """Return the tables of a ``Table`` or a mapped class.

    Raises:
        ClaimError: it is neither.
    """
    mapper = mapper_of(given)
    tables: list[Any] = [given] if mapper is None else list(mapper.tables)
    if not all(isinstance(table, Table) for table in tables):
        raise ClaimError(
            f"{given!r} is not a table: pass a Table, a mapped class or a JobTable"
            + (" (is the class mapped?)" if isinstance(given, type) else "")
        )
    return tables


def clause(given: Any) -> Any:
    """Return the SQL expression of a mapped attribute, and anything else as it is."""
    return given.__clause_element__() if hasattr(given, "__clause_element__") else given


def column_of(table: Table, mapper: Mapper[Any] | None, given: Any, role: str) -> Column[Any]:
    """Return the table's column for a name, a column or a mapped attribute.

    A name is a column's key, else an attribute's, else a column's own name.

    Raises:
        ClaimError: the table has no such column; the message names the ``role``.
    """
    named = clause(given)
    if isinstance(given, str):
        names: list[Mapping[str, Any]] = [dict(table.columns)]
        if mapper is not None:
            names.append(dict(mapper.columns))
        names.append({column.name: column for column in table.columns})
        named = next((each[given] for each in names if given in each), None)
    found = table.corresponding_column(named) if isinstance(named, ColumnClause) else None
    if not isinstance(found, Column):
        raise ClaimError(
            f"{role}={given!s} is not a column of table {table.fullname!r}, which has: "
            + ", ".join(column.name for column in table.columns)
        )
    return found


def table_with(tables: Sequence[Table], wanted: Iterable[Any]) -> Table:
    """Return the first of the tables that has one of the columns.

    Raises:
        ClaimError: none of them has.
    """
    wanted = list(wanted)
    for table in tables:
        names = {name for c in table.columns for name in (c.name, c.key)}
        for each in wanted:
            if each in names if isinstance(each, str) else table.c.contains_column(clause(each)):
                return table
    raise ClaimError(
        f"none of the tables {', '.join(t.fullname for t in tables)} has the state column "
        f"{wanted!r}"
    )


def listed(given: Any) -> tuple[Any, ...]:
    """Return what may be given alone or as several, as a tuple."""
    if given is None:
        return ()
    if isinstance(given, Iterable) and not isinstance(given, (str, ClauseElement)):
        return tuple(given)
    return (given,)


def term_of(given: Any) -> ColumnElement[Any]:
    """Return an ORDER BY term.

    Raises:
        ClaimError: it is no expression.
    """
    term = clause(given)
    if not isinstance(term, ColumnElement):
        raise ClaimError(
            f"order={given!r}: expected a column, its name, or an expression such as "
            "table.c.priority.desc()"
        )
    return term
