"""The end of a claim: complete, fail, release, extend, sweep; each as one guarded UPDATE.

A row is changed only while it bears the token that the claim wrote, so a worker whose lease ran
out cannot overwrite its successor's result. The token compared is the one kept in the ``Claim``:
an entity that a commit has expired would read the successor's.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    bindparam,
    case,
    func,
    literal,
    not_,
    or_,
    select,
)
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.types import JSON, Float

from . import predicates
from .backends import Backend, Transaction
from .claim import Claim, Key
from .errors import ClaimError, ClaimLost
from .execution import Bind, run_in
from .inference import plain_type
from .job_table import JobTable, job_table_of
from .outcomes import Values, common_values, freeing
from .plan import TOKEN
from .sql_elements import ByKey
from .tickets import job_table_of_ticket, keys_of_ticket

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

Held = Claim[Any] | Mapping[str, Any]

FIRST_RETRY = timedelta(seconds=10)
DOUBLINGS = 12
LONGEST_LOOK = 0.25
"""Seconds that is waited for others before rows are left to the end of their lease."""


@dataclass(frozen=True)
class Owned:
    """The rows of one call, and what proves that they are ours."""

    job_table: JobTable
    keys: tuple[Key, ...]
    token: str | None
    lease: timedelta | None

    def guard(self) -> ColumnElement[bool]:
        """Build the condition that a row still belongs to this claim."""
        running = predicates.is_running(self.job_table)
        if self.job_table.token is None:
            return running
        return and_(self.job_table.token == self.token, running)

    def lasting(self) -> ColumnElement[bool]:
        """Build the condition that a row still belongs to this claim and may be extended.

        Once its lease is over, a row with an exclusive key has given the key away.
        """
        if self.job_table.exclusive_by is None:
            return self.guard()
        return and_(self.guard(), predicates.is_held(self.job_table))

    def is_ended(self) -> ColumnElement[bool]:
        """Build the condition that this claim was a row's last owner and has ended it."""
        return and_(self.job_table.token == self.token, not_(predicates.is_running(self.job_table)))

    def changed_before(self, tx: Transaction, keys: Sequence[Key], values: Values) -> list[Key]:
        """Return the keys of rows that an earlier try ended before its connection was lost."""
        otherwise = predicates.not_ended_in(self.job_table, values)
        return self.visible(tx, keys, self.is_ended(), *predicates.bears(values), *otherwise)

    def visible(
        self, tx: Transaction, keys: Sequence[Key], *conditions: ColumnElement[bool]
    ) -> list[Key]:
        """Return the keys of the rows that meet the conditions, as this transaction sees them."""
        key = self.job_table.key
        asking = ByKey(key, select(*key).where(*conditions).where)
        return [tuple(row) for _, result in tx.by_key(asking, keys) for row in result]


class Ended(set[Key]):
    """The rows of a claim that this process has ended: gone, but not lost."""


ended_here: WeakValueDictionary[str, Ended] = WeakValueDictionary()
"""By token, for the claims whose leases are being kept."""


def complete_jobs(
    bind: Bind, claim: Held, jobs: Iterable[Any] | None = None, *, unfenced: bool = False
) -> int:
    """Mark claimed jobs as done, those that this claim still owns.

    Args:
        bind: as for :func:`claim_jobs`; the claim's own transaction, or any later one.
        claim: what ``claim_jobs`` returned, a slice of it, or a :meth:`Claim.ticket`.
        jobs: some of the claim's jobs, as entities, rows or keys; all of them if left out.
        unfenced: agree to a table without a token column, where a row that was freed and claimed
            again by another worker passes for this claim's own, and is marked done for both.

    Returns:
        How many rows were changed: all of them.

    Raises:
        ClaimLost: some rows are no longer this claim's; its ``keys`` names them. The others are
            done: by ``Engine`` or ``sessionmaker`` that is committed already.
        ClaimConflict: another transaction was in the way.
        ClaimError: the table cannot hold what was asked for.
    """
    owned = owned_rows(claim, jobs, unfenced=unfenced)
    return _change(bind, owned, owned.job_table.prepare(completion), prepared=True)


def fail_jobs(
    bind: Bind,
    claim: Held,
    jobs: Iterable[Any] | None = None,
    *,
    retry: bool | timedelta = False,
    error: str | BaseException | None = None,
    unfenced: bool = False,
) -> int:
    """Mark claimed jobs as failed, or free them for another attempt later.

    Args:
        bind: as for :func:`complete_jobs`.
        claim: as for :func:`complete_jobs`.
        jobs: as for :func:`complete_jobs`.
        retry: ``False`` marks the rows as failed. A ``timedelta`` frees them and makes them due
            that long from now; ``True`` chooses 10 s, doubled with every attempt after the first
            (up to 12 times), times a random factor between 0.5 and 1.5. The attempt stays
            counted.
        error: what went wrong; stored if the table has a column for it.
        unfenced: as for :func:`complete_jobs`.

    Returns:
        How many rows were changed: all of them.

    Raises:
        ClaimLost, ClaimConflict, ClaimError: as for :func:`complete_jobs`.
    """
    owned = owned_rows(claim, jobs, unfenced=unfenced)
    return _change(bind, owned, failure(owned.job_table, retry=retry, error=error))


def release_jobs(
    bind: Bind, claim: Held, jobs: Iterable[Any] | None = None, *, unfenced: bool = False
) -> int:
    """Give claimed jobs back as if they had not been claimed; the attempt does not count.

    Args:
        bind: as for :func:`complete_jobs`.
        claim: as for :func:`complete_jobs`.
        jobs: as for :func:`complete_jobs`.
        unfenced: as for :func:`complete_jobs`.

    Returns:
        How many rows were changed: all of them.

    Raises:
        ClaimLost, ClaimConflict, ClaimError: as for :func:`complete_jobs`.
    """
    owned = owned_rows(claim, jobs, unfenced=unfenced)
    return _change(bind, owned, release(owned.job_table))


def release_left(bind: Bind, claim: Held) -> int:
    """Give back what of a claim is still marked as running, and passes by what others have locked.

    For the end of a loop that has ended its jobs in its own way: what it has not got to is freed.

    Returns:
        How many rows were freed.
    """
    owned = owned_rows(claim, None, unfenced=False)
    job_table, guard = owned.job_table, owned.guard()
    values = release(job_table)

    def run(tx: Transaction) -> int:
        with tx.backend.limit_wait(tx, LONGEST_LOOK):
            free = tx.backend.unlocked(tx, job_table, owned.keys, guard)
            return len(tx.backend.change(tx, free, tx.backend.changes(job_table, guard, values)))

    return run_in(bind, job_table, run, tries=1)


def extend_jobs(
    bind: Bind,
    claim: Held,
    jobs: Iterable[Any] | None = None,
    *,
    lease: timedelta | None = None,
) -> int:
    """Prolong the leases of claimed jobs, counted from now by the database's clock.

    A lease that is over can be prolonged as long as nobody has claimed the row; but not where the
    table has exclusive keys, since the row's key may be another's by now.

    Args:
        bind: as for :func:`complete_jobs`.
        claim: as for :func:`complete_jobs`.
        jobs: as for :func:`complete_jobs`.
        lease: for how long; the claim's own lease if left out.

    Returns:
        How many rows were changed: all of them.

    Raises:
        ClaimLost, ClaimConflict, ClaimError: as for :func:`complete_jobs`.
    """
    owned = owned_rows(claim, jobs, unfenced=False)
    return _change(bind, owned, extension(owned.job_table, lease or owned.lease), ends=False)


def sweep_jobs(bind: Bind, table: Any) -> int:
    """Mark as failed what has spent its attempts and is neither owned nor ended.

    Such a row is never claimed again, so without this it stays in limbo. Rows that somebody has
    locked are left for the next time.

    Args:
        bind: as for :func:`claim_jobs`.
        table: a ``Table``, a mapped class or a :class:`JobTable` with attempts and a maximum.

    Returns:
        How many rows were marked.

    Raises:
        ClaimConflict: another transaction was in the way.
        ClaimError: the table has no attempts, no maximum or no mark for failed rows.
    """
    job_table = job_table_of(table)
    if not predicates.is_unspent(job_table):
        raise ClaimError(
            f"{job_table!r} says neither attempts=... nor max_attempts=...: nothing can be spent"
        )
    attempts, most = _needed(job_table, "attempts", "sweep_jobs"), job_table.max_attempts
    values = _ending(job_table, job_table.failed, "failed")
    if job_table.error is not None:
        values[job_table.error] = _error_value(job_table, "all attempts are spent")
    unowned = [predicates.is_free(job_table)]
    if job_table.lease is not None:
        expired = job_table.lease <= job_table.now(job_table.lease)
        unowned.append(and_(predicates.is_running(job_table), expired))
    spent = and_(attempts >= most, or_(*unowned))

    def run(tx: Transaction) -> int:
        keys = [tuple(row) for row in tx.execute(select(*job_table.key).where(spent))]
        free = tx.backend.unlocked(tx, job_table, keys, spent)
        return len(tx.backend.change(tx, free, tx.backend.changes(job_table, spent, values)))

    return run_in(bind, job_table, run)


def completion(job_table: JobTable) -> Values:
    """Return the values that mark a row as done."""
    return _ending(job_table, job_table.done, "done")


def failure(
    job_table: JobTable, *, retry: bool | timedelta, error: str | BaseException | None
) -> Values:
    """Return the values that mark a row as failed or free it for another attempt."""
    if retry is False:
        values = _ending(job_table, job_table.failed, "failed")
    else:
        values = freeing(job_table)
        due = _needed(job_table, "due", "fail_jobs(retry=...)")
        values[due] = job_table.now(due, _delay(job_table, retry), floor=True)
    if error is not None and job_table.error is not None:
        values[job_table.error] = _error_value(job_table, str(error))
    return values


def release(job_table: JobTable) -> Values:
    """Return the values that free a row and do not count the attempt."""
    values = freeing(job_table)
    if (attempts := job_table.attempts) is not None:
        values[attempts] = case((attempts > 0, attempts - 1), else_=0)
    return values


def extension(job_table: JobTable, lease: timedelta | None) -> Values:
    """Return the values that extend a row's lease, counted from now."""
    column = _needed(job_table, "lease", "extend_jobs")
    if lease is None:
        raise ClaimError(
            "the claim has no lease: claim with claim_jobs(..., lease=...), or say how long with "
            "extend_jobs(..., lease=...)"
        )
    if not isinstance(lease, timedelta) or lease <= timedelta(0):
        raise ClaimError(f"lease is {lease!r}; expected a timedelta above zero")
    return {column: job_table.now(column, literal(lease.total_seconds(), Float()))}


def owned_rows(claim: Any, jobs: Iterable[Any] | None, *, unfenced: bool) -> Owned:
    """Return the rows of a claim or a ticket, or only those of ``jobs``."""
    if isinstance(claim, Claim):
        found = Owned(claim.table, claim.keys, claim.token, claim.lease)
    elif isinstance(claim, Mapping):
        job_table = job_table_of_ticket(claim)
        keys = keys_of_ticket(job_table, claim)
        seconds = claim.get("lease")
        lease = None if seconds is None else timedelta(seconds=seconds)
        found = Owned(job_table, keys, claim.get("token"), lease)
    else:
        raise ClaimError(
            f"{claim!r} is not a claim: pass what claim_jobs returned, or a Claim.ticket(job)"
        )
    if jobs is not None:
        keys = tuple(_key_of(found.job_table, job, found.keys) for job in jobs)
        found = Owned(found.job_table, keys, found.token, found.lease)
    if found.token is None and not unfenced:
        raise ClaimError(
            f"{found.job_table.table.fullname!r} has no token column that is known, so a row that "
            "was freed and claimed again cannot be told from this claim's: name one with "
            "JobTable(token=...), or agree to that with unfenced=True"
        )
    return found


def _key_of(job_table: JobTable, job: Any, known: tuple[Key, ...]) -> Key:
    """Return the key of an entity, a row or a key, or raise if it is not one of the claim's."""
    key: Any
    if isinstance(job, Row):
        names = [column.key for column in job_table.key]
        key = tuple(job._mapping[name] for name in names)  # noqa: SLF001 - Row's public name
    elif isinstance(job, tuple):
        key = job
    elif (state := sa_inspect(job, raiseerr=False)) is not None and hasattr(state, "identity"):
        key = tuple(state.identity or ())
    else:
        key = (job,)
    found: Key = key
    if found not in known:
        raise ClaimError(
            f"{job!r} is not one of the claim's {len(known)} jobs, whose keys are {list(known)!r}"
        )
    return found


def _needed(job_table: JobTable, role: str, what: str) -> Any:
    column = getattr(job_table, role)
    if column is None:
        name = {"lease": "lease_until", "due": "run_at"}.get(role, role)
        type_ = {"lease": "TIMESTAMP", "due": "TIMESTAMP"}.get(role, "INTEGER")
        raise ClaimError(
            f"{what} needs a {role} column, and {job_table.table.fullname!r} has none that is "
            f"known: name it with JobTable({role}=...), or add one: ALTER TABLE "
            f"{job_table.table.fullname} ADD COLUMN {name} {type_} NULL"
        )
    return column


def _ending(job_table: JobTable, mark: Mapping[Any, Any], role: str) -> Values:
    if not mark:
        raise ClaimError(
            f"nothing marks a row of {job_table.table.fullname!r} as {role}: say it with "
            f"JobTable({role}=...)"
        )
    # The mark alone keeps the row from being claimed, so a flag can go back to what it was.
    undone = {} if job_table.state in mark else job_table.released
    kept = {column: value for column, value in undone.items() if column is job_table.state}
    return {**kept, **common_values(job_table), **mark}


def _delay(job_table: JobTable, retry: bool | timedelta) -> ColumnElement[Any]:
    """Return the delay before the next attempt, in seconds."""
    if isinstance(retry, timedelta):
        if retry < timedelta(0):
            raise ClaimError(f"retry is {retry!r}; expected a timedelta of at least zero")
        return literal(retry.total_seconds(), Float())
    if retry is not True:
        raise ClaimError(f"retry is {retry!r}; expected True, False or a timedelta")
    jitter = random.uniform(0.5, 1.5)  # noqa: S311 - no secret
    first = literal(FIRST_RETRY.total_seconds() * jitter, Float())
    if job_table.attempts is None:
        return first
    doubled = func.coalesce(job_table.attempts, 1) - 1
    # A chain of CASEs: SQLite's power() is not always built in.
    factor = case(
        *((doubled <= place, literal(float(2**place), Float())) for place in range(DOUBLINGS)),
        else_=literal(float(2**DOUBLINGS), Float()),
    )
    return first * factor


def _error_value(job_table: JobTable, message: str) -> Any:
    type_ = plain_type(job_table.error.type)
    if isinstance(type_, JSON):
        return {"message": message}
    length = getattr(type_, "length", None)
    return message if length is None else message[:length]


def _change(
    bind: Bind, owned: Owned, values: Values, *, ends: bool = True, prepared: bool = False
) -> int:
    """Change what is still owned, and name what is not; ``prepared`` for a completion."""
    job_table = owned.job_table
    keyed = not ends and job_table.exclusive_by is not None

    def run(tx: Transaction) -> list[Key]:
        if prepared:
            changes = job_table.prepare(_completing, tx.backend)
            params = {} if job_table.token is None else {TOKEN: owned.token}
            changed = tx.backend.change(tx, owned.keys, changes, params)
        elif ends:
            changes = tx.backend.changes(job_table, owned.guard(), values)
            changed = tx.backend.change(tx, owned.keys, changes)
        else:
            changes = tx.backend.changes(job_table, owned.lasting(), values)
            changed = tx.backend.extend(tx, job_table, owned.keys, changes)
        if tx.after_disconnect and ends:
            # Afterwards: the earlier try may have been running still, and the change waits for it.
            known = set(changed)
            rest = [key for key in owned.keys if key not in known]
            changed += owned.changed_before(tx, rest, values)
        if not isinstance(tx.executor, Connection):
            _expire(tx.executor, owned.job_table, changed, values)
        return changed

    changed = run_in(
        bind,
        owned.job_table,
        run,
        keyed=keyed,
        recoverable=owned.token is not None,
    )
    if ends and owned.token is not None:
        ended_here.get(owned.token, Ended()).update(changed)
    if len(changed) < len(owned.keys):
        ours = set(changed)
        lost = [key for key in owned.keys if key not in ours]
        raise ClaimLost(
            f"{len(lost)} of {len(owned.keys)} jobs of {owned.job_table.table.fullname!r} are no "
            f"longer this claim's, their keys: {lost!r}. Another worker has them, or they have "
            f"ended: do not apply their results. The other {len(changed)} were changed",
            keys=lost,
        )
    return len(changed)


def _completing(job_table: JobTable, backend: Backend) -> Sequence[ByKey]:
    """Return the statements of a completion, whose token is a parameter."""
    guard, token = predicates.is_running(job_table), job_table.token
    if token is not None:
        guard = and_(token == bindparam(TOKEN, None, token.type), guard)
    return backend.changes(job_table, guard, job_table.prepare(completion))


def _expire(session: Session, job_table: JobTable, keys: Iterable[Key], values: Values) -> None:
    """Have the claim's entities read again what was written behind their back."""
    mapper = job_table.mapper
    if mapper is None:
        return
    names = [mapper.get_property_by_column(column).key for column in values]
    for key in keys:
        entity = session.identity_map.get(mapper.identity_key_from_primary_key(key))
        if entity is not None:
            session.expire(entity, names)
