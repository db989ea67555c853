"""The values that mark a row as free, claimed or ended: completed from types, and as SQL."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from datetime import datetime
from itertools import product
from typing import Any

from sqlalchemy import Column, ColumnElement, or_
from sqlalchemy.schema import ColumnDefault
from sqlalchemy.sql import functions, visitors
from sqlalchemy.sql.elements import ClauseElement, False_, TextClause, True_
from sqlalchemy.sql.selectable import SelectBase
from sqlalchemy.types import Boolean, DateTime, Enum, Integer, String, TypeDecorator, TypeEngine

from .columns import clause, listed
from .errors import AmbiguousTable, ClaimError
from .inference import HELD, NOW, default_text, is_flag, members_of, plain_type
from .roles import check_writable, highest
from .sql_elements import DatabaseTime, InlineLiteral

UNSET: Any = ...
Values = Mapping[Column[Any], Any]
CONSTANTS: Mapping[type[Any], bool] = {True_: True, False_: False}
"""The values of SQL's booleans, in which form they are declared."""
FLAG_TEXTS = {True: ("1", "true", "b'1"), False: ("0", "false", "b'0")}
"""The texts of a flag's default."""
UNSTORABLE = re.compile("[\0\ud800-\udfff]")


EXCLUSIVE: Mapping[str, tuple[str, ...]] = {
    "claimed": ("free", "done", "failed", "withdrawn"),
    "free": ("done", "failed", "withdrawn"),
    "done": ("failed",),
    "released": ("claimed", "done", "failed", "withdrawn"),
}
"""By mark, the other marks that its rows must not bear."""


def check_marks(marks: Mapping[str, Sequence[Values]]) -> None:
    """Raise if rows that bear one mark bear another that excludes it, where values compare.

    Args:
        marks: by role, the mappings of values that mark a row, each on its own. There are none for
            ``free`` if an expression says which rows are free.
    """
    for one, other in ((one, other) for one, others in EXCLUSIVE.items() for other in others):
        for given, wanted in product(marks[one], marks[other]):
            if wanted and _has(given, wanted):
                common = ", ".join(f"{c.name} = {_shown(value)}" for c, value in wanted.items())
                raise ClaimError(
                    f"{one} and {other} have {common} in common, so a {one} row would count as "
                    f"{other}: let them differ in the value of a column"
                )
    for released, (state, *_) in product(marks["released"], marks["free"][:1]):
        if state in released and not any(_has(released, each) for each in marks["free"]):
            raise ClaimError(
                f"released writes {_shown(released[state])} to {state}, which is not free, so a "
                "released row would never be claimed: write one of the values of free"
            )


def _has(values: Values, wanted: Values) -> bool:
    return all(c in values and is_same(values[c], value) for c, value in wanted.items())


def check_free_changes(free: ColumnElement[bool], written: Collection[Column[Any]]) -> None:
    """Raise if the condition of a free row depends on no column that a claim writes."""
    parts = list(visitors.iterate(free))
    columns = {part for part in parts if isinstance(part, Column)}
    if any(isinstance(part, (SelectBase, TextClause)) for part in parts) or not columns:
        return
    if columns.isdisjoint(written):
        raise ClaimError(
            f"free={free} depends on no column that a claim writes, so a claimed row would stay "
            "free: let claimed write a column of that expression"
        )


def check_defaults(withdrawn: Values, now: Callable[[Column[Any]], Any]) -> None:
    """Raise if a fresh row bears a value that withdraws it, by its column's own default.

    Columns whose conventional names say that they hold a row back at first may do so.
    """
    for column, value in withdrawn.items():
        if _is_default(column, value, now) and not any(
            column.name in each for each in HELD.values()
        ):
            raise ClaimError(
                f"withdrawn has {_shown(value)} in {column.name!r}, which is the column's default, "
                "so no fresh row would ever be claimed: name a value that takes a row out of the "
                "queue, or say with free=<expression> when a row may run"
            )


def _is_default(column: Column[Any], value: Any, now: Callable[[Column[Any]], Any]) -> bool:
    default, text = column.default, default_text(column)
    if isinstance(value, DatabaseTime):
        return default is not None or text not in {"", "null"}
    if isinstance(default, ColumnDefault) and default.is_scalar:
        return is_same(declared(column, default.arg, "default", now), value)
    stored = _stored(value) if isinstance(value, InlineLiteral) else None
    texts = FLAG_TEXTS[stored] if isinstance(stored, bool) else (str(stored).lower(),)
    # PostgreSQL's has the type behind it.
    return default is None and text.partition("'::")[0] in texts


def is_same(one: Any, other: Any) -> bool:
    """Check whether two declared values are known to be equal; a time equals any other time."""
    if isinstance(one, InlineLiteral) and isinstance(other, InlineLiteral):
        return bool(_stored(one) == _stored(other))
    if isinstance(one, ClauseElement) and isinstance(other, ClauseElement):
        times = isinstance(one, DatabaseTime) and isinstance(other, DatabaseTime)
        return times or one.compare(other)
    return one is None and other is None


def _stored(literal_: InlineLiteral) -> Any:
    """Return the value as the column holds it: of a member of an enum, its name."""
    members, value = members_of(literal_.type), literal_.value
    return next((name for name, member in members.items() if member is value), value)


def _shown(value: Any) -> str:
    if isinstance(value, DatabaseTime):
        return "func.now()"
    return repr(value.value) if isinstance(value, InlineLiteral) else str(value)


def _expected(type_: TypeEngine[Any], value: Any) -> str | None:
    """Describe what a column of the type holds; return None if the value is such."""
    type_, held, expected = plain_type(type_), True, ""
    if isinstance(type_, Enum):
        members = members_of(type_)
        held, expected = value in [*type_.enums, *members.values()], repr(type_.enums)[1:-1]
        right = [name for name, each in members.items() if getattr(each, "value", ...) == value]
        expected += f" ({right[0]!r} is the name of that member)" if right else ""
    elif isinstance(type_, Integer):
        most = highest(type_)
        held, expected = isinstance(value, int) and abs(value) <= most, f"integers up to {most}"
    elif isinstance(type_, String):
        held = isinstance(value, str) and len(value) <= (type_.length or len(value))
        held = held and not UNSTORABLE.search(value)
        size = type_.length or "any number of"
        expected = f"strings of up to {size} characters without NUL and surrogates"
    elif isinstance(type_, Boolean):
        held, expected = value in (0, 1), "true and false"
    elif isinstance(type_, DateTime):
        held, expected = isinstance(value, datetime), "times"
    elif type_.__visit_name__ == "BIT" and not hasattr(type_, "varying"):
        # MySQL's; PostgreSQL's, which may vary, is a text.
        held, expected = isinstance(value, (int, bytes)), "integers and booleans"
    return None if held else expected


def free_values(free: Any) -> list[Any]:
    """Return the values of ``free`` as a list, in their order."""
    if isinstance(free, (set, frozenset)):
        raise ClaimError(
            f"free={free!r} has no order, and the first of its values is written when a row is "
            "released: write a tuple"
        )
    found = list(free) if isinstance(free, (tuple, list)) else [free]
    if not found:
        raise ClaimError(f"free={free!r} has no value, so no row would ever be claimed: name one")
    return found


def declared(column: Column[Any], value: Any, role: str, now: Callable[[Column[Any]], Any]) -> Any:
    """Return a declared value as it stands in a statement: a literal of the column's type.

    Args:
        column: the column that holds it.
        value: the value; an SQLAlchemy expression stays as it is.
        role: what it is declared as, for the message.
        now: the database's clock as a column stores it.

    Raises:
        ClaimError: the column cannot hold it.
    """
    check_writable(role, column)
    value, type_ = clause(value), column.type
    value = CONSTANTS.get(type(value), value)
    if isinstance(value, (functions.now, functions.current_timestamp)):
        return now(column)
    if value is None and not column.nullable:
        raise ClaimError(
            f"{role} has NULL in {column.name!r}, which is NOT NULL: declare the value that stands "
            "there instead"
        )
    if value is None or isinstance(value, ClauseElement):
        return value
    if not isinstance(value, Hashable):
        raise ClaimError(
            f"{column.name}={value!r} cannot be declared: the value must be hashable, since "
            "it is part of the statement; pass it in values=... of the call"
        )
    # What a decorated type accepts is its own affair.
    if not isinstance(type_, TypeDecorator) and (expected := _expected(type_, value)):
        raise ClaimError(
            f"{role} has {value!r} in {column.name!r}, which is {type_!r} and holds {expected}: "
            "write the value as it stands in the column, or name another column with "
            f"{role}={{column: value}}"
        )
    return InlineLiteral(bool(value) if isinstance(type_, Boolean) else value, type_)


def completed(state: Column[Any], free: Any, claimed: Any, *, is_time: bool) -> tuple[Any, Any]:
    """Infer missing values of a state that is free and claimed from the type of its column.

    Args:
        state: the column.
        free: its free values, or ``UNSET``.
        claimed: its claimed value as it stands in a statement, or ``UNSET``.
        is_time: whether the column holds times.
    """
    if is_flag(state):
        if free is UNSET:
            free = claimed is not UNSET and not getattr(claimed, "value", False)
        others = (CONSTANTS.get(type(value), value) for value in listed(free))
        return free, ({True}.isdisjoint(others) if claimed is UNSET else claimed)
    if is_time:
        return (None if free is UNSET else free), (NOW if claimed is UNSET else claimed)
    given, type_ = {"free": free, "claimed": claimed}, plain_type(state.type)
    missing = " and ".join(f"{role}=..." for role, value in given.items() if value is UNSET)
    one_of = f" (one of {', '.join(type_.enums)})" if isinstance(type_, Enum) else ""
    raise AmbiguousTable(
        f"{state} is {type_!r}, whose values are not declared: give {missing} as they stand in the "
        f"column{one_of}"
    )


def is_one_of(state: Column[Any], values: Sequence[Any]) -> ColumnElement[bool]:
    """Build the condition that the state holds one of the values."""
    held = [value for value in values if value is not None]
    if not held:
        return state.is_(None)
    found = state == held[0] if len(held) == 1 else state.in_(held)
    if len(held) == len(values):
        return found
    if len(held) == 1 and (other := opposite(held[0])) is not None:
        return state.is_not(other)
    return or_(state.is_(None), found)


def opposite(value: Any) -> InlineLiteral | None:
    """Return the other value of a declared boolean; None for a value of another type."""
    if not isinstance(value, InlineLiteral) or not isinstance(value.value, bool):
        return None
    is_boolean = isinstance(plain_type(value.type), Boolean)
    return InlineLiteral(not value.value, value.type) if is_boolean else None


def undone(claimed: Values, state: Column[Any] | None, first_free: Any) -> dict[Column[Any], Any]:
    """Return the values that undo the mark of a claim, or none if they cannot be inferred."""
    found: dict[Column[Any], Any] = {}
    for column, value in claimed.items():
        if column is state and first_free is not UNSET:
            found[column] = first_free
        elif isinstance(value, DatabaseTime) and column.nullable:
            found[column] = None
        elif isinstance(value, DatabaseTime) and column is not state:
            # The time stays where it cannot be NULL: the state frees the row.
            continue
        elif (other := opposite(value)) is not None:
            found[column] = other
        else:
            return {}
    return found
