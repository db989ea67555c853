"""The interface that a database's backend implements, and the objects passed to it."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import filterfalse
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import DateTime

from atomic_claim import predicates
from atomic_claim.errors import ClaimConflict, ClaimError, UnsupportedDialect
from atomic_claim.inference import plain_type
from atomic_claim.job_table import JobTable
from atomic_claim.plan import INSTANT, LIMIT, SCAN_LIMIT, ClaimPlan
from atomic_claim.sql_elements import ByKey, DatabaseTime, key_in
from atomic_claim.statement import ClaimStatement

from .drivers import code_of, in_transaction, is_lost, product_of
from .reading import Candidate, Key, KeyedRows, Reading, Tried, instant
from .tables import check_once, hinted, refuse_view

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


# A chain of ORs nests as deep as it is long, and SQLite allows a depth of 1,000.
CHUNK = 500
# Behind some servers' own version stands what they tell old clients: 5.5.5-10.11.6.
OLD_CLIENTS = (5, 5, 5)


@dataclass
class Transaction:
    """The transaction in which the statements of one operation run.

    Attributes:
        backend: the database's.
        executor: a session, so that its events see the statements, or the connection itself.
        connection: the connection that all statements go to.
        own: whether the transaction is the call's own.
        after_disconnect: whether an earlier try lost its connection while it was committed.
        careful: whether an earlier try has failed, so that rows that cause it are passed over.
        marked: the keys of the rows that the operation has marked so far, in claim order.
        tokens: those that were stored of a mark at fault, which a trigger may have changed.
        autocommit: whether every statement is committed by itself, by SQLAlchemy's AUTOCOMMIT.
        outlasting: takes what ends after the transaction, where that is the call's own and has
            exclusive keys.
    """

    backend: Backend
    executor: Session | sa.Connection
    connection: sa.Connection
    own: bool
    after_disconnect: bool = False
    careful: bool = False
    marked: list[Key] = field(default_factory=list)
    tokens: frozenset[Any] = field(init=False, default=frozenset())
    autocommit: bool = field(init=False, default=False)
    outlasting: ExitStack | None = field(init=False, default=None)

    def execute(
        self, statement: Executable, params: Mapping[str, Any] | None = None
    ) -> sa.Result[Any]:
        """Execute on the connection, by the session if there is one."""
        if isinstance(self.executor, sa.Connection):
            return self.executor.execute(statement, params)
        return self.executor.execute(statement, params, bind_arguments={"bind": self.connection})

    def tuples(
        self, statement: Executable, params: Mapping[str, Any] | None = None
    ) -> list[tuple[Any, ...]]:
        """Execute, and return the rows as plain tuples."""
        return list(map(tuple, self.execute(statement, params)))

    def by_key(
        self, statement: ByKey, keys: Sequence[Key], params: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[Sequence[Key], sa.Result[Any]]]:
        """Execute for some keys after the others, and yield those keys and the result."""
        for start in range(0, len(keys), CHUNK):
            chunk = keys[start : start + CHUNK]
            yield chunk, self.execute(*statement.of(chunk, params))

    def change(
        self,
        keys: Sequence[Key],
        changes: Sequence[ByKey],
        params: Mapping[str, Any] | None = None,
        *,
        extends: JobTable | None = None,
    ) -> list[Key]:
        """Change the rows that the guard of :meth:`Backend.changes` is true for.

        Where one statement cannot return what it has changed, the first locks the rows. Before an
        extension of their leases, their exclusive keys are locked.

        Returns:
            Their keys, in no order.
        """
        if extends is not None and extends.exclusive_by is not None:
            locks = self.backend.key_locks
            locks.lock_table(self, extends)
            with locks.held(self, extends, keys):
                return self.change(keys, changes, params)
        changed: list[Key] = []
        first, *others = changes
        for _, result in self.by_key(first, keys, params):
            changed += (found := list(map(tuple, result)))
            if others:
                self.refuse_autocommit("the row locks would be gone before the rows are changed")
            for other in others if found else ():
                self.execute(*other.of(found))
        return changed

    def unlocked(
        self, job_table: JobTable, keys: Sequence[Key], guard: sa.ColumnElement[bool]
    ) -> list[Key]:
        """Lock those of the rows that the guard is true for and that are not locked."""
        locking = sa.select(*job_table.key).where(guard)
        locking = hinted(locking, job_table.table, self.backend.hints)
        locking = locking.with_for_update(skip_locked=True, key_share=True)
        found = self.by_key(ByKey(job_table.key, locking.where), keys)
        return [tuple(row) for _, result in found for row in result]

    def needs_steps(self, plan: ClaimPlan) -> bool:
        """Return True if a claim has to lock, mark and read by a statement each.

        That is where the session has ``do_orm_execute`` listeners, which may add criteria to a
        SELECT; and where rows that are claimed and cannot be read could not be found again: they
        are not rolled back, and bear no token.
        """
        job_table = plan.job_table
        if not self.own and (job_table.token is None or not job_table.released):
            return True
        session = self.executor
        if not plan.entities or isinstance(session, sa.Connection):
            return False
        return bool(session.dispatch.do_orm_execute)

    def has_lost(self, error: BaseException) -> bool:
        """Check whether the connection was lost, whatever error a listener has put in place."""
        return self.connection.invalidated or is_lost(error)

    def in_autocommit(self) -> bool | None:
        """Check whether the driver commits after every statement; None if it does not tell.

        Asked once a transaction has begun: an engine may begin its transactions by itself, on a
        driver in autocommit, and only then has done so.
        """
        pooled = self.connection.connection
        assert pooled.dbapi_connection is not None
        try:
            found = self.connection.dialect.detect_autocommit_setting(pooled.dbapi_connection)
        except NotImplementedError:
            return None
        return found and not in_transaction(pooled.driver_connection)

    def refuse_autocommit(self, why: str) -> None:
        """Refuse a bind whose driver commits after every statement; asked after a first one."""
        if (in_autocommit := self.in_autocommit()) is None:
            raise UnsupportedDialect(
                f"the driver {self.connection.dialect.driver!r} does not tell whether a connection "
                "is in AUTOCOMMIT, where this claim would not be safe: use another driver"
            )
        if in_autocommit:
            raise ClaimError(
                f"the connection is in AUTOCOMMIT, where {why}: use a bind with transactions, such "
                'as engine.execution_options(isolation_level="READ COMMITTED")'
            )


class Unreadable(Exception):
    """Raised with the keys of marked rows, if at least one of them cannot be read."""


Mark = Callable[[Transaction, ClaimPlan, Sequence[Key], Mapping[str, Any]], KeyedRows]
"""Marks rows that are locked, and returns them."""


@dataclass(frozen=True, eq=False)
class Find:
    """A SELECT of a patched function that finds jobs.

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
    statement: sa.Select[Any]
    place: Any
    limit: int | None
    conditions: tuple[sa.ColumnElement[bool], ...]
    alone: bool
    params: Mapping[str, Any]

    @property
    def key(self) -> tuple[sa.ColumnElement[Any], ...]:
        """The primary key's columns, as the SELECT has them."""
        return tuple(self.place.columns[column.key] for column in self.job_table.key)


class KeyLocks:
    """The locks of a database's exclusive keys; this base class has nothing to lock."""

    needs_own: ClassVar[str | None] = None
    """Why a claim needs a transaction of its own, where it does."""

    def check(self, tx: Transaction, job_table: JobTable) -> None:
        """Raise if the keys of this table cannot be locked."""
        check_once(tx.connection, job_table.table, refuse_view)

    def lock_table(self, tx: Transaction, job_table: JobTable) -> None:
        """Lock all keys of a table at once, where there is one lock; otherwise do nothing."""

    def number(self, key: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Return the number of a key's lock, where keys are locked one by one, or NULL."""
        return sa.null()

    def lock(
        self, tx: Transaction, job_table: JobTable, candidates: Sequence[Candidate], wanted: int
    ) -> Tried:
        """Lock the keys of the first candidates until the transaction ends, as many as are wanted.

        Returns:
            The candidates whose keys are locked, or that have none; and those that were not tried.
        """
        return candidates, ()

    def held(
        self, tx: Transaction, job_table: JobTable, keys: Sequence[Key]
    ) -> AbstractContextManager[None]:
        """Lock the exclusive keys of some rows before their leases are extended."""
        return nullcontext()

    def begin(self, connection: sa.Connection) -> None:
        """Begin a transaction of the call's own that makes or keeps rows with keys running."""


NO_KEY_LOCKS = KeyLocks()


class Backend(ABC):
    """The interface by which one database claims rows atomically."""

    names: ClassVar[tuple[str, ...]]
    """The names of the SQLAlchemy dialects that it serves."""
    required: ClassVar[Mapping[str, tuple[str, tuple[int, ...], str]]] = {}
    """By dialect, the product, the version that a claim needs, and what came with it."""
    conflicts: ClassVar[frozenset[Any]]
    """The codes of errors for which the database asks to try the transaction again."""
    random: ClassVar[str] = "random()"
    """A random number from 0 to 1, drawn for each row."""
    hints: ClassVar[Mapping[str, str]] = {}
    """What makes a statement reach rows through their key and lock no others, by dialect."""
    ending: ClassVar[str] = ""
    """The statement that ends the server's process with a number."""
    has_returning: ClassVar[bool] = True
    """Whether an UPDATE returns rows."""
    has_lateral: ClassVar[bool] = False
    """Whether a recursive CTE can join a LATERAL subquery."""
    walks_keys: ClassVar[bool] = True
    """Whether the planner walks the keys of an index by a recursive CTE."""
    key_locks: ClassVar[KeyLocks] = NO_KEY_LOCKS
    """How exclusive keys are locked; without it a claim by them is refused."""
    cure: ClassVar[str] = "roll back, and claim again in a new transaction"
    """What the message of a conflict advises the owner of the transaction to do."""
    checks_text: ClassVar[bool] = True
    """Whether a text can be refused for its characters or its length."""

    def check(self, dialect: sa.Dialect) -> None:
        """Raise ``UnsupportedDialect`` if the server is too old to claim atomically."""
        product, least, cause = self.required.get(product_of(dialect), ("", (), ""))
        # A dialect that never connected has no version.
        found = tuple(dialect.server_version_info or least)
        if found[:3] == OLD_CLIENTS:
            found = found[3:] or found
        if found[: len(least)] < least:
            has, needs = (".".join(map(str, version)) for version in (found, least))
            raise UnsupportedDialect(
                f"{product} {has} cannot claim rows atomically: {cause} came with {product} "
                f"{needs}; upgrade the server"
            )

    def compile_claim(self, element: ClaimStatement, compiler: SQLCompiler, **kw: Any) -> str:
        """Render a claim as one statement."""
        raise UnsupportedDialect(
            f"one statement cannot return the rows it claims on {compiler.dialect.name}: use "
            "claim_jobs(bind, table, ...), which runs the sequence that can"
        )

    def compile_time(self, element: DatabaseTime, compiler: SQLCompiler, **kw: Any) -> str:
        """Render the database's clock."""
        raise UnsupportedDialect(
            f"no backend reads the clock of {compiler.dialect.name!r}; expected PostgreSQL, MySQL, "
            "MariaDB or SQLite"
        )

    def is_single(self, plan: ClaimPlan) -> bool:
        """Return True if the claim is one statement."""
        return False

    def claim(
        self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any], mark: Mark | None = None
    ) -> KeyedRows:
        """Claim without regard to exclusive keys; return the rows or entities in claim order.

        ``mark`` marks and reads rows in a way of its own, after they were found and locked.
        """
        return (mark or mark_and_load)(tx, plan, self.lock(tx, plan, params), params)

    def before_search(self, tx: Transaction, job_table: JobTable) -> None:  # noqa: B027
        """Check the session, or take a lock, before a claim reads candidates."""

    @abstractmethod
    def lock(self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any]) -> list[Key]:
        """Lock the rows that a claim would claim, whatever their exclusive keys.

        They stay as they are. What is returned are their primary keys, in claim order.
        """

    @abstractmethod
    def lock_read(self, tx: Transaction, find: Find) -> sa.Select[Any]:
        """Return the SELECT that locks the rows it returns and skips rows locked elsewhere."""

    @abstractmethod
    def statements(self, plan: ClaimPlan) -> Sequence[Executable | ByKey]:
        """Return the statements of :meth:`claim` in execution order, as run without contention.

        For people to read, and for EXPLAIN.
        """

    def changes(
        self, job_table: JobTable, guard: sa.ColumnElement[bool], values: Mapping[Any, Any]
    ) -> Sequence[ByKey]:
        """Return the statements of :meth:`Transaction.change` in execution order."""
        statement = sa.update(job_table.table).values(dict(values)).returning(*job_table.key)
        return (ByKey(job_table.key, lambda is_one: statement.where(is_one, guard)),)

    def limit_wait(self, tx: Transaction, seconds: float) -> AbstractContextManager[None]:
        """Wait for no lock longer than this."""
        return nullcontext()

    def check_at_once(self, connection: sa.Connection) -> None:  # noqa: B027 - others have none
        """Have deferred constraints checked by each statement of the transaction."""

    def process(self, connection: sa.Connection) -> tuple[Any, str | None]:
        """Return what identifies the server's process, and the session's isolation level.

        They are for a lost connection and for AUTOCOMMIT; None where they are not needed. Asked
        once for each DBAPI connection.
        """
        return None, None

    def asks_to_end(self, connection: sa.Connection, process: Any, seconds: float) -> bool:
        """Ask for the end of a process, and return False if it is gone; SQLite has none."""
        return False

    def is_conflict(self, error: DBAPIError) -> bool:
        """Check whether the error is one for which the database asks to retry the transaction."""
        return not self.conflicts.isdisjoint((code_of(error, int), code_of(error, str)))

    def is_naive(self, type_: DateTime) -> bool:
        """Check whether a time column of this type has no time zone on this database."""
        return not type_.timezone


def naive_columns(job_table: JobTable, backend: Backend) -> list[str]:
    """Return the names of naive datetime columns, or none if ``naive_times`` is declared."""
    if job_table.naive_times is not None:
        return []
    return [
        column.name
        for column in job_table.time_columns
        if isinstance(type_ := plain_type(column.type), DateTime) and backend.is_naive(type_)
    ]


def refuse_naive(job_table: JobTable, backend: Backend, zone: str) -> NoReturn:
    """Refuse to guess what times without a zone mean in a session that is not in UTC."""
    names = ", ".join(map(repr, naive_columns(job_table, backend)))
    raise ClaimError(
        f"the session's time zone is {zone}, and {names} of {job_table.table.fullname!r} "
        'hold times without a zone: say what they mean with JobTable(naive_times="utc") or '
        'JobTable(naive_times="server")'
    )


def locking_by_key(plan: ClaimPlan, backend: Backend, *columns: Any) -> ByKey:
    """Return the SELECT that locks the rows given by key that are free and not locked."""
    locking = locking_rows(plan, backend, *columns).where(*plan.conditions)
    return ByKey(plan.job_table.key, locking.where)


def locking_rows(plan: ClaimPlan, backend: Backend, *columns: Any) -> sa.Select[Any]:
    """Return the SELECT of keys that locks the rows that are not locked, and no others."""
    table, asked = plan.job_table.table, plan.source(*plan.key_attributes, *columns)
    if plan.multi_table:
        # Else the subclass's table may come first, and MariaDB locks every row of it.
        for dialect_name in backend.hints:
            asked = asked.prefix_with("STRAIGHT_JOIN", dialect=dialect_name)
    of = table if plan.multi_table else None
    return hinted(asked, table, backend.hints).with_for_update(
        skip_locked=True, key_share=not plan.changes_key, of=of
    )


def mark_and_load(
    tx: Transaction, plan: ClaimPlan, keys: Sequence[Key], params: Mapping[str, Any]
) -> KeyedRows:
    """Mark rows that are locked, and read them back: complete, current and in this order.

    Raises:
        ClaimConflict: some rows are not claimable any more.
        ClaimError: some rows do not bear the mark, or are claimable still.
    """
    backend = tx.backend
    if len(set(keys)) < len(keys):
        plan.refuse_shared_keys(keys)
    if None in itertools.chain.from_iterable(keys):
        plan.refuse_fault(None, keys)
    given = dict(params)
    del given[LIMIT], given[SCAN_LIMIT]
    if keys and (asking := plan.prepare(instant)) is not None:
        given[INSTANT] = tx.connection.scalar(asking, given)
    for chunk, result in tx.by_key(plan.prepare(marking_by_key, backend), keys, given):
        rows = cast("sa.CursorResult[Any]", result)
        marked = len(rows.all()) if backend.has_returning else rows.rowcount
        tx.marked.extend(chunk)
        if marked != len(chunk):
            _refuse_unmarked(tx, plan, chunk, marked)
    try:
        return read_back(tx, plan, keys, given)
    except Exception as error:
        if tx.has_lost(error) or isinstance(error, ClaimError):
            raise
        raise Unreadable(keys) from error


def _refuse_unmarked(tx: Transaction, plan: ClaimPlan, keys: Sequence[Key], marked: int) -> None:
    job_table = plan.job_table
    name = job_table.table.fullname
    claimable = sa.select(*job_table.key).where(
        key_in(job_table.key, keys), predicates.claimable(job_table)
    )
    # The transaction's snapshot may be older than the lock.
    claimable = claimable.with_for_update()
    if left := tx.tuples(hinted(claimable, job_table.table, tx.backend.hints)):
        raise ClaimError(
            f"the UPDATE that marks {len(keys)} rows of {name!r} as claimed changed {marked}, and "
            f"{left!r} are claimable still: look for a trigger or a row security policy that "
            "keeps rows from being changed"
        )
    raise ClaimConflict(
        f"{len(keys) - marked} of {len(keys)} rows of {name!r} were changed between their lock and "
        f"their mark: {tx.backend.cure}"
    )


def marking_by_key(plan: ClaimPlan, backend: Backend) -> ByKey:
    """Return the UPDATE that marks rows given by key, if they are claimable."""
    table = plan.job_table.table
    marking = hinted(sa.update(table).values(plan.values), table, backend.hints)
    if backend.has_returning:
        marking = marking.returning(*plan.job_table.key)
    claimable = predicates.claimable(plan.job_table)
    return ByKey(plan.job_table.key, marking.where(claimable).where)


def marked_by_key(plan: ClaimPlan, backend: Backend) -> tuple[ByKey, ByKey]:
    """Return the statements of :func:`mark_and_load`."""
    reading = plan.prepare(reading_by_key, backend, False, True)
    return plan.prepare(marking_by_key, backend), reading.statement


def read_back(
    tx: Transaction, plan: ClaimPlan, keys: Sequence[Key], params: Mapping[str, Any] | None
) -> KeyedRows:
    """Read the rows or entities with these keys, in this order; check them if they are claimed.

    A plain read comes first: it sees what this transaction wrote itself, whatever its snapshot.
    A row of another table of a mapped class may be newer than the snapshot, so what is missing
    is read again with a lock, which sees the latest.

    Args:
        tx: where it runs.
        plan: the claim's.
        keys: the keys, a tuple each.
        params: the parameters of the claim; None if the rows are not claimed.
    """
    found: dict[Key, Any] = {}
    for lock in (False, True):
        reading = plan.prepare(reading_by_key, tx.backend, lock, params is not None)
        missing = list(filterfalse(found.__contains__, keys))
        for _, result in tx.by_key(reading.statement, missing, params):
            found.update(reading.keyed(result))
    return list(zip(keys, map(found.__getitem__, keys), strict=True))


def reading_by_key(plan: ClaimPlan, backend: Backend, lock: bool, checks: bool) -> Reading:
    """Return the SELECT that reads claimed rows or entities by key."""
    reading = hinted(plan.reading, plan.job_table.table, backend.hints)
    if checks:
        reading = reading.add_columns(plan.fault(later=True))
    if lock:
        reading = reading.with_for_update()
    key = plan.key_attributes if plan.entities else plan.job_table.key
    return Reading(plan, ByKey(key, reading.where), checks)
