"""The reads of a legacy function, watched while it runs."""

from __future__ import annotations

import inspect
import logging
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sqlalchemy import (
    Connection,
    Delete,
    Engine,
    Insert,
    Result,
    Select,
    StatementLambdaElement,
    TextClause,
    Update,
    event,
)
from sqlalchemy.orm import FromStatement, ORMExecuteState, Query, Session
from sqlalchemy.sql import visitors
from sqlalchemy.sql.selectable import SelectBase
from sqlalchemy.util import greenlet_spawn

from atomic_claim.errors import ClaimLost, PatchError
from atomic_claim.execution import patiently
from atomic_claim.job_table import JobTable
from atomic_claim.statement import ClaimStatement

from .calls import Call, bound_call
from .patches import Patch, Run
from .selects import is_read, is_table, mentions, names
from .targets import Target

LOADS = "atomic_claim_loads"
logger = logging.getLogger("atomic_claim")
UNSEEN = (
    "%s read nothing of %s, so nothing of it is protected: name the table that it finds its jobs "
    "in, or patch the function that does"
)


class Watch(ABC):
    """One running call, whose statements are seen before they are executed.

    Attributes:
        patch: the patch of the function that is called.
        job_table: the table that its reads are watched for.
        reads: how many of them were seen.
        failed: whether the function raised.
        refused: the first error that was raised within one of its statements.
    """

    def __init__(self, patch: Patch, job_table: JobTable) -> None:
        self.patch = patch
        self.job_table = job_table
        self.reads = 0
        self.failed = False
        self.refused: PatchError | ClaimLost | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Log what is refused, and keep it: the function's own code may swallow it."""
        try:
            yield
        except (PatchError, ClaimLost) as error:
            if self.refused is None:
                self.refused = error
                logger.error("%s", error)
            raise

    @abstractmethod
    def read(
        self, connection: Connection, statement: Any, params: Mapping[str, Any]
    ) -> Select[Any] | None:
        """Return the SELECT to execute in place of a statement, or None to keep it."""

    @abstractmethod
    def mark(
        self, connection: Connection, statement: Update | Delete | None
    ) -> Update | Delete | None:
        """Rows are about to be changed; what is executed instead, or None.

        The statement is None where it is raw SQL.
        """

    # Not every watch reacts to all of these.

    def marked(self, rows: int) -> None:  # noqa: B027
        """Count the rows of the table that a statement changed."""

    def ended(self, connection: Connection) -> None:  # noqa: B027
        """React before the connection's transaction ends."""

    def flushing(self, entities: Iterable[Any]) -> None:  # noqa: B027
        """React before a session writes its changed entities."""

    def flushed(self) -> None:  # noqa: B027
        """React after a session has written them."""

    def tick(self) -> None:  # noqa: B027
        """React before a statement is executed."""

    def close(self) -> None:  # noqa: B027
        """Clean up after the call."""


watches: ContextVar[tuple[Watch, ...]] = ContextVar("atomic_claim_watches", default=())
"""The calls that this thread or task is in."""


@contextmanager
def unwatched() -> Iterator[None]:
    """Statements of our own."""
    token = watches.set(())
    try:
        yield
    finally:
        watches.reset(token)


def watching(patch: Patch, target: Target, make: Callable[[Call], Watch]) -> Run:
    """Return a function that runs the patched function and watches its reads."""
    listeners.begin()
    patch.at_undo(listeners.end)
    patch.at_undo(lambda: _warn_if_unseen(patch))
    function = target.function
    is_coroutine = inspect.iscoroutinefunction(function)
    wrap: Any = WatchedAsyncGenerator if inspect.isasyncgenfunction(function) else None

    def run(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = bound_call(target.signature, instance, args, kwargs)
        if call is None:
            return wrapped(*args, **kwargs)
        watch = make(call)
        if wrap is not None:
            return wrap(watch, wrapped(*args, **kwargs))
        if is_coroutine:
            return _finished(watch, wrapped(*args, **kwargs))
        result: Any = None
        try:
            with _watched(watch):
                result = wrapped(*args, **kwargs)
                if not inspect.isawaitable(result):
                    return _read_already(result, watch)
        finally:
            if not inspect.isawaitable(result):
                _over(watch)
        return _finished(watch, result)

    def generate(
        wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Generator[Any, Any, Any]:
        call = bound_call(target.signature, instance, args, kwargs)
        inner = wrapped(*args, **kwargs)
        return (yield from inner if call is None else WatchedGenerator(make(call), inner))

    return generate if inspect.isgeneratorfunction(function) else run


async def _finished(watch: Watch, result: Awaitable[Any]) -> Any:
    """Watch a coroutine, or what a plain function returned to be awaited, until it ends."""
    try:
        with _watched(watch):
            return _read_already(await result, watch)
    finally:
        await greenlet_spawn(patiently, _over, watch)


@contextmanager
def _watched(watch: Watch) -> Iterator[None]:
    token = watches.set((*watches.get(), watch))
    watch.failed = True
    try:
        yield
    except Exception as error:
        if watch.refused is not None and error is not watch.refused:
            error.add_note(f"before that, {watch.refused}")
        raise
    finally:
        watches.reset(token)
    if watch.refused is not None:
        raise watch.refused
    watch.failed = False


def _over(watch: Watch) -> None:
    patch = watch.patch
    if not watch.reads and watch.refused is None:
        patch.count(passed_through=1)
        if patch.passed_through == patch.calls == 1:
            logger.warning(UNSEEN, patch.target, watch.job_table.table.fullname)
    watch.close()


def _warn_if_unseen(patch: Patch) -> None:
    if patch.calls and patch.calls == patch.passed_through:
        warnings.warn(UNSEEN % (patch.target, "the table in any of its calls"), stacklevel=3)


class WatchedGenerator(Generator[Any, Any, Any]):
    """A generator that is watched whenever it runs, and not while its consumer does."""

    def __init__(self, watch: Watch, inner: Generator[Any, Any, Any]) -> None:
        self._watch = watch
        self._inner = inner

    def send(self, value: Any) -> Any:
        """Run up to the next yield."""
        return self._run(lambda: self._inner.send(value))

    def throw(self, *error: Any) -> Any:
        """Raise an exception where it stands."""
        return self._run(lambda: self._inner.throw(*error))

    def _run(self, step: Callable[[], Any]) -> Any:
        is_over = True
        try:
            with _watched(self._watch):
                found = step()
            is_over = False
            return found
        except StopIteration:
            self._watch.failed = False
            raise
        finally:
            if is_over:
                _over(self._watch)


class WatchedAsyncGenerator(AsyncGenerator[Any, Any]):
    """The same of an asynchronous one."""

    def __init__(self, watch: Watch, inner: AsyncGenerator[Any, Any]) -> None:
        self._watch = watch
        self._inner = inner

    async def asend(self, value: Any) -> Any:
        """Run up to the next yield."""
        return await self._run(self._inner.asend(value))

    async def athrow(self, *error: Any) -> Any:
        """Raise an exception where it stands."""
        return await self._run(self._inner.athrow(*error))

    async def _run(self, step: Awaitable[Any]) -> Any:
        is_over = True
        try:
            with _watched(self._watch):
                found = await step
            is_over = False
            return found
        except StopAsyncIteration:
            self._watch.failed = False
            raise
        finally:
            if is_over:
                await greenlet_spawn(patiently, _over, self._watch)


def _read_already(result: Any, watch: Watch) -> Any:
    """Return the function's result, or raise if it reads after the call."""
    lazy = (Query, SelectBase, Iterator, AsyncIterator, Future)
    if isinstance(result, lazy) and not isinstance(result, Result):
        with watch.noting():
            raise PatchError(
                f"{watch.patch.target} returned a {type(result).__name__}, which reads when the "
                "call is over: patch the function that consumes it, or let patch_claims() do the "
                "finding"
            )
    return result


class _Listeners:
    """Our listeners to SQLAlchemy's events, there as long as a patch needs them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._patches = 0

    def begin(self) -> None:
        """Register the listeners for the first patch."""
        with self._lock:
            if self._patches == 0:
                for target, name, function, options in LISTENERS:
                    event.listen(target, name, function, **options)
            self._patches += 1

    def end(self) -> None:
        """Remove the listeners after the last patch."""
        with self._lock:
            self._patches -= 1
            if self._patches == 0:
                for target, name, function, _ in LISTENERS:
                    event.remove(target, name, function)


listeners = _Listeners()


def _before_orm(state: ORMExecuteState) -> None:
    """Mark loads of found entities, and refresh what a find returns."""
    current = watches.get()
    if not current or not state.is_select:
        return
    if state.is_column_load or state.is_relationship_load:
        state.update_execution_options(**{LOADS: True})
    elif state.session.autoflush and any(
        mentions(state.statement, watch.job_table.table) for watch in current
    ):
        # An entity that is loaded already would keep what it held before the row was ours.
        state.update_execution_options(populate_existing=True)


def _before(
    connection: Connection,
    clause: Any,
    multiparams: Any,
    params: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[Any, Any, Any]:
    for watch in watches.get():
        with watch.noting():
            watch.tick()
            if not options.get(LOADS):
                replaced = _seen(watch, connection, clause, params)
                clause = clause if replaced is None else replaced
    return clause, multiparams, params


def _seen(watch: Watch, connection: Connection, clause: Any, params: Mapping[str, Any]) -> Any:
    table = watch.job_table.table
    if isinstance(clause, ClaimStatement):
        return None
    if isinstance(clause, StatementLambdaElement):
        clause = clause._resolved  # noqa: SLF001 - there is no public way to what a lambda gives
    if isinstance(clause, Insert) and clause.select is not None and mentions(clause.select, table):
        raise PatchError(
            f"{watch.patch.target} copies {table.fullname!r} by INSERT ... SELECT, whose rows "
            "cannot be locked: read the rows in Python, and insert them then"
        )
    if isinstance(clause, (Update, Delete)):
        return watch.mark(connection, clause) if is_table(clause.table, table) else None
    text = clause.element if isinstance(clause, FromStatement) else clause
    if isinstance(text, TextClause):
        _raw(watch, connection, text.text)
    elif isinstance(clause, (SelectBase, FromStatement)):
        if not mentions(clause, table):
            for element in visitors.iterate(clause):
                if isinstance(element, TextClause):
                    _raw(watch, connection, f"SELECT {element.text}")
            return None
        return watch.read(connection, clause, params)
    return None


def _raw(watch: Watch, connection: Connection, sql: str) -> None:
    if not names(sql, watch.job_table.table):
        return
    if is_read(sql):
        raise PatchError(
            f"{watch.patch.target} reads {watch.job_table.table.fullname!r} by raw SQL, which "
            f"nothing can be added to: {' '.join(sql.split())[:200]}; write it as a select() of "
            "the table"
        )
    watch.mark(connection, None)


def _before_cursor(
    connection: Connection, _cursor: Any, sql: str, _params: Any, context: Any, _many: bool
) -> None:
    """See what went past all constructs, by ``exec_driver_sql``."""
    if context is None or context.compiled is None:
        for watch in watches.get():
            with watch.noting():
                watch.tick()
                _raw(watch, connection, sql)


def _after(
    _connection: Connection,
    clause: Any,
    _multiparams: Any,
    _params: Any,
    _options: Any,
    result: Any,
) -> None:
    if isinstance(clause, (Update, Delete)) and not isinstance(clause, ClaimStatement):
        for watch in watches.get():
            if is_table(clause.table, watch.job_table.table):
                watch.marked(max(0, result.rowcount))


def _ended(connection: Connection) -> None:
    for watch in watches.get():
        watch.ended(connection)


def _flushing(session: Session, _context: Any, _instances: Any) -> None:
    for watch in watches.get():
        watch.flushing([*session.dirty, *session.deleted])


def _flushed(_session: Session, _context: Any) -> None:
    for watch in watches.get():
        watch.flushed()


LISTENERS: tuple[tuple[Any, str, Callable[..., Any], dict[str, bool]], ...] = (
    (Session, "do_orm_execute", _before_orm, {}),
    (Session, "before_flush", _flushing, {}),
    (Session, "after_flush", _flushed, {}),
    (Engine, "before_execute", _before, {"retval": True}),
    (Engine, "after_execute", _after, {}),
    (Engine, "before_cursor_execute", _before_cursor, {}),
    (Engine, "commit", _ended, {}),
    (Engine, "rollback", _ended, {}),
)
