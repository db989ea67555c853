"""A claim as JSON: what lets another process, or another queue, end a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import Column

from .errors import AmbiguousTable, ClaimError
from .job_table import JobTable, declared_tables
from .references import resolve

Key = tuple[Any, ...]


def ticket_for(
    job_table: JobTable, keys: Sequence[Key], token: str | None, lease: timedelta | None
) -> dict[str, Any]:
    """Build a JSON-serializable ticket that identifies the rows and holds the claim's token."""
    entity = job_table.entity
    return {
        "table": job_table.table.fullname,
        "entity": None if entity is None else f"{entity.__module__}:{entity.__qualname__}",
        "shape": job_table.shape,
        "keys": [[_written(part) for part in key] for key in keys],
        "token": token,
        "lease": None if lease is None else lease.total_seconds(),
    }


def job_table_of_ticket(ticket: Mapping[str, Any]) -> JobTable:
    """Return this process's ``JobTable`` for the table and columns of a ticket.

    It is one that was declared or inferred here, or else is inferred from the mapped class, which
    is imported if need be.
    """
    name, shape = _part(ticket, "table"), _part(ticket, "shape")
    for known in declared_tables:
        if known.table.fullname == name and known.shape == shape:
            return known
    found = None if ticket.get("entity") is None else _inferred(ticket["entity"])
    if found is None or found.shape != shape:
        raise ClaimError(
            f"nothing in this process says what the columns of {name!r} mean, as the claim of "
            "this ticket took it: import the module that declares its JobTable, or call "
            "JobTable.infer(table), before the ticket is used"
        )
    return found


def keys_of_ticket(job_table: JobTable, ticket: Mapping[str, Any]) -> tuple[Key, ...]:
    """Return the ticket's keys, converted to the types of the table's columns."""
    return tuple(
        tuple(_read(column, part) for column, part in zip(job_table.key, key, strict=True))
        for key in _part(ticket, "keys")
    )


def _part(ticket: Mapping[str, Any], name: str) -> Any:
    if name not in ticket:
        raise ClaimError(f"{dict(ticket)!r} is not a ticket: it has no {name!r}")
    return ticket[name]


def _inferred(named: str) -> JobTable | None:
    try:
        return JobTable.infer(resolve(named))
    except (ImportError, AttributeError, ValueError, AmbiguousTable):
        return None


def _written(part: Any) -> Any:
    if isinstance(part, bytes):
        return part.hex()
    return part if isinstance(part, (int, float, str, type(None))) else str(part)


def _read(column: Column[Any], part: Any) -> Any:
    if not isinstance(part, str):
        return part
    readers: dict[type, Any] = {
        UUID: UUID,
        bytes: bytes.fromhex,
        Decimal: Decimal,
        datetime: datetime.fromisoformat,
        date: date.fromisoformat,
    }
    return readers.get(column.type.python_type, str)(part)
