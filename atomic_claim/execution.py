"""Run statements in the caller's transaction, or in a transaction of the call's own."""

from __future__ import annotations

import operator
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from sqlalchemy import Connection, Engine, Update, update
from sqlalchemy.exc import DBAPIError, UnboundExecutionError
from sqlalchemy.pool import PoolProxiedConnection, SingletonThreadPool, StaticPool

from .backends import Backend, Transaction, backend_for, drivers
from .backends.base import NO_KEY_LOCKS
from .backends.recovery import end_process, logger, wait
from .errors import ClaimConflict, ClaimError, UnsupportedDialect
from .job_table import JobTable
from .orm import is_own, pinned, session_of
from .plan import ClaimPlan
from .telemetry import Retried, report

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session, sessionmaker

    Bind = Session | scoped_session[Any] | Connection | Engine | sessionmaker[Any]
    OwnBind = Engine | sessionmaker[Any]
else:
    # Annotations can be evaluated where the ORM is not loaded, too.
    Bind = OwnBind = Any

R = TypeVar("R")
T = TypeVar("T")

TRIES = 8
FIRST_PAUSE = 0.005
LONGEST_PAUSE = 0.5
FIRST_OUTAGE_PAUSE = 0.1
LONGEST_OUTAGE_PAUSE = 2.0
NOTHING = nullcontext()
SHARED = (StaticPool, SingletonThreadPool)
TRANSACTION_EVENTS = operator.attrgetter("begin", "commit", "rollback")
# The key, in the ``info`` of a DBAPI connection, of what _process_of() returns.
PROCESS = "atomic_claim_process"
UNKNOWN = (
    "The connection was lost during the COMMIT, so its outcome is unknown, and without a token "
    "column it cannot be looked up: rows may have been claimed or changed."
)


@dataclass
class Operation(ABC, Generic[R]):
    """Statements in the caller's transaction, or in one of the call's own, which may take tries.

    Attributes:
        bind: ``Session``, ``scoped_session``, ``Connection``, ``Engine`` or ``sessionmaker``.
        job_table: the table that the statements are for.
        runs: whether it makes or keeps rows running.
        token: the claim's, if ``run`` finds out by it what became of an earlier try, so that it
            runs again after a lost connection whatever the outcome of the COMMIT.
        single: the plan of a claim for which AUTOCOMMIT may do, if it is one statement.
        careful: whether an earlier try has failed, so that ``run`` passes over the rows that cause
            it; None if it cannot.
        undoes: whether :meth:`undo` undoes what may have been committed before an interrupt.
        tries: how often a transaction of its own runs at most.
        dialect: the one of the last try.
        process: identifies the server's process of the last try.
        committing: whether the last try may have been committed, if its connection was lost.
        ended: whether ``run`` itself was over when the last try failed.
        dropped: whether the last try lost its connection by an error that a listener has replaced.
        lost: whether an earlier try lost its connection.
        unknown: whether an earlier try lost it while it may have been committed.
        lost_at: when it was lost, by ``time.monotonic()``.
    """

    bind: Any
    job_table: JobTable
    _: KW_ONLY
    runs: bool = False
    token: str | None = None
    single: ClaimPlan | None = None
    careful: bool | None = None
    undoes: ClassVar[bool] = False
    tries: int = TRIES
    dialect: Any = field(init=False, default=None)
    process: Any = field(init=False, default=None)
    committing: bool = field(init=False, default=False)
    ended: bool = field(init=False, default=False)
    dropped: bool = field(init=False, default=False)
    lost: bool = field(init=False, default=False)
    unknown: bool = field(init=False, default=False)
    lost_at: float = field(init=False, default=0.0)

    @abstractmethod
    def run(self, tx: Transaction) -> R:
        """Execute the statements; again after a conflict in a transaction of the call's own."""

    def undo(self, tx: Transaction) -> None:
        """Undo them in a transaction of its own."""

    def execute(self) -> R:
        """Run it: never end the caller's transaction, always end the call's own.

        Raises:
            ClaimConflict: another transaction was in the way.
            ClaimError: the bind cannot be used.
        """
        # Connections and engines are told without a look at sqlalchemy.orm.
        is_core = isinstance(self.bind, (Connection, Engine))
        session = None if is_core else session_of(self.bind)
        if session is not None or isinstance(self.bind, Connection):
            return self._in_callers(session)
        tried = 0
        while True:
            tried += 1
            try:
                return self.run_once(self.run)
            except ClaimConflict:
                if tried >= self.tries:
                    raise
            except ClaimError:
                raise
            except Exception as error:
                if not self._is_outage(error):
                    # A listener may raise after the COMMIT.
                    ended = self.ended and not isinstance(error, DBAPIError)
                    if ended:
                        self._take_back(unknown=False)
                    if self.careful is not False or self.unknown or ended:
                        raise
                    self.careful, self.single = True, None
                    continue
                if tried >= self.tries or (self.committing and self.token is None):
                    if self.committing and isinstance(error, DBAPIError):
                        error.add_detail(UNKNOWN)
                    raise
                self.lost, self.unknown = True, self.unknown or self.committing
                self.lost_at = time.monotonic()
            except BaseException:
                self._take_back(unknown=True)
                raise
            report(Retried(self.job_table.table.fullname, (), tried, self.lost))
            # Full jitter, so that the ones in each other's way do not meet again.
            longest = LONGEST_OUTAGE_PAUSE if self.lost else LONGEST_PAUSE
            first = FIRST_OUTAGE_PAUSE if self.lost else FIRST_PAUSE
            wait(self.dialect, random.uniform(0, min(longest, first * 2**tried)))  # noqa: S311 - no secret

    def _take_back(self, *, unknown: bool) -> None:
        """Undo what is committed; on another connection where this one is in no known state."""
        if self.undoes and self.committing and self.token is not None:
            self.runs, self.single = False, None
            self.unknown, self.lost_at = unknown, time.monotonic()
            self.run_once(self.undo)

    def _in_callers(self, session: Session | None) -> R:
        """Run in a transaction that the caller begins and ends."""
        pinning: AbstractContextManager[Connection] = nullcontext(self.bind)
        if session is not None:
            engine = _engine_of(session, self.job_table)
            # A database that is not known is refused before it is connected to.
            backend_for(engine.dialect)
            pinning = pinned(session, engine)
        elif self.bind.closed:
            raise ClaimError("the Connection is closed; open one with engine.connect()")
        with pinning as connection:
            backend = backend_for(connection.dialect)
            if self.runs and self.job_table.exclusive_by is not None:
                _check_key_locks(backend, connection.dialect.name, own=False)
            try:
                return self.run(Transaction(backend, session or connection, connection, own=False))
            except DBAPIError as error:
                _raise_conflict(backend, error)
                raise

    def run_once(self, run: Callable[[Transaction], T]) -> T:
        """Run once in a transaction of the call's own, and commit."""
        self.committing = self.ended = self.dropped = False
        session, engine = None, self.bind
        if not isinstance(engine, Engine):
            session, engine = self._session()
        dialect = self.dialect = engine.dialect
        if not dialect.server_version_info:
            # A database that is not known is refused before it is connected to.
            backend_for(dialect)
        if isinstance(engine.pool, SHARED):
            _refuse_shared(engine)
        connection = engine.connect()
        pooled = connection.connection
        driver = pooled.dbapi_connection
        try:
            backend = backend_for(dialect)
            tx = Transaction(backend, session or connection, connection, own=True)
            tx.after_disconnect, tx.careful = self.unknown, bool(self.careful)
            try:
                if self.unknown:
                    lost_for = time.monotonic() - self.lost_at
                    end_process(backend, connection, self.process, lost_for)
                found = pooled.info.get(PROCESS)
                if found is None and self.token is not None:
                    found = pooled.info[PROCESS] = _process_of(tx)
                self.process, can_switch = found or (None, False)
                if can_switch and self.single is not None and _may_autocommit(tx, self.single):
                    connection.execution_options(isolation_level="AUTOCOMMIT")
                    self.committing = tx.autocommit = True
                with NOTHING if tx.autocommit else self._transaction(tx):
                    result = run(tx)
                    self.committing = self.ended = True
            except BaseException as error:
                self.dropped = connection.invalidated and drivers.has_lost(error, dialect, driver)
                _fail(tx, error)
                raise
        finally:
            try:
                connection.close()
            except Exception:  # noqa: BLE001 - drivers and listeners raise what they like
                _give_up(pooled)
        return result

    def _session(self) -> tuple[Session, Engine]:
        bind = self.bind
        if not is_own(bind):
            raise ClaimError(
                f"{bind!r} is not a bind: pass a Session, scoped_session, Connection, Engine "
                "or sessionmaker (the asynchronous ones go to atomic_claim.aio)"
            )
        # Expiring at commit would unload the entities that are about to be detached.
        session = self.bind(expire_on_commit=False)
        if not session.in_transaction():
            session.begin()
        engine = _engine_of(session, self.job_table)
        if not isinstance(engine, Engine):
            raise ClaimError(
                "the sessionmaker is bound to a Connection, whose transaction is the caller's: "
                "pass that Connection, or a Session on it"
            )
        return session, engine

    @contextmanager
    def _transaction(self, tx: Transaction) -> Iterator[None]:
        """Begin a transaction, commit it, and clean up behind it."""
        backend, connection = tx.backend, tx.connection
        keyed = self.runs and self.job_table.exclusive_by is not None
        with ExitStack() as stack:
            if keyed:
                _check_key_locks(backend, connection.dialect.name, own=True)
                tx.outlasting = stack.enter_context(ExitStack())
                # The lock of the keys outlasts the rollback.
                stack.push(lambda _, error, __: None if error is None else _fail(tx, error))
            if not isinstance(tx.executor, Connection):
                stack.enter_context(tx.executor)
                stack.enter_context(pinned(tx.executor, connection.engine, connection))
            if not connection.in_transaction():
                connection.begin()
            if tx.in_autocommit():
                stack.enter_context(_out_of_autocommit(connection))
            if keyed:
                backend.key_locks.begin(connection)
            if tx.careful:
                backend.check_at_once(connection)
            yield
            tx.executor.commit()
            if connection.in_transaction():
                # A session does not end what a listener has begun before it.
                connection.commit()

    def _is_outage(self, error: Exception) -> bool:
        """Check whether the error is a lost connection, or a failed reconnect after one."""
        if self.dropped or drivers.is_lost(error):
            return True
        # Only a statement's error names a statement, a refusal to connect does not.
        is_refusal = self.lost and getattr(error, "statement", None) is None
        return is_refusal and self.is_unreachable(error)

    def is_unreachable(self, error: Exception) -> bool:
        """Check whether the error is one that is raised when the database cannot be reached."""
        return self.dialect is not None and isinstance(error, drivers.outages(self.dialect))


def _check_key_locks(backend: Backend, name: str, *, own: bool) -> None:
    """Raise if exclusive keys cannot be locked in a transaction, which may be the call's own."""
    if backend.key_locks is NO_KEY_LOCKS:
        raise UnsupportedDialect(
            f"the backend of {name!r} has no key_locks, so two rows of one key could run at a "
            "time: leave exclusive_by out, or use PostgreSQL, MySQL, MariaDB or SQLite"
        )
    if backend.key_locks.needs_own and not own:
        raise ClaimError(backend.key_locks.needs_own)


def _process_of(tx: Transaction) -> tuple[Any, bool]:
    """Return the server's process, and whether the driver can be switched to AUTOCOMMIT.

    It can if the driver is a known one, is not in AUTOCOMMIT, and has the server's isolation level.
    A transaction that a listener has begun stays open.
    """
    connection, dialect = tx.connection, tx.connection.dialect
    driver = connection.connection.driver_connection
    begun = connection.in_transaction() or drivers.in_transaction(driver)
    process, level = tx.backend.process(connection)
    can_switch = dialect.driver in drivers.AUTOCOMMIT and tx.in_autocommit() is False
    if not begun:
        connection.rollback()
    return process, can_switch and level == dialect.default_isolation_level


def _may_autocommit(tx: Transaction, plan: ClaimPlan) -> bool:
    """Return True if AUTOCOMMIT makes no difference but of round trips."""
    connection = tx.connection
    # Asked of the dispatcher only where there are any: every Connection would build its own.
    has_events = connection._has_events or connection.engine._has_events  # noqa: SLF001 - SQLAlchemy's own test
    return (
        tx.executor is connection
        and not (has_events and any(TRANSACTION_EVENTS(connection.dispatch)))
        and not connection.get_execution_options()
        # A listener may have begun a transaction, and have set something in it.
        and not drivers.in_transaction(connection.connection.driver_connection)
        and plan.prepare(tx.backend.is_single)
    )


def _give_up(pooled: PoolProxiedConnection) -> None:
    """End a connection that the pool could not reset, which changes no outcome."""
    logger.warning("a connection cannot be reset, and is closed", exc_info=True)
    if pooled.is_valid:
        pooled.invalidate()


@dataclass
class Statements(Operation[R]):
    """An operation that a function executes."""

    function: Callable[[Transaction], R]

    def run(self, tx: Transaction) -> R:
        """Execute the statements."""
        return self.function(tx)


@contextmanager
def _out_of_autocommit(connection: Connection) -> Iterator[None]:
    """Run in a transaction on a connection in the caller's AUTOCOMMIT."""
    dialect, driver = connection.dialect, connection.connection.dbapi_connection
    assert driver is not None
    # On MySQL the session has a level of its own in AUTOCOMMIT, too.
    dialect.set_isolation_level(driver, dialect.get_isolation_level(driver))
    try:
        yield
    finally:
        if not connection.invalidated:
            pooled = connection.connection
            try:
                pooled.rollback()
                dialect.set_isolation_level(driver, "AUTOCOMMIT")
            except dialect.loaded_dbapi.Error:
                _give_up(pooled)


def _fail(tx: Transaction, error: BaseException) -> None:
    """Clean up after a failed transaction, and raise a conflict as ``ClaimConflict``.

    SQLAlchemy takes a COMMIT that failed, or was vetoed, for an end of the transaction; SQLite's
    stays open if it is busy at COMMIT.
    """
    backend, connection = tx.backend, tx.connection
    if not (connection.closed or connection.invalidated or connection.in_transaction()):
        connection.connection.rollback()
    if not isinstance(error, DBAPIError) or drivers.is_lost(error):
        return
    if drivers.is_stale(error) and not connection.invalidated:
        # The driver would send the prepared statement again and again.
        connection.invalidate()
    _raise_conflict(backend, error)


def _raise_conflict(backend: Backend, error: DBAPIError) -> None:
    """Raise ``ClaimConflict`` if the database's error is a conflict."""
    if backend.is_conflict(error):
        raise ClaimConflict(
            f"another transaction was in the way ({error.orig}): {backend.cure}"
        ) from error


def _writing(job_table: JobTable) -> Update:
    return update(job_table.table)


def _engine_of(session: Session, job_table: JobTable) -> Engine | Connection:
    """Return the bind to which the session sends an UPDATE of the table."""
    module: Any = sys.modules.get("sqlalchemy.ext.horizontal_shard")
    if module is not None and isinstance(session, module.ShardedSession):
        raise ClaimError(
            f"{type(session).__name__} is a ShardedSession, whose statements go to several "
            "databases: claim from each shard with its own Session or Engine"
        )
    try:
        return session.get_bind(mapper=job_table.mapper, clause=job_table.prepare(_writing))
    except UnboundExecutionError as error:
        raise ClaimError(f"the Session has no bind for this table: {error}") from error


def _refuse_shared(engine: Engine) -> None:
    """Refuse a pool that would hand out a connection on which a transaction is open.

    Asked before anything is checked out: giving a StaticPool's connection back rolls it back.
    """
    pool = engine.pool
    if isinstance(pool, StaticPool):
        shared = drivers.in_transaction(pool.connection.driver_connection)
    else:
        with engine.connect() as connection:
            shared = drivers.in_transaction(connection.connection.driver_connection)
    if shared is not False:
        finding = "and" if shared else f"and the driver {engine.dialect.driver!r} does not tell if"
        raise ClaimError(
            f"the engine's {type(pool).__name__} has one connection, {finding} a transaction is "
            "open on it, which a claim by engine would commit: pass the Session or Connection that "
            "owns the transaction, or end it first and use another pool"
        )
