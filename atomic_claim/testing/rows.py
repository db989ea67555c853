"""Rows that a table accepts, made from what it says of its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from itertools import islice
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.orm import InstanceState, Mapper

from atomic_claim.columns import mapper_of as mapper_of_class
from atomic_claim.errors import ClaimError
from atomic_claim.inference import STATUSES, WAITING_VALUES, plain_type, read_columns
from atomic_claim.job_table import JobTable, job_table_of
from atomic_claim.sql_elements import InlineLiteral

from .database import CommandError
from .names import where

Row = dict[str, Any]
"""A row's values, by the keys of its columns."""

FREE = "pending"
# How a value is made of a number and a time.
MAKE: Mapping[Any, Callable[[int, datetime], Any]] = {
    bool: lambda *_: False,
    int: lambda number, _: number,
    float: lambda number, _: float(number),
    Decimal: lambda number, _: Decimal(number),
    bytes: lambda number, _: str(number).encode(),
    datetime: lambda _, moment: moment,
    date: lambda _, moment: moment.date(),
    time: lambda _, moment: moment.time(),
    timedelta: lambda *_: timedelta(0),
    list: lambda *_: [],
}


@dataclass(frozen=True)
class JobColumns:
    """The known meaning of a job table's columns, used to make free and due rows.

    Attributes:
        free: what the columns hold in a free row.
        times: the columns that say from when a job may run, and what comes first.
        counts: the columns that count attempts.
    """

    free: Mapping[sa.Column[Any], Any]
    times: Set[Any]
    counts: Set[Any]


def job_columns(given: Any) -> JobColumns:
    """Read the columns' meaning from a ``JobTable``, a mapped class or a table, else by name."""
    free: dict[sa.Column[Any], Any] = {}
    mapper = mapper_of(given)
    # A class that shares its table with others.
    if mapper is not None and isinstance(mapper.polymorphic_on, sa.Column):
        free[mapper.polymorphic_on] = mapper.polymorphic_identity
    try:
        found = job_table_of(given)
    except ClaimError:
        roles = [read_columns(table) for table in tables_of(given)]
        said = [each.arguments for each in roles]
    else:
        said = [{"due": found.due, "order": found.order, "attempts": found.attempts}]
        for column, value in found.released.items():
            known = value.value if isinstance(value, InlineLiteral) else value
            if not isinstance(known, sa.ClauseElement):
                free[column] = known
    return JobColumns(
        free,
        {column for roles in said for column in (roles.get("due"), *roles.get("order", ()))},
        {roles.get("attempts") for roles in said},
    )


@dataclass
class Maker:
    """Makes the rows of one table.

    Attributes:
        table: the table.
        known: what its columns mean.
        parents: the values of referenced columns, by the column that refers to them, a list each.
        first: the number of the first row; those before it are there already.
    """

    table: sa.Table
    known: JobColumns
    parents: Mapping[sa.Column[Any], list[Any]]
    first: int = 1

    def __post_init__(self) -> None:
        self._unique = frozenset(_unique_columns(self.table))
        self._begin = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)

    def row(self, place: int, given: Mapping[str, Any]) -> Row:
        """Build the row with this number, counted from 0; given values override generated ones.

        Raises:
            CommandError: nothing is known that a column would take.
        """
        made = dict(given)
        for column in self.table.columns:
            if column.key not in made:
                made.update(self._value(column, place))
        return made

    def _value(self, column: sa.Column[Any], place: int) -> Row:
        """Return the value of the column, by its key, or nothing if it needs none."""
        if column in self.parents:
            values = self.parents[column]
            return {column.key: values[place % len(values)]}
        if column in self.known.free:
            return {column.key: self.known.free[column]}
        # A default that is the same in every row is of no use where rows must differ.
        is_constant = getattr(column.default, "is_scalar", False)
        if _is_filled(column) and not (column in self._unique and is_constant):
            return {}
        type_ = plain_type(column.type)
        if column in self.known.times and isinstance(type_, sa.DateTime):
            return {column.key: self._time(type_, place)}
        if column.nullable:
            if isinstance(type_, sa.Boolean):
                return {column.key: False}
            return {column.key: 0} if column in self.known.counts else {}
        return {column.key: self._made(column, type_, place)}

    def _time(self, type_: Any, place: int) -> datetime:
        # As old as a day, so that it has come in every zone, and in the order of the rows.
        found = self._begin + timedelta(seconds=place)
        return found if getattr(type_, "timezone", False) else found.replace(tzinfo=None)

    def _made(self, column: sa.Column[Any], type_: Any, place: int) -> Any:
        number = self.first + place if column in self._unique else 0
        if isinstance(type_, sa.Enum):
            return _enum_value(type_)
        if isinstance(type_, sa.Uuid):
            return uuid4() if type_.as_uuid else str(uuid4())
        if isinstance(type_, sa.JSON):
            return {}
        with suppress(NotImplementedError):
            if type_.python_type is str:
                return self._text(column, getattr(type_, "length", None), number)
            if (make := MAKE.get(type_.python_type)) is not None:
                return make(number, self._time(type_, place))
        raise CommandError(
            f"no value is known for {column.table.fullname}.{column.name}, a {column.type!r} that "
            "is not nullable and has no default: give rows with factory="
        )

    def _text(self, column: sa.Column[Any], length: int | None, number: int) -> str:
        if column not in self._unique:
            return (FREE if column.name in STATUSES else column.name)[:length]
        digits = str(number)
        if length is not None and len(digits) > length:
            raise CommandError(
                f"{column.table.fullname}.{column.name} holds {length} characters and is unique: "
                f"too few for this number of rows; use fewer with jobs=, or give rows with factory="
            )
        prefix = column.name[: None if length is None else max(0, length - len(digits) - 1)]
        return f"{prefix}-{digits}" if prefix else digits


def _enum_value(type_: Any) -> Any:
    """Return the enum value named like a free state, or the first."""
    values = type_.enum_class or type_.enums
    members = {getattr(value, "name", value).lower(): value for value in values}
    free = [members[name] for name in WAITING_VALUES if name in members]
    return next(iter(free or members.values()))


def _is_filled(column: sa.Column[Any]) -> bool:
    """Check whether the database or SQLAlchemy fills the column if no value is given."""
    return (
        column.default is not None
        or column.server_default is not None
        or column.identity is not None
        or column.computed is not None
        or column is column.table.autoincrement_column
    )


def _unique_columns(table: sa.Table) -> Iterator[sa.Column[Any]]:
    """Columns that must differ from row to row, so that every unique constraint is satisfied."""
    indexes = [index.columns for index in table.indexes if index.unique]
    unique = [each.columns for each in table.constraints if isinstance(each, sa.UniqueConstraint)]
    for columns in [*indexes, *unique, table.primary_key.columns]:
        referring = [column for column in columns if column.foreign_keys]
        own = [c for c in columns if c not in referring and c.name not in STATUSES]
        fit = [c for c in own if not isinstance(plain_type(c.type), (sa.Boolean, sa.Enum))]
        yield from fit[:1] or referring[:1]


def needs_parent_each(column: sa.Column[Any]) -> bool:
    """Check whether every row needs a different parent in this column."""
    return isinstance(column.table, sa.Table) and column in set(_unique_columns(column.table))


def parents_needed(table: sa.Table, given: Iterable[str]) -> list[sa.ForeignKeyConstraint]:
    """Return the foreign keys for which rows need parents, but those of the columns given."""
    return [
        constraint
        for constraint in table.foreign_key_constraints
        if not any(column.nullable for column in constraint.columns)
        and not {column.key for column in constraint.columns} <= {*given}
    ]


Factory = Callable[..., Any]


def given_rows(factory: Factory | None, count: int) -> list[dict[str, Any]]:
    """Call a user's factory for each row; return the values by column key.

    Args:
        factory: called with the row's number, from 1, it returns a dictionary or a mapped object;
            or called with how many there are to be, it returns or yields as many of them.
        count: how many rows.

    Raises:
        CommandError: it gives something else, or too few.
    """
    if factory is None:
        return [{} for _ in range(count)]
    try:
        found = [factory(1)]
        if _values(found[0]) is not None:
            found += [factory(number) for number in range(2, count + 1)]
        elif isinstance(found[0], Iterable) and not isinstance(found[0], str):
            found = list(islice(factory(count), count))
    # Whatever a user's function raises, its author reads one line of it.
    except Exception as error:  # noqa: BLE001
        raise CommandError(f"factory= failed: {where(error)}") from None
    rows = [row for each in found if (row := _values(each)) is not None]
    if len(rows) < count:
        wrong = [each for each in found if _values(each) is None]
        raise CommandError(
            f"factory= gave {f'{wrong[0]!r}' if wrong else f'{len(found)} rows'}; expected, called "
            "with the number of a row, a dictionary of its columns or a mapped object, or, called "
            f"with a count, a list of {count}"
        )
    return rows


def _values(given: Any) -> dict[str, Any] | None:
    if isinstance(given, Mapping):
        return {str(getattr(name, "key", name)): value for name, value in given.items()}
    state = sa.inspect(given, raiseerr=False)
    if not isinstance(state, InstanceState):
        return None
    found = {}
    for attribute in state.mapper.column_attrs:
        if attribute.key in state.dict:
            for column in attribute.columns:
                found[column.key] = state.dict[attribute.key]
    return found


def mapper_of(given: Any) -> Mapper[Any] | None:
    """Return the mapper of a mapped class, or of the class of a ``JobTable``."""
    return given.mapper if isinstance(given, JobTable) else mapper_of_class(given)


def tables_of(given: Any) -> list[sa.Table]:
    """Return the tables that hold the jobs, several for joined table inheritance.

    Raises:
        CommandError: it is no table.
    """
    mapper = mapper_of(given)
    table = given.table if isinstance(given, JobTable) else given
    found: list[Any] = [table] if mapper is None else list(mapper.tables)
    if not all(isinstance(table, sa.Table) for table in found):
        raise CommandError(
            f"table= is {given!r}; expected a Table, a mapped class or a JobTable of a module"
        )
    if not found[0].primary_key.columns:
        raise CommandError(
            f"table {found[0].fullname!r} has no primary key, so its rows cannot be told apart: "
            "add one, or declare the unique columns with PrimaryKeyConstraint(...)"
        )
    return found
