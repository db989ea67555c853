"""Inference of a job table's columns from conventional names and types.

Only names that mean one thing are read. ``priority`` has no natural direction and a status
column of plain strings has no values that could be read from it, so both are problems to report,
not guesses to make.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Column, Table
from sqlalchemy.schema import DefaultClause
from sqlalchemy.types import (
    Boolean,
    DateTime,
    Enum,
    Integer,
    String,
    TypeDecorator,
    TypeEngine,
)

CLAIMED_FLAGS = (
    "processing",
    "is_processing",
    "in_progress",
    "is_in_progress",
    "in_process",
    "running",
    "is_running",
    "claimed",
    "is_claimed",
    "locked",
    "is_locked",
    "picked",
    "taken",
    "reserved",
    "is_reserved",
    "executing",
)
FREE_FLAGS = (
    "visible",
    "is_visible",
    "available",
    "is_available",
)
CLAIMED_TIMES = (
    "locked_at",
    "claimed_at",
    "picked_at",
    "reserved_at",
    "taken_at",
    "leased_at",
)
STATUSES = (
    "status",
    "state",
    "job_status",
    "job_state",
)
DONE_TIMES = (
    "completed_at",
    "finished_at",
    "done_at",
    "processed_at",
    "ended_at",
    "succeeded_at",
)
DONE_FLAGS = (
    "done",
    "is_done",
    "completed",
    "is_completed",
    "finished",
    "is_finished",
    "processed",
    "is_processed",
)
FAILED_TIMES = (
    "failed_at",
    "dead_at",
    "discarded_at",
)
FAILED_FLAGS = (
    "has_error",
    "failed",
    "is_failed",
    "errored",
    "is_dead",
)
WITHDRAWN_TIMES = (
    "cancelled_at",
    "canceled_at",
    "deleted_at",
    "archived_at",
)
WITHDRAWN_FLAGS = (
    "cancelled",
    "is_cancelled",
    "canceled",
    "is_canceled",
    "deleted",
    "is_deleted",
    "archived",
    "is_archived",
)
DUE = (
    "wait_until",
    "run_at",
    "due_at",
    "scheduled_at",
    "scheduled_for",
    "available_at",
    "not_before",
    "run_after",
    "execute_at",
    "visible_at",
    "next_run_at",
    "eta",
)
ORDER = (
    "created_at",
    "created",
    "created_on",
    "inserted_at",
    "enqueued_at",
    "queued_at",
    "submitted_at",
    "added_at",
)
WORKERS = ("worker", "worker_id", "locked_by", "claimed_by", "reserved_by", "picked_by")
TOKENS = ("claim_token", "lease_token", "fencing_token", "lock_token", "token")
LEASES = ("lease_until", "leased_until", "lease_expires_at", "locked_until", "claimed_until")
ATTEMPTS = ("attempts", "attempt_count", "claim_attempts")
ERRORS = ("last_error", "error", "error_message")
STAMPS = ("updated_at", "modified_at", "last_modified", "updated_on")
UNDIRECTED = (
    "priority",
    "prio",
    "rank",
    "weight",
)

WAITING_VALUES = (
    "waiting",
    "pending",
    "queued",
    "new",
    "ready",
    "todo",
    "enqueued",
)
RUNNING_VALUES = (
    "running",
    "processing",
    "in_progress",
    "active",
    "started",
    "claimed",
    "executing",
)
DONE_VALUES = (
    "done",
    "completed",
    "complete",
    "finished",
    "succeeded",
    "success",
)
FAILED_VALUES = (
    "failed",
    "failure",
    "error",
    "errored",
    "dead",
)

ROLES_BY_NAME: Mapping[str, tuple[str, ...]] = {
    "due": DUE,
    "order": ORDER,
    "worker": WORKERS,
    "token": TOKENS,
    "lease": LEASES,
    "attempts": ATTEMPTS,
    "error": ERRORS,
}


class Now:
    """The sign for the database's clock in a mapping of columns to values."""

    def __repr__(self) -> str:
        return "NOW"


NOW = Now()


@dataclass
class Reading:
    """The result of inference: arguments of ``JobTable``, and what remains ambiguous.

    Attributes:
        arguments: what is certain.
        understood: the names of its columns, by role, for people.
        unknown: the columns that mean nothing here.
        problems: what is in doubt, whatever is asked for.
        undirected: what is in doubt unless the order is said.
        asked: the arguments that would answer.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    understood: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    undirected: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


def plain_type(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return the type beneath any ``TypeDecorator``."""
    while isinstance(type_, TypeDecorator):
        type_ = type_.impl_instance
    return type_


def is_flag(column: Column[Any]) -> bool:
    """Check whether the column is a boolean, or an integer declared like one."""
    type_ = plain_type(column.type)
    if isinstance(type_, Boolean):
        return True
    if type_.__visit_name__ == "BIT":
        # Hibernate's booleans on MySQL.
        return getattr(type_, "length", None) in {None, 1}
    if not isinstance(type_, Integer):
        return False
    if getattr(type_, "display_width", None) == 1:
        return True
    return _default_text(column) in {"0", "1", "false", "true"}


def is_time(column: Column[Any]) -> bool:
    """Check whether the column can hold times: a ``DateTime``, or plain text."""
    return isinstance(plain_type(column.type), DateTime) or is_text(column)


def is_text(column: Column[Any]) -> bool:
    """Check whether the column holds plain text; an enum does not."""
    type_ = plain_type(column.type)
    return isinstance(type_, String) and not isinstance(type_, Enum)


def time_format(columns: Iterable[Column[Any]]) -> str | None:
    """Return the ``strftime`` format that the text columns' SQLite defaults share, or None."""
    formats = {
        found
        for column in columns
        if is_text(column) and (found := _format_of(_default_text(column))) is not None
    }
    return formats.pop() if len(formats) == 1 else None


def _format_of(default: str) -> str | None:
    match = re.fullmatch(r"strftime\(\s*'([^']+)'\s*,\s*'now'\s*\)", default)
    if match:
        return match.group(1)
    if default in {"current_timestamp", "datetime('now')"}:
        return "%Y-%m-%d %H:%M:%S"
    return None


def _default_text(column: Column[Any]) -> str:
    default = column.server_default
    if not isinstance(default, DefaultClause):
        return ""
    text = str(getattr(default.arg, "text", default.arg)).strip()
    while text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    if re.match(r"strftime\b", text, re.IGNORECASE):
        return text
    return text.strip("'\"").lower() if "(" not in text else text.lower()


def read_columns(table: Table, names: Mapping[Column[Any], frozenset[str]]) -> Reading:
    """Read the columns of ``table``; ``names`` holds each column's own and attribute names."""
    reading = Reading()
    columns = [column for column in table.columns if not column.primary_key]

    def named(wanted: Iterable[str]) -> list[Column[Any]]:
        wanted = list(wanted)
        found = [c for c in columns if not names[c].isdisjoint(wanted)]
        return sorted(found, key=lambda c: min(wanted.index(n) for n in names[c] if n in wanted))

    _read_state(reading, named)
    _read_ends(reading, named)
    for role, conventional in ROLES_BY_NAME.items():
        _read_role(reading, role, named(conventional))
    stamps = [c for c in named(STAMPS) if is_time(c) and c.onupdate is None]
    if stamps:
        reading.arguments["stamps"] = tuple(stamps)
        reading.understood["stamps"] = ", ".join(c.name for c in stamps)
    if (priorities := named(UNDIRECTED)) and "order" not in table.info.get("atomic_claim", ()):
        reading.asked.append("order")
        reading.undirected.append(
            f"{priorities[0].name!r} has no natural direction: does the highest or the lowest "
            f"come first? Say it with order=[table.c.{priorities[0].key}.desc(), ...]"
        )
    used = _columns_of(reading.arguments)
    reading.unknown = [c.name for c in columns if c not in used and c not in priorities]
    return reading


def _columns_of(arguments: Mapping[str, Any]) -> set[Column[Any]]:
    used: set[Column[Any]] = set()
    for value in arguments.values():
        if isinstance(value, Column):
            used.add(value)
        elif isinstance(value, (dict, tuple)):
            used.update(part for part in value if isinstance(part, Column))
    return used


def _read_state(reading: Reading, named: Any) -> None:
    flags = [c for c in named(CLAIMED_FLAGS) if is_flag(c)]
    inverted = [c for c in named(FREE_FLAGS) if is_flag(c)]
    statuses = named(STATUSES)
    times = [c for c in named(CLAIMED_TIMES) if is_time(c) and c.nullable]
    found = flags + inverted + statuses
    # A boolean or status beside a claim time: the time is the stamp of the state.
    states = found or times
    if not states:
        reading.problems.append(
            "no column says whether a job is claimed: name it with state=..., or give free=... "
            "and claimed=..."
        )
        return
    if len(states) > 1:
        reading.problems.append(
            "several columns could be the state ("
            + ", ".join(repr(c.name) for c in states)
            + "): name one with state=..."
        )
        return
    state = states[0]
    reading.arguments["state"] = state
    reading.understood["state"] = state.name
    if state in inverted:
        reading.arguments.update(free=True, claimed=False)
    elif state in statuses:
        _read_status(reading, state)
    if found and len(times) == 1:
        claimed = reading.arguments.get("claimed", True)
        reading.arguments["claimed"] = {state: claimed, times[0]: NOW}
        reading.understood["claimed"] = f"{state.name}, {times[0].name}"


def _read_status(reading: Reading, state: Column[Any]) -> None:
    type_ = plain_type(state.type)
    if not isinstance(type_, Enum):
        reading.asked += ["free", "claimed"]
        reading.problems.append(
            f"{state.name!r} is a status whose values nobody named: give free=..., claimed=... "
            "(and done=..., failed=...) as they stand in the column"
        )
        return
    members: dict[str, Any] = (
        dict(type_.enum_class.__members__) if type_.enum_class else {e: e for e in type_.enums}
    )
    for role, conventional in (
        ("free", WAITING_VALUES),
        ("claimed", RUNNING_VALUES),
        ("done", DONE_VALUES),
        ("failed", FAILED_VALUES),
    ):
        found = [name for name in members if name.lower() in conventional]
        if len(found) == 1:
            reading.arguments[role] = members[found[0]]
            reading.understood[role] = f"{state.name} = {found[0]}"
        elif found or role in {"free", "claimed"}:
            reading.asked.append(role)
            reading.problems.append(
                f"which value of {state.name!r} ({', '.join(members)}) is {role!r}? "
                f"Say it with {role}=..."
            )


def _read_ends(reading: Reading, named: Any) -> None:
    for role, times, flags in (
        ("done", DONE_TIMES, DONE_FLAGS),
        ("failed", FAILED_TIMES, FAILED_FLAGS),
        ("withdrawn", WITHDRAWN_TIMES, WITHDRAWN_FLAGS),
    ):
        ends: dict[Column[Any], Any] = {}
        for column in named(times):
            if is_time(column) and column.nullable:
                ends[column] = NOW
            else:
                _doubt(reading, column, "a time that is empty until then", role)
        for column in named(flags):
            if is_flag(column):
                ends[column] = True
            else:
                _doubt(reading, column, "yes or no", role)
        if not ends:
            continue
        if role in reading.arguments:
            ends[reading.arguments["state"]] = reading.arguments[role]
        reading.arguments[role] = ends
        reading.understood[role] = ", ".join(column.name for column in ends)


def _doubt(reading: Reading, column: Column[Any], expected: str, role: str) -> None:
    """Say that a column has the name of something that its type cannot be."""
    null = "" if column.nullable else ", not nullable,"
    reading.asked.append(role)
    reading.problems.append(
        f"{column.name!r} is {column.type!r}{null} which cannot be read as {expected}: say what "
        f"it means with {role}=..., or with free=<expression> and claimed=..."
    )


def _read_role(reading: Reading, role: str, found: list[Column[Any]]) -> None:
    if role in {"due", "lease"}:
        for column in found:
            if not is_time(column):
                _doubt(reading, column, "a time", role)
        found = [c for c in found if is_time(c)]
    elif role == "attempts":
        found = [c for c in found if isinstance(plain_type(c.type), Integer)]
    elif role == "token":
        # "token" alone is as often a credential; beside a lease it is the fence.
        found = [c for c in found if is_text(c) and (c.name != "token" or _has_lease(c))]
    if not found:
        return
    if len(found) > 1 and role in {"due", "lease", "worker", "token"}:
        reading.problems.append(
            f"several columns could be {role!r} ("
            + ", ".join(repr(c.name) for c in found)
            + f"): name one with {role}=..."
        )
        return
    reading.arguments[role] = (found[0],) if role == "order" else found[0]
    reading.understood[role] = found[0].name


def _has_lease(column: Column[Any]) -> bool:
    """Check whether the column's table has a conventionally named lease."""
    return any(c.name in LEASES for c in column.table.columns)
