"""The checks of a table that a database makes once, and the hints for reading it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Dialect, Select, Table, Update, inspect

from atomic_claim.errors import ClaimError

Statement = TypeVar("Statement", bound=Select[Any] | Update)
VIEW = (
    "{!r} is a view, and exclusive keys are locked in the name of a table: declare the table that "
    "the view reads"
)

checked: WeakKeyDictionary[Dialect, set[tuple[Any, ...]]] = WeakKeyDictionary()
"""The checks of tables that were passed, by the dialect of their database."""


def check_once(
    connection: Connection, table: Table, check: Callable[[Connection, Table, str | None], None]
) -> None:
    """Check a table with its schema, once for each dialect object of SQLAlchemy's."""
    schema = connection.schema_for_object(table)
    known = checked.setdefault(connection.dialect, set())
    if (passed := (check, schema, table.name)) not in known:
        check(connection, table, schema)
        known.add(passed)


def refuse_view(connection: Connection, table: Table, schema: str | None) -> None:
    """Refuse a view, whose keys would be locked by another name than its table's."""
    if table.name in inspect(connection).get_view_names(schema):
        raise ClaimError(VIEW.format(table.fullname))


def hinted(statement: Statement, table: Any, hints: Mapping[str, str]) -> Statement:
    """Add a hint for each dialect to the statement; other dialects do not render it."""
    for dialect_name, hint in hints.items():
        with_hint = statement.with_hint(selectable=table, text=hint, dialect_name=dialect_name)
        statement = cast("Statement", with_hint)
    return statement
