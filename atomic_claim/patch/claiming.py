"""Legacy functions that find and mark, replaced by a claim."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar, Unpack

from sqlalchemy.util import greenlet_spawn

from atomic_claim.claim import Claim, claim_jobs, dequeue_jobs
from atomic_claim.columns import by_name
from atomic_claim.errors import ClaimError, PatchError
from atomic_claim.job_table import JobTable, job_table_of
from atomic_claim.lifecycle import release_jobs

from . import filters
from .calls import Call, Reading
from .events import listened, listening
from .options import ClaimOptions, check_files, check_names
from .patches import Patch, Run, guarded, make_patch
from .replacing import Replacing
from .sessions import Opened, Sessions, unlocking
from .sources import source_of, writes_of
from .tables import Tables, check_role, stateless
from .targets import PatchWrapper, Target, loaded

BY_LOCKS = "have it run as it is, its reads locked, by lock_reads()"
F = TypeVar("F", bound=Callable[..., Any])


def patch_claims(target: Any, table: Any = None, **options: Unpack[ClaimOptions]) -> Patch:
    """Replace a legacy function that finds jobs and marks them by an atomic claim.

    Each option is a constant, the **name** of a parameter of the function, a dotted path from one
    (``"self.session"``), or a callable that gets the bound call (``lambda call: call["limit"]``).
    A string that is a parameter's name, or a dotted path that begins with one, is always read
    from the call; any other is a constant where a string makes sense (``worker``, ``empty``,
    a column in ``order_by``), and a ``PatchError`` where it does not.

    Within ``where``, ``values`` and ``order_by`` the same holds for each string of a dictionary or
    list, and ``"now()"`` is the database's clock. A callable that takes no argument is called
    without; an optional parameter gets the call only if its name is ``call``.

    A generator stays one: it claims one job whenever the next one is asked for, ``limit`` at most;
    as a context manager it claims once. What it does after its yield is left out, which is warned
    of as far as its source shows it: :func:`claim_reads` runs it as it is.

    A session that the patch opens itself (an engine, a factory, a context manager, a function or
    method that makes one) is a transaction of its own: committed and closed, whatever was found,
    and rolled back if ``returns`` raises. In any other session ``commit`` must be said.

    Args:
        target: ``"package.module:Class.method"``, or the function or method itself. It is
            replaced inside its decorators, which go on working. A module that is not imported yet
            is patched when it is.
        table: a ``Table``, a mapped class or a :class:`JobTable`, or the name of one
            (``"package.models:Job"``), which is found at the first call if it is not defined yet.
            A table that the code knows only as text is given by its name in the database
            (``"jobs"``, ``"schema.jobs"``), and reflected at the first call, from the call's bind.
            A dictionary holds either name as ``"table"``, and the arguments of
            :meth:`JobTable.infer` beside it.
            Where every object has a table of its own, a path (``"self.jobs_table"``) or a callable
            that gives the same one again for the same object.
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
        returns: makes what the function returns of what was claimed: the name of an attribute of
            the jobs, or a callable that gets the job, or the list where there is a ``limit``; the
            call as its second argument or by the name ``call``; the session or connection, in
            which it may read more, as its third or by the name ``bind``. A coroutine function if
            the patched function is one.
        empty: what the function returns if nothing was claimed: None or an empty list if left
            out. An exception is raised.
        when: whether this call claims; a parameter's name may have ``not`` before it. If it does
            not, it goes to the original.
        commit: whether the claim in a session or connection of the caller's is committed; the
            value that fits is in the error if it is left out. Where nothing was claimed, only a
            transaction that began with the call is ended.
        delete: the function takes jobs by deleting them: so does the claim.
        ignore: the names of parameters that no option reads, on purpose.
        directory: in place of ``table``: the folder of the waiting jobs, where a job is a file, as
            for :func:`atomic_claim.files.claim_files`. What is claimed are its ``ClaimedFile``,
            for ``returns=`` to take; left out, the function returns the claimed ``Path``, or a
            list of them. Beside it only ``processing``, ``limit``, ``worker``, ``returns``,
            ``empty``, ``when``, ``ignore``, ``pattern``, ``key`` and ``layout`` can be given.
        processing: the folder of the claimed files; left out, ``processing`` beside the other.
        pattern: as for :func:`atomic_claim.files.claim_files`.
        key: as for :func:`atomic_claim.files.claim_files`.
        layout: as for :func:`atomic_claim.files.claim_files`.

    Returns:
        The :class:`Patch`, whose ``undo()`` puts back what was there.

    Raises:
        PatchError: the target does not exist, is patched already, has no such parameter, or one
            that no option reads; or ``commit`` has to be said.
        TypeError: there is no such option.
        AmbiguousTable: the table's columns cannot be read with certainty.
    """
    check_names(options)
    return make_patch(target, partial(prepared, table, options))


def claims(table: Any = None, **options: Unpack[ClaimOptions]) -> Callable[[F], F]:
    """:func:`patch_claims` as a decorator, for code that may be edited.

    The function's ``patch`` is the :class:`Patch`, with its counts.
    """
    check_names(options)

    def decorate(function: F) -> F:
        target = loaded(function)
        patch = Patch(target.name)
        run = guarded(patch, target, partial(prepared, table, options))
        return PatchWrapper(function, run, patch)  # type: ignore[return-value]

    return decorate


def prepared(table: Any, options: ClaimOptions, patch: Patch, target: Target) -> Run:
    """Check the options and return the function that runs in place of the target."""
    claiming: Replacing
    if options.get("directory") is None:
        if table is None:
            raise PatchError(f"{target.name}: say what is claimed, by table= or directory=")
        claiming = Claiming(table, options, patch, target)
    else:
        # Most programs have no directory queue, and need not wait for what serves it.
        from .folders import FileClaiming  # noqa: PLC0415

        check_files({"table": table, **options}, target.name)
        claiming = FileClaiming(patch, target, options)
    claiming.check_dropped(options.get("ignore", ()))
    return claiming.run


class Claiming(Replacing):
    """The claim that stands in place of one function."""

    def __init__(self, table: Any, options: ClaimOptions, patch: Patch, target: Target) -> None:
        super().__init__(patch, target, options)
        self._warned: set[str] = set()
        self._has_listened = False
        self.delete = options.get("delete", False)
        # What is read for the result can fail, and a row that was deleted cannot be given back.
        opens = self.returns_bind or (self.delete and options.get("returns") is not None)
        self.sessions = Sessions(
            target, self.options, options.get("session"), options.get("commit"), opens=opens
        )
        self.session, self.commit = self.sessions.session, self.sessions.commit
        self.where = self.options.reading("where", options.get("where"))
        self.order_by = self.options.reading("order_by", options.get("order_by"), self._is_order)
        self.values = self.options.reading("values", options.get("values"))
        self.lease = self.options.reading("lease", options.get("lease"))
        self.tables = Tables(table, self.options, self._job_table)
        self.table = self.tables.reading

    def _is_order(self, given: Any) -> bool:
        return not callable(given) or hasattr(given, "__clause_element__")

    def _job_table(self, given: Any) -> JobTable:
        """Return the job table of a call, and raise if an option does not fit it."""
        job_table = stateless(given) if self.delete else job_table_of(given)
        try:
            given = self._given(job_table, lambda each: each.given if each.constant else None)
            job_table.values(given.get("values") or {}, "values")
            check_role(job_table, "token", "lease", self.lease.given)
            check_role(job_table, "lease", "lease", self.lease.given)
            check_role(job_table, "worker", "worker", self.worker.given)
        except ClaimError as error:
            raise PatchError(f"{self.target.name}: {error}") from error
        self._warn_of_dropped(job_table)
        return job_table

    def _warn_of_dropped(self, job_table: JobTable) -> None:
        """Warn of what the function's source and the mapper's events write beside the claim."""
        named = by_name(job_table.table, job_table.mapper)
        columns = {name: column.name for name, column in named.items()}
        written = filters.written(job_table)
        values = self.values.given
        if isinstance(values, dict):
            written |= {job_table.column(name, "values").name for name in values}
        elif values is not None or self.delete:
            written |= set(columns.values())
        own = {job_table.table.name}
        if job_table.mapper is not None:
            own.add(job_table.mapper.class_.__name__)
        found = list(dict.fromkeys(n for n, _ in writes_of(source_of(self.target.function))))
        dropped = [name for name in found if columns.get(name, name) not in written]
        mine = [name for name in dropped if name in columns]
        others = [name for name in dropped if name not in own.union(columns)]
        if mine:
            self._warn(
                f"{self.target.name} sets {', '.join(mine)}, which the claim does not: name what "
                f"it is to write, values={{{mine[0]!r}: ...}}"
            )
        if others:
            self._warn(
                f"{self.target.name} writes {', '.join(others)} beside {job_table.table.fullname}, "
                f"which the claim does not: {BY_LOCKS}"
            )
        self._warn_of_events(listened(job_table, written, delete=self.delete))

    def _warn_of_events(self, names: list[str]) -> None:
        if names:
            self._warn(
                f"what listens to {', '.join(names)} does not run for the rows that the claim in "
                f"place of {self.target.name} changes: {BY_LOCKS}"
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=12)

    @asynccontextmanager
    async def claimed(self, call: Call, limit: int) -> AsyncIterator[tuple[Sequence[Any], Any]]:
        """Claim; yield the jobs and the bind while the session is open."""
        async with self.sessions.open(call, waits=self.is_coroutine) as opened:
            claim: Claim[Any] = await _beside(opened, self._claim, call, limit, opened)
            try:
                yield claim, opened.bind
            except BaseException as error:
                await _beside(opened, self._give_back, opened, claim, error)
                raise
            await _beside(opened, opened.end, claim)

    def _claim(self, call: Call, limit: int, opened: Opened) -> Claim[Any]:
        job_table = self.tables.of(call, opened.sync)
        if limit == 0:
            return Claim(table=job_table)
        if not self._has_listened:
            self._has_listened = True
            self._warn_of_events(listening(opened.sync))
        given = self._given(job_table, lambda each: each.read(call))
        leave = unlocking(opened.sync, job_table)
        make = dequeue_jobs if self.delete else claim_jobs
        claim: Claim[Any] = make(opened.sync, job_table, limit, **given)
        if not claim and leave is not None:
            leave()
        self.patch.count(claimed=len(claim))
        return claim

    def _given(self, job_table: JobTable, read: Callable[[Reading], Any]) -> dict[str, Any]:
        """Return the arguments of a claim."""
        where = filters.conditions(job_table, read(self.where))
        given: dict[str, Any] = {
            "where": filters.beside_the_lease(job_table, where) or None,
            "order_by": filters.order(job_table, read(self.order_by)),
        }
        if not self.delete:
            given["values"] = read(self.values) or None
            given["worker"] = read(self.worker)
            given["lease"] = filters.lease(read(self.lease))
        return given

    def _give_back(self, opened: Opened, claim: Claim[Any], error: BaseException) -> None:
        """Free rows whose claim is committed already; any other session rolls back."""
        if not claim or not opened.is_maker or self.delete:
            return
        try:
            release_jobs(opened.sync, claim, unfenced=True)
        except ClaimError as failure:
            error.add_note(f"{len(claim)} claimed jobs could not be given back: {failure}")


async def _beside(opened: Opened, run: Callable[..., Any], *args: Any) -> Any:
    """Run a synchronous function, beside the event loop if its bind is an asynchronous one."""
    if opened.bind is opened.sync:
        return run(*args)
    return await greenlet_spawn(run, *args)
