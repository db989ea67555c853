"""The roles that a job table's columns play, and what a column of each role has to be."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import Column
from sqlalchemy.types import (
    BINARY,
    VARBINARY,
    Boolean,
    Date,
    Integer,
    LargeBinary,
    String,
    Uuid,
)

from .errors import ClaimError
from .inference import is_text, plain_type

COLUMNS = ("state", "due", "worker", "token", "lease", "attempts", "error", "exclusive_by")
"""The arguments of ``JobTable`` that name one column."""
TOKEN_LENGTH = 32
# Of exclusive keys: their equal values are written alike.
KEY_TYPES = (Integer, String, Uuid, Date, Boolean, BINARY, LargeBinary, VARBINARY)


def check_exclusive(column: Column[Any] | None, most: Any) -> None:
    """Raise if a column cannot be an exclusive key, or if the maximum of its rows is no count."""
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ClaimError(f"max_per_key is {most!r}; expected an int of at least 1")
    if column is None:
        if most != 1:
            raise ClaimError("max_per_key needs exclusive_by=..., the column of the key")
        return
    if not isinstance(plain_type(column.type), KEY_TYPES):
        raise ClaimError(
            f"exclusive_by={column.name!r} is {column.type!r}; expected an integer, a string, "
            "an enum, a UUID, a date, a boolean or bytes, whose equal values are written alike"
        )


def check_token(column: Column[Any] | None) -> None:
    """Raise if a column cannot hold a token."""
    if column is None:
        return
    length = getattr(plain_type(column.type), "length", None)
    if not is_text(column) or (length is not None and length < TOKEN_LENGTH):
        raise ClaimError(
            f"the token column {column.name!r} is {column.type!r}; expected a string "
            f"of at least {TOKEN_LENGTH} characters"
        )


def check_attempts(column: Column[Any] | None, limit: Any) -> None:
    """Raise if the maximum of attempts is neither a count nor a column."""
    if limit is None:
        return
    if column is None:
        raise ClaimError("max_attempts needs attempts=..., the column that counts the claims")
    if isinstance(limit, Column):
        return
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ClaimError(f"max_attempts is {limit!r}; expected an int of at least 1, or a column")


def check_unleased(unleased: Any, *, tells_age: bool) -> None:
    """Raise if rows without a lease cannot be freed by their age."""
    if unleased is None:
        return
    if not isinstance(unleased, timedelta) or unleased <= timedelta(0):
        raise ClaimError(f"unleased is {unleased!r}; expected a timedelta above zero")
    if not tells_age:
        raise ClaimError(
            "unleased needs lease=..., and a time from which a row's age can be told: "
            "claimed={..., 'claimed_at': func.now()} or stamps=('updated_at',)"
        )
