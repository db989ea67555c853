"""Columns and tables as users name them: by ``Column``, mapped attribute or name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.sql.elements import ClauseElement, ColumnClause

from .errors import ClaimError

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper

T = TypeVar("T")


def mapper_of(given: Any) -> Mapper[Any] | None:
    """Return the mapper of a mapped class, or None for anything else."""
    found: Any = sa.inspect(given, raiseerr=False) if isinstance(given, type) else None
    return found  # type: ignore[no-any-return]


def tables_of(given: Any) -> list[sa.Table]:
    """Return the tables of a ``Table`` or a mapped class.

    Raises:
        ClaimError: it is neither.
    """
    mapper = mapper_of(given)
    tables: list[Any] = [given] if mapper is None else list(mapper.tables)
    if not all(isinstance(table, sa.Table) for table in tables):
        raise ClaimError(
            f"{given!r} is not a table: pass a Table, a mapped class or a JobTable"
            + (" (is the class mapped?)" if isinstance(given, type) else "")
        )
    return tables


def by_name(table: sa.Table, mapper: Mapper[Any] | None) -> dict[str, Any]:
    """Return the columns by their keys, else by attributes, else by their own names."""
    found: dict[str, Any] = {column.name: column for column in table.columns}
    found |= dict(mapper.columns) if mapper is not None else {}
    return found | dict(table.columns)


def clause(given: Any) -> Any:
    """Return the SQL expression of a mapped attribute, and anything else as it is."""
    return given.__clause_element__() if hasattr(given, "__clause_element__") else given


def column_of(table: sa.Table, mapper: Mapper[Any] | None, given: Any) -> sa.Column[Any] | None:
    """Return the table's column for a name, a column or a mapped attribute, or None.

    A name is a column's key, else an attribute's, else a column's own name.
    """
    named = clause(given)
    if isinstance(given, str):
        named = by_name(table, mapper).get(given)
    found = table.corresponding_column(named) if isinstance(named, ColumnClause) else None
    return found if isinstance(found, sa.Column) else None


def listed(given: Any) -> tuple[Any, ...]:
    """Return what may be given alone or as several, as a tuple."""
    if given is None:
        return ()
    if isinstance(given, Iterable) and not isinstance(given, (str, ClauseElement)):
        return tuple(given)
    return (given,)


def as_sql(given: Any, role: str, example: str, kind: type[T]) -> T:
    """Return a mapped attribute or an expression of this kind as an expression.

    Raises:
        ClaimError: it is none.
    """
    if isinstance(found := clause(given), kind):
        return found
    raise ClaimError(f"{role}={given!r}: expected {example}")
