"""The values that mark a row as free, claimed or ended: completed from types, and as SQL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, false, or_, true
from sqlalchemy.sql import functions
from sqlalchemy.sql.elements import ClauseElement, False_, True_
from sqlalchemy.types import Boolean, Enum, Integer

from .errors import AmbiguousTable, ClaimError
from .inference import NOW, Now, is_flag, plain_type
from .sql_elements import DatabaseTime, InlineLiteral


class _Unset:
    def __repr__(self) -> str:
        return "..."


UNSET: Any = _Unset()
Values = Mapping[Column[Any], Any]


def listed(free: Any) -> list[Any]:
    """Return the values of ``free`` as a list."""
    return list(free) if isinstance(free, (tuple, list, set, frozenset)) else [free]


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
    if isinstance(value, bool) and is_flag(column):
        if isinstance(plain_type(column.type), Boolean):
            return true() if value else false()
        bits = column.type.__visit_name__ == "BIT"
        return InlineLiteral(int(value), column.type if bits else Integer())
    try:
        hash(value)
    except TypeError:
        raise ClaimError(
            f"{column.name}={value!r} cannot be declared: the value must be hashable, since "
            "it is part of the statement; pass it in values=... of the call"
        ) from None
    return InlineLiteral(value, column.type)


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
        if isinstance(value, DatabaseTime):
            found[column] = None
        elif column is state and first_free is not UNSET:
            found[column] = first_free
        elif is_flag(column) and isinstance(value, (True_, False_)):
            found[column] = false() if isinstance(value, True_) else true()
        else:
            return {}
    return found
