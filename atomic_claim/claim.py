"""The claim: free rows are handed to exactly one worker."""

from __future__ import annotations

import operator
import reprlib
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, TypeVar, Unpack, overload

import sqlalchemy as sa

from .backends import KeyedRows, Transaction, read_back
from .backends.by_key import claim_by_key
from .backends.recovery import (
    ROUNDS,
    Passed,
    free_traced,
    load_fully,
    mark_carefully,
    refusal,
    salvage,
    traced,
)
from .errors import ClaimError
from .execution import Bind, Operation
from .job_table import JobTable, job_table_of
from .orm import note_changes
from .plan import TOKEN, ClaimPlan, ClaimRequest, checked_limit, claim_plan
from .sql_elements import key_in
from .telemetry import logs_claims, report_claim, subscribers
from .tickets import parts_of, pickled, read, unpickled, written

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session, sessionmaker

    Sessions = Session | scoped_session[Any] | sessionmaker[Any]

Key = tuple[Any, ...]
J = TypeVar("J")


@dataclass(frozen=True, eq=False, repr=False)
class Claim(Sequence[J]):
    """An immutable sequence of the claimed rows or entities, in claim order.

    A slice is a ``Claim`` too. It equals a list, tuple or claim of equal jobs, and can be pickled.

    Attributes:
        jobs: the rows or entities; the keys, in a claim that was made from a ticket.
        table: the ``JobTable``.
        keys: the rows' primary keys, a tuple each, in claim order.
        token: the claim's token, if the table has a column for it.
        worker: the worker's name, if one was given.
        lease: how long the claim holds, if a lease was asked for.
        unreadable: the primary keys of rows that the claim passed over, since they cannot be
            marked or read; they are free. Where the claim was not rolled back (in the caller's
            transaction, or as one statement in AUTOCOMMIT) what ``values`` wrote to them stays.
    """

    jobs: tuple[J, ...] = ()
    _: KW_ONLY
    table: JobTable
    keys: tuple[Key, ...] = ()
    token: str | None = None
    worker: str | None = None
    lease: timedelta | None = None
    unreadable: tuple[Key, ...] = ()

    def __repr__(self) -> str:
        return f"<Claim of {len(self)} from {self.table.table.fullname}: {list(self)!r}>"

    def __len__(self) -> int:
        return len(self.jobs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Claim, list, tuple)) and self.jobs == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, place: int, /) -> J: ...
    @overload
    def __getitem__(self, place: slice, /) -> Claim[J]: ...
    def __getitem__(self, place: int | slice, /) -> J | Claim[J]:
        if isinstance(place, slice):
            return replace(self, jobs=self.jobs[place], keys=self.keys[place])
        return self.jobs[place]

    def __reduce__(self) -> Any:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return _unpickled, (*pickled(values.pop("table")), values)

    def keys_of(self, jobs: Iterable[Any]) -> tuple[Key, ...]:
        """Return the primary keys of some of the claim's jobs.

        Args:
            jobs: entities (merged into another session, too), rows or keys.

        Returns:
            The keys, a tuple each, in the order of ``jobs``, each once.

        Raises:
            ClaimError: ``jobs`` is no list of jobs, or one is not of this claim.
        """
        single = isinstance(jobs, (str, bytes, sa.Row, Mapping)) or not isinstance(jobs, Iterable)
        if single or _identity(jobs) is not None:
            raise ClaimError(f"jobs is {jobs!r}; expected a list of the claim's jobs: write [job]")
        known = set(self.keys)
        ours = {id(job): key for job, key in zip(self.jobs, self.keys, strict=True)}
        found: dict[Key, None] = {}
        for job in jobs:
            key = ours[id(job)] if id(job) in ours else _key_of(self.table, job)
            if key not in known:
                raise ClaimError(
                    f"{job!r} is not one of the claim's {len(known)} jobs; expected one with a key "
                    f"of {reprlib.repr(self.keys)}"
                )
            found[key] = None
        return tuple(found)

    def ticket(self, job: Any) -> dict[str, Any]:
        """Return a JSON-serializable handle on one job, for other processes and queues.

        Args:
            job: one of the claim's jobs, as an entity, a row or a key.

        Returns:
            A dictionary of plain values for :meth:`from_ticket`. It holds the token: who has it
            can end the job.

        Raises:
            ClaimError: the job is not one of this claim's, or its key does not survive JSON.
        """
        [key] = self.keys_of([job])
        parts = zip(self.table.key, key, strict=True)
        return {
            "table": self.table.table.name,
            "key": {column.name: written(column, part) for column, part in parts},
            "token": self.token,
            "lease": None if self.lease is None else self.lease.total_seconds(),
        }

    @classmethod
    def from_ticket(cls, table: Any, ticket: Mapping[str, Any]) -> Claim[Any]:
        """Return the claim of a ticket's job, for :func:`complete_jobs` and its like.

        Args:
            table: the ``Table``, mapped class or :class:`JobTable` that the job was claimed from.
            ticket: what :meth:`ticket` returned.

        Returns:
            A claim of one job, which is its key.

        Raises:
            ClaimError: it is not a ticket, or one of another table.
        """
        job_table = job_table_of(table, ordered=True)
        name, key, token, lease = parts_of(ticket)
        names = {column.name for column in job_table.key}
        fits = name == job_table.table.name and (token is None) == (job_table.token is None)
        if not fits or not isinstance(key, Mapping) or key.keys() != names:
            raise ClaimError(
                f"the ticket is of the table {name!r} and the key {key!r}; expected one of "
                f"{job_table!r} with the key {sorted(names)!r}: pass the table of the claim"
            )
        found = tuple(read(column, key[column.name]) for column in job_table.key)
        return Claim((found,), table=job_table, keys=(found,), token=token, lease=lease)


def _unpickled(entity: type[Any] | None, table: bytes, values: dict[str, Any]) -> Claim[Any]:
    return Claim(table=unpickled(entity, table), **values)


def _identity(job: Any) -> Key | None:
    """Return the primary key of an entity, which is empty before it is flushed; else None."""
    state: Any = sa.inspect(job, raiseerr=False)
    return tuple(state.identity or ()) if hasattr(state, "identity") else None


def _key_of(job_table: JobTable, job: Any) -> Key | None:
    """Return the key of an entity, a row or a key; None if there can be none."""
    if isinstance(job, sa.Row):
        found = job._mapping  # noqa: SLF001 - Row's public name
        names = [column.key for column in job_table.key]
        return tuple(found[name] for name in names) if found.keys() >= set(names) else None
    if not isinstance(job, tuple):
        job = (job,) if (identity := _identity(job)) is None else identity
    return job if all(isinstance(part, Hashable) for part in job) else None


class ClaimOptions(TypedDict, total=False):
    """The keyword arguments of :func:`claim_jobs`."""

    where: Any
    order_by: Any
    values: Mapping[Any, Any] | None
    worker: str | None
    lease: timedelta | None


@overload
def claim_jobs(
    bind: Sessions, table: type[J], limit: int = 1, **options: Unpack[ClaimOptions]
) -> Claim[J]: ...
@overload
def claim_jobs(
    bind: Bind, table: Any, limit: int = 1, **options: Unpack[ClaimOptions]
) -> Claim[Any]: ...
def claim_jobs(
    bind: Bind,
    table: Any,
    limit: int = 1,
    *,
    where: Any = None,
    order_by: Any = None,
    values: Mapping[Any, Any] | None = None,
    worker: str | None = None,
    lease: timedelta | None = None,
) -> Claim[Any]:
    """Claim up to ``limit`` free rows that are due: each goes to exactly one caller.

    With a ``Session`` or ``Connection`` the claim is part of the caller's transaction: others
    see it at commit, a rollback undoes it, and nothing is committed here. On a cluster with
    several writable nodes it counts only once the commit has succeeded, so start no work before.
    With an ``Engine`` or ``sessionmaker`` it is a transaction of its own, committed before this
    returns and tried again (up to 8 times, with jittered pauses) when the database asks for it.

    Args:
        bind: ``Session``, ``scoped_session``, ``Connection``, ``Engine`` or ``sessionmaker``.
        table: a ``Table``, a mapped class or a :class:`JobTable`. The first two are read by
            :meth:`JobTable.infer`.
        limit: how many rows at most, an ``int`` of at least 1.
        where: further conditions on the table's own columns, an expression or a sequence of them.
        order_by: what comes first, in place of the ``JobTable``'s order.
        values: further values to write, by column, attribute or name.
        worker: the claiming worker's name; needs a worker column.
        lease: for how long the claim holds; needs a lease and a token column.

    Returns:
        A :class:`Claim` in claim order, or in that of the turn where the ``JobTable`` has
        ``fair_by``; empty if nothing is free and due. It can have fewer rows than ``limit`` though
        more are free, where others claim at the same time or rows are passed over (see
        :attr:`Claim.unreadable`). A mapped class gives entities: attached to the ``Session``, or,
        by ``sessionmaker``, detached with every column loaded. A ``Table``, and anything by
        ``Connection`` or ``Engine``, gives rows. In a transaction of the caller's at MySQL's or
        MariaDB's REPEATABLE READ the order is best effort, since the transaction reads from a
        snapshot that may be old.

    Raises:
        ClaimConflict: another transaction was in the way; roll back and claim again. Own
            transactions raise it only once their tries are spent.
        ClaimError: an argument or the bind does not fit, and nothing was written; or nothing can be
            handed out since the database refuses the mark of every row, or none of many rows can
            be read: by ``Engine`` or ``sessionmaker`` the attempts to read rows stay counted.
        AmbiguousTable: the table's columns cannot be read with certainty.
        UnsupportedDialect: the database has no atomic claim.
        ValueError, TypeError: ``limit`` is not an ``int`` of at least 1.
    """
    job_table = job_table_of(table, ordered=order_by is not None)
    return _claimed(bind, job_table, ClaimRequest(limit, where, order_by, values, worker, lease))


def dequeue_jobs(
    bind: Any, table: Any, limit: int = 1, *, where: Any = None, order_by: Any = None
) -> Claim[Any]:
    """Claim up to ``limit`` rows by deleting them; otherwise as :func:`claim_jobs`.

    The rows are locked, read, and deleted by key; entities by their session, with the cascades of
    their mapping. Nothing brings them back: a worker that dies after the commit loses them.
    """
    job_table = job_table_of(table)
    if job_table.exclusive_by is not None:
        raise ClaimError(
            f"{job_table!r} has exclusive keys, and a row that is deleted does not run: use "
            "claim_jobs(), and delete the row when its job is done"
        )
    return _claimed(bind, job_table, ClaimRequest(limit, where, order_by, deletes=True))


def _claimed(bind: Bind, job_table: JobTable, request: ClaimRequest) -> Claim[Any]:
    began, limit = time.perf_counter(), request.limit
    if type(limit) is not int or limit < 1:
        checked_limit(limit)
    by_session = not isinstance(bind, (sa.Connection, sa.Engine))
    plan = claim_plan(job_table, request, entities=by_session and job_table.entity is not None)
    if plan.multi_table and not plan.entities and request.deletes:
        raise ClaimError(
            f"{job_table.entity!r} has its columns in several tables, and a DELETE would leave the "
            "rows of all but one: use a Session or sessionmaker"
        )
    params = request.parameters(token=job_table.token is not None and not request.deletes)
    token = params.get(TOKEN)
    operation = _Claiming(
        bind,
        job_table,
        plan,
        params,
        runs=True,
        token=token,
        # In AUTOCOMMIT rows that cannot be read are committed, and freed by key and token.
        single=plan if token is not None and job_table.released else None,
        careful=None if request.deletes else False,
    )
    found, passed, error = operation.execute()
    if error is not None:
        raise error
    keys, jobs = zip(*found, strict=True) if found else ((), ())
    claim = Claim(
        jobs,
        table=job_table,
        keys=keys,
        token=token,
        worker=request.worker,
        lease=request.lease,
        unreadable=tuple(passed),
    )
    if subscribers or logs_claims():
        report_claim(claim, began)
    return claim


@dataclass
class _Claiming(Operation[tuple[KeyedRows, Passed, ClaimError | None]]):
    """A claim, which hands out what can be read of rows that are not rolled back.

    It returns the rows or entities with their keys, in claim order; the keys that it passed over;
    and what it raises if nothing can be handed out: only once the attempts that are counted are
    committed, so that ``max_attempts`` retires the rows.
    """

    plan: ClaimPlan
    params: dict[str, Any]
    undoes: ClassVar[bool] = True

    def undo(self, tx: Transaction) -> None:
        """Free the rows that bear the claim's token."""
        free_traced(tx, self.plan, self.params)

    def run(self, tx: Transaction) -> tuple[KeyedRows, Passed, ClaimError | None]:
        plan, params, passed, mark = self.plan, self.params, Passed(), None
        if plan.deletes:
            mark = _delete
        elif tx.careful:
            mark = partial(mark_carefully, passed=passed)
        session = tx.executor
        if plan.entities and not (isinstance(session, sa.Connection) or session.autoflush):
            _refuse_unflushed(session, plan)
        if tx.after_disconnect and (keys := traced(tx, plan, params)):
            return read_back(tx, plan, keys, None), passed, None
        claim = tx.backend.claim if plan.job_table.exclusive_by is None else claim_by_key
        found, before = KeyedRows(), 0
        for _ in range(ROUNDS):
            before = len(passed)
            try:
                narrowed = plan.passing_over(list(passed)) if passed else plan
                found = claim(tx, narrowed, params, mark)
                if plan.entities and tx.own:
                    load_fully(tx, plan, found)
            except BaseException as error:
                if tx.own and not tx.autocommit:
                    raise
                found, failed = salvage(tx, plan, params, error)
                passed |= failed
            if found or len(passed) == before:
                break
        if plan.entities and not (isinstance(session, sa.Connection) or plan.deletes):
            note_changes(session, map(operator.itemgetter(1), found))
        refused = None if found else refusal(plan, passed, gives_up=len(passed) > before)
        return found, passed, refused


def _delete(
    tx: Transaction,
    plan: ClaimPlan,
    keys: Sequence[Key],
    params: Mapping[str, Any],  # noqa: ARG001 - of the claim, which writes nothing
) -> KeyedRows:
    """Delete rows that are locked, and return them as they were."""
    found = read_back(tx, plan, keys, None)
    if plan.entities and not isinstance(tx.executor, sa.Connection):
        if tx.own:
            load_fully(tx, plan, found)
        for _, entity in found:
            tx.executor.delete(entity)
        tx.executor.flush()
    else:
        # One by one: for a list of keys, MySQL and MariaDB may lock what they scan.
        for each in keys:
            tx.execute(sa.delete(plan.job_table.table).where(key_in(plan.job_table.key, [each])))
    return found


def _refuse_unflushed(session: Session, plan: ClaimPlan) -> None:
    """Raise if reading a claimed entity would discard pending changes."""
    job_table = plan.job_table
    assert job_table.entity is not None
    for entity in (*session.dirty, *session.deleted):
        if isinstance(entity, job_table.entity) and (
            entity in session.deleted or session.is_modified(entity)
        ):
            raise ClaimError(
                f"{entity!r} has changes that are not flushed and the Session's autoflush is "
                "off, so a claim could overwrite them: call session.flush() before claim_jobs()"
            )
