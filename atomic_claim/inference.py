"""Inference of a job table's columns from conventional names and types.

Only names that mean one thing are read, and only where type, nullability, foreign keys and
computed defaults fit. ``priority`` has no natural direction, a status column of plain strings has
no values that could be read from it, and ``paused`` may or may not hold a row back: these are
problems to report, not guesses to make. What the caller says settles them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Table, func
from sqlalchemy.schema import DefaultClause
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.types import Boolean, DateTime, Enum, Integer, String, TypeDecorator, TypeEngine

from .columns import by_name, clause, listed

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper

NOW = func.now()
TOKEN_LENGTH = 32


def plain_type(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return the type beneath any ``TypeDecorator`` and PostgreSQL's ``DOMAIN``."""
    while isinstance(type_, TypeDecorator):
        type_ = type_.impl_instance
    beneath: TypeEngine[Any] | None = getattr(type_, "data_type", None)
    return type_ if beneath is None else plain_type(beneath)


def members_of(type_: TypeEngine[Any]) -> dict[str, Any]:
    """Return the members of an enum by their names, or its strings; empty for other types."""
    if isinstance(type_, Enum) and type_.enum_class is not None:
        return dict(type_.enum_class.__members__)
    return {each: each for each in type_.enums} if isinstance(type_, Enum) else {}


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
    return default_text(column) in {"0", "1", "false", "true"}


def is_time(column: Column[Any]) -> bool:
    """Check whether the column can hold times: a ``DateTime``, or plain text."""
    return isinstance(plain_type(column.type), DateTime) or is_text(column)


def is_text(column: Column[Any]) -> bool:
    """Check whether the column holds plain text; an enum and MySQL's SET do not."""
    type_ = plain_type(column.type)
    listed = isinstance(type_, Enum) or type_.__visit_name__ == "SET"
    return isinstance(type_, String) and not listed


def holds_tokens(column: Column[Any]) -> bool:
    """Check whether the column can hold the token of a claim."""
    length = getattr(plain_type(column.type), "length", None)
    return is_text(column) and (length is None or length >= TOKEN_LENGTH)


def _is_token(column: Column[Any]) -> bool:
    # "token" alone is as often a credential; beside a lease it is the fence.
    alone = column.name == "token" and not any(c.name in LEASES for c in column.table.columns)
    return holds_tokens(column) and not alone


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _flags(text: str) -> tuple[str, ...]:
    return tuple(name for each in text.split() for name in (each, f"is_{each}"))


CLAIMED_FLAGS = _flags(
    "processing in_progress in_process running claimed locked picked taken reserved executing"
)
FREE_FLAGS = _flags("visible available")
CLAIMED_TIMES = _names("locked_at claimed_at picked_at reserved_at taken_at leased_at")
STATUSES = _names("status state job_status job_state")
DUE = _names(
    "wait_until run_at due_at scheduled_at scheduled_for available_at not_before run_after "
    "execute_at visible_at next_run_at eta"
)
ORDER = _names(
    "created_at created created_on inserted_at enqueued_at queued_at submitted_at added_at"
)
WORKERS = _names("worker worker_id locked_by claimed_by reserved_by picked_by")
TOKENS = _names("claim_token lease_token fencing_token lock_token token")
LEASES = _names("lease_until leased_until lease_expires_at locked_until claimed_until")
ATTEMPTS = _names("attempts attempt_count claim_attempts")
STAMPS = _names("updated_at modified_at last_modified updated_on")
UNDIRECTED = _names("priority prio rank weight position sort_order")
WAITING_VALUES = _names("waiting pending queued new ready todo enqueued")
VALUES: Mapping[str, tuple[str, ...]] = {
    "free": WAITING_VALUES,
    "claimed": _names("running processing in_progress active started claimed executing"),
    "done": _names("done completed complete finished succeeded success"),
    "failed": _names("failed failure error errored dead"),
}
END_TIMES: Mapping[str, tuple[str, ...]] = {
    "done": _names("completed_at finished_at done_at processed_at ended_at succeeded_at"),
    "failed": _names("failed_at dead_at discarded_at"),
    "withdrawn": _names("cancelled_at canceled_at deleted_at archived_at paused_at suspended_at"),
}
END_FLAGS: Mapping[str, tuple[str, ...]] = {
    "done": _flags("done completed finished processed"),
    "failed": ("has_error", *_flags("failed errored dead")),
    "withdrawn": _flags("cancelled canceled deleted archived"),
}
# What may keep a row from running, by what would say so: a flag while it has this value, a time
# that is due, or an expression.
HELD: Mapping[bool | str, tuple[str, ...]] = {
    True: _flags("paused suspended on_hold hold held blocked draft disabled skip skipped ignored"),
    False: _flags("enabled active approved confirmed published verified"),
    "due": _names("retry_at retry_after next_retry_at next_attempt_at snoozed_until delayed_until")
    + _names("delay_until postponed_until hold_until blocked_until start_after starts_at"),
    "free": _names("expires_at expire_at expires_on expiry valid_from valid_until not_after")
    + _names("deadline depends_on depends_on_id blocked_by waits_for"),
}


@dataclass(frozen=True)
class Kind:
    """Conventional names of one meaning, and what a column must be to have it.

    Attributes:
        role: the argument of ``JobTable``.
        fits: whether the column's type can have the meaning.
        names: the names, the likeliest first.
        expected: what a column that does not fit should have been, if ignoring it could hand out
            rows that must not run.
        empty: whether the column has to be nullable.
    """

    role: str
    fits: Callable[[Column[Any]], bool]
    names: tuple[str, ...]
    expected: str = ""
    empty: bool = False


UNTIL_THEN = "a time that is empty until then"
CLAIMED_FLAG = Kind("state", is_flag, CLAIMED_FLAGS, "yes or no")
FREE_FLAG = Kind("state", is_flag, FREE_FLAGS)
STATUS = Kind("state", lambda _: True, STATUSES)
CLAIMED_TIME = Kind("state", is_time, CLAIMED_TIMES, empty=True)
STATES = (CLAIMED_FLAG, FREE_FLAG, STATUS, CLAIMED_TIME)
KINDS = (
    *STATES,
    *(Kind(role, is_time, names, UNTIL_THEN, empty=True) for role, names in END_TIMES.items()),
    *(Kind(role, is_flag, names, "yes or no") for role, names in END_FLAGS.items()),
    Kind("failed", is_flag, ("error",)),
    Kind("due", is_time, DUE, "a time"),
    Kind("order", lambda column: not is_flag(column), ORDER),
    Kind("worker", is_text, WORKERS, empty=True),
    Kind("token", _is_token, TOKENS, empty=True),
    Kind("lease", is_time, LEASES, "a time"),
    Kind("attempts", lambda c: isinstance(plain_type(c.type), Integer), ATTEMPTS),
    Kind("error", is_text, _names("last_error error error_message"), empty=True),
    Kind("stamps", lambda c: is_time(c) and c.onupdate is None, STAMPS),
)
# What free=<expression> settles, beside the state's own value.
EXPRESSION = "an expression"


@dataclass
class Reading:
    """The result of inference: arguments of ``JobTable``, and what remains ambiguous.

    Attributes:
        table: the table.
        columns: the columns by their own and attribute names, without those of the key.
        given: the arguments that the caller gave.
        settled: the arguments that raise no doubt.
        arguments: what is certain, the caller's included.
        unknown: the columns that mean nothing here.
        problems: what is in doubt.
        proposed: the arguments that would settle it, by role, as source.
        found: the columns of each kind, by name.
        layout: the known queue whose table it is, if it is one.
    """

    table: Table
    columns: Mapping[str, Column[Any]]
    given: Mapping[str, Any]
    settled: set[str]
    arguments: dict[str, Any]
    unknown: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    proposed: dict[str, str] = field(default_factory=dict)
    found: dict[Kind, list[Column[Any]]] = field(default_factory=dict)
    layout: str = ""

    @property
    def understood(self) -> Iterator[tuple[str, str]]:
        """The roles that were read, and their columns or values, as people read them."""
        for role, value in self.arguments.items():
            columns = ", ".join(column.name for column in _columns_of(self, [(role, value)]))
            if role not in self.given:
                yield role, columns or str(getattr(value, "name", value))
        if self.layout:
            yield "layout", self.layout

    def doubt(self, problem: str, *settled_by: str, **proposed: str) -> None:
        """Add a problem, and what would settle it, unless that was given."""
        if self.settled.isdisjoint(settled_by):
            self.problems.append(problem)
            self.proposed.update(proposed)

    def named(self, given: Iterable[Any]) -> list[Column[Any]]:
        """Return the columns that are given, or have one of the names, in the order given."""
        names = (each if isinstance(each, str) else getattr(each, "key", "") for each in given)
        return list(dict.fromkeys(self.columns[name] for name in names if name in self.columns))

    def doubt_several(self, columns: Iterable[Column[Any]], role: str) -> None:
        """Add the problem that a role could be that of several columns."""
        names = ", ".join(repr(column.name) for column in columns)
        said = f"several columns could be {role!r} ({names}): name one with {role}=..."
        self.doubt(said, role, **{role: "..."})


def default_text(column: Column[Any]) -> str:
    """Return the column's server default as text, without its quotes and parentheses."""
    default = column.server_default
    if not isinstance(default, DefaultClause):
        return ""
    text = str(getattr(default.arg, "text", default.arg)).strip()
    while text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    if re.match(r"strftime\b", text, re.IGNORECASE):
        return text
    return text.strip("'\"").lower() if "(" not in text else text.lower()


def read_columns(
    table: Table,
    mapper: Mapper[Any] | None = None,
    given: Mapping[str, Any] | None = None,
    *,
    ordered: bool = False,
) -> Reading:
    """Read the columns of a table.

    Args:
        table: the table.
        mapper: the mapper of its class, whose attributes name the columns too.
        given: arguments of ``JobTable``, which settle what is in doubt.
        ordered: whether the order comes from elsewhere.
    """
    given = given or {}
    settled = {*given, *(["order"] if ordered else ())}
    if isinstance(clause(given.get("free")), ClauseElement):
        settled |= {EXPRESSION, *(["state"] if "claimed" in given else ())}
    columns = {
        name: column
        for name, column in by_name(table, mapper).items()
        if table.columns.contains_column(column) and not column.primary_key
    }
    reading = Reading(table, columns, given, settled, dict(given))
    _find(reading)
    _read_state(reading)
    _read_ends(reading)
    _read_roles(reading)
    unused = set(columns.values()).difference(_columns_of(reading, reading.arguments.items()))
    _read_held(reading, unused)
    unknown = unused.difference(reading.named(UNDIRECTED))
    reading.unknown = [column.name for column in table.columns if column in unknown]
    return reading


def _find(reading: Reading) -> None:
    """Sort the columns by kind; raise doubt about those that only have the name of one."""
    reading.found = {
        kind: [column for column in reading.named(kind.names) if _fits(kind, column)]
        for kind in KINDS
    }
    clear = {column for columns in reading.found.values() for column in columns}
    clear.update(_columns_of(reading, reading.arguments.items()))
    for kind in KINDS:
        for column in reading.named(kind.names if kind.expected else ()):
            if column not in clear:
                _doubt(reading, column, kind)


def _fits(kind: Kind, column: Column[Any]) -> bool:
    if column.computed is not None or (column.foreign_keys and kind is not STATUS):
        return False
    return kind.fits(column) and not (kind.empty and (not column.nullable or _is_filled(column)))


def _is_filled(column: Column[Any]) -> bool:
    """Check whether every new row has a time in the column."""
    is_empty = column.default is None and (default_text(column) or "null").startswith("null")
    return is_time(column) and not is_empty


def _doubt(reading: Reading, column: Column[Any], kind: Kind) -> None:
    """Say that a column has the name of something that it cannot be."""
    if kind.role == "state" and column.computed is not None:
        return
    more = "" if column.nullable else ", not nullable,"
    more += ", with a default," if _is_filled(column) else ""
    more += ", a foreign key," if column.foreign_keys else ""
    more += ", generated," if column.computed is not None else ""
    reading.doubt(
        f"{column.name!r} is {column.type!r}{more} which cannot be read as {kind.expected}: say "
        f"what it means with {kind.role}=..., or with free=<expression>",
        kind.role,
        EXPRESSION,
        # No value of another type means "at some time", or "until now".
        **{"free" if kind.fits is is_time and "free" not in reading.given else kind.role: "..."},
    )


def _columns_of(reading: Reading, arguments: Iterable[tuple[str, Any]]) -> Iterator[Column[Any]]:
    """Return the columns that arguments speak of."""
    for role, value in arguments:
        if role not in VALUES or isinstance(value, Mapping):
            yield from reading.named(listed(value))


def _read_state(reading: Reading) -> None:
    found, times = reading.found, reading.found[CLAIMED_TIME]
    # A boolean or status beside a claim time: the time is the stamp of the state.
    states = found[CLAIMED_FLAG] + found[FREE_FLAG] + found[STATUS] or times
    if "state" in reading.given:
        states = reading.named([reading.given["state"]])
    elif "state" in reading.settled:
        return
    if len(states) > 1:
        reading.doubt_several(states, "state")
        return
    if not states:
        problem = "no column says whether a job is claimed: name it with state=..., or give "
        reading.doubt(problem + "free=... and claimed=...", "state", state="...")
        return
    state = states[0]
    if is_flag(state):
        values: dict[str, Any] = {"free": True} if state in found[FREE_FLAG] else {}
    elif state in times or isinstance(plain_type(state.type), DateTime):
        values = {"free": None, "claimed": NOW}
    else:
        values = _read_status(reading, state)
    reading.arguments = {"state": state} | values | reading.arguments | {"state": state}
    claimed = reading.arguments.get("claimed")
    if len(times) == 1 and times[0] is not state and not isinstance(claimed, Mapping):
        mark = {state: claimed} if "claimed" in reading.arguments else {}
        reading.arguments["claimed"] = {**mark, times[0]: NOW}


def _read_status(reading: Reading, state: Column[Any]) -> dict[str, Any]:
    members = members_of(plain_type(state.type))
    one_of = f" ({', '.join(members)})" if members else ""
    values: dict[str, Any] = {}
    for role, conventional in VALUES.items():
        found = [name for name in members if name.lower() in conventional]
        if len(found) == 1:
            values[role] = members[found[0]]
        elif found or role in {"free", "claimed"}:
            reading.doubt(
                f"which value of {state.name!r}{one_of} is {role!r}? Say it with {role}=...",
                role,
                **{role: "..."},
            )
    return values


def _read_ends(reading: Reading) -> None:
    for role in END_TIMES:
        ends: dict[Any, Any] = {
            column: True if kind.fits is is_flag else NOW
            for kind, columns in reading.found.items()
            if kind.role == role
            for column in columns
        }
        value = reading.arguments.get(role)
        if isinstance(value, Mapping):
            # Each column that withdraws a row is a reason of its own; an end is all of them.
            ends = {**ends, **value} if role == "withdrawn" else {}
        elif value is not None and "state" in reading.arguments and ends:
            ends[reading.arguments["state"]] = value
        if ends:
            reading.arguments[role] = ends


def _read_roles(reading: Reading) -> None:
    """Read the roles of one column each, the stamps, and the order."""
    for kind, columns in reading.found.items():
        role = kind.role
        if not columns or role in {"state", *END_TIMES, *reading.given}:
            continue
        if len(columns) > 1 and role in {"due", "lease", "worker", "token"}:
            reading.doubt_several(columns, role)
            continue
        read = columns if role == "stamps" else columns[:1]
        reading.arguments[role] = tuple(read) if role in {"order", "stamps"} else read[0]
    if priorities := reading.named(UNDIRECTED):
        reading.doubt(
            f"{priorities[0].name!r} has no natural direction: does the highest or the lowest "
            f"come first? Say it with order=[table.c.{priorities[0].key}.desc(), ...]",
            "order",
            order="[...]",
        )


def _read_held(reading: Reading, unused: Collection[Column[Any]]) -> None:
    """Raise doubt about columns without a role that may keep a row from running."""
    flags: dict[str, bool] = {}
    for held, names in HELD.items():
        for column in reading.named(names):
            if column not in unused:
                continue
            role, said = "free", "<expression>"
            if isinstance(held, bool) and is_flag(column):
                flags[column.key] = held
                role, said = "withdrawn", repr({column.key: held})
            elif held == "due" and is_time(column) and "due" not in reading.arguments:
                role, said = "due", repr(column.key)
            proposed = {"free": "...", "withdrawn": repr(flags)}.get(role, said)
            reading.doubt(
                f"{column.name!r} may hold a row back: say when with {role}={said}, or with "
                "withdrawn={} if it never does",
                *{"withdrawn", EXPRESSION, role} - {"free"},
                **{role: proposed},
            )
