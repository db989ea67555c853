"""The user's table in a database that may be filled: made, filled, and gone afterwards."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    Column,
    Connection,
    Engine,
    ForeignKeyConstraint,
    Integer,
    Table,
    delete,
    func,
    inspect,
    select,
    text,
    tuple_,
)
from sqlalchemy.exc import CompileError, NoReferenceError, SQLAlchemyError
from sqlalchemy.schema import sort_tables

from .database import CommandError, complaint, masked
from .interrupts import deferred
from .results import Key
from .rows import Factory, JobColumns, Maker, given_rows, job_columns, needs_parent_each, required
from .rows import tables_of as _tables_of

# A table that somebody else looks at cannot be dropped; nobody should wait for ever.
LOCK_TIMEOUTS = {
    "postgresql": "SET LOCAL lock_timeout = '10s'",
    "mysql": "SET SESSION lock_wait_timeout = 10",
    "mariadb": "SET SESSION lock_wait_timeout = 10",
}
MANY = 1000


@dataclass(frozen=True)
class Jobs:
    """The jobs that the workers of a race compete for.

    Attributes:
        keys: the primary keys of the rows, as text.
        table: the table that has the key.
    """

    keys: frozenset[Key]
    table: Table


@contextmanager
def filled(
    engine: Engine, given: Any, count: int, *, factory: Factory | None, existing: bool
) -> Iterator[Jobs]:
    """Create the table with a number of free rows and their parents; undo it afterwards.

    Args:
        engine: the database.
        given: a ``Table``, a mapped class or a ``JobTable``.
        count: how many rows.
        factory: see :func:`~atomic_claim.testing.rows.given_rows`.
        existing: whether tables that are there are used: the rows made are deleted again, and the
            tables stay.

    Raises:
        CommandError: a table is there already, or could not be made, filled or dropped.
    """
    jobs = _tables_of(given)
    tables = _with_parents(jobs)
    there = _there(engine, tables)
    if there and not existing:
        raise CommandError(
            f"{masked(engine.url)} holds a table {there[0].fullname!r} already, and this fills it "
            "and has its rows claimed: name a database of its own with url=, or say "
            "use_existing_table=True"
        )
    new = [table for table in tables if table not in there]
    filling = _Filling(engine, jobs, job_columns(given))
    try:
        with deferred():
            _make(engine, new)
        keys = filling.fill(count, given_rows(factory, count))
        yield Jobs(keys, jobs[0])
    finally:
        with deferred():
            _undo(engine, new, filling.added)


def _there(engine: Engine, tables: Iterable[Table]) -> list[Table]:
    look = inspect(engine)
    try:
        return [table for table in tables if look.has_table(table.name, schema=table.schema)]
    except SQLAlchemyError as error:
        raise complaint(f"cannot look into {masked(engine.url)}", error, engine.url) from None


def _with_parents(tables: Sequence[Table]) -> list[Table]:
    """Return the tables and all that their foreign keys refer to, parents first."""
    found = list(tables)
    for table in found:
        for key in table.foreign_keys:
            try:
                parent = key.column.table
            except NoReferenceError as error:
                raise CommandError(
                    f"{table.fullname} has a foreign key to what its metadata does not have "
                    f"({error}): import the module of that table, too"
                ) from None
            if parent not in found:
                found.append(parent)
    return sort_tables(found)


def _make(engine: Engine, tables: Sequence[Table]) -> None:
    try:
        with engine.begin() as connection:
            for table in tables:
                table.metadata.create_all(connection, tables=[table])
    except (SQLAlchemyError, NotImplementedError) as error:
        with suppress(SQLAlchemyError):
            _drop(engine, tables)
        names = ", ".join(table.fullname for table in tables)
        what = f"cannot make {names} in {masked(engine.url)}"
        if isinstance(error, CompileError):
            said = re.sub(r"Compiler <[^>]*>", engine.dialect.name, str(error))
            raise CommandError(f"{what}: {said}; name a database that can with url=") from None
        raise complaint(what, error, engine.url) from None


def _drop(engine: Engine, tables: Sequence[Table]) -> None:
    with engine.begin() as connection:
        if (statement := LOCK_TIMEOUTS.get(engine.dialect.name)) is not None:
            connection.execute(text(statement))
        for table in reversed(tables):
            table.metadata.drop_all(connection, tables=[table])


def _undo(engine: Engine, new: Sequence[Table], added: Sequence[tuple[Table, list[Any]]]) -> None:
    """Drop what was made, and delete what was put into tables that were there."""
    before = sys.exception()
    try:
        with engine.begin() as connection:
            for table, rows in reversed(added):
                if table not in new:
                    _delete(connection, table, rows)
        _drop(engine, new)
    except SQLAlchemyError as error:
        names = ", ".join(table.fullname for table in dict.fromkeys([*new, *dict(added)], 0))
        what = f"cannot clean up {names} in {masked(engine.url)} (do it yourself)"
        found = complaint(what, error, engine.url)
        if isinstance(before, CommandError):
            found = CommandError(f"{before}; then: {found}")
        raise found from None


def _delete(connection: Connection, table: Table, rows: Sequence[Any]) -> None:
    key = tuple(table.primary_key.columns)
    for start in range(0, len(rows), MANY):
        some = [tuple(row[: len(key)]) for row in rows[start : start + MANY]]
        condition = (
            key[0].in_([each for (each,) in some]) if len(key) == 1 else tuple_(*key).in_(some)
        )
        connection.execute(delete(table).where(condition))


class _Filling:
    """Fills tables, and notes what was added."""

    def __init__(self, engine: Engine, jobs: Sequence[Table], known: JobColumns) -> None:
        self.added: list[tuple[Table, list[Any]]] = []
        self._engine = engine
        self._jobs = jobs
        self._known = known
        self._rows: dict[Table, tuple[tuple[Column[Any], ...], list[Any]]] = {}
        self._table = jobs[0]

    def fill(self, count: int, given: Sequence[dict[str, Any]]) -> frozenset[Key]:
        """Fill the job tables, and before them the parents; the keys of the jobs."""
        try:
            with self._engine.begin() as connection:
                for table in self._jobs:
                    self._table = table
                    self._fill(connection, table, given, ())
        except (SQLAlchemyError, TypeError, ValueError) as error:
            self.added.clear()
            raise self._complaint(error) from None
        key = len(self._jobs[0].primary_key.columns)
        rows = self._rows[self._jobs[0]][1]
        if len(rows) != count:
            raise CommandError(
                f"{self._jobs[0].fullname} has {len(rows)} new rows, expected {count}"
            )
        return frozenset(tuple(str(part) for part in row[:key]) for row in rows)

    def _complaint(self, error: Exception) -> CommandError:
        table = self._table
        checks = [
            str(each.sqltext)
            for each in [*table.constraints, *(c for col in table.columns for c in col.constraints)]
            if isinstance(each, CheckConstraint) and not getattr(each, "_type_bound", False)
        ]
        said = f", which has the CHECK {'; '.join(checks)}" if checks else ""
        found = complaint(f"cannot fill {table.fullname}{said}", error, self._engine.url)
        return CommandError(
            f"{found}; rows are made to satisfy NOT NULL, types, lengths, enums, foreign keys and "
            "unique constraints: give others with factory="
        )

    def _fill(
        self,
        connection: Connection,
        table: Table,
        given: Sequence[dict[str, Any]],
        above: tuple[Table, ...],
    ) -> None:
        """Insert a row for each of those given, and remember them with their primary keys."""
        if table in above:
            raise CommandError(
                f"{table.fullname} needs itself by its foreign keys: give rows with factory="
            )
        parents = self._parents(connection, table, given, above)
        wanted = (*table.primary_key.columns, *self._referenced(table))
        before = {tuple(row) for row in connection.execute(select(*table.primary_key.columns))}
        self._table = table
        maker = Maker(table, self._known, parents, 1 + self._highest(connection, table))
        names = {column.key for column in table.columns}
        rows = [
            maker.row(place, {name: value for name, value in each.items() if name in names})
            for place, each in enumerate(given)
        ]
        for same in _alike(rows):
            connection.execute(table.insert(), same)
        keys = len(table.primary_key.columns)
        query = select(*wanted).order_by(*table.primary_key.columns)
        found = [row for row in connection.execute(query) if tuple(row[:keys]) not in before]
        self._rows[table] = (wanted, found)
        self.added.append((table, found))

    def _parents(
        self,
        connection: Connection,
        table: Table,
        given: Sequence[dict[str, Any]],
        above: tuple[Table, ...],
    ) -> dict[Column[Any], list[Any]]:
        """For each column that refers to others, the values that it can have."""
        found: dict[Column[Any], list[Any]] = {}
        for constraint in table.constraints:
            if not isinstance(constraint, ForeignKeyConstraint) or not required(constraint):
                continue
            if all(column.key in given[0] for column in constraint.columns):
                continue
            parent = constraint.referred_table
            if parent is table:
                continue
            if parent not in self._rows:
                each = any(needs_parent_each(column) for column in constraint.columns)
                self._fill(
                    connection, parent, [{} for _ in (given if each else [0])], (*above, table)
                )
            wanted, rows = self._rows[parent]
            for element in constraint.elements:
                place = [column.key for column in wanted].index(element.column.key)
                found[element.parent] = [row[place] for row in rows]
        return found

    def _referenced(self, table: Table) -> list[Column[Any]]:
        """Return the columns outside the primary key that these tables' foreign keys refer to."""
        tables = _with_parents(self._jobs)
        found = {key.column for each in tables for key in each.foreign_keys}
        return [c for c in table.columns if c in found and not c.primary_key]

    @staticmethod
    def _highest(connection: Connection, table: Table) -> int:
        """Return the highest number in the primary key, or else the number of rows."""
        numbers = [c for c in table.primary_key.columns if isinstance(c.type, Integer)]
        query = select(func.max(numbers[0]) if numbers else func.count()).select_from(table)
        return int(connection.scalar(query) or 0)


def _alike(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Group the rows by the columns that they name, as one INSERT requires."""
    groups: dict[frozenset[str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(frozenset(row), []).append(row)
    yield from groups.values()
