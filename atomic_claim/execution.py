"""Where statements of ours run: in the caller's transaction, or in one of our own."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Dialect, Engine
from sqlalchemy.exc import (
    DBAPIError,
    InvalidRequestError,
    UnboundExecutionError,
)
from sqlalchemy.pool import (
    NullPool,
    PoolProxiedConnection,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
)
from sqlalchemy.util import await_only

from .backends import BACKENDS, Backend, Failed, Transaction, backend_for, is_watched
from .errors import ClaimConflict, ClaimError
from .job_table import JobTable
from .orm import is_maker, is_scoped, is_session

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session, sessionmaker

    Bind = Session | scoped_session[Any] | Connection | Engine | sessionmaker[Any]
    OwnBind = Engine | sessionmaker[Any]
else:
    # Annotations can be evaluated where the ORM is not loaded, too.
    Bind = OwnBind = Any

R = TypeVar("R")
Run = Callable[[Backend, Transaction], R]
IsSingle = Callable[[Backend], bool]

# They hand a connection to nobody else until it is given back.
SAFE_POOLS = frozenset({QueuePool, NullPool})

TRIES = 8
FIRST_PAUSE = 0.005
LONGEST_PAUSE = 0.5
FIRST_OUTAGE_PAUSE = 0.1
LONGEST_OUTAGE_PAUSE = 2.0

pause: ContextVar[Callable[[float], None]] = ContextVar("pause", default=time.sleep)
"""How to wait between two tries; an event loop must not be blocked."""


def run_in(
    bind: Any,
    job_table: JobTable,
    run: Run[R],
    *,
    single: IsSingle,
    recoverable: bool = False,
    left: Left | None = None,
    keyed: bool = False,
    tries: int = TRIES,
) -> R:
    """Run statements in a bind: never ending the caller's transaction, always ending our own.

    Args:
        bind: ``Session``, ``scoped_session``, ``Connection``, ``Engine`` or ``sessionmaker``.
        job_table: the table that the statements are for, where a session has several binds.
        run: what is run, with the database's backend and where it runs. In a transaction of our
            own it is run again if the database asks for it.
        single: whether it is one statement on that database, for which autocommit is enough.
        recoverable: whether ``run`` can tell from the table what became of an earlier try, so
            that a transaction of our own is run again when its connection is lost.
        left: an engine's connection to begin with, from :func:`run_directly`; it is given back.
        keyed: whether it makes or keeps rows with exclusive keys running.
        tries: how often a transaction of our own is run at most.

    Raises:
        ClaimConflict: another transaction was in the way.
        ClaimError: the bind cannot be used.
    """
    if is_scoped(bind):
        bind = bind.registry()
    if is_session(bind):
        backend_for(_bind_of(bind, job_table).dialect)
        connection = _connection_of(bind, job_table)
        return _run_in_transaction(Transaction(bind, connection, own=False), run, keyed)
    if isinstance(bind, Connection):
        backend_for(bind.dialect)
        if bind.closed:
            raise ClaimError("the Connection is closed; open one with engine.connect()")
        return _run_in_transaction(Transaction(bind, bind, own=False), run, keyed)
    if isinstance(bind, Engine):
        first = iter([left])
        return _try_again(
            lambda lost: _run_by_engine(
                bind, job_table, run, single, keyed=keyed, resumed=lost, left=next(first, None)
            ),
            tries,
            lambda: outages(bind, job_table) if recoverable else (),
        )
    if is_maker(bind):
        return _try_again(
            lambda lost: _run_by_sessionmaker(
                bind, job_table, run, single, keyed=keyed, resumed=lost
            ),
            tries,
            lambda: outages(bind, job_table) if recoverable else (),
        )
    raise ClaimError(
        f"{bind!r} is not a bind: pass a Session, scoped_session, Connection, Engine or "
        "sessionmaker (the asynchronous ones go to atomic_claim.aio)"
    )


def keyed_apart(bind: Any, job_table: JobTable) -> Backend | None:
    """Return the backend of a bind with transactions of our own that exclusive keys need.

    None where they need none, and for a caller's transaction.
    """
    if not (isinstance(bind, Engine) or is_maker(bind)):
        return None
    backend = backend_for(_dialect_of(bind, job_table))
    return backend if backend.keyed_needs_own else None


def _run_in_transaction(tx: Transaction, run: Run[R], keyed: bool) -> R:
    """Run in a transaction that somebody else begins and ends."""
    backend = backend_for(tx.connection.dialect)
    if keyed and backend.keyed_needs_own:
        raise ClaimError(backend.keyed_needs_own)
    with _conflicts(backend):
        return run(backend, tx)


class Left(NamedTuple):
    """A connection on which a transaction could not be run directly, and why."""

    pooled: PoolProxiedConnection
    error: BaseException | None = None


def run_directly(
    engine: Engine, run: Callable[[PoolProxiedConnection], R]
) -> tuple[R | None, Left | None]:
    """Run a whole transaction on a connection of the driver's own.

    Returns:
        What ``run`` returned. Or None, and the connection if there is one, on which it is to be
        tried again: then SQLAlchemy hears of it where a connection is lost.
    """
    if type(engine.pool) not in SAFE_POOLS or is_watched(engine):
        return None, None
    dialect = engine.dialect
    try:
        pooled = engine.raw_connection()
    except dialect.loaded_dbapi.Error:
        return None, None
    try:
        mode = BACKENDS[dialect.name].directly(dialect, pooled)
        if mode is None:
            return None, Left(pooled)
        with mode:
            found = run(pooled)
    except Failed as failed:
        return None, Left(pooled, failed.__cause__)
    except BaseException as error:
        if isinstance(error, Exception):
            pooled.close()
        else:
            # An interrupt: nobody knows what was left unread on it.
            pooled.invalidate(error)
        raise
    pooled.close()
    return found, None


def _run_by_engine(
    engine: Engine,
    job_table: JobTable,
    run: Run[R],
    single: IsSingle,
    *,
    keyed: bool,
    resumed: bool,
    left: Left | None,
) -> R:
    backend = backend_for(engine.dialect)
    _refuse_shared(backend, engine)
    connecting = engine.connect() if left is None else Connection(engine, left.pooled)
    with ExitStack() as stack:
        stack.enter_context(_conflicts(backend))
        stack.enter_context(_noting(left))
        connection = stack.enter_context(connecting)
        backend.check(connection.dialect)
        if keyed:
            stack.enter_context(backend.key_lock(connection, job_table.table))
            backend.begin_keyed(connection)
        mode = _driver_mode(backend, connection, single, listeners=engine.dispatch.begin)
        tx = Transaction(
            connection,
            connection,
            own=True,
            resumed=resumed,
            unheard=not is_watched(engine),
            single=mode is not None,
        )
        with mode or nullcontext():
            found = run(backend, tx)
            backend.commit(connection)
            connection.commit()
    return found


@contextmanager
def _noting(left: Left | None) -> Iterator[None]:
    """Tell what the driver said first, where a connection turns out to be lost."""
    try:
        yield
    except DBAPIError as error:
        if left is not None and left.error is not None and error.connection_invalidated:
            error.add_note(f"The driver had said: {left.error}")
        raise


def _run_by_sessionmaker(
    maker: sessionmaker[Any],
    job_table: JobTable,
    run: Run[R],
    single: IsSingle,
    *,
    keyed: bool,
    resumed: bool,
) -> R:
    with ExitStack() as stack:
        # Expiring at commit would unload the entities that are about to be detached.
        session = stack.enter_context(maker(expire_on_commit=False))
        if not session.in_transaction():
            session.begin()
        engine = _bind_of(session, job_table)
        if not isinstance(engine, Engine):
            raise ClaimError(
                "the sessionmaker is bound to a Connection, whose transaction is somebody "
                "else's: pass that Connection, or a Session on it"
            )
        backend = backend_for(engine.dialect)
        _refuse_shared(backend, engine)
        with _conflicts(backend):
            if keyed and backend.keyed_needs_own:
                locked = stack.enter_context(engine.connect())
                stack.enter_context(backend.key_lock(locked, job_table.table))
                _bind_to(session, job_table, locked)
            connection = _connection_of(session, job_table)
            backend.check(connection.dialect)
            if keyed:
                backend.begin_keyed(connection)
            listeners = (
                session.dispatch.after_begin
                or session.dispatch.do_orm_execute
                or engine.dispatch.begin
            )
            mode = _driver_mode(backend, connection, single, listeners=listeners)
            with mode or nullcontext():
                found = run(backend, Transaction(session, connection, own=True, resumed=resumed))
                backend.commit(connection)
                session.commit()
        session.expunge_all()
    return found


def _driver_mode(
    backend: Backend, connection: Connection, single: IsSingle, *, listeners: Any
) -> AbstractContextManager[None] | None:
    """Let the driver commit by itself where one statement is all and nothing hangs on BEGIN.

    None where something may.

    A listener to the beginning of a transaction may set what lasts only as long as it does, or
    begin another kind of transaction.
    """
    if listeners or not single(backend):
        return None
    return backend.autocommit(connection.dialect, connection.connection)


@contextmanager
def _conflicts(backend: Backend) -> Iterator[None]:
    """Turn what the database says of a conflict into a ``ClaimConflict``."""
    try:
        yield
    except DBAPIError as error:
        if not backend.is_conflict(error):
            raise
        raise ClaimConflict(
            f"another transaction was in the way ({error.orig}): {backend.cure()}"
        ) from error


def outages(bind: OwnBind, job_table: JobTable) -> tuple[type[Exception], ...]:
    """Return the exceptions that are raised when a bind's database cannot be reached."""
    dialect = _dialect_of(bind, job_table)
    return backend_for(dialect).outages(dialect)


def _try_again(
    run: Callable[[bool], R], tries: int, outages: Callable[[], tuple[type[Exception], ...]]
) -> R:
    """Run a transaction of our own, again if the database asks for it or the connection is lost.

    ``run`` is told whether an earlier try may have been committed without our hearing of it.
    """
    lost = False
    for tried in range(1, tries + 1):
        try:
            return run(lost)
        except ClaimConflict:
            if tried == tries:
                raise
        except outages() as error:
            if tried == tries or not _is_outage(error, lost):
                raise
            lost = True
        # Full jitter, so that the ones in each other's way do not meet again.
        longest = LONGEST_OUTAGE_PAUSE if lost else LONGEST_PAUSE
        first = FIRST_OUTAGE_PAUSE if lost else FIRST_PAUSE
        pause.get()(random.uniform(0, min(longest, first * 2**tried)))  # noqa: S311 - no secret
    raise AssertionError("unreachable")


def _is_outage(error: Exception, lost: bool) -> bool:
    """Check whether the error means a lost connection, or a failed reconnect after one."""
    if isinstance(error, DBAPIError):
        # Only a statement's error names a statement, a refusal to connect does not.
        return error.connection_invalidated or (lost and error.statement is None)
    return lost


def _bind_of(session: Session, job_table: JobTable) -> Engine | Connection:
    try:
        return session.get_bind(mapper=job_table.mapper, clause=job_table.table)
    except UnboundExecutionError as error:
        raise ClaimError(f"the Session has no bind for this table: {error}") from error


def _dialect_of(bind: OwnBind, job_table: JobTable) -> Dialect:
    if isinstance(bind, Engine):
        return bind.dialect
    with bind() as session:
        return _bind_of(session, job_table).dialect


def _bind_to(session: Session, job_table: JobTable, connection: Connection) -> None:
    """Have a session of our own use this connection for the table.

    Raises:
        ClaimError: the session's class chooses another one.
    """
    mapper = job_table.mapper
    if mapper is not None:
        session.bind_mapper(mapper, connection)
    for table in mapper.tables if mapper is not None else [job_table.table]:
        session.bind_table(table, connection)
    if _connection_of(session, job_table) is not connection:
        raise ClaimError(
            f"get_bind() of {type(session).__name__} chooses a connection of its own, and the "
            "lock of exclusive keys is held by another: pass the Engine"
        )


def _connection_of(session: Session, job_table: JobTable) -> Connection:
    try:
        return session.connection(
            bind_arguments={"mapper": job_table.mapper, "clause": job_table.table}
        )
    except InvalidRequestError as error:
        raise ClaimError(f"the Session cannot be used: {error}") from error


def _refuse_shared(backend: Backend, engine: Engine) -> None:
    """Refuse a pool that would hand out the connection of somebody's open transaction.

    Asked before anything is checked out: giving a StaticPool's connection back rolls it back.
    """
    pool = engine.pool
    if isinstance(pool, StaticPool):
        shared = backend.in_transaction(pool.connection)
    elif isinstance(pool, SingletonThreadPool):
        with engine.connect() as connection:
            shared = backend.in_transaction(connection.connection)
    else:
        return
    if shared:
        raise ClaimError(
            f"the engine's {type(pool).__name__} has one connection, and a transaction is open "
            "on it, which a claim by engine would commit: pass the Session or Connection that "
            "owns the transaction, or end it first"
        )


def async_types() -> tuple[type[Any], ...]:
    """Return the asynchronous bind classes, or an empty tuple if they are not imported."""
    module: Any = sys.modules.get("sqlalchemy.ext.asyncio")
    if module is None:
        return ()
    return (
        module.AsyncSession,
        module.async_scoped_session,
        module.AsyncConnection,
        module.AsyncEngine,
        module.async_sessionmaker,
    )


def sync_bind(bind: Any) -> Any:
    """Return the synchronous bind behind an asynchronous one, and any other bind unchanged."""
    if not isinstance(bind, async_types()):
        return bind
    if hasattr(bind, "registry"):
        bind = bind.registry()
    for name in ("sync_session", "sync_connection", "sync_engine"):
        if hasattr(bind, name):
            return getattr(bind, name)
    return _sync_maker(bind)


def _sync_maker(maker: Any) -> sessionmaker[Any]:
    from sqlalchemy.orm import sessionmaker  # noqa: PLC0415 - loaded with the asynchronous one

    options = dict(maker.kw)
    if options.get("bind") is not None:
        options["bind"] = sync_bind(options["bind"])
    if options.get("binds"):
        options["binds"] = {key: sync_bind(each) for key, each in options["binds"].items()}
    session_class = options.pop("sync_session_class", None) or maker.class_.sync_session_class
    return sessionmaker(class_=session_class, **options)


def patiently(function: Callable[..., R], *args: Any, **options: Any) -> R:
    """Run beside an event loop, with pauses that leave it to others."""
    import asyncio  # noqa: PLC0415 - whoever runs beside an event loop has loaded it

    token = pause.set(lambda seconds: await_only(asyncio.sleep(seconds)))
    try:
        return function(*args, **options)
    finally:
        pause.reset(token)
