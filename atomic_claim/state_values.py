"""The values that mark a row as free, claimed or ended: completed from types, and as SQL."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from itertools import product
from typing import Any

from sqlalchemy import Column, ColumnElement, false, or_, true
from sqlalchemy.sql import functions, visitors
from sqlalchemy.sql.elements import ClauseElement, False_, TextClause, True_
from sqlalchemy.sql.selectable import SelectBase
from sqlalchemy.types import Boolean, DateTime, Enum, Integer, String, TypeDecorator, TypeEngine

from .errors import AmbiguousTable, ClaimError
from .inference import NOW, Now, is_flag, plain_type
from .roles import highest
from .sql_elements import DatabaseTime, InlineLiteral


class _Unset:
    def __repr__(self) -> str:
        return "..."


UNSET: Any = _Unset()
Values = Mapping[Column[Any], Any]
UNSTORABLE = re.compile("[\0\ud800-\udfff]")


EXCLUSIVE: Mapping[tuple[str, str], str] = {
    ("claimed", "free"): "every claim would hand out the same rows",
    ("claimed", "done"): "a claimed row would count as done",
    ("claimed", "failed"): "a claimed row would count as failed",
    ("claimed", "withdrawn"): "a claimed row would count as withdrawn",
    ("free", "done"): "free rows would count as done and never be claimed",
    ("free", "failed"): "free rows would count as failed and never be claimed",
    ("free", "withdrawn"): "free rows would count as withdrawn and never be claimed",
    ("done", "failed"): "a done row would count as failed, and could be requeued",
    ("released", "claimed"): "a released row would stay claimed",
    ("released", "done"): "a released row would count as done",
    ("released", "failed"): "a released row would count as failed",
    ("released", "withdrawn"): "a released row would count as withdrawn",
}
"""The pairs of marks of which no row may bear both, and why."""


def check_marks(
    marks: Mapping[str, Values], state: Column[Any] | None, free: Sequence[Any]
) -> None:
    """Raise if rows that bear one mark bear another that excludes it, where values compare.

    Args:
        marks: the values of each mark, by role. A row is withdrawn by any of its values; it bears
            another mark if it has all of them.
        state: the column of the values in ``free``.
        free: the values that are free; empty if an expression says it.
    """
    several = {role: [values] for role, values in marks.items()}
    several["withdrawn"] = [{column: value} for column, value in marks["withdrawn"].items()]
    several["free"] = [] if state is None else [{state: value} for value in free]
    for (one, other), reason in EXCLUSIVE.items():
        for given, wanted in product(several[one], several[other]):
            if wanted and all(c in given and is_same(given[c], v) for c, v in wanted.items()):
                common = ", ".join(f"{c.name} = {_shown(v)}" for c, v in wanted.items())
                raise ClaimError(
                    f"{one} and {other} have {common} in common, so {reason}: let them differ in "
                    "the value of a column"
                )
    value = UNSET if state is None else marks["released"].get(state, UNSET)
    if free and value is not UNSET and not any(is_same(value, each) for each in free):
        raise ClaimError(
            f"released writes {_shown(value)} to {state}, which is not free, so a "
            "released row would never be claimed: write one of the values of free"
        )


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
    type_, value = literal_.type, literal_.value
    members = type_.enum_class.__members__ if isinstance(type_, Enum) and type_.enum_class else {}
    return next((name for name, member in members.items() if member is value), value)


def _shown(value: Any) -> str:
    if isinstance(value, DatabaseTime):
        return "func.now()"
    return repr(value.value) if isinstance(value, InlineLiteral) else str(value)


def check_value(column: Column[Any], value: Any, role: str) -> None:
    """Raise if a column cannot hold a declared value."""
    type_ = column.type
    if value is None and not column.nullable:
        raise ClaimError(
            f"{role} has NULL in {column.name!r}, which is NOT NULL: declare the value that stands "
            "there instead"
        )
    # What a decorated type accepts is its own affair.
    if value is None or isinstance(value, ClauseElement) or isinstance(type_, TypeDecorator):
        return
    if isinstance(type_, Enum):
        _check_member(column, type_, value, role)
    elif (expected := _expected(type_, value)) is not None:
        raise ClaimError(
            f"{role} has {value!r} in {column.name!r}, which is {type_!r} and holds {expected}: "
            "write the value as it stands in the column, or name another column with "
            f"{role}={{column: value}}"
        )


def _expected(type_: TypeEngine[Any], value: Any) -> str | None:
    """Describe what a column of the type holds; return None if the value is such."""
    type_, held, expected = plain_type(type_), True, ""
    if isinstance(type_, Integer):
        most = highest(type_)
        held, expected = isinstance(value, int) and abs(value) <= most, f"integers up to {most}"
    elif isinstance(type_, String):
        held = isinstance(value, str) and len(value) <= (type_.length or len(value))
        expected = f"strings of up to {type_.length or 'any number of'} characters"
        if held and UNSTORABLE.search(value):
            held, expected = False, "strings without NUL and surrogates"
    elif isinstance(type_, Boolean):
        held, expected = value in {0, 1}, "true and false"
    elif isinstance(type_, DateTime):
        held, expected = isinstance(value, datetime), "times"
    return None if held else expected


def _check_member(column: Column[Any], type_: Enum, value: Any, role: str) -> None:
    members = dict(type_.enum_class.__members__) if type_.enum_class else {}
    if value in type_.enums or any(value == member for member in members.values()):
        return
    right = next((name for name, member in members.items() if member.value == value), None)
    raise ClaimError(
        f"{role} has {value!r} in {column.name!r}, which holds {', '.join(map(repr, type_.enums))}"
        ": write " + ("one of them" if right is None else f"{right!r}, the name of that member")
    )


def check_not_a_column(state: Column[Any], value: Any, role: str, names: Collection[str]) -> None:
    """Raise for a value of the state that is the name of a column, and may have been meant so."""
    if not isinstance(value, str) or value not in names:
        return
    if isinstance(state.type, Enum) and value in state.type.enums:
        return
    if role == "free":
        cure = f"free=({value!r},) for the value, or free=<expression> for the column"
    else:
        cure = (
            f"{role}={{{state.name!r}: {value!r}}} for the value, or {role}={{{value!r}: ...}} "
            "for the column"
        )
    raise ClaimError(
        f"{role}={value!r} is the name of a column, and would be a value of {state.name!r}: "
        f"write {cure}"
    )


def free_values(free: Any) -> list[Any]:
    """Return the values of ``free`` as a list, in their order."""
    if isinstance(free, (set, frozenset)):
        raise ClaimError(
            f"free={free!r} has no order, and the first of its values is written when a row is "
            "released: write a tuple"
        )
    found = list(free) if isinstance(free, (tuple, list)) else [free]
    if not found:
        raise ClaimError(f"free={free!r} has no value, so no row would ever be claimed")
    return found


def literal(column: Column[Any], value: Any, now: Callable[[Column[Any]], Any]) -> Any:
    """Return a declared value as it stands in a statement: a literal of the column's type.

    Args:
        column: the column that holds it.
        value: the value; an SQLAlchemy expression stays as it is.
        now: the database's clock as a column stores it.
    """
    if hasattr(value, "__clause_element__"):
        value = value.__clause_element__()
    if isinstance(value, (Now, functions.now, functions.current_timestamp)):
        return now(column)
    if value is None or isinstance(value, ClauseElement):
        return value
    is_truth = isinstance(value, int) and value in {0, 1} and is_flag(column)
    if is_truth and not _converts(column.type):
        type_ = plain_type(column.type)
        if isinstance(type_, Boolean):
            return true() if value else false()
        return InlineLiteral(int(value), type_ if type_.__visit_name__ == "BIT" else Integer())
    try:
        hash(value)
    except TypeError:
        raise ClaimError(
            f"{column.name}={value!r} cannot be declared: the value must be hashable, since "
            "it is part of the statement; pass it in values=... of the call"
        ) from None
    return InlineLiteral(value, column.type)


def _converts(type_: TypeEngine[Any]) -> bool:
    """Check whether a decorated type stores another value than the one declared."""
    return isinstance(type_, TypeDecorator) and any(
        getattr(type(type_), name) is not getattr(TypeDecorator, name)
        for name in ("process_bind_param", "process_literal_param")
    )


def completed(state: Column[Any], free: Any, claimed: Any, *, is_time: bool) -> tuple[Any, Any]:
    """Infer missing values of ``free`` and ``claimed`` from the type of the state column.

    Args:
        state: the column.
        free: its free values, or ``UNSET``.
        claimed: its claimed value or a mapping of columns to values, or ``UNSET``.
        is_time: whether the column holds times.
    """
    if is_flag(state):
        marked = claimed.get(state, UNSET) if isinstance(claimed, Mapping) else claimed
        if free is UNSET:
            free = False if marked is UNSET else not marked
        return free, (not free if claimed is UNSET else claimed)
    if is_time:
        return (None if free is UNSET else free), (NOW if claimed is UNSET else claimed)
    missing = " and ".join(
        f"{role}=..." for role, value in (("free", free), ("claimed", claimed)) if value is UNSET
    )
    type_ = plain_type(state.type)
    raise AmbiguousTable(
        f"{state} is {type_!r}, whose values nobody named: give {missing} as they stand in the "
        "column" + (f" (one of {', '.join(type_.enums)})" if isinstance(type_, Enum) else "")
    )


def is_one_of(
    state: Column[Any], values: Sequence[Any], *, null_is_free: bool
) -> ColumnElement[bool]:
    """Build the condition that the state holds one of the values."""
    held = [value for value in values if value is not None]
    if not held:
        return state.is_(None)
    found = state == held[0] if len(held) == 1 else state.in_(held)
    if len(held) == len(values) and not (null_is_free and state.nullable):
        return found
    if len(held) == 1 and isinstance(held[0], (True_, False_)):
        return state.is_not(true() if isinstance(held[0], False_) else false())
    return or_(state.is_(None), found)


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
        elif is_flag(column) and isinstance(value, (True_, False_)):
            found[column] = false() if isinstance(value, True_) else true()
        else:
            return {}
    return found
