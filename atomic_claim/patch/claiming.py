"""Legacy functions that find and mark, replaced by a claim."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy import Column, Connection, Engine, Integer
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util import greenlet_spawn

from atomic_claim.backends.drivers import in_transaction
from atomic_claim.claim import Claim, claim_jobs, dequeue_jobs
from atomic_claim.errors import ClaimError, PatchError
from atomic_claim.execution import patiently
from atomic_claim.job_table import JobTable, job_table_of
from atomic_claim.orm import async_types, sync_bind

from . import filters
from .calls import Call, Reading
from .generators import Habit, commit_habit
from .patches import Patch, Run, guarded, make_patch
from .replacing import ALL, ONE, Replacing
from .tables import stateless, table_of
from .targets import PatchWrapper, Target, loaded

F = TypeVar("F", bound=Callable[..., Any])

SESSIONS = ("session", "db_session", "async_session", "db", "sess", "connection", "conn", "engine")
BINDS = (Session, scoped_session, Connection, Engine, sessionmaker)


@dataclass(frozen=True, eq=False, kw_only=True)
class Options:
    """The arguments of ``patch_claims`` other than the target."""

    table: Any = None
    session: Any = None
    limit: Any = ONE
    where: Any = None
    order_by: Any = None
    values: Any = None
    lease: Any = None
    worker: Any = None
    returns: Any = None
    empty: Any = None
    when: Any = None
    commit: Any = None
    delete: bool = False
    directory: Any = None
    processing: Any = None
    pattern: str = "*"
    key: Callable[[str], Any] | None = None
    layout: str = "plain"


def patch_claims(
    target: Any,
    table: Any = None,
    *,
    session: Any = None,
    limit: Any = ONE,
    where: Any = None,
    order_by: Any = None,
    values: Any = None,
    lease: Any = None,
    worker: Any = None,
    returns: Any = None,
    empty: Any = None,
    when: Any = None,
    commit: Any = None,
    delete: bool = False,
    directory: Any = None,
    processing: Any = None,
    pattern: str = "*",
    key: Callable[[str], Any] | None = None,
    layout: str = "plain",
) -> Patch:
    """Replace a legacy function that finds jobs and marks them by an atomic claim.

    Each option is a constant, the **name** of a parameter of the function, a dotted path from one
    (``"self.session"``), or a callable that gets the bound call (``lambda call: call["limit"]``).
    A string that is a parameter's name, or a dotted path that begins with one, is always read
    from the call; any other is a constant where a string makes sense (``worker``, ``empty``,
    a column in ``order_by``), and a ``PatchError`` where it does not.

    A generator stays one: it claims when it is asked for the next job, one by one if the original
    yields them so, and as a context manager once. One that marks something after its yield is
    refused, since that would be left out: :func:`claim_reads` runs it as it is.

    Args:
        target: ``"package.module:Class.method"``, or the function or method itself. It is
            replaced inside its decorators, which go on working. A module that is not imported yet
            is patched when it is.
        table: a ``Table``, a mapped class or a :class:`JobTable`, or the name of one
            (``"package.models:Job"``) that is yet to be imported. Where every object has a table
            of its own, a path (``"self.jobs_table"``) or a callable that gives the same one again
            for the same object.
        session: where the claim runs: whatever :func:`claim_jobs` takes, its asynchronous
            counterpart, a context manager that gives it, or a method that makes one of these. Left
            out, the parameter that is called ``session``, ``db``, ``connection``, ``engine`` or the
            like.
        limit: how many jobs at most; ``None`` is all, 0 none. The function then returns a list.
            Left out, or the constant 1, it claims one job and returns that.
        where: further conditions: expressions, or a dictionary as :func:`~.filters.conditions`
            takes it. With a lease, what it asks of the state does not hold back a dead worker's
            row.
        order_by: what comes first: expressions, or names with ``-`` before them for descending.
        values: further values to write, by column, attribute or name.
        lease: for how long the claim holds, a ``timedelta`` or seconds.
        worker: the claiming worker's name.
        returns: makes what the function returns of what was claimed: a callable that gets the
            job, or the :class:`Claim` where there is a ``limit``, and if it takes two arguments
            the call; or the name of an attribute of the jobs.
        empty: what the function returns if nothing was claimed: None or an empty list if left
            out. An exception is raised.
        when: whether this call claims; a parameter's name may have ``not`` before it. If it does
            not, it goes to the original.
        commit: whether the claim in a session or connection of the caller's is committed, as the
            function did it. Left out, it is if the function's own source does, or that of a helper
            (a method of the same class, a function of the same package that gets the session).
            Where nothing was claimed, it is only if the source shows that the function commits
            then, too.
        delete: the function takes jobs by deleting them: so does the claim.
        directory: in place of ``table``: the folder of the waiting jobs, where a job is a file, as
            for :func:`atomic_claim.files.claim_files`. What is claimed are its ``ClaimedFile``,
            for ``returns=`` to take; left out, the function returns the claimed ``Path``, or a
            list of them. Beside it only ``processing``, ``limit``, ``worker``, ``returns``,
            ``empty``, ``when``, ``pattern``, ``key`` and ``layout`` can be given.
        processing: the folder of the claimed files; left out, ``processing`` beside the other.
        pattern: as for :func:`atomic_claim.files.claim_files`.
        key: as for :func:`atomic_claim.files.claim_files`.
        layout: as for :func:`atomic_claim.files.claim_files`.

    Returns:
        The :class:`Patch`, whose ``undo()`` puts back what was there.

    Raises:
        PatchError: the target does not exist, is patched already, or has no such parameter.
        AmbiguousTable: the table's columns cannot be read with certainty.
    """
    options = Options(
        table=table,
        session=session,
        limit=limit,
        where=where,
        order_by=order_by,
        values=values,
        lease=lease,
        worker=worker,
        returns=returns,
        empty=empty,
        when=when,
        commit=commit,
        delete=delete,
        directory=directory,
        processing=processing,
        pattern=pattern,
        key=key,
        layout=layout,
    )
    return make_patch(target, lambda patch, found: prepared(options, patch, found))


def claims(
    table: Any = None,
    *,
    session: Any = None,
    limit: Any = ONE,
    where: Any = None,
    order_by: Any = None,
    values: Any = None,
    lease: Any = None,
    worker: Any = None,
    returns: Any = None,
    empty: Any = None,
    when: Any = None,
    commit: Any = None,
    delete: bool = False,
    directory: Any = None,
    processing: Any = None,
    pattern: str = "*",
    key: Callable[[str], Any] | None = None,
    layout: str = "plain",
) -> Callable[[F], F]:
    """:func:`patch_claims` as a decorator, for code that may be edited.

    The function's ``patch`` is the :class:`Patch`, with its counts.
    """
    options = Options(
        table=table,
        session=session,
        limit=limit,
        where=where,
        order_by=order_by,
        values=values,
        lease=lease,
        worker=worker,
        returns=returns,
        empty=empty,
        when=when,
        commit=commit,
        delete=delete,
        directory=directory,
        processing=processing,
        pattern=pattern,
        key=key,
        layout=layout,
    )

    def decorate(function: F) -> F:
        target = loaded(function)
        patch = Patch(target.name)
        run = guarded(patch, prepared(options, patch, target))
        return PatchWrapper(function, run, patch)  # type: ignore[return-value]

    return decorate


def prepared(options: Options, patch: Patch, target: Target) -> Run:
    """Check the options and return the function that runs in place of the target."""
    claiming: Replacing
    if options.directory is None:
        if options.table is None:
            raise PatchError(f"{target.name}: say what is claimed, by table= or directory=")
        claiming = Claiming(options, patch, target)
    else:
        claiming = _file_claiming(options, patch, target)
    function = target.function
    if inspect.isasyncgenfunction(function):
        return claiming.generate_async
    if inspect.iscoroutinefunction(function):
        return claiming.run_async
    return claiming.generate if inspect.isgeneratorfunction(function) else claiming.run


def _file_claiming(options: Options, patch: Patch, target: Target) -> Replacing:
    # Most programs have no directory queue, and need not wait for what serves it.
    from .folders import FileClaiming  # noqa: PLC0415

    of_files = {"directory", "processing", "pattern", "key", "layout"}
    of_files |= {"limit", "worker", "returns", "empty", "when"}
    others = [
        field.name
        for field in fields(Options)
        if field.name not in of_files and getattr(options, field.name) not in {None, False}
    ]
    if others:
        raise PatchError(
            f"{target.name}: {', '.join(others)} cannot be had with directory=, whose jobs are "
            "files; leave it out"
        )
    return FileClaiming(
        patch,
        target,
        **{name: getattr(options, name) for name in sorted(of_files)},
    )


@dataclass(frozen=True, eq=False)
class Asked:
    """The arguments of one claim, read from a call."""

    bind: Any
    limit: int
    where: Any
    order_by: Any
    values: Any
    lease: timedelta | None
    worker: Any
    commit: bool


class Claiming(Replacing):
    """The claim that stands in place of one function."""

    def __init__(self, options: Options, patch: Patch, target: Target) -> None:
        super().__init__(
            patch,
            target,
            limit=options.limit,
            worker=options.worker,
            returns=options.returns,
            empty=options.empty,
            when=options.when,
        )
        self.delete = options.delete
        self.table = self._reading("table", table_of(options.table), _is_table)
        self._tables: dict[Any, JobTable] = {}
        self.commits = self._habit(options.commit)
        self.session = self._session(options.session)
        self.where = self._reading("where", options.where)
        self.order_by = self._reading("order_by", options.order_by, self._is_order)
        self.values = self._reading("values", options.values)
        self.lease = self._reading("lease", options.lease)
        self.commit = self._reading("commit", options.commit)
        if self.table.constant:
            self._check_table(self._job_table(self.table.given))

    def _habit(self, commit: Any) -> Habit:
        found = commit_habit(self.target.function, SESSIONS)
        if found is None and commit is None:
            raise PatchError(
                f"whether {self.target.name} commits cannot be read, since "
                f"{self.target.function!r} is not written in Python: say commit=True or "
                "commit=False"
            )
        return found or Habit(commits=False, when_empty=False)

    def _job_table(self, given: Any) -> JobTable:
        """Return the job table of a call, cached by the given table."""
        if given not in self._tables:
            self._tables[given] = stateless(given) if self.delete else job_table_of(given)
        return self._tables[given]

    def _session(self, given: Any) -> Reading:
        if given is None:
            parameters = self.target.signature.parameters
            found = [name for name in SESSIONS if name in parameters]
            if len(found) != 1:
                several = f"several of its parameters could be it ({', '.join(found)})"
                raise PatchError(
                    f"{self.target.name}: where does the claim run? "
                    f"{several if found else 'None of its parameters is called session'}: say it "
                    "with session='parameter', session='self.session', session=SessionLocal or "
                    "session=engine"
                )
            given = found[0]
        return self._reading("session", given, _is_bind)

    def _is_order(self, given: Any) -> bool:
        return not callable(given) or hasattr(given, "__clause_element__")

    def _check_table(self, job_table: JobTable) -> None:
        name, table = self.target.name, job_table.table.fullname
        try:
            if self.where.constant:
                filters.conditions(job_table, self.where.given)
            if self.order_by.constant:
                filters.order(job_table, self.order_by.given)
            if self.values.constant and self.values.given is not None:
                job_table.values(self.values.given, "values")
            if self.lease.constant:
                filters.lease(self.lease.given)
        except PatchError:
            raise
        except ClaimError as error:
            raise PatchError(f"{name}: {error}") from error
        for option, role in (("lease", "token"), ("lease", "lease"), ("worker", "worker")):
            given = getattr(self, option).given
            if given is not None and getattr(job_table, role) is None:
                raise PatchError(
                    f"{option}={given!r} of {name} needs a {role} column, and {table!r} has none "
                    f"that is known: name it with JobTable({role}=...)"
                )

    @contextmanager
    def claimed(self, call: Call) -> Iterator[Sequence[Any]]:
        """Claim for a call of a function; yield the jobs while its session is open."""
        with _opened(_made(self.session.read(call))) as bind:
            yield self._claim(call, self._synchronous(bind))

    @asynccontextmanager
    async def claimed_async(self, call: Call) -> AsyncIterator[Sequence[Any]]:
        """Claim for a call of a coroutine; yield the jobs while its session is open."""
        given = _made(self.session.read(call))
        if inspect.isawaitable(given):
            given = await given
        if isinstance(given, AbstractAsyncContextManager) and not _is_bind(given):
            async with given as bind:
                yield await self._claim_async(call, bind)
        else:
            with _opened(given) as bind:
                yield await self._claim_async(call, bind)

    def _synchronous(self, bind: Any) -> Any:
        if isinstance(bind, async_types()):
            raise PatchError(
                f"session={self.session.given!r} of {self.target.name} is {bind!r}, which only a "
                "coroutine can use: give a synchronous one"
            )
        return bind

    async def _claim_async(self, call: Call, bind: Any) -> Claim[Any]:
        if not isinstance(bind, async_types()):
            return self._claim(call, bind)
        claim: Claim[Any] = await greenlet_spawn(patiently, self._claim, call, sync_bind(bind))
        return claim

    def _claim(self, call: Call, bind: Any) -> Claim[Any]:
        if isinstance(bind, scoped_session):
            bind = bind.registry()
        job_table = self._job_table(self.table.read(call))
        asked = self._asked(call, bind, job_table)
        if asked.limit == 0:
            return Claim(table=job_table)
        leave = _leaving_unlocked(bind, job_table)
        if self.delete:
            claim = dequeue_jobs(
                bind, job_table, asked.limit, where=asked.where, order_by=asked.order_by
            )
        else:
            claim = claim_jobs(
                bind,
                job_table,
                asked.limit,
                where=asked.where,
                order_by=asked.order_by,
                values=asked.values,
                worker=asked.worker,
                lease=asked.lease,
            )
        if asked.commit and (claim or self.commits.when_empty):
            _commit(bind, claim)
        elif not claim:
            leave()
        self.patch.count(claimed=len(claim))
        return claim

    def _asked(self, call: Call, bind: Any, job_table: JobTable) -> Asked:
        where = filters.conditions(job_table, self.where.read(call))
        limit = self.limit.read(call)
        commit = self.commits.commits if self.commit.given is None else self.commit.read(call)
        return Asked(
            bind,
            ALL if limit is None else limit,
            filters.beside_the_lease(job_table, where) or None,
            filters.order(job_table, self.order_by.read(call)),
            _versioned(job_table, self.values.read(call)) or None,
            filters.lease(self.lease.read(call)),
            self.worker.read(call),
            bool(commit) and isinstance(bind, (Session, Connection)),
        )


def _versioned(job_table: JobTable, values: Any) -> Any:
    """Add the increment of the mapper's version column to the values, as a flush would."""
    mapper = job_table.mapper
    column = None if mapper is None else mapper.version_id_col
    if mapper is None or not isinstance(column, Column) or column.table is not job_table.table:
        return values
    if mapper.version_id_generator is False or not isinstance(column.type, Integer):
        return values
    given = {job_table.column(name, "values") for name in values or ()}
    return values if column in given else {**(values or {}), column: column + 1}


def _is_table(given: Any) -> bool:
    """Check whether it is a mapped class rather than a function that reads one from a call."""
    return isinstance(given, type)


def _is_bind(given: Any) -> bool:
    return isinstance(given, (*BINDS, *async_types()))


def _made(given: Any) -> Any:
    """Call a method that a path leads to and return its result; return other objects unchanged."""
    return given() if inspect.isroutine(given) else given


@contextmanager
def _opened(given: Any) -> Iterator[Any]:
    """Yield the session, entering a context manager that creates it."""
    if isinstance(given, AbstractContextManager) and not _is_bind(given):
        with given as bind:
            yield bind
    else:
        yield given


def _leaving_unlocked(bind: Any, job_table: JobTable) -> Callable[[], None]:
    """Return a function that releases SQLite's write lock after an empty claim.

    On SQLite an UPDATE takes the database's only write lock, be it of no row, and the caller of a
    function that found nothing has no reason to end the transaction.
    """
    if not isinstance(bind, (Session, Connection)):
        return lambda: None
    connection = bind
    if isinstance(bind, Session):
        if bind.autoflush:
            bind.flush()
        arguments = {"mapper": job_table.mapper, "clause": job_table.table}
        if bind.get_bind(**arguments).dialect.name != "sqlite":
            return lambda: None
        connection = bind.connection(bind_arguments=arguments)
    assert isinstance(connection, Connection)
    if connection.dialect.name != "sqlite" or in_transaction(
        connection.connection.driver_connection
    ):
        return lambda: None

    def leave() -> None:
        if in_transaction(connection.connection.driver_connection):
            connection.exec_driver_sql("ROLLBACK")

    return leave


def _commit(bind: Any, claim: Claim[Any]) -> None:
    """Commit, and leave the claimed entities loaded; all others expire as they would."""
    if not isinstance(bind, Session) or not bind.expire_on_commit:
        bind.commit()
        return
    bind.expire_on_commit = False
    try:
        bind.commit()
    finally:
        bind.expire_on_commit = True
    for entity in list(bind.identity_map.values()):
        if not any(entity is job for job in claim):
            bind.expire(entity)
