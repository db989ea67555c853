"""Which columns of the user's own table mean what."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sqlalchemy import (
    Column,
    ColumnElement,
    Table,
    and_,
    bindparam,
    false,
    func,
    literal,
    not_,
    or_,
    true,
)
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.sql import functions
from sqlalchemy.sql.elements import ClauseElement, ColumnClause, False_, True_
from sqlalchemy.types import (
    BINARY,
    VARBINARY,
    Boolean,
    Date,
    DateTime,
    Enum,
    Float,
    Integer,
    LargeBinary,
    String,
    Uuid,
)

from .errors import AmbiguousTable, ClaimError
from .inference import (
    NOW,
    Now,
    Reading,
    is_flag,
    is_text,
    plain_type,
)
from .layouts import read_table
from .orm import is_mapper
from .sql_elements import DatabaseTime, InlineLiteral

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper

TOKEN_LENGTH = 32
# Of exclusive keys: their equal values are written alike.
KEY_TYPES = (Integer, String, Uuid, Date, Boolean, BINARY, LargeBinary, VARBINARY)
declared_tables: weakref.WeakSet[JobTable] = weakref.WeakSet()
"""The job tables of this process, so that a ticket finds its own again."""


T = TypeVar("T")
# The key of what was inferred, in the ``info`` of its table.
INFERRED = "atomic_claim.inferred"


class _Unset:
    def __repr__(self) -> str:
        return "..."


_UNSET: Any = _Unset()
Values = Mapping[Column[Any], Any]


@dataclass(frozen=True, eq=False, repr=False)
class JobTable:
    """Say which columns of a job table mean what.

    Columns are given as ``Column``, mapped attribute or name. Values given here are written into
    the SQL as literals, by the column's type, so that partial indexes on them serve the claim;
    what changes from call to call belongs into the arguments of :func:`claim_jobs`.

    Args:
        table: a ``Table`` with a primary key, or a mapped class.
        state: the column that says whether a job is free. A boolean (``processing``) is free when
            false, a nullable time (``locked_at``) when NULL; any other needs ``free`` and
            ``claimed``. Without ``state``, ``free`` is an expression and ``claimed`` a mapping.
        free: the value of ``state`` that is free, a tuple of such values, or an SQLAlchemy
            expression that is true for a free row.
        claimed: the value of ``state`` that marks a claimed row, or a mapping of columns to
            values; ``func.now()`` stands for the database's clock, as the column stores it.
        done: likewise for a finished job. Rows that bear it are never claimed.
        failed: likewise for a failed job. Rows that bear it are never claimed.
        released: the value of ``state`` that a released row gets, or a mapping. Left out, the
            first of the values that are free.
        withdrawn: a mapping of further columns to values that take a row out of the queue
            (``{"cancelled_at": func.now()}``: not free once it is set).
        due: the time from which the job may run; NULL is due at once.
        order: what comes first: columns or expressions, ``table.c.priority.desc()`` for example.
            Left out, the primary key's order.
        worker: where the claiming worker's name goes.
        token: where the claim's token goes, a string of 32 hexadecimal digits.
        lease: where the end of the lease goes.
        attempts: an integer that counts the claims.
        max_attempts: how many claims are allowed, an ``int`` or a column, in which NULL is no
            maximum. A row that has had as many is not claimed.
        error: where a failure's text goes.
        stamps: time columns that every change of ours sets to the database's clock.
        naive_times: what the time columns without a zone hold: ``"utc"`` or the ``"server"``'s
            (the session's) zone. Demanded where the two differ.
        text_times: the ``strftime`` format (SQLite's) of time columns that are text.
        null_is_free: whether NULL in ``state`` is free.
        unleased: what becomes of rows that run without a lease, such as those that were running
            before the column existed. None: they are owned for ever. A ``timedelta``: they are
            free once the time of their claim (or else the first of ``stamps``) is so long ago.
        exclusive_by: a column, such as the customer's id, of whose every value no more than
            ``max_per_key`` rows run at a time; NULL restricts nothing. See
            :mod:`atomic_claim.backends.by_key` for what it rests on and costs. Every claimer of
            the table has to declare it.
        max_per_key: how many rows of one key may run, an ``int`` of at least 1.

    Raises:
        AmbiguousTable: something needed was not said; the message says what to write.
        ClaimError: the table has no primary key, or a column is not one of the table's.
    """

    table: Any
    _: KW_ONLY
    state: Any = None
    free: Any = _UNSET
    claimed: Any = _UNSET
    done: Any = _UNSET
    failed: Any = _UNSET
    withdrawn: Any = None
    released: Any = _UNSET
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
    entity: type[Any] | None = field(init=False, default=None)
    statements: dict[Any, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        given = self.table
        mapper = _mapper_of(given)
        tables = list(mapper.tables) if mapper is not None else [given]
        if not all(isinstance(table, Table) for table in tables):
            raise ClaimError(
                f"{given!r} is not a table: pass a Table, a mapped class or a JobTable"
                + (" (is the class mapped?)" if isinstance(given, type) else "")
            )
        if mapper is not None and any(each.concrete for each in mapper.self_and_descendants):
            raise ClaimError(
                f"{given.__name__} has concrete table inheritance, where a row's class is told by "
                "its table: declare the Table of each class"
            )
        self._set("entity", mapper.class_ if mapper is not None else None)
        self._set("table", self._table_of_state(tables))
        if not self.table.primary_key.columns:
            raise ClaimError(
                f"table {self.table.fullname!r} has no primary key, so its rows cannot be told "
                "apart while they are claimed: add one, or name the columns that are unique with "
                "PrimaryKeyConstraint(...) in the Table"
            )
        roles = ("state", "due", "worker", "token", "lease", "attempts", "error", "exclusive_by")
        for name in roles:
            if (column := getattr(self, name)) is not None:
                self._set(name, self.column(column, name))
        if isinstance(self.max_attempts, (str, ClauseElement)) or hasattr(
            self.max_attempts, "__clause_element__"
        ):
            self._set("max_attempts", self.column(self.max_attempts, "max_attempts"))
        self._check_attempts()
        self._check_token()
        self._set("stamps", tuple(self.column(c, "stamps") for c in _listed(self.stamps)))
        self._set("order", tuple(self.term(term) for term in _listed(self.order)))
        if self.naive_times not in {None, "utc", "server"}:
            raise ClaimError(
                f"naive_times is {self.naive_times!r}; it must be 'utc', 'server' or None"
            )
        self._read_state()
        for role in ("done", "failed"):
            self._set(role, self._mapping(getattr(self, role), role))
        self._set("withdrawn", self._mapping(self.withdrawn or {}, "withdrawn"))
        self._check_unleased()
        self._check_exclusive()
        for column in (self.due, self.lease):
            if column is not None:
                self.now(column)
        declared_tables.add(self)

    def __repr__(self) -> str:
        said = [f"state={self.state.name!r}"] if self.state is not None else []
        said += [
            f"{role}={column.name!r}"
            for role in ("due", "worker", "token", "lease", "attempts", "exclusive_by")
            if (column := getattr(self, role)) is not None
        ]
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
        return cls._inferred(table, overrides, ordered=False)

    @classmethod
    def _inferred(cls, table: Any, overrides: Mapping[str, Any], *, ordered: bool) -> JobTable:
        """Read the names; ``ordered`` where the order comes from elsewhere."""
        mapper = _mapper_of(table)
        key = mapper if mapper is not None else table
        if not (isinstance(key, Table) or is_mapper(key)):
            raise ClaimError(
                f"{table!r} is not a table: pass a Table, a mapped class or a JobTable"
                + (" (is the class mapped?)" if isinstance(table, type) else "")
            )
        if overrides:
            return cls._infer(table, mapper, overrides, ordered=ordered)
        # Kept with the table rather than in a registry of ours, so that it dies with the table.
        info = table.info if mapper is None else mapper.tables[0].info  # type: ignore[attr-defined]
        kept = info.setdefault(INFERRED, {})
        known = kept.get((key, False)) or kept.get((key, ordered))
        if known is None:
            known = kept[key, ordered] = cls._infer(table, mapper, {}, ordered=ordered)
        return known  # type: ignore[no-any-return]

    @classmethod
    def _infer(
        cls,
        given: Any,
        mapper: Mapper[Any] | None,
        overrides: Mapping[str, Any],
        *,
        ordered: bool,
    ) -> JobTable:
        tables = [t for t in mapper.tables if isinstance(t, Table)] if mapper else [given]
        readings: list[tuple[Table, Reading]] = []
        for table in tables:
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
            names = _names(table, mapper)
            readings.append((table, read_table(table, names, overrides, ordered=ordered)))
        clear = [reading for _, reading in readings if not reading.problems]
        stated = [r for r in clear if isinstance(r.arguments.get("state"), Column)]
        for reading in stated or clear:
            return cls(given, **reading.arguments)
        raise AmbiguousTable(_explain(given, *readings[0], overrides))

    def prepare(self, make: Callable[..., T], *given: Any) -> T:
        """Call ``make`` with this declaration and ``given`` once, and return its cached result."""
        key = (make, *given)
        if key not in self.statements:
            self.statements[key] = make(self, *given)
        return self.statements[key]  # type: ignore[no-any-return]

    @cached_property
    def key(self) -> tuple[Column[Any], ...]:
        """The primary key's columns, in its order."""
        return tuple(self.table.primary_key.columns)

    @cached_property
    def shape(self) -> str:
        """A short name for what the columns mean, the same in every process."""
        roles = [
            f"{role}={column.name}"
            for role in ("state", "due", "worker", "token", "lease", "attempts", "error")
            if (column := getattr(self, role)) is not None
        ]
        said = [*roles, str(self.is_free), str(self.is_running), str(sorted(self._marks))]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()[:12]

    @property
    def _marks(self) -> list[str]:
        return [
            f"{role}: {column.name} = {value}"
            for role in ("claimed", "done", "failed", "released")
            for column, value in getattr(self, role).items()
        ]

    @cached_property
    def mapper(self) -> Mapper[Any] | None:
        """The mapper of the class that was given, if one was."""
        return _mapper_of(self.entity) if self.entity is not None else None

    @cached_property
    def is_free(self) -> ColumnElement[bool]:
        """True for a row that nobody has claimed and that has not ended."""
        return and_(self.free, *self.not_ended)

    @cached_property
    def is_running(self) -> ColumnElement[bool]:
        """True for a row that bears the mark of a claim and has not ended."""
        return and_(*(self.marks or [not_(self.free)]), *self.not_ended)

    @cached_property
    def marks(self) -> tuple[ColumnElement[bool], ...]:
        """Together true for a row that bears the declared values of a claim."""
        return tuple(
            column.is_not(None) if isinstance(value, DatabaseTime) else column == value
            for column, value in self.claimed.items()
            if value is None or isinstance(value, (DatabaseTime, InlineLiteral, True_, False_))
        )

    @cached_property
    def next_version(self) -> dict[Any, Any]:
        """The value of a mapped ``version_id_col`` after a change, as a flush would write it."""
        mapper = self.mapper
        column = None if mapper is None else mapper.version_id_col
        if mapper is None or column is None or column.table is not self.table:
            return {}
        if not callable(mapper.version_id_generator):
            return {}
        if isinstance(plain_type(column.type), Integer):
            return {column: func.coalesce(column, 0) + 1}
        generate = partial(mapper.version_id_generator, None)
        return {column: bindparam("atomic_claim_version", callable_=generate, type_=column.type)}

    @cached_property
    def is_expired(self) -> ColumnElement[bool] | None:
        """True for a running row whose lease is over; None where rows have no leases."""
        lease = self.lease
        if lease is None:
            return None
        expired: ColumnElement[bool] = lease <= self.now(lease)
        if self.unleased is not None:
            expired = or_(expired, and_(lease.is_(None), self._is_old))
        return expired

    @cached_property
    def is_held(self) -> ColumnElement[bool]:
        """True for a running row that its worker still owns."""
        lease = self.lease
        if lease is None:
            return self.is_running
        lasts: list[ColumnElement[bool]] = [lease > self.now(lease)]
        if self.unleased is not None:
            since = self._claimed_since
            lasts.append(and_(lease.is_(None), or_(since.is_(None), not_(self._is_old))))
        elif lease.nullable:
            lasts.append(lease.is_(None))
        return and_(self.is_running, or_(*lasts))

    @property
    def _is_old(self) -> ColumnElement[bool]:
        """True where a row without a lease has been running for so long that it is free."""
        assert self.unleased is not None
        since = self._claimed_since
        age = literal(-self.unleased.total_seconds(), Float())
        return since <= self.now(since, age)

    @cached_property
    def claimable_branches(
        self,
    ) -> tuple[tuple[tuple[ColumnElement[bool], ...], tuple[ColumnElement[Any], ...]], ...]:
        """Why a row may be claimed, a tuple of conditions each; and what then comes first.

        The order of the whole claim stands for an empty second part.
        """
        found: list[Any] = [((self.is_free, *self.is_due), ())]
        lease, unspent = self.lease, self.is_unspent
        if lease is not None:
            expired = (self.is_running, lease <= self.now(lease), *unspent)
            found.append((expired, (lease,)))
            if self.unleased is not None:
                old = (self.is_running, lease.is_(None), self._is_old, *unspent)
                found.append((old, (self._claimed_since,)))
        return tuple(found)

    @cached_property
    def not_ended(self) -> tuple[ColumnElement[bool], ...]:
        """Together true for a row that is neither done nor failed nor withdrawn."""
        return self.not_ended_in(())

    def not_ended_in(self, others: Collection[Column[Any]]) -> tuple[ColumnElement[bool], ...]:
        """Return the ``not_ended`` conditions that do not use the columns in ``others``."""
        return tuple(
            _is_not(column, value)
            for mapping in (self.done, self.failed, self.withdrawn)
            for column, value in mapping.items()
            if column is not self.state and column not in others
        )

    @cached_property
    def is_due(self) -> tuple[ColumnElement[bool], ...]:
        """Together true for a row whose time has come and whose attempts are not spent."""
        conditions: list[ColumnElement[bool]] = []
        if self.due is not None:
            conditions.append(_null_or(self.due, self.due <= self.now(self.due)))
        return (*conditions, *self.is_unspent)

    @cached_property
    def is_unspent(self) -> tuple[ColumnElement[bool], ...]:
        """True, if anything, for a row that has attempts left."""
        if self.attempts is None or self.max_attempts is None:
            return ()
        most = self.max_attempts
        if isinstance(most, int):
            most = InlineLiteral(most, Integer())
            return (_null_or(self.attempts, self.attempts < most),)
        return (_null_or(most, _null_or(self.attempts, self.attempts < most)),)

    @cached_property
    def time_columns(self) -> tuple[Column[Any], ...]:
        """The time columns that a claim compares or writes."""
        written = [c for c, value in self.claimed.items() if isinstance(value, DatabaseTime)]
        found = [*([self.due] if self.due is not None else []), *self.stamps, *written]
        return tuple(found + ([self.lease] if self.lease is not None else []))

    def column(self, given: Any, role: str) -> Column[Any]:
        """Return the table's column for a name, a column or a mapped attribute."""
        table: Table = self.table
        if isinstance(given, str):
            given = self._named(given)
        elif hasattr(given, "__clause_element__"):
            given = given.__clause_element__()
        if isinstance(given, ColumnClause):
            found = table.corresponding_column(given)
            if isinstance(found, Column):
                return found
        raise ClaimError(
            f"{role}={given!s} is not a column of table {table.fullname!r}, which has: "
            + ", ".join(column.name for column in table.columns)
        )

    def _named(self, name: str) -> Any:
        """Resolve a name as a column's key, else as an attribute, else as a column's own name."""
        table: Table = self.table
        if name in table.columns:
            return table.columns[name]
        if self.mapper is not None and name in self.mapper.columns:
            return self.mapper.columns[name]
        return next((column for column in table.columns if column.name == name), name)

    def now(
        self,
        column: Column[Any],
        offset: ColumnElement[Any] | None = None,
        *,
        floor: bool = False,
    ) -> ColumnElement[Any]:
        """Return the database's time plus ``offset`` seconds, in the format of ``column``."""
        if isinstance(plain_type(column.type), DateTime):
            return DatabaseTime(column.type, self.naive_times or "unsaid", offset, floor=floor)
        if is_text(column) and self.text_times is not None:
            return DatabaseTime(column.type, "text:" + self.text_times, offset)
        raise AmbiguousTable(
            f"{self.table.fullname}.{column.name} is {column.type!r} and is used as a time; "
            "expected a DateTime, or text with text_times='%Y-%m-%dT%H:%M:%fZ' (its strftime "
            "format) in the JobTable"
        )

    def values(self, given: Any, role: str) -> dict[Column[Any], Any]:
        """Resolve the columns of a mapping given per call; plain values become parameters."""
        if not isinstance(given, Mapping):
            raise ClaimError(f"{role} is {given!r}; expected a mapping of columns to values")
        return {self.column(column, role): value for column, value in given.items()}

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _table_of_state(self, tables: list[Any]) -> Table:
        """Of a class mapped to several tables, the one that holds the state."""
        if len(tables) == 1:
            return tables[0]  # type: ignore[no-any-return]
        wanted = [self.state] if self.state is not None else list(_columns_in(self.claimed))
        for table in tables:
            names = {name for c in table.columns for name in (c.name, c.key)}
            for column in wanted:
                if isinstance(column, str):
                    if column in names:
                        return table  # type: ignore[no-any-return]
                    continue
                clause = getattr(column, "__clause_element__", lambda column=column: column)()
                if table.columns.contains_column(clause):
                    return table  # type: ignore[no-any-return]
        raise ClaimError(
            f"none of the tables {', '.join(t.fullname for t in tables)} has the state column "
            f"{wanted!r}"
        )

    @cached_property
    def _claimed_since(self) -> Column[Any]:
        written = [c for c, value in self.claimed.items() if isinstance(value, DatabaseTime)]
        found: Column[Any] = [*written, *self.stamps][0]
        return found

    def _check_unleased(self) -> None:
        if self.unleased is None:
            return
        if not isinstance(self.unleased, timedelta) or self.unleased <= timedelta(0):
            raise ClaimError(f"unleased is {self.unleased!r}; expected a timedelta above zero")
        marks_time = any(isinstance(value, DatabaseTime) for value in self.claimed.values())
        if self.lease is None or not (marks_time or self.stamps):
            raise ClaimError(
                "unleased needs lease=..., and a time from which a row's age can be told: "
                "claimed={..., 'claimed_at': func.now()} or stamps=('updated_at',)"
            )

    def _check_exclusive(self) -> None:
        most = self.max_per_key
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ClaimError(f"max_per_key is {most!r}; expected an int of at least 1")
        column = self.exclusive_by
        if column is None:
            if most != 1:
                raise ClaimError("max_per_key needs exclusive_by=..., the column of the key")
            return
        if not isinstance(plain_type(column.type), KEY_TYPES):
            raise ClaimError(
                f"exclusive_by={column.name!r} is {column.type!r}; expected an integer, a string, "
                "an enum, a UUID, a date, a boolean or bytes, whose equal values are written alike"
            )
        if column in self.claimed:
            raise ClaimError(
                f"exclusive_by={column.name!r} is written by the claim itself, which would change "
                "the row's key: name another column"
            )

    def _check_token(self) -> None:
        if self.token is None:
            return
        length = getattr(plain_type(self.token.type), "length", None)
        if not is_text(self.token) or (length is not None and length < TOKEN_LENGTH):
            raise ClaimError(
                f"the token column {self.token.name!r} is {self.token.type!r}; expected a string "
                f"of at least {TOKEN_LENGTH} characters"
            )

    def _check_attempts(self) -> None:
        limit = self.max_attempts
        if limit is None:
            return
        if self.attempts is None:
            raise ClaimError("max_attempts needs attempts=..., the column that counts the claims")
        if isinstance(limit, Column):
            return
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ClaimError(
                f"max_attempts is {limit!r}; expected an int of at least 1, or a column"
            )

    def term(self, term: Any) -> ColumnElement[Any]:
        """Return the ORDER BY term for a name, a column, an attribute or an expression."""
        if isinstance(term, str):
            return self.column(term, "order")
        if hasattr(term, "__clause_element__"):
            term = term.__clause_element__()
        if not isinstance(term, ColumnElement):
            raise ClaimError(
                f"order={term!r}: expected a column, its name, or an expression such as "
                "table.c.priority.desc()"
            )
        return term

    def _read_state(self) -> None:
        """Bring ``free`` and ``claimed`` into one form: an expression and a mapping."""
        state: Column[Any] | None = self.state
        free, claimed = self.free, self.claimed
        if hasattr(free, "__clause_element__"):
            free = free.__clause_element__()
        if state is not None and (free is _UNSET or claimed is _UNSET):
            free, claimed = self._complete(state, free, claimed)
        if free is _UNSET or claimed is _UNSET:
            raise AmbiguousTable(
                f"JobTable({self.table.fullname!r}): name the state column with state=..., or "
                "give free=<expression> and claimed={column: value}"
            )
        if isinstance(free, ClauseElement):
            expression = free
        elif state is None:
            raise ClaimError(f"free={free!r} is a value; it needs state=..., the column it is in")
        else:
            expression = self._equals(state, free)
        mapping = self._mapping(claimed, "claimed")
        if not mapping:
            raise ClaimError("claimed={} marks nothing: a claimed row would stay free")
        self._set("free", expression)
        self._set("claimed", mapping)
        self._set("released", self._read_released(free, mapping))

    def _read_released(self, free: Any, claimed: Values) -> dict[Column[Any], Any]:
        """Return the values that undo a claim's mark, or none if they cannot be inferred."""
        if self.released is not _UNSET:
            return self._mapping(self.released, "released")
        found: dict[Column[Any], Any] = {}
        for column, value in claimed.items():
            if isinstance(value, DatabaseTime):
                found[column] = None
            elif column is self.state and not isinstance(free, ClauseElement):
                values = list(free) if isinstance(free, (tuple, list, set, frozenset)) else [free]
                found[column] = self._literal(column, values[0])
            elif is_flag(column) and isinstance(value, (True_, False_)):
                found[column] = false() if isinstance(value, True_) else true()
            else:
                return {}
        return found

    def _complete(self, state: Column[Any], free: Any, claimed: Any) -> tuple[Any, Any]:
        """Infer missing values of ``free`` and ``claimed`` from the type of the state column."""
        if is_flag(state):
            marked = claimed
            if isinstance(claimed, Mapping):
                by_column = {self.column(c, "claimed"): value for c, value in claimed.items()}
                marked = by_column.get(state, _UNSET)
            if free is _UNSET:
                free = False if marked is _UNSET else not marked
            return free, (not free if claimed is _UNSET else claimed)
        type_ = plain_type(state.type)
        if isinstance(type_, DateTime) or (is_text(state) and self.text_times is not None):
            return (None if free is _UNSET else free), (NOW if claimed is _UNSET else claimed)
        missing = " and ".join(
            f"{role}=..."
            for role, value in (("free", free), ("claimed", claimed))
            if value is _UNSET
        )
        raise AmbiguousTable(
            f"{self.table.fullname}.{state.name} is {type_!r}, whose values nobody named: give "
            f"{missing} as they stand in the column"
            + (f" (one of {', '.join(type_.enums)})" if isinstance(type_, Enum) else "")
        )

    def _equals(self, state: Column[Any], free: Any) -> ColumnElement[bool]:
        if free is None:
            return state.is_(None)
        values = list(free) if isinstance(free, (tuple, list, set, frozenset)) else [free]
        literals = [self._literal(state, value) for value in values]
        found = state == literals[0] if len(literals) == 1 else state.in_(literals)
        if not self.null_is_free or not state.nullable:
            return found
        if len(values) == 1 and isinstance(plain_type(state.type), Boolean):
            return state.is_not(true() if not values[0] else false())
        return or_(state.is_(None), found)

    def _mapping(self, given: Any, role: str) -> dict[Column[Any], Any]:
        if given is _UNSET:
            return {}
        if not isinstance(given, Mapping):
            if self.state is None:
                raise ClaimError(
                    f"{role}={given!r} is a value; without state=... it must be a mapping of "
                    "columns to values"
                )
            given = {self.state: given}
        elif role == "claimed" and self.state is not None:
            columns = {self.column(c, role): v for c, v in given.items()}
            if self.state not in columns:
                raise ClaimError(
                    f"claimed={given!r} leaves out the state column {self.state.name!r}"
                )
        return {
            (column := self.column(name, role)): self._literal(column, value)
            for name, value in given.items()
        }

    def _literal(self, column: Column[Any], value: Any) -> Any:
        if hasattr(value, "__clause_element__"):
            value = value.__clause_element__()
        if isinstance(value, (Now, functions.now, functions.current_timestamp)):
            return self.now(column)
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


def job_table_of(given: Any, *, ordered: bool = False) -> JobTable:
    """Return the ``JobTable`` for a ``Table``, a mapped class or a ``JobTable``.

    ``ordered`` where the call says the order, so that the table's columns need not.
    """
    if isinstance(given, JobTable):
        return given
    if isinstance(given, Table) and (kept := given.info.get(INFERRED)):
        known: JobTable | None = kept.get((given, False)) or kept.get((given, ordered))
        if known is not None:
            return known
    return JobTable._inferred(given, {}, ordered=ordered)  # noqa: SLF001 - this module's own


def _mapper_of(given: Any) -> Mapper[Any] | None:
    if not isinstance(given, type):
        return None
    mapper: Any = sa_inspect(given, raiseerr=False)
    return mapper if is_mapper(mapper) else None


def _names(table: Table, mapper: Mapper[Any] | None) -> dict[Column[Any], frozenset[str]]:
    names = {column: {column.name, column.key} for column in table.columns}
    if mapper is not None:
        for key, column in mapper.columns.items():
            if isinstance(column, Column) and column in names:
                names[column].add(key)
    return {column: frozenset(found) for column, found in names.items()}


def _columns_in(claimed: Any) -> Iterator[Any]:
    if isinstance(claimed, Mapping):
        yield from claimed


def _listed(given: Any) -> tuple[Any, ...]:
    if given is None:
        return ()
    if isinstance(given, Iterable) and not isinstance(given, (str, ClauseElement)):
        return tuple(given)
    return (given,)


def _null_or(column: Column[Any], condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return or_(column.is_(None), condition) if column.nullable else condition


def _is_not(column: Column[Any], value: Any) -> ColumnElement[bool]:
    """Build the condition that a column does not hold the value; it is true for NULL."""
    if isinstance(value, DatabaseTime) or not isinstance(value, ClauseElement):
        return column.is_(None)
    if isinstance(plain_type(column.type), Boolean) and value is not None:
        flag = value.compare(true())
        if not column.nullable:
            return column == (false() if flag else true())
        return column.is_not(true() if flag else false())
    return _null_or(column, column != value)


def _explain(given: Any, table: Table, reading: Reading, overrides: Mapping[str, Any]) -> str:
    understood = "; ".join(f"{role}: {names}" for role, names in reading.understood.items())
    name = given.__name__ if isinstance(given, type) else table.name
    said = {
        role: repr(value) if isinstance(value, (str, type(None))) else "..."
        for role, value in overrides.items()
    }
    arguments = [f"{role}={value}" for role, value in (said | reading.proposed).items()]
    call = ", ".join([name if name.isidentifier() else "table", *arguments])
    return (
        f"table {table.fullname!r} cannot be read with certainty.\n"
        f"  understood: {understood or 'nothing'}\n"
        f"  not understood: {', '.join(reading.unknown) or 'nothing'}\n"
        + "".join(f"  in doubt: {problem}\n" for problem in reading.problems)
        + f"  write: JobTable.infer({call})"
    )
