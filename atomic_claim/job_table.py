"""Which columns of the user's own table mean what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from datetime import timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sqlalchemy import Column, ColumnElement, Table, bindparam, func, literal
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.types import DateTime, Float, Integer

from . import roles, state_values
from .columns import as_sql, by_name, clause, column_of, listed, mapper_of, tables_of
from .errors import AmbiguousTable, ClaimError
from .inference import Reading, is_text, plain_type
from .layouts import read_table
from .sql_elements import DatabaseTime, Preparing
from .state_values import UNSET

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper

T = TypeVar("T")
MARKS = ("claimed", "done", "failed", "withdrawn", "released")
# The key of what was inferred, in the ``info`` of its table.
INFERRED = "atomic_claim.inferred"


@dataclass(frozen=True, eq=False, repr=False)
class JobTable(Preparing):
    """Declare which column of a job table has which role.

    Columns are given as ``Column``, mapped attribute or name. Values given here are written into
    the SQL as literals, by the column's type, so that partial indexes on them serve the claim;
    what changes from call to call belongs into the arguments of :func:`claim_jobs`. Each role needs
    a column of its own, except by ``atomic_claim.roles.MAY_SHARE``.

    Args:
        table: a ``Table`` with a primary key, or a mapped class.
        state: the column that says whether a job is free. A boolean (``processing``) is free when
            false, a nullable time (``locked_at``) when NULL; any other needs ``free`` and
            ``claimed``. Without ``state``, ``free`` is an expression and ``claimed`` a mapping.
            It may be the ``lease``: then every claim needs one, and its end frees the row.
        free: the value of ``state`` that is free, a tuple of such values (``None`` is NULL), or an
            SQLAlchemy expression that is true for a free row.
        claimed: the value of ``state`` that marks a claimed row, or a mapping of columns to
            values; ``func.now()`` stands for the database's clock, as the column stores it.
        done: likewise for a finished job. Rows that bear all of its values are never claimed.
        failed: likewise for a failed job.
        released: the value of ``state`` that a released row gets, or a mapping. Left out, the
            first of the values that are free.
        withdrawn: a mapping of further columns to values that take a row out of the queue
            (``{"cancelled_at": func.now()}``). A row that bears one of them is never claimed.
        due: the time from which the job may run; NULL is due at once.
        order: what comes first: columns or expressions, ``table.c.priority.desc()`` for example, or
            names, with ``-`` before them for descending. Left out, the primary key's order.
        worker: the string column of the claiming worker's name. Clearing it writes NULL, or an
            empty string if it is NOT NULL.
        token: the string column of the claim's token, 32 hexadecimal digits.
        lease: the time column of the end of the lease. Clearing it writes NULL, or the present
            time if it is NOT NULL; then every claim needs a lease.
        attempts: the integer column that counts the claims, up to the end of its type.
        max_attempts: how many claims are allowed, an ``int`` or a column, in which NULL is no
            maximum. A row that has had as many is not claimed. If a row's lease runs out before its
            last attempt, it is claimed alone then, so that it costs no other row an attempt.
        error: the column of a failure's text, a string or JSON.
        stamps: time columns that claims and their ends set to the database's clock.
        naive_times: the zone of time columns that store none: ``"utc"``, or ``"server"`` for the
            session's zone. Required if the two differ.
        text_times: the ``strftime`` format (SQLite's) of time columns that are text.
        null_is_free: whether NULL in ``state`` is free.
        unleased: a ``timedelta`` after which rows that run without a lease are free, counted from
            the time of their claim, or else from the first of ``stamps``. Left out, they are never
            reclaimed.
        exclusive_by: a column, such as the customer's id. At most ``max_per_key`` rows of the same
            value run at a time; NULL restricts nothing. Every claimer of the table has to declare
            it. See :mod:`atomic_claim.backends.by_key` for its cost.
        max_per_key: how many rows of one key may run, an ``int`` of at least 1.
        fair_by: a column, such as the tenant's id, by whose values claims take turns: a claim takes
            the first row of each of the next values, beginning behind the one that was served last,
            and goes round again while its limit is not full. NULL is a value of its own. The rows
            come in this order. See :mod:`atomic_claim.backends.fair` for its cost.

    Raises:
        AmbiguousTable: a needed argument is missing; the message names it.
        ClaimError: the table has no primary key, a column is not one of the table's or does not fit
            its role, or the declared values contradict each other.
    """

    table: Any
    _: KW_ONLY
    state: Any = None
    free: Any = UNSET
    claimed: Any = UNSET
    done: Any = UNSET
    failed: Any = UNSET
    withdrawn: Any = None
    released: Any = UNSET
    due: Any = None
    order: Any = ()
    worker: Any = None
    token: Any = None
    lease: Any = None
    attempts: Any = None
    max_attempts: Any = None
    error: Any = None
    stamps: Any = ()
    naive_times: Literal["utc", "server"] | None = None
    text_times: str | None = None
    null_is_free: bool = False
    unleased: timedelta | None = None
    exclusive_by: Any = None
    max_per_key: int = 1
    fair_by: Any = None
    entity: type[Any] | None = field(init=False, default=None)
    free_values: tuple[Any, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        given, tables = self.table, tables_of(self.table)
        mapper = mapper_of(given)
        if mapper is not None and any(each.concrete for each in mapper.self_and_descendants):
            raise ClaimError(
                f"{given.__name__} has concrete table inheritance, where a row's class is told by "
                "its table: declare the Table of each class"
            )
        self._set("entity", mapper.class_ if mapper is not None else None)
        marked = self.claimed if isinstance(self.claimed, Mapping) else ()
        state = marked if self.state is None else (self.state,)
        holders = (t for t in tables for each in state if column_of(t, None, each) is not None)
        self._set("table", next(holders, tables[0]))
        if not self.table.primary_key.columns:
            raise ClaimError(
                f"table {self.table.fullname!r} has no primary key, so its rows cannot be told "
                "apart while they are claimed: add one, or (not on MySQL and MariaDB) name the "
                "columns that are unique with PrimaryKeyConstraint(...) in the Table"
            )
        roles.check_roles([("primary_key", column) for column in self.key])
        if mapper is not None:
            self._check_mapper(mapper)
        for name in roles.COLUMNS:
            if (column := getattr(self, name)) is not None:
                self._set(name, self.column(column, name))
        if isinstance(clause(self.max_attempts), (str, ClauseElement)):
            self._set("max_attempts", self.column(self.max_attempts, "max_attempts"))
        self._set("stamps", tuple(self.column(c, "stamps") for c in listed(self.stamps)))
        self._set("order", self.terms(self.order))
        written = self.values(self.claimed, "claimed") if isinstance(self.claimed, Mapping) else {}
        marking = (("claimed", column) for column in written if column is not self.state)
        roles.check_roles([*self.role_columns, *marking])
        roles.check_attempts(self.attempts, self.max_attempts)
        if self.naive_times not in {None, "utc", "server"}:
            raise ClaimError(
                f"naive_times is {self.naive_times!r}; expected 'utc', 'server' or None"
            )
        self._read_state()
        for role in ("done", "failed"):
            self._set(role, self._mapping(getattr(self, role), role))
        self._set("withdrawn", self._mapping(self.withdrawn or {}, "withdrawn"))
        tells_age = self.lease is not None and bool(self.claim_times or self.stamps)
        roles.check_unleased(self.unleased, tells_age=tells_age)
        roles.check_most_rows(self.max_per_key, self.exclusive_by)
        self._check_marks()
        for column in self.time_columns:
            self.now(column)

    def _check_mapper(self, mapper: Mapper[Any]) -> None:
        """Refuse a class whose identity or version is not in the table that a claim updates."""
        mapped = {column for each in mapper.column_attrs for column in each.columns}
        own = tuple(column for column in mapper.primary_key if column.table is self.table)
        version, found = mapper.version_id_col, ""
        if not mapped.issuperset(self.key) or own not in {(), self.key}:
            found = f"has the primary key {', '.join(map(str, mapper.primary_key))}"
        elif version is not None and version.table is not self.table:
            found = f"has its version in {version}"
        if found:
            raise ClaimError(
                f"{mapper.class_.__name__} {found}, which is not that of {self.table.fullname!r}, "
                "the table that a claim updates: map it to that, or declare the Table"
            )

    def _check_marks(self) -> None:
        """Refuse marks that contradict each other or leave a claimed row free."""
        marks: dict[str, Any] = {role: [getattr(self, role)] for role in MARKS}
        # A lease that is the state is claimed and released by different times.
        others = {c: value for c, value in self.released.items() if c is not self.lease}
        marks |= {"free": [{self.state: value} for value in self.free_values], "released": [others]}
        marks["withdrawn"] = [{column: value} for column, value in self.withdrawn.items()]
        state_values.check_marks(marks)
        written = {column for role, column in self.role_columns if role not in roles.READ_ONLY}
        state_values.check_free_changes(self.free, written | set(self.claimed))
        others = {c: value for c, value in self.withdrawn.items() if c is not self.state}
        state_values.check_defaults(others, self.now)

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __repr__(self) -> str:
        said = [f"{role}={column.name!r}" for role, column in self.role_columns]
        return f"<JobTable({', '.join([repr(self.table.fullname), *said])})>"

    @classmethod
    def infer(cls, table: Any, **overrides: Any) -> JobTable:
        """Read the meaning of conventionally named columns, or refuse.

        Tables of known queues are recognised by their columns, see :mod:`atomic_claim.layouts`. A
        declaration in ``table.info["atomic_claim"]``, a dictionary of this class's arguments with
        columns by name, goes before the names.

        Args:
            table: a ``Table`` (reflected or declared) or a mapped class.
            **overrides: arguments of this class. Each settles what is in doubt about it, and what
                was understood of the others is kept. A value in ``claimed``, ``done`` or
                ``failed`` is one of the state, beside which the conventionally named times are
                kept; a mapping is all that is written. A mapping in ``withdrawn`` adds to what
                was understood; ``withdrawn={}`` says that no other column holds a row back.

        Returns:
            The ``JobTable``; without overrides, the same one for the same table.

        Raises:
            AmbiguousTable: it lists what was understood, what was not, and what to write.
            ClaimError: it is not a table, or has no primary key.
        """
        return cls._infer(table, overrides) if overrides else job_table_of(table)

    @classmethod
    def _infer(cls, given: Any, overrides: Mapping[str, Any], *, ordered: bool = False) -> JobTable:
        """Read the names; ``ordered`` where the order comes from elsewhere."""
        mapper, readings = mapper_of(given), list[Reading]()
        for table in tables_of(given):
            declared = table.info.get("atomic_claim")
            if isinstance(declared, JobTable):
                if overrides:
                    raise ClaimError(
                        f"{table.fullname!r} has a JobTable in its info, which is complete: leave "
                        "out the overrides, or put a dictionary there"
                    )
                return declared
            if isinstance(declared, Mapping):
                return cls(given, **{**declared, **overrides})
            readings.append(read_table(table, mapper, overrides, ordered=ordered))
        clear = [reading for reading in readings if not reading.problems]
        stated = [r for r in clear if isinstance(r.arguments.get("state"), Column)]
        for reading in stated or clear:
            return cls(given, **reading.arguments)
        raise AmbiguousTable(_explain(given, readings[0], overrides))

    @cached_property
    def key(self) -> tuple[Column[Any], ...]:
        """The primary key's columns, in its order."""
        return tuple(self.table.primary_key.columns)

    @cached_property
    def mapper(self) -> Mapper[Any] | None:
        """The mapper of the class that was given, if one was."""
        return mapper_of(self.entity) if self.entity is not None else None

    @cached_property
    def next_version(self) -> dict[Any, Any]:
        """The value of a mapped ``version_id_col`` after a change, as a flush would write it."""
        column: Any = getattr(self.mapper, "version_id_col", None)
        make: Any = getattr(self.mapper, "version_id_generator", None)
        if column is None or not callable(make):
            return {}
        if isinstance(plain_type(column.type), Integer):
            return {column: func.coalesce(column, 0) + 1}
        next_one = partial(make, None)
        return {column: bindparam("_atomic_claim_version", callable_=next_one, type_=column.type)}

    @property
    def has_keys(self) -> bool:
        """Return True if claims regard a key, for which they take more than one statement."""
        return any(getattr(self, role) is not None for role in roles.KEYS)

    @cached_property
    def claim_times(self) -> tuple[Column[Any], ...]:
        """The columns that a claim sets to the database's clock."""
        return tuple(c for c, value in self.claimed.items() if isinstance(value, DatabaseTime))

    @cached_property
    def time_columns(self) -> tuple[Column[Any], ...]:
        """The time columns that a claim compares or writes."""
        found = (self.due, *self.stamps, *self.claim_times, self.lease)
        return tuple(column for column in found if column is not None)

    def column(self, given: Any, role: str) -> Column[Any]:
        """Return the table's column for a name, a column or a mapped attribute.

        Raises:
            ClaimError: the table has no such column; the message names the ``role``.
        """
        if (found := column_of(self.table, self.mapper, given)) is None:
            raise ClaimError(
                f"{role}={given!s} is not a column of table {self.table.fullname!r}, which has: "
                + ", ".join(column.name for column in self.table.columns)
            )
        return found

    def needed(self, role: str, what: str) -> Any:
        """Return the column of a role, or raise with the ALTER TABLE that adds one."""
        if (column := getattr(self, role)) is not None:
            return column
        name = self.table.fullname
        raise ClaimError(
            f"{what} needs a {role} column, and {name!r} has none that is known: name it with "
            f"JobTable({role}=...), or add one: ALTER TABLE {name} ADD COLUMN {roles.ADDED[role]} "
            "NULL"
        )

    def now(
        self, column: Column[Any], offset: ColumnElement[Any] | None = None, *, floor: bool = False
    ) -> ColumnElement[Any]:
        """Return the database's time plus ``offset`` seconds, in the format of ``column``."""
        if not self._holds_times(column):
            raise AmbiguousTable(
                f"{self.table.fullname}.{column.name} is {column.type!r} and is used as a time; "
                "expected a DateTime, or text with text_times='%Y-%m-%dT%H:%M:%fZ' (its strftime "
                "format) in the JobTable"
            )
        clock, form = self.naive_times or "unsaid", self.text_times if is_text(column) else None
        return DatabaseTime(column.type, clock, offset, form=form, floor=floor)

    def _holds_times(self, column: Column[Any]) -> bool:
        is_time = isinstance(plain_type(column.type), DateTime)
        return is_time or (is_text(column) and self.text_times is not None)

    def values(self, given: Any, role: str) -> dict[Column[Any], Any]:
        """Resolve the columns of a mapping given per call; plain values become parameters."""
        if not isinstance(given, Mapping):
            raise ClaimError(f"{role} is {given!r}; expected a mapping of columns to values")
        return {self.column(column, role): value for column, value in given.items()}

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def terms(self, given: Any) -> tuple[ColumnElement[Any], ...]:
        """Return the ORDER BY terms for names, columns, attributes or expressions.

        A name with ``-`` before it is descending.
        """
        return tuple(self._term(term) for term in listed(given))

    def _term(self, term: Any) -> ColumnElement[Any]:
        if not isinstance(term, str):
            example = "a column, its name, or an expression such as table.c.priority.desc()"
            return as_sql(term, "order", example, ColumnElement)
        column = self.column(term.removeprefix("-"), "order")
        return column.desc() if term.startswith("-") else column

    @property
    def role_columns(self) -> list[tuple[str, Column[Any]]]:
        """The roles and their columns; stamps have several."""
        found = [(role, getattr(self, role)) for role in (*roles.COLUMNS, "max_attempts")]
        found += [("stamps", column) for column in self.stamps]
        return [(role, column) for role, column in found if isinstance(column, Column)]

    def _read_state(self) -> None:
        """Bring ``free``, ``claimed`` and ``released`` into one form: expressions and mappings."""
        state: Column[Any] | None = self.state
        free, claimed = clause(self.free), self._mapping(self.claimed, "claimed")
        if free is UNSET or not claimed or (state is not None and state not in claimed):
            free, claimed = self._completed(free, claimed)
        first_free: Any = UNSET
        if state is not None and state is self.lease and free is None and not state.nullable:
            # A lease that is over frees the row, and is what a release writes.
            # Rounded down: without fractions of the second, MySQL's lease would end later.
            free = state <= self.now(state)
            first_free = self.now(state, literal(0.0, Float()), floor=True)
        elif not isinstance(free, ClauseElement):
            state, values = self._state_of(free, "free"), state_values.free_values(free)
            found = [state_values.declared(state, each, "free", self.now) for each in values]
            first_free = found[0]
            found += [None] if self.null_is_free and state.nullable else []
            self._set("free_values", tuple(found))
            free = state_values.is_one_of(state, found)
        self._set("free", free)
        self._set("claimed", claimed)
        released = self._mapping(self.released, "released")
        if self.released is UNSET:
            released = state_values.undone(claimed, state, first_free)
        self._set("released", released)

    def _completed(self, free: Any, claimed: Mapping[Any, Any]) -> tuple[Any, Any]:
        """Complete ``free`` and ``claimed`` by the type of the state."""
        if (state := self.state) is None:
            raise AmbiguousTable(
                f"JobTable({self.table.fullname!r}): name the state column with state=..., or "
                "give free=<expression> and claimed={column: value}"
            )
        marked, is_time = claimed.get(state, UNSET), self._holds_times(state)
        free, marked = state_values.completed(state, free, marked, is_time=is_time)
        return free, {**self._mapping({state: marked}, "claimed"), **claimed}

    def _state_of(self, value: Any, role: str) -> Column[Any]:
        """Return the state, in which a value is that is given alone.

        Raises:
            ClaimError: there is no state, or the value is a column's name and may be meant so.
        """
        state: Column[Any] | None = self.state
        if state is None:
            raise ClaimError(
                f"{role}={value!r} is a value; it needs state=..., the column it is in, or a "
                "mapping of columns to values"
            )
        names, members = by_name(self.table, self.mapper), getattr(state.type, "enums", ())
        if isinstance(value, str) and value in names and value not in members:
            said, meant = f"{role}={{{state.name!r}: {value!r}}}", f"{role}={{{value!r}: ...}}"
            if role == "free":
                said, meant = f"free=({value!r},)", "free=<expression>"
            raise ClaimError(
                f"{role}={value!r} is the name of a column, and would be a value of "
                f"{state.name!r}: write {said} for the value, or {meant} for the column"
            )
        return state

    def _mapping(self, given: Any, role: str) -> dict[Column[Any], Any]:
        if given is UNSET:
            return {}
        if not isinstance(given, Mapping):
            given = {self._state_of(given, role): given}
        values = self.values(given, role).items()
        return {c: state_values.declared(c, v, role, self.now) for c, v in values}


def job_table_of(given: Any, *, ordered: bool = False) -> JobTable:
    """Return the ``JobTable`` for a ``Table``, a mapped class or a ``JobTable``.

    ``ordered`` where the call says the order, so that the table's columns need not.
    """
    if isinstance(given, JobTable):
        return given
    # Kept with the table rather than in a registry of ours, so that it dies with the table.
    table = given if isinstance(given, Table) else tables_of(given)[0]
    kept: dict[Any, JobTable] = table.info.setdefault(INFERRED, {})
    known = kept.get((given, False)) or kept.get((given, ordered))
    if known is None:
        known = kept[given, ordered] = JobTable._infer(given, {}, ordered=ordered)  # noqa: SLF001
    return known


def _explain(given: Any, reading: Reading, overrides: Mapping[str, Any]) -> str:
    understood = "; ".join(f"{role}: {said}" for role, said in reading.understood)
    name = given.__name__ if isinstance(given, type) else given.name
    said = {
        role: repr(value) if isinstance(value, (str, type(None))) else "..."
        for role, value in overrides.items()
    }
    arguments = [f"{role}={value}" for role, value in (said | reading.proposed).items()]
    call = ", ".join([name if name.isidentifier() else "table", *arguments])
    return (
        f"table {reading.table.fullname!r} cannot be read with certainty.\n"
        f"  understood: {understood or 'nothing'}\n"
        f"  not understood: {', '.join(reading.unknown) or 'nothing'}\n"
        + "".join(f"  in doubt: {problem}\n" for problem in reading.problems)
        + f"  write: JobTable.infer({call})"
    )
