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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import FromStatement, ORMExecuteState, Query, Session
from sqlalchemy.sql import visitors
from sqlalchemy.sql.selectable import SelectBase
from sqlalchemy.util import greenlet_spawn

from atomic_claim.backends import Find
from atomic_claim.errors import ClaimLost, PatchError
from atomic_claim.job_table import JobTable
from atomic_claim.statement import ClaimStatement

from .calls import Call
from .patches import Patch, Run
from .selects import find_of, is_read, is_table, mentions, names
from .tables import Tables

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
        table: the table that its reads are watched for, by its name alone if that is reflected.
        job_table: what its jobs are read by, known from its first find on.
        reads: how many of them were seen.
        failed: whether the function raised.
        is_over: whether the call has ended.
        refused: the first error that was raised within one of its statements.
    """

    job_table: JobTable

    def __init__(self, patch: Patch, tables: Tables, limit: int | None, call: Call) -> None:
        self.patch = patch
        self._limit = limit
        self.table = tables.named(call)
        self._table_from = partial(tables.of, call)
        self.reads = 0
        self.failed = self.is_over = False
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

    def find(
        self, connection: sa.Connection, statement: Any, params: Mapping[str, Any]
    ) -> Find | None:
        """Analyze a SELECT of the table; return None if it finds no jobs.

        It finds no more of them than the patch allows.
        """
        with unwatched():
            self.job_table = self._table_from(connection)
        find = find_of(self.job_table, statement, params, self.patch.target, counts=self.reads > 0)
        most = self._limit
        if find is None or most is None or (find.limit is not None and find.limit <= most):
            return find
        return replace(find, statement=find.statement.limit(most), limit=most)

    @abstractmethod
    def read(
        self, connection: sa.Connection, statement: Any, params: Mapping[str, Any]
    ) -> sa.Select[Any] | None:
        """Return the SELECT to execute in place of a statement, or None to keep it."""

    @abstractmethod
    def mark(
        self, connection: sa.Connection, statement: sa.Update | sa.Delete | None
    ) -> sa.Update | sa.Delete | None:
        """Return what is executed in place of a statement that changes rows, or None.

        The statement is None where it is raw SQL.
        """

    # Not every watch reacts to all of these.

    def marked(self, rows: int) -> None:  # noqa: B027
        """Count the rows of the table that a statement changed."""

    def ended(self, connection: sa.Connection) -> None:  # noqa: B027
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


def watching(patch: Patch, function: Callable[..., Any], make: Callable[[Call], Watch]) -> Run:
    """Return a function that runs the patched function and watches its reads."""
    _listen(patch, on=True)
    patch.at_undo(lambda: _listen(patch, on=False))
    patch.at_undo(lambda: _warn_if_unseen(patch))

    def run(call: Call, original: Callable[[], Any]) -> Any:
        watch = make(call)
        try:
            with _watched(watch):
                result = original()
                watch.is_over = not inspect.isawaitable(result)
                if watch.is_over:
                    return _read_already(result, watch)
        finally:
            _close_ended(watch)
        return _finished(watch, result)

    def generate(call: Call, original: Callable[[], Any]) -> Generator[Any, Any, Any]:
        return (yield from WatchedGenerator(make(call), original()))

    def generate_async(call: Call, original: Callable[[], Any]) -> AsyncGenerator[Any, Any]:
        return WatchedAsyncGenerator(make(call), original())

    if inspect.isasyncgenfunction(function):
        return generate_async
    return generate if inspect.isgeneratorfunction(function) else run


async def _finished(watch: Watch, result: Awaitable[Any]) -> Any:
    """Watch a coroutine, or what a plain function returned to be awaited, until it ends."""
    try:
        with _watched(watch):
            return _read_already(await result, watch)
    finally:
        await greenlet_spawn(_close_ended, watch)


@contextmanager
def _watched(watch: Watch) -> Iterator[None]:
    token = watches.set((*watches.get(), watch))
    watch.failed = watch.is_over = True
    try:
        yield
    except Exception as error:
        if watch.refused is not None and error is not watch.refused:
            error.add_note(f"before that, {watch.refused}")
        raise
    finally:
        watches.reset(token)
    if watch.refused is not None:
        watch.is_over = True
        raise watch.refused
    watch.failed = False


@contextmanager
def _step(watch: Watch) -> Iterator[None]:
    """Watch a generator up to its next yield or its end."""
    try:
        with _watched(watch):
            yield
            watch.is_over = False
    except (StopIteration, StopAsyncIteration):
        if watch.refused is not None:
            raise watch.refused from None
        watch.failed = False
        raise


def _close_ended(watch: Watch) -> None:
    if not watch.is_over:
        return
    patch = watch.patch
    if not watch.reads and watch.refused is None:
        patch.count(passed_through=1)
        if patch.passed_through == patch.calls == 1:
            logger.warning(UNSEEN, patch.target, watch.table.fullname)
    watch.close()


def _warn_if_unseen(patch: Patch) -> None:
    if patch.calls and patch.calls == patch.passed_through:
        warnings.warn(UNSEEN % (patch.target, "the table in any of its calls"), stacklevel=3)


@dataclass(eq=False)
class WatchedGenerator(Generator[Any, Any, Any]):
    """A generator that is watched whenever it runs, and not while its consumer does."""

    watch: Watch
    inner: Generator[Any, Any, Any]

    def send(self, value: Any) -> Any:
        """Run up to the next yield."""
        return self._run(self.inner.send, value)

    def throw(self, *error: Any) -> Any:
        """Raise an exception where it stands."""
        return self._run(self.inner.throw, *error)

    def _run(self, resume: Callable[..., Any], *args: Any) -> Any:
        try:
            with _step(self.watch):
                return resume(*args)
        finally:
            _close_ended(self.watch)


@dataclass(eq=False)
class WatchedAsyncGenerator(AsyncGenerator[Any, Any]):
    """The same of an asynchronous one."""

    watch: Watch
    inner: AsyncGenerator[Any, Any]

    async def asend(self, value: Any) -> Any:
        """Run up to the next yield."""
        return await self._run(self.inner.asend(value))

    async def athrow(self, *error: Any) -> Any:
        """Raise an exception where it stands."""
        return await self._run(self.inner.athrow(*error))

    async def _run(self, step: Awaitable[Any]) -> Any:
        try:
            with _step(self.watch):
                return await step
        finally:
            await greenlet_spawn(_close_ended, self.watch)


def _read_already(result: Any, watch: Watch) -> Any:
    """Return the function's result, or raise if it reads after the call."""
    lazy = (Query, SelectBase, Iterator, AsyncIterator, Future)
    if isinstance(result, lazy) and not isinstance(result, sa.Result):
        with watch.noting():
            raise PatchError(
                f"{watch.patch.target} returned a {type(result).__name__}, which reads when the "
                "call is over: patch the function that consumes it, or let patch_claims() do the "
                "finding"
            )
    return result


_watching: set[Patch] = set()
_lock = threading.Lock()


def _listen(patch: Patch, *, on: bool) -> None:
    """Register listeners to SQLAlchemy's events while a patch needs them."""
    with _lock:
        change: Callable[..., Any] = event.listen if on else event.remove
        if _watching <= {patch}:
            for target, name, function, options in LISTENERS:
                change(target, name, function, **(options if on else {}))
        _watching.symmetric_difference_update({patch})


def _before_orm(state: ORMExecuteState) -> None:
    """Mark loads of found entities, and refresh what a find returns."""
    current = watches.get()
    if not current or not state.is_select:
        return
    if state.is_column_load or state.is_relationship_load:
        state.update_execution_options(**{LOADS: True})
    elif state.session.autoflush and any(
        mentions(state.statement, watch.table) for watch in current
    ):
        # An entity that is loaded already would keep what it held before the row was ours.
        state.update_execution_options(populate_existing=True)


def _before(
    connection: sa.Connection,
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


def _seen(watch: Watch, connection: sa.Connection, clause: Any, params: Mapping[str, Any]) -> Any:
    table = watch.table
    if isinstance(clause, ClaimStatement):
        return None
    if isinstance(clause, sa.StatementLambdaElement):
        clause = clause._resolved  # noqa: SLF001 - there is no public way to what a lambda gives
    if (
        isinstance(clause, sa.Insert)
        and clause.select is not None
        and mentions(clause.select, table)
    ):
        raise PatchError(
            f"{watch.patch.target} copies {table.fullname!r} by INSERT ... SELECT, whose rows "
            "cannot be locked: read the rows in Python, and insert them then"
        )
    if isinstance(clause, (sa.Update, sa.Delete)):
        return watch.mark(connection, clause) if is_table(clause.table, table) else None
    text = clause.element if isinstance(clause, FromStatement) else clause
    if isinstance(text, sa.TextClause):
        _raw(watch, connection, text.text)
    elif isinstance(clause, (SelectBase, FromStatement)):
        if not mentions(clause, table):
            for element in visitors.iterate(clause):
                if isinstance(element, sa.TextClause):
                    _raw(watch, connection, f"SELECT {element.text}")
            return None
        return watch.read(connection, clause, params)
    return None


def _raw(watch: Watch, connection: sa.Connection, sql: str) -> None:
    if not names(sql, watch.table):
        return
    if is_read(sql):
        raise PatchError(
            f"{watch.patch.target} reads {watch.table.fullname!r} by raw SQL, which "
            f"nothing can be added to: {' '.join(sql.split())[:200]}; write it as a select() of "
            "the table"
        )
    watch.mark(connection, None)


def _before_cursor(
    connection: sa.Connection, _cursor: Any, sql: str, _params: Any, context: Any, _many: bool
) -> None:
    """See what went past all constructs, by ``exec_driver_sql``."""
    if context is None or context.compiled is None:
        for watch in watches.get():
            with watch.noting():
                watch.tick()
                _raw(watch, connection, sql)


def _after(
    _connection: sa.Connection,
    clause: Any,
    _multiparams: Any,
    _params: Any,
    _options: Any,
    result: Any,
) -> None:
    if isinstance(clause, (sa.Update, sa.Delete)) and not isinstance(clause, ClaimStatement):
        for watch in watches.get():
            if is_table(clause.table, watch.table):
                watch.marked(max(0, result.rowcount))


def _ended(connection: sa.Connection) -> None:
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
    (sa.Engine, "before_execute", _before, {"retval": True}),
    (sa.Engine, "after_execute", _after, {}),
    (sa.Engine, "before_cursor_execute", _before_cursor, {}),
    (sa.Engine, "commit", _ended, {}),
    (sa.Engine, "rollback", _ended, {}),
)
