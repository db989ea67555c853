"""The interface that a database's backend implements, and the objects passed to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Protocol, TypeVar, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    Dialect,
    Result,
    Row,
    Select,
    Table,
    Update,
    null,
    select,
    update,
)
from sqlalchemy.engine import result_tuple
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.sql.base import Executable
from sqlalchemy.types import DateTime

from atomic_claim.errors import ClaimError, UnsupportedDialect
from atomic_claim.inference import plain_type
from atomic_claim.job_table import JobTable
from atomic_claim.plan import LIMIT, SCAN_LIMIT, ClaimPlan
from atomic_claim.sql_elements import ByKey, key_in

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


Key = tuple[Any, ...]
Pooled = PoolProxiedConnection | ConnectionPoolEntry
T = TypeVar("T")
Statement = TypeVar("Statement", bound=Select[Any] | Update)
# A chain of ORs nests as deep as it is long, and SQLite allows a depth of 1,000.
CHUNK = 500
LIMITS = frozenset({LIMIT, SCAN_LIMIT})
KeyedRows = list[tuple[Key, Any]]
"""Keys and the rows or entities they belong to, in claim order."""


Read = Callable[[Select[Any], Mapping[str, Any]], Sequence[Any]]
"""Executes a SELECT, and returns its rows."""


class Candidate(NamedTuple):
    """A row that may be claimed, unless another claim was faster.

    Attributes:
        row: the row's primary key.
        key: its exclusive key.
        lock: the number of the key's lock, where keys are locked one by one.
    """

    row: Key
    key: Any
    lock: int | None = None


class Executes(Protocol):
    """Where statements of a claim are executed; see :class:`Transaction`."""

    @property
    def own(self) -> bool: ...
    @property
    def dialect(self) -> Dialect: ...
    @property
    def pooled(self) -> PoolProxiedConnection: ...
    @property
    def in_autocommit(self) -> bool: ...
    def rows(
        self, statement: Executable, params: Mapping[str, Any] | None = None
    ) -> Sequence[Row[Any]]: ...
    def tuples(
        self, statement: Executable, params: Mapping[str, Any] | None = None
    ) -> list[tuple[Any, ...]]: ...
    def write(self, statement: Executable, params: Mapping[str, Any] | None = None) -> None: ...
    def entities(
        self, statement: Executable, params: Mapping[str, Any] | None = None
    ) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Transaction:
    """Where a claim runs.

    Attributes:
        executor: executes the statements: a session, so that its events see them, or a connection.
        connection: the connection they arrive at.
        own: whether the transaction is ours, begun for this claim and ended after it.
        resumed: whether an earlier try lost its connection, so that nobody knows what became of it.
        unheard: whether nobody hears of its statements, so that they may go to the driver's cursor.
        single: whether one statement is all, which the driver commits by itself.
    """

    executor: Session | Connection
    connection: Connection
    own: bool
    resumed: bool = False
    unheard: bool = False
    single: bool = False

    def execute(
        self, statement: Executable, params: Mapping[str, Any] | None = None
    ) -> Result[Any]:
        """Execute where the caller wants it executed."""
        return self.executor.execute(statement, params)

    def rows(
        self, statement: Executable, params: Mapping[str, Any] | None = None
    ) -> Sequence[Row[Any]]:
        """Execute, and return the rows."""
        return self.execute(statement, params).all()

    def tuples(
        self, statement: Executable, params: Mapping[str, Any] | None = None
    ) -> list[tuple[Any, ...]]:
        """Execute, and return the rows as plain tuples."""
        return [tuple(row) for row in self.rows(statement, params)]

    def write(self, statement: Executable, params: Mapping[str, Any] | None = None) -> None:
        """Execute what returns no rows."""
        self.execute(statement, params)

    def entities(
        self, statement: Executable, params: Mapping[str, Any] | None = None
    ) -> Sequence[Any]:
        """Execute, and return the entities, each once."""
        return self.execute(statement, params).scalars().unique().all()

    @property
    def dialect(self) -> Dialect:
        """The database's."""
        return self.connection.dialect

    @property
    def pooled(self) -> PoolProxiedConnection:
        """The driver's connection, as the pool gave it."""
        return self.connection.connection

    @property
    def has_criteria(self) -> bool:
        """Return True if the session has ``do_orm_execute`` listeners, which may add criteria."""
        session = self.executor
        return not isinstance(session, Connection) and bool(session.dispatch.do_orm_execute)

    @property
    def in_autocommit(self) -> bool:
        """Ask the driver whether it commits every statement by itself."""
        dbapi_connection = self.connection.connection.dbapi_connection
        assert dbapi_connection is not None
        return self.connection.dialect.detect_autocommit_setting(dbapi_connection)


@dataclass(frozen=True, eq=False)
class Find:
    """A SELECT of somebody else's that finds jobs.

    Attributes:
        job_table: the table that it finds them in.
        statement: the SELECT.
        place: the table in its FROM, or the alias of it.
        limit: how many rows it asks for, if it says so.
        conditions: what it asks of the table's own columns.
        alone: whether the table is all that is in its FROM.
        params: what is passed with it.
    """

    job_table: JobTable
    statement: Select[Any]
    place: Any
    limit: int | None
    conditions: tuple[ColumnElement[bool], ...]
    alone: bool
    params: Mapping[str, Any]

    @property
    def key(self) -> tuple[ColumnElement[Any], ...]:
        """The primary key's columns, as the SELECT has them."""
        return tuple(self.place.columns[column.key] for column in self.job_table.key)


class Backend(ABC):
    """How one database claims rows atomically."""

    names: ClassVar[tuple[str, ...]]
    """The names of the SQLAlchemy dialects that it serves."""
    hints: ClassVar[Mapping[str, str]] = {}
    """What makes a statement reach rows through their key and lock no others, by dialect."""
    walks_keys: ClassVar[bool] = True
    """Whether the planner walks the keys of an index by a recursive CTE."""
    keyed_needs_own: ClassVar[str | None] = None
    """Why exclusive keys need a transaction of our own, where they do."""

    @abstractmethod
    def check(self, dialect: Dialect) -> None:
        """Raise ``UnsupportedDialect`` if the server is too old to claim atomically."""

    @abstractmethod
    def is_single(self, plan: ClaimPlan) -> bool:
        """Check whether the claim is a single statement, atomic without a transaction."""

    @abstractmethod
    def claim(self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any]) -> KeyedRows:
        """Claim, and return the rows or entities in claim order."""

    def key_session(self, job_table: JobTable) -> Sequence[ColumnElement[Any]]:
        """Return expressions that describe the session, for the search by exclusive keys."""
        return ()

    def check_key_session(self, job_table: JobTable, found: Sequence[Any]) -> None:  # noqa: B027 - most ask nothing
        """Raise if the values of :meth:`key_session` do not allow a claim by exclusive keys."""

    def key_number(self, job_table: JobTable, key: ColumnElement[Any]) -> ColumnElement[Any]:
        """Return the number of a key's lock, where keys are locked one by one, or NULL."""
        return null()

    def lock_keys(
        self, tx: Transaction, job_table: JobTable, candidates: Sequence[Candidate], wanted: int
    ) -> tuple[Sequence[Candidate], Sequence[Candidate]]:
        """Lock the exclusive keys of the first candidates until the transaction ends.

        Databases whose lock is held around the transaction have nothing to do.

        Returns:
            The candidates whose keys are locked, and those that were not tried.
        """
        return candidates, ()

    def key_lock(self, connection: Connection, table: Table) -> AbstractContextManager[None]:
        """Lock a table's exclusive keys around a transaction of our own.

        Most databases lock them in the transaction.
        """
        return nullcontext()

    def begin_keyed(self, connection: Connection) -> None:  # noqa: B027 - some have nothing to do
        """Begin a transaction of our own that is about to make or keep rows with keys running."""

    @abstractmethod
    def lock(
        self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any], *, deletes: bool = False
    ) -> list[Key]:
        """Lock the rows that a claim would claim, and leave them as they are.

        ``deletes`` says that they are going to be deleted. What is returned are their keys, in
        claim order.
        """

    @abstractmethod
    def lock_read(self, tx: Transaction, find: Find) -> Select[Any]:
        """Return the SELECT that locks the rows it returns and skips rows locked elsewhere."""

    @abstractmethod
    def statements(self, plan: ClaimPlan) -> Sequence[Executable | ByKey]:
        """Return the statements of :meth:`claim` in execution order, as run without contention.

        For people to read, and for EXPLAIN.
        """

    def change(
        self,
        tx: Transaction,
        job_table: JobTable,
        keys: Sequence[Key],
        guard: ColumnElement[bool],
        values: Mapping[Any, Any],
    ) -> list[Key]:
        """Change those of the rows that the guard is true for; their keys, in no order."""
        changed: list[Key] = []
        [changing] = self.changes(job_table, guard, values)
        for chunk in chunks(keys, CHUNK):
            changed += [tuple(row) for row in tx.execute(*changing.of(chunk))]
        return changed

    def extend(
        self,
        tx: Transaction,
        job_table: JobTable,
        keys: Sequence[Key],
        guard: ColumnElement[bool],
        values: Mapping[Any, Any],
    ) -> list[Key]:
        """:meth:`change`, such that no claim takes the rows for expired at the same time."""
        return self.change(tx, job_table, keys, guard, values)

    def changes(
        self, job_table: JobTable, guard: ColumnElement[bool], values: Mapping[Any, Any]
    ) -> Sequence[ByKey]:
        """Return the statements of :meth:`change` in execution order."""
        statement = update(job_table.table).values(dict(values)).returning(*job_table.key)
        return (ByKey(job_table.key, lambda is_one: statement.where(is_one, guard)),)

    def changes_at_once(self, keys: Sequence[Key]) -> bool:
        """Check whether :meth:`change` takes a single statement for these keys."""
        return len(keys) <= CHUNK

    def unlocked(
        self,
        tx: Transaction,
        job_table: JobTable,
        keys: Sequence[Key],
        guard: ColumnElement[bool],
    ) -> list[Key]:
        """Lock those of the rows that the guard is true for and that nobody else holds."""
        locked: list[Key] = []
        for chunk in chunks(keys, CHUNK):
            statement = select(*job_table.key).where(key_in(job_table.key, chunk), guard)
            statement = hinted(statement, job_table.table, self.hints)
            statement = statement.with_for_update(skip_locked=True, key_share=True)
            locked += [tuple(row) for row in tx.execute(statement)]
        return locked

    def limit_wait(self, tx: Transaction, seconds: float) -> AbstractContextManager[None]:
        """Wait for no lock longer than this."""
        return nullcontext()

    def commit(self, connection: Connection) -> None:  # noqa: B027 - most have nothing to do
        """Commit a transaction of our own ahead of SQLAlchemy, where that has to clean up."""

    def autocommit(
        self, dialect: Dialect, pooled: PoolProxiedConnection
    ) -> AbstractContextManager[None] | None:
        """Have the driver commit by itself; None where that may differ from BEGIN … COMMIT.

        Neither does it where a transaction is open already.
        """
        return None

    def directly(
        self, dialect: Dialect, pooled: PoolProxiedConnection
    ) -> AbstractContextManager[None] | None:
        """Let a claim use the driver's connection; None where it is in another state than usual."""
        return self.autocommit(dialect, pooled)

    @abstractmethod
    def in_transaction(self, pooled: Pooled) -> bool:
        """Ask the driver whether a transaction is open on its connection."""

    @abstractmethod
    def is_conflict(self, error: DBAPIError) -> bool:
        """Check whether the error is one for which the database asks to retry the transaction."""

    def outages(self, dialect: Dialect) -> tuple[type[Exception], ...]:
        """Return the exceptions that are raised when the database cannot be reached."""
        return (DBAPIError, OSError)

    def is_naive(self, type_: DateTime) -> bool:
        """Check whether a time column of this type has no time zone on this database."""
        return not type_.timezone

    def naive_columns(self, job_table: JobTable) -> list[str]:
        """Return the names of naive datetime columns, or none if ``naive_times`` is declared."""
        if job_table.naive_times is not None:
            return []
        return [
            column.name
            for column in job_table.time_columns
            if isinstance(type_ := plain_type(column.type), DateTime) and self.is_naive(type_)
        ]

    def refuse_naive(self, job_table: JobTable, zone: str) -> NoReturn:
        """Refuse to guess what times without a zone mean in a session that is not in UTC."""
        names = ", ".join(repr(name) for name in self.naive_columns(job_table))
        raise ClaimError(
            f"the session's time zone is {zone}, and {names} of {job_table.table.fullname!r} "
            'hold times without a zone: say what they mean with JobTable(naive_times="utc") or '
            'JobTable(naive_times="server")'
        )

    def cure(self) -> str:
        """Return the advice that a conflict's message gives to the owner of the transaction."""
        return "roll back, and claim again in a new transaction"


def require(
    dialect: Dialect,
    product: str,
    least: tuple[int, ...],
    because: str,
    *,
    prefix: tuple[int, ...] = (),
) -> None:
    """Refuse a server older than ``least``; a dialect that never connected has no version.

    ``prefix`` is what may stand before the version that counts.
    """
    found = tuple(dialect.server_version_info or ())
    if prefix and len(found) > len(prefix) and found[: len(prefix)] == prefix:
        found = found[len(prefix) :]
    if not found or found[: len(least)] >= least:
        return
    raise UnsupportedDialect(
        f"{product} {_dotted(found)} cannot claim rows atomically: {because} came with "
        f"{product} {_dotted(least)}; upgrade the server"
    )


def _dotted(version: Iterable[Any]) -> str:
    return ".".join(str(part) for part in version)


def returned(plan: ClaimPlan, result: Result[Any]) -> KeyedRows:
    """Pair the rows or entities of the claim statement with their keys, in result order."""
    if plan.multi_table:
        return [(tuple(row), None) for row in result]
    items = result.scalars().all() if plan.entities else result.all()
    key_of = plan.key_of
    return [(key_of(item), item) for item in items]


def row_maker(result: Result[Any], columns: Sequence[Any]) -> Callable[[Iterable[Any]], Row[Any]]:
    """Return a function that makes rows with the same column access as the result's own rows."""
    names = list(result.keys())[: len(columns)]
    return result_tuple(names, [(column, column.key) for column in columns])


def hinted(statement: Statement, table: Any, hints: Mapping[str, str]) -> Statement:
    """Add a hint for each dialect to the statement; other dialects do not render it."""
    for dialect_name, hint in hints.items():
        with_hint = statement.with_hint(selectable=table, text=hint, dialect_name=dialect_name)
        statement = cast("Statement", with_hint)
    return statement


def mark_and_load(
    tx: Executes,
    plan: ClaimPlan,
    keys: Sequence[Key],
    params: Mapping[str, Any],
    hints: Mapping[str, str],
) -> KeyedRows:
    """Write the claim to rows that are locked, and read them."""
    written = {name: value for name, value in params.items() if name not in LIMITS}
    marking = marking_by_key(plan, hints)
    for chunk in chunks(keys, CHUNK):
        tx.write(*marking.of(chunk, written))
    return load(tx, plan, keys, hints)


def marking_by_key(plan: ClaimPlan, hints: Mapping[str, str]) -> ByKey:
    """Return the UPDATE that writes the claim, for rows given by key."""
    name = "marking, hinted" if hints else "marking"
    return plan.prepare(name, partial(_marking, hints=hints))


def _marking(plan: ClaimPlan, hints: Mapping[str, str]) -> ByKey:
    table = plan.job_table.table
    return ByKey(plan.job_table.key, hinted(update(table).values(plan.values), table, hints).where)


def load(tx: Executes, plan: ClaimPlan, keys: Sequence[Key], hints: Mapping[str, str]) -> KeyedRows:
    """Load the rows or entities with these keys: complete, current and in this order.

    A plain read comes first: it sees what this transaction wrote itself, whatever its snapshot.
    A row of another table of a mapped class may be newer than the snapshot, so what is missing
    is read again with a lock, which sees the latest.
    """
    found: dict[Key, Any] = {}
    for lock in (False, True):
        missing = [key for key in keys if key not in found]
        for chunk in chunks(missing, CHUNK):
            asked = reading_by_key(plan, hints, lock=lock).of(chunk)
            items = tx.entities(*asked) if plan.entities else tx.rows(*asked)
            key_of = plan.key_of
            found.update((key_of(item), item) for item in items)
    return [(key, found[key]) for key in keys]


def reading_by_key(plan: ClaimPlan, hints: Mapping[str, str], *, lock: bool = False) -> ByKey:
    """Return the SELECT that reads the claimed rows or entities by key."""
    name = f"reading{', locked' if lock else ''}{', hinted' if hints else ''}"
    return plan.prepare(name, partial(_reading, lock=lock, hints=hints))


def _reading(plan: ClaimPlan, lock: bool, hints: Mapping[str, str]) -> ByKey:
    reading = hinted(plan.reading, plan.job_table.table, hints)
    if lock:
        reading = reading.with_for_update()
    key = plan.key_attributes if plan.entities else plan.job_table.key
    return ByKey(key, reading.where)


def chunks(keys: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the keys in chunks of at most ``size``: databases limit a statement's parameters."""
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


def refuse_autocommit(backend: Backend, tx: Executes, why: str) -> None:
    """Refuse a bind whose driver commits after every statement.

    Asked after a first statement: an engine may begin its transactions by itself, on a driver in
    autocommit, and only then has done so.
    """
    if tx.in_autocommit and not backend.in_transaction(tx.pooled):
        raise ClaimError(
            f"the connection is in AUTOCOMMIT, where {why}: use a bind with transactions, such "
            'as engine.execution_options(isolation_level="READ COMMITTED")'
        )
