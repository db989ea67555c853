"""The roles of a job table's columns: which may share one, and what a column of each has to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import JSON, Integer, TypeEngine

from .errors import ClaimError
from .inference import TOKEN_LENGTH, default_text, holds_tokens, is_text, plain_type

KEYS = ("exclusive_by", "fair_by")
COLUMNS = ("state", "due", "worker", "token", "lease", "attempts", "error", *KEYS)
"""The arguments of ``JobTable`` that name one column."""
USES: Mapping[str, str] = {
    "state": "tells free rows from claimed ones",
    "claimed": "marks a claimed row, beside the state",
    "due": "says from when a row may run",
    "worker": "gets the worker's name",
    "token": "gets the token of the claim",
    "lease": "gets the end of the lease",
    "attempts": "counts the claims",
    "max_attempts": "is the maximum of the attempts",
    "error": "gets the text of a failure",
    "stamps": "gets the time of every change",
    "exclusive_by": "is the key that limits how many rows run",
    "fair_by": "is the key by which claims take turns",
}
"""What each role uses its column for. Two roles need two columns, except by ``MAY_SHARE``."""
MAY_SHARE: Mapping[frozenset[str], str] = {
    frozenset({"state", "lease"}): "the row is free once its lease is over; claims need lease=",
    frozenset({"due", "lease"}): "a row is due once its lease is over",
    frozenset({"claimed", "due"}): "a claimed row is due at another time",
    frozenset({"claimed", "error"}): "a claimed row has another text",
    frozenset({"claimed", "stamps"}): "the value of the mark is written",
    frozenset({"max_attempts", "exclusive_by"}): "both are only read",
    frozenset({"max_attempts", "fair_by"}): "both are only read",
    frozenset(KEYS): "of one key only some rows run, and claims take turns",
}
"""The pairs of roles that may share a column, and what that means."""
ADDED: Mapping[str, str] = {
    "due": "run_at TIMESTAMP",
    "worker": "worker VARCHAR(64)",
    "token": f"claim_token VARCHAR({TOKEN_LENGTH})",
    "lease": "lease_until TIMESTAMP",
}
"""The columns to add where a call needs a role that the table lacks."""
# Bits of a FLOAT that is stored in single precision.
SINGLE = 24
BYTES = (sa.BINARY, sa.LargeBinary, sa.VARBINARY)
# Of exclusive keys: their equal values are written alike.
KEY_TYPES = (Integer, sa.String, sa.Uuid, sa.Date, sa.Boolean, *BYTES)
READ_ONLY = {"primary_key", "due", "max_attempts", *KEYS}
UNMOVED = {"state", "lease", "due", "token"}
BITS = {"small_integer": 16, "SMALLINT": 16, "big_integer": 64, "BIGINT": 64}
BITS |= {"TINYINT": 8, "MEDIUMINT": 24}
# The last day that every database can store in every time zone.
LAST = datetime(9999, 12, 30, tzinfo=UTC)


def highest(type_: TypeEngine[Any]) -> int:
    """Return the largest number that a column of this integer type can hold."""
    plain = plain_type(type_)
    bits = BITS.get(plain.__visit_name__, 32)
    return int(2 ** (bits if getattr(plain, "unsigned", False) else bits - 1)) - 1


def _is_integer(column: sa.Column[Any]) -> bool:
    return isinstance(plain_type(column.type), Integer)


def _finds_rows(column: sa.Column[Any]) -> bool:
    """Check whether values of the column can be kept in a set, and are equal when they come back.

    Numbers of single precision are not.
    """
    type_ = plain_type(column.type)
    if isinstance(type_, sa.Float) and not isinstance(type_, sa.Double):
        return (type_.precision or 0) > SINGLE
    return column.type.hashable and type_.__visit_name__ != "SET"


def _is_comparable(column: sa.Column[Any]) -> bool:
    """Check whether the column holds one value that the database compares with another.

    PostgreSQL has no operators for a DOMAIN of an ENUM.
    """
    type_ = column.type
    is_domain = getattr(type_, "data_type", None) is not None
    return not isinstance(plain_type(type_), (sa.ARRAY, JSON, *[sa.Enum] * is_domain))


NEEDS: Mapping[str, tuple[str, Callable[[sa.Column[Any]], bool]]] = {
    "primary_key": ("hashable values, and Double in place of Float", _finds_rows),
    "state": ("one value, and no DOMAIN of an ENUM, which cannot be compared", _is_comparable),
    "worker": ("a string", is_text),
    "token": (f"a string of at least {TOKEN_LENGTH} characters", holds_tokens),
    "attempts": ("an integer", _is_integer),
    "max_attempts": ("an integer", _is_integer),
    "error": ("a string or JSON", lambda c: is_text(c) or isinstance(plain_type(c.type), JSON)),
    "exclusive_by": (
        "an integer, string, enum, UUID, date, boolean or bytes, whose equal values look alike",
        lambda c: isinstance(plain_type(c.type), KEY_TYPES) and _is_comparable(c),
    ),
    "fair_by": (
        "an integer, string, UUID, date, boolean or bytes, whose order is that of its comparisons",
        # MySQL sorts an ENUM or a SET by number and compares it as text.
        lambda c: (
            isinstance(plain_type(c.type), KEY_TYPES)
            and plain_type(c.type).__visit_name__.lower() not in {"enum", "set"}
        ),
    ),
}
"""By role, the type that its column has to have. ``JobTable.now`` checks columns of times."""


def check_roles(pairs: Sequence[tuple[str, sa.Column[Any]]]) -> None:
    """Raise if columns cannot play their roles, alone or together.

    Args:
        pairs: the roles and their columns.
    """
    for role, column in pairs:
        _check_role(role, column)
    for (one, column), (other, same) in combinations(pairs, 2):
        if column is same and one != other and frozenset({one, other}) not in MAY_SHARE:
            raise ClaimError(
                f"{one} and {other} are one column, {column.name!r}, but {one} {USES[one]} and "
                f"{other} {USES[other]}: name another column for one of them"
            )


def _check_role(role: str, column: sa.Column[Any]) -> None:
    expected, fits = NEEDS.get(role, ("", None))
    if fits is not None and not fits(column):
        raise ClaimError(
            f"{role}={column.name!r} is {column.type!r}; expected {expected}, since it "
            + USES.get(role, "finds the claimed rows again")
        )
    if role not in READ_ONLY:
        check_writable(role, column)
    if role in UNMOVED and is_moved(column):
        raise ClaimError(
            f"{role}={column.name!r} is changed by every UPDATE of its row (ON UPDATE, onupdate), "
            "so a worker's own progress would end or take a claim: remove that, or name another "
            "column"
        )


def check_writable(role: str, column: sa.Column[Any]) -> None:
    """Raise for a column that the database computes."""
    if column.computed is not None:
        raise ClaimError(
            f"{role} writes {column.name!r}, which the database computes (GENERATED): name the "
            "column that it is computed from, or give free=<expression>"
        )


def is_moved(column: sa.Column[Any]) -> bool:
    """Check whether an UPDATE that does not name the column changes it."""
    own = column.onupdate is not None or column.server_onupdate is not None
    # MySQL's ON UPDATE is reflected as a part of the default.
    return own or "on update" in default_text(column)


def check_most_rows(most: Any, column: sa.Column[Any] | None) -> None:
    """Raise if the maximum of running rows is no count, or there is no key to count by."""
    _check_count("max_per_key", most, "an int of at least 1")
    if column is None and most != 1:
        raise ClaimError("max_per_key needs exclusive_by=..., the column of the key")


def _check_count(name: str, value: Any, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ClaimError(f"{name} is {value!r}; expected {expected}")


def check_attempts(column: sa.Column[Any] | None, limit: Any) -> None:
    """Raise if the maximum of attempts is neither a column nor a number that is ever reached."""
    if limit is None:
        return
    if column is None:
        raise ClaimError("max_attempts needs attempts=..., the column that counts the claims")
    if isinstance(limit, sa.Column):
        return
    _check_count("max_attempts", limit, "an int of at least 1, or a column")
    if limit > (most := highest(column.type)):
        raise ClaimError(
            f"max_attempts is {limit}, but {column.name!r} is {column.type!r} and counts to "
            f"{most}, so no row would ever be spent: lower it, or widen the column"
        )


def check_duration(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise if a value is not a ``timedelta`` above zero, or leads beyond the year 9999.

    Args:
        name: what it is, for the message.
        value: the duration.
        zero: whether zero is allowed.
    """
    least = "of at least" if zero else "above"
    if not isinstance(value, timedelta) or value < timedelta(0) or not (value or zero):
        raise ClaimError(f"{name} is {value!r}; expected a timedelta {least} zero")
    if value > LAST - datetime.now(UTC):
        raise ClaimError(
            f"{name} is {value!r}, which ends after the year 9999, the last one that a database "
            "stores: choose a shorter one"
        )


def check_unleased(unleased: Any, *, tells_age: bool) -> None:
    """Raise if rows without a lease cannot be freed by their age."""
    if unleased is None:
        return
    check_duration("unleased", unleased)
    if not tells_age:
        raise ClaimError(
            "unleased needs lease=..., and a time from which a row's age can be told: "
            "claimed={..., 'claimed_at': func.now()} or stamps=('updated_at',)"
        )
