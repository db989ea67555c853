"""Claims for other processes: keys as JSON, and the ``JobTable`` of a pickled claim."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.engine.default import DefaultDialect

from .errors import ClaimError
from .job_table import JobTable

THROUGH = "column"
MICROSECOND = timedelta(microseconds=1)
# How each type is written, and read again; a subclass stands before its base class.
FORMS: dict[type, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    bool: (str, "True".__eq__),
    int: (str, int),
    str: (str, str),
    float: (str, float),
    bytes: (bytes.hex, bytes.fromhex),
    Decimal: (str, Decimal),
    datetime: (str, datetime.fromisoformat),
    date: (str, date.fromisoformat),
    time: (str, time.fromisoformat),
    timedelta: (lambda value: str(value // MICROSECOND), lambda text: int(text) * MICROSECOND),
    UUID: (str, UUID),
}
READERS = {kind.__name__: reads for kind, (_, reads) in FORMS.items()}
_dialect = DefaultDialect()
_dialect.supports_native_decimal = True


def written(column: sa.Column[Any], value: Any) -> list[str]:
    """Write a part of a key as its type and its text.

    Both are strings: JavaScript rounds integers above 2^53. A value of another type is converted
    by the column's bind processing first, and ``"column"`` stands before the two.

    Raises:
        ClaimError: reading it again would give another value.
    """
    through = type(value) not in FORMS
    process = column.type.dialect_impl(_dialect).bind_processor(_dialect) if through else None
    stored = value if process is None else process(value)
    for kind, (writes, _) in FORMS.items():
        if isinstance(stored, kind):
            part = [*[THROUGH] * through, kind.__name__, writes(stored)]
            if read(column, part) == value:
                return part
            break
    raise ClaimError(
        f"the key {column.name}={value!r} of type {type(value).__name__} does not survive JSON; "
        f"expected {', '.join(READERS)}, or a value that the column's type converts to one of them "
        "and back: give the claim's rows to other processes by pickle"
    )


def read(column: sa.Column[Any], part: Any) -> Any:
    """Read a part of a key that :func:`written` has written."""
    try:
        *through, kind, text = part
        stored = READERS[kind](text)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise ClaimError(
            f"{part!r} is not a key of {column.name!r}: expected what Claim.ticket(job) wrote, "
            'such as ["int", "7"]'
        ) from None
    if not through:
        return stored
    process = column.type.dialect_impl(_dialect).result_processor(_dialect, None)
    return stored if process is None else process(stored)


def parts_of(ticket: Any) -> tuple[Any, Any, Any, timedelta | None]:
    """Return a ticket's table, key, token and lease, or raise if it is not a ticket."""
    try:
        name, key, token, seconds = (ticket[part] for part in ("table", "key", "token", "lease"))
        return name, key, token, None if seconds is None else timedelta(seconds=seconds)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ClaimError(
            f"{ticket!r} is not a ticket ({type(error).__name__}: {error}); expected what "
            "Claim.ticket(job) returned, with its table, key, token and lease in seconds"
        ) from None


def pickled(job_table: JobTable) -> tuple[type[Any] | None, bytes]:
    """Pickle a declaration: a mapped class by references to it, a ``Table`` with its metadata.

    Returns:
        The mapped class, if there is one, and the text.
    """
    entity = job_table.entity
    return entity, _pickler(entity).dumps(job_table)


def unpickled(entity: type[Any] | None, state: bytes) -> JobTable:
    """Return the declaration that :func:`pickled` has pickled."""
    if entity is not None:
        metadata = sa.inspect(entity).local_table.metadata
        return cast("JobTable", _pickler(entity).loads(state, metadata))
    found: JobTable = pickle.loads(state)  # noqa: S301 - a part of the caller's own pickle
    for column in found.table.columns:
        # SQLAlchemy keeps it, and unpickles it before the column has its type.
        column.__dict__.pop("comparator", None)
    return found


def _pickler(entity: type[Any] | None) -> Any:
    if entity is None:
        return pickle
    from sqlalchemy.ext import serializer  # noqa: PLC0415 - loads the ORM

    return serializer
