"""Rows that a table accepts, made from what it says of its columns."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import islice
from typing import Any

from sqlalchemy import (
    ARRAY,
    JSON,
    Boolean,
    Column,
    Date,
    DateTime,
    Enum,
    Float,
    ForeignKeyConstraint,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    String,
    Table,
    Time,
    UniqueConstraint,
    Uuid,
)
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.orm import InstanceState, Mapper

from atomic_claim.errors import ClaimError
from atomic_claim.inference import (
    STATUSES,
    WAITING_VALUES,
    plain_type,
    read_columns,
)
from atomic_claim.job_table import JobTable, job_table_of
from atomic_claim.sql_elements import InlineLiteral

from .database import CommandError
from .names import where

Row = dict[str, Any]
"""A row's values, by the keys of its columns."""

FREE = "pending"
PLAIN = (bool, int, float, str, bytes, type(None))


@dataclass(frozen=True)
class JobColumns:
    """The known meaning of a job table's columns, used to make free and due rows.

    Attributes:
        free: what the columns hold in a free row.
        times: the columns that say from when a job may run, and what comes first.
        counts: the columns that count attempts.
    """

    free: Mapping[Column[Any], Any] = field(default_factory=dict)
    times: frozenset[Column[Any]] = frozenset()
    counts: frozenset[Column[Any]] = frozenset()


def job_columns(given: Any) -> JobColumns:
    """Read the columns' meaning from a ``JobTable``, a mapped class or a table, else by name."""
    tables, kind = tables_of(given), _discriminator(given)
    try:
        found = job_table_of(given)
    except ClaimError:
        return _by_name(tables, kind)
    times = (found.due, *(term for term in found.order if isinstance(term, Column)))
    released = {column: _plain(value) for column, value in found.released.items()}
    return JobColumns(
        {**kind, **{column: value for column, (known, value) in released.items() if known}},
        frozenset(column for column in times if column is not None),
        frozenset([found.attempts] if found.attempts is not None else []),
    )


def _by_name(tables: Iterable[Table], kind: dict[Column[Any], Any]) -> JobColumns:
    """Infer what the column names reveal of a table that cannot be read with certainty."""
    times: list[Column[Any]] = []
    counts: list[Column[Any]] = []
    for table in tables:
        said = read_columns(table, {column: frozenset([column.name]) for column in table.columns})
        found = said.arguments
        times += [*([found["due"]] if "due" in found else []), *found.get("order", ())]
        counts += [found["attempts"]] if "attempts" in found else []
    return JobColumns(kind, frozenset(times), frozenset(counts))


def _discriminator(given: Any) -> dict[Column[Any], Any]:
    """Return the discriminator's value for a class that shares its table with others."""
    mapper: Any = sa_inspect(given.entity if isinstance(given, JobTable) else given, raiseerr=False)
    if not isinstance(mapper, Mapper) or not isinstance(mapper.polymorphic_on, Column):
        return {}
    return {mapper.polymorphic_on: mapper.polymorphic_identity}


def _plain(value: Any) -> tuple[bool, Any]:
    """Return whether a declared value is known in Python, and the value."""
    if isinstance(value, InlineLiteral):
        return True, value.value
    name = getattr(value, "__visit_name__", None)
    if name in {"true", "false"}:
        return True, name == "true"
    return isinstance(value, PLAIN), value


@dataclass
class Maker:
    """Makes the rows of one table.

    Attributes:
        table: the table.
        known: what its columns mean.
        parents: the values of referenced columns, by the column that refers to them, a list each.
        first: the number of the first row; those before it are there already.
    """

    table: Table
    known: JobColumns
    parents: Mapping[Column[Any], list[Any]]
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
                known, value = self._value(column, place)
                if known:
                    made[column.key] = value
        return made

    def _value(self, column: Column[Any], place: int) -> tuple[bool, Any]:
        """Return whether the column needs a value, and the value."""
        if column in self.parents:
            values = self.parents[column]
            return True, values[place % len(values)]
        if column in self.known.free:
            return True, self.known.free[column]
        if _is_filled(column) and not (column in self._unique and _is_constant(column)):
            return False, None
        type_ = plain_type(column.type)
        if column in self.known.times and isinstance(type_, DateTime):
            return True, self._time(column, place)
        if column.nullable:
            if isinstance(type_, Boolean):
                return True, False
            return column in self.known.counts, 0
        return True, self._made(column, type_, place)

    def _time(self, column: Column[Any], place: int) -> datetime:
        # As old as a day, so that it has come in every zone, and in the order of the rows.
        found = self._begin + timedelta(milliseconds=1000 * place)
        return found if getattr(plain_type(column.type), "timezone", False) else _naive(found)

    def _made(self, column: Column[Any], type_: Any, place: int) -> Any:
        number = self.first + place if column in self._unique else 0
        for kinds, make in MAKERS:
            if isinstance(type_, kinds):
                return make(self, column, type_, place, number)
        raise CommandError(
            f"no value is known for {column.table.fullname}.{column.name}, a {column.type!r} that "
            "is not nullable and has no default: give rows with factory="
        )

    def _text(self, column: Column[Any], length: int | None, number: int) -> str:
        if column not in self._unique:
            text = FREE if column.name in STATUSES else column.name
            return text if length is None or len(text) <= length else text[:length]
        digits = str(number)
        room = len(digits) if length is None else length - len(digits) - 1
        if length is not None and len(digits) > length:
            raise CommandError(
                f"{column.table.fullname}.{column.name} holds {length} characters and is unique: "
                f"too few for so many rows; use fewer with jobs=, or give rows with factory="
            )
        prefix = column.name if length is None else column.name[: max(0, room)]
        return f"{prefix}-{digits}" if prefix else digits


def _naive(time: datetime) -> datetime:
    return time.replace(tzinfo=None)


def _enum_value(type_: Any) -> Any:
    """Return the enum value named like a free state, or the first."""
    if type_.enum_class is not None:
        members = dict(type_.enum_class.__members__)
    else:
        members = {text: text for text in type_.enums}
    for name in WAITING_VALUES:
        for member, value in members.items():
            if member.lower() == name:
                return value
    return next(iter(members.values()))


Make = Callable[[Maker, Column[Any], Any, int, int], Any]
# Enum is a String to SQLAlchemy, and so goes before it.
MAKERS: list[tuple[Any, Make]] = [
    (Boolean, lambda *_: False),
    (Enum, lambda _m, _c, type_, _p, _n: _enum_value(type_)),
    (Integer, lambda _m, _c, _t, _p, number: number),
    ((Float, Numeric), lambda _m, _c, type_, _p, n: Decimal(n) if type_.asdecimal else float(n)),
    (
        Uuid,
        lambda _m, _c, type_, _p, _n: uuid.uuid4() if type_.as_uuid else str(uuid.uuid4()),
    ),
    (String, lambda maker, column, type_, _p, n: maker._text(column, type_.length, n)),  # noqa: SLF001
    (DateTime, lambda maker, column, _t, place, _n: maker._time(column, place)),  # noqa: SLF001
    (Date, lambda maker, column, _t, place, _n: maker._time(column, place).date()),  # noqa: SLF001
    (Time, lambda maker, column, _t, place, _n: maker._time(column, place).time()),  # noqa: SLF001
    (Interval, lambda *_: timedelta(0)),
    (LargeBinary, lambda _m, _c, _t, _p, number: str(number).encode()),
    (JSON, lambda *_: {}),
    (ARRAY, lambda *_: []),
]


def _is_filled(column: Column[Any]) -> bool:
    """Check whether the database or SQLAlchemy fills the column if no value is given."""
    return (
        column.default is not None
        or column.server_default is not None
        or column.identity is not None
        or column.computed is not None
        or column is column.table.autoincrement_column
    )


def _is_constant(column: Column[Any]) -> bool:
    """Check whether the column's default is known to be the same in every row."""
    return bool(getattr(column.default, "is_scalar", False))


def _unique_columns(table: Table) -> Iterator[Column[Any]]:
    """Columns that must differ from row to row, so that every unique constraint is satisfied."""
    unique = [list(index.columns) for index in table.indexes if index.unique]
    unique += [
        list(each.columns) for each in table.constraints if isinstance(each, UniqueConstraint)
    ]
    for columns in [*unique, list(table.primary_key.columns)]:
        referring = [column for column in columns if column.foreign_keys]
        own = [c for c in columns if c not in referring and c.name not in STATUSES]
        fit = [c for c in own if not isinstance(plain_type(c.type), (Boolean, Enum))]
        yield from fit[:1] or referring[:1]


def needs_parent_each(column: Column[Any]) -> bool:
    """Check whether every row needs a different parent in this column."""
    return isinstance(column.table, Table) and column in set(_unique_columns(column.table))


def required(constraint: ForeignKeyConstraint) -> bool:
    """Check whether rows need a parent for this foreign key."""
    return not any(column.nullable for column in constraint.columns)


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
        found = _given(factory, count)
    # Whatever a user's function raises, its author reads one line of it.
    except Exception as error:  # noqa: BLE001
        raise CommandError(f"factory= failed: {where(error)}") from None
    rows = [_values(each) for each in found]
    if len(rows) < count or any(row is None for row in rows):
        wrong = next((each for each in found if _values(each) is None), None)
        what = f"{len(rows)} rows" if wrong is None else f"{wrong!r}"
        raise CommandError(
            f"factory= gave {what}; expected, called with the number of a row, a dictionary of "
            f"its columns or a mapped object, or, called with a count, so many of them ({count})"
        )
    return [row for row in rows if row is not None]


def _given(factory: Factory, count: int) -> list[Any]:
    first = factory(1)
    if _values(first) is not None:
        return [first, *(factory(number) for number in range(2, count + 1))]
    if isinstance(first, Iterable) and not isinstance(first, (str, bytes)):
        return list(islice(iter(factory(count)), count))
    return [first]


def _values(given: Any) -> dict[str, Any] | None:
    if isinstance(given, Mapping):
        return {str(getattr(name, "key", name)): value for name, value in given.items()}
    state = sa_inspect(given, raiseerr=False)
    if not isinstance(state, InstanceState):
        return None
    found = {}
    for attribute in state.mapper.column_attrs:
        if attribute.key in state.dict:
            for column in attribute.columns:
                found[column.key] = state.dict[attribute.key]
    return found


def tables_of(given: Any) -> list[Table]:
    """Return the tables that hold the jobs, several for joined table inheritance.

    Raises:
        CommandError: it is no table.
    """
    if isinstance(given, JobTable):
        given = given.entity or given.table
    mapper = sa_inspect(given, raiseerr=False)
    found: list[Any] = list(mapper.tables) if isinstance(mapper, Mapper) else [given]
    if not found or not all(isinstance(table, Table) for table in found):
        raise CommandError(
            f"table= is {given!r}; expected a Table, a mapped class or a JobTable of a module"
        )
    if not found[0].primary_key.columns:
        raise CommandError(
            f"table {found[0].fullname!r} has no primary key, so its rows cannot be told apart"
        )
    return found
