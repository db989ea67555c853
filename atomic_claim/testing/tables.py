"""The user's table in a database that may be filled: made, filled, and gone afterwards."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import NoReferenceError, SQLAlchemyError
from sqlalchemy.schema import sort_tables

from .database import CommandError, complaint, family, masked
from .interrupts import deferred
from .results import Key
from .rows import (
    Factory,
    JobColumns,
    Maker,
    Row,
    given_rows,
    job_columns,
    needs_parent_each,
    parents_needed,
    tables_of,
)

CURE = (
    "; rows are made to satisfy NOT NULL, types, lengths, enums, foreign keys and unique "
    "constraints: give others with factory="
)
Added = dict[sa.Table, list[sa.RowMapping]]
"""The rows that were inserted, by table, parents first: their keys, and the referenced columns."""

# A table that another transaction reads cannot be dropped; the wait is bounded.
LOCK_TIMEOUTS = {
    "postgresql": "SET LOCAL lock_timeout = '10s'",
    "mysql": "SET SESSION lock_wait_timeout = 10",
}


@contextmanager
def filled(
    engine: sa.Engine, given: Any, count: int, *, factory: Factory | None, existing: bool
) -> Iterator[frozenset[Key]]:
    """Create the table with a number of free rows and their parents; undo it afterwards.

    It yields the primary keys of the rows, as text.

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
    jobs = tables_of(given)
    tables = _with_parents(jobs)
    there = _there(engine, tables)
    if there and not existing:
        raise CommandError(
            f"{masked(engine.url)} holds a table {there[0].fullname!r} already, and this fills it "
            "and has its rows claimed: name a database of its own with url=, or say "
            "use_existing_table=True"
        )
    rows = given_rows(factory, count)
    new = [table for table in tables if table not in there]
    added: Added = {}
    try:
        with deferred():
            _make(engine, new)
        cure = CURE if factory is None else ""
        added = _fill(engine, _rows_needed(jobs, rows), job_columns(given), cure)
        yield frozenset(tuple(map(str, _key(jobs[0], row))) for row in added[jobs[0]])
    finally:
        with deferred():
            _undo(engine, new, added)


def _key(table: sa.Table, row: sa.RowMapping) -> tuple[Any, ...]:
    return tuple(row[column] for column in table.primary_key.columns)


def _there(engine: sa.Engine, tables: Iterable[sa.Table]) -> list[sa.Table]:
    look = sa.inspect(engine)
    try:
        return [table for table in tables if look.has_table(table.name, schema=table.schema)]
    except SQLAlchemyError as error:
        raise complaint(f"cannot look into {masked(engine.url)}", error, engine.url) from None


def _with_parents(tables: Sequence[sa.Table]) -> list[sa.Table]:
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


def _make(engine: sa.Engine, tables: Sequence[sa.Table]) -> None:
    try:
        with engine.begin() as connection:
            for table in tables:
                table.metadata.create_all(connection, tables=[table])
    except (SQLAlchemyError, NotImplementedError) as error:
        with suppress(SQLAlchemyError):
            _drop(engine, tables)
        names = ", ".join(table.fullname for table in tables)
        found = complaint(f"cannot make {names} in {masked(engine.url)}", error, engine.url)
        said = re.sub(r"Compiler <[^>]*>", engine.dialect.name, str(found))
        raise CommandError(f"{said}; name a database that can with url=") from None


def _drop(engine: sa.Engine, tables: Sequence[sa.Table]) -> None:
    with engine.begin() as connection:
        if (statement := LOCK_TIMEOUTS.get(family(engine.url))) is not None:
            connection.execute(sa.text(statement))
        for table in reversed(tables):
            table.metadata.drop_all(connection, tables=[table])


def _undo(engine: sa.Engine, new: Sequence[sa.Table], added: Added) -> None:
    """Drop what was made, and delete what was put into tables that were there."""
    before = sys.exception()
    try:
        with engine.begin() as connection:
            for table, rows in reversed(added.items()):
                key = {f"key_{place}": each for place, each in enumerate(table.primary_key.columns)}
                values = [{name: row[column] for name, column in key.items()} for row in rows]
                same = [column == sa.bindparam(name) for name, column in key.items()]
                if table not in new:
                    connection.execute(sa.delete(table).where(*same), values)
        _drop(engine, new)
    except SQLAlchemyError as error:
        names = ", ".join(table.fullname for table in dict.fromkeys([*new, *added]))
        what = f"cannot clean up {names} in {masked(engine.url)} (do it yourself)"
        found = complaint(what, error, engine.url)
        if isinstance(before, CommandError):
            found = CommandError(f"{before}; then: {found}")
        raise found from None


def _rows_needed(jobs: Sequence[sa.Table], given: Sequence[Row]) -> dict[sa.Table, Sequence[Row]]:
    """Return the values given for each row to insert, by table, parents first."""
    rows: dict[sa.Table, Sequence[Row]] = {}
    graph: dict[sa.Table, set[sa.Table]] = {}

    def need(table: sa.Table, wanted: Sequence[Row]) -> None:
        if len(wanted) > len(rows.get(table, ())):
            rows[table] = wanted
            keys = parents_needed(table, wanted[0])
            graph[table] = {key.referred_table for key in keys}
            for key in keys:
                each = any(map(needs_parent_each, key.columns))
                need(key.referred_table, [{}] * (len(wanted) if each else 1))

    for table in jobs:
        need(table, given)
    try:
        return {table: rows[table] for table in TopologicalSorter(graph).static_order()}
    except CycleError as error:
        raise CommandError(
            f"{error.args[1][0].fullname} needs itself by its foreign keys: give rows with factory="
        ) from None


def _fill(
    engine: sa.Engine, needed: Mapping[sa.Table, Sequence[Row]], known: JobColumns, cure: str
) -> Added:
    """Insert rows in each table; return their primary keys and the columns that others refer to."""
    added: Added = {}
    referred = {key.column for table in needed for key in table.foreign_keys}
    with engine.begin() as connection:
        for table, given in needed.items():
            parents = {
                element.parent: [row[element.column] for row in added[key.referred_table]]
                for key in parents_needed(table, given[0])
                for element in key.elements
            }
            maker = Maker(table, known, parents)
            read = [c for c in table.columns if c.primary_key or c in referred]
            try:
                added[table] = _insert(connection, maker, given, read)
            except (SQLAlchemyError, TypeError, ValueError) as error:
                raise CommandError(f"{_complaint(table, error, engine.url)}{cure}") from None
    return added


def _insert(
    connection: sa.Connection, maker: Maker, given: Sequence[Row], read: Sequence[sa.Column[Any]]
) -> list[sa.RowMapping]:
    """Insert a row for each of those given; return these columns of them, by primary key."""
    table = maker.table
    query = sa.select(*read).order_by(*table.primary_key.columns)
    before = {_key(table, row) for row in connection.execute(query).mappings()}
    numbers = [part for key in before for part in key if isinstance(part, int)]
    maker.first = 1 + max(numbers, default=len(before))
    rows = [
        maker.row(place, {name: value for name, value in each.items() if name in table.columns})
        for place, each in enumerate(given)
    ]
    # One INSERT takes rows that name the same columns.
    for _, same in groupby(rows, key=frozenset):
        connection.execute(table.insert(), list(same))
    found = connection.execute(query).mappings()
    new = [row for row in found if _key(table, row) not in before]
    if len(new) != len(rows):
        raise CommandError(
            f"{table.fullname} has {len(new)} new rows, expected {len(rows)}: stop what else "
            "writes to it"
        )
    return new


def _complaint(table: sa.Table, error: Exception, url: sa.URL) -> CommandError:
    checks = [
        str(each.sqltext)
        for each in [*table.constraints, *(c for col in table.columns for c in col.constraints)]
        if isinstance(each, sa.CheckConstraint) and not getattr(each, "_type_bound", False)
    ]
    said = f", which has the CHECK {'; '.join(checks)}" if checks else ""
    return complaint(f"cannot fill {table.fullname}{said}", error, url)
