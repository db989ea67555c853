"""The end of a claim: complete, fail, release, extend, sweep; each as one guarded UPDATE.

A row is changed only while it bears the token that the claim wrote, so a worker whose lease ran
out cannot overwrite its successor's result. The token compared is the one kept in the ``Claim``:
an entity that a commit has expired would read the successor's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakValueDictionary

from sqlalchemy import ColumnElement, Connection, Engine, and_, bindparam, not_, select
from sqlalchemy.exc import DBAPIError

from . import predicates
from .arguments import conditions_of
from .backends import Backend, Transaction
from .backends.recovery import is_general
from .claim import Claim, Key
from .errors import ClaimError, ClaimLost
from .execution import Bind, run_in
from .job_table import JobTable, job_table_of
from .orm import is_maker
from .outcomes import (
    Outcome,
    completion,
    extension,
    failures,
    release,
    requeuing,
    sweeping,
)
from .plan import TOKEN, checked_limit
from .sql_elements import ByKey
from .telemetry import Lost, Requeued, Swept, logs_claims, report, report_ends, subscribers

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

Runner = Callable[[Callable[[Transaction], list[Key]]], list[Key]]

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
        return _owned_by(self.job_table, self.token)

    def lasting(self) -> ColumnElement[bool]:
        """Build the condition that a row still belongs to this claim and may be extended."""
        return and_(self.guard(), *lasting(self.job_table))

    def is_ended(self) -> ColumnElement[bool]:
        """Build the condition that this claim was a row's last owner and has ended it."""
        return and_(self.job_table.token == self.token, not_(predicates.is_running(self.job_table)))

    def changed_before(self, tx: Transaction, keys: Sequence[Key], outcome: Outcome) -> list[Key]:
        """Return the keys of rows that an earlier try ended before its connection was lost."""
        otherwise = predicates.not_ended_in(self.job_table, outcome.values)
        return self.visible(
            tx, keys, self.is_ended(), *predicates.bears(outcome.values), *otherwise
        )

    def visible(
        self, tx: Transaction, keys: Sequence[Key], *conditions: ColumnElement[bool]
    ) -> list[Key]:
        """Return the keys of the rows that meet the conditions, as this transaction sees them."""
        key = self.job_table.key
        query = ByKey(key, select(*key).where(*conditions).where)
        return [tuple(row) for _, rows in tx.by_key(query, keys) for row in rows]


class Ended(set[Key]):
    """The rows of a claim that this process has ended: gone, but not lost.

    Attributes:
        lost: the rows that ``keep_claims`` has found lost, and reported.
    """

    lost: frozenset[Key] = frozenset()


ended_here: WeakValueDictionary[str, Ended] = WeakValueDictionary()
"""By token, for the claims whose leases are being kept."""


def complete_jobs(
    bind: Bind, claim: Claim[Any], jobs: Iterable[Any] | None = None, *, unfenced: bool = False
) -> int:
    """Mark claimed jobs as done, those that this claim still owns.

    Args:
        bind: as for :func:`claim_jobs`; the claim's own transaction, or any later one.
        claim: what ``claim_jobs`` or :meth:`Claim.from_ticket` returned, or a slice of it.
        jobs: a list of some of the claim's jobs, as entities, rows or keys; all of them if left
            out.
        unfenced: agree to a table without a token column, where a row that was freed and claimed
            again by another worker passes for this claim's own, and is marked done for both.

    Returns:
        How many rows were changed: all of them.

    Raises:
        ClaimLost: some rows are no longer this claim's; its ``keys`` names them. The others are
            done: by ``Engine`` or ``sessionmaker`` that is committed already.
        ClaimConflict: another transaction was in the way.
        ClaimError: the table cannot hold what was asked for, or the database refused the change of
            some rows, by a constraint or a trigger: by ``Engine`` or ``sessionmaker`` the message
            names them, and the others are done. In the caller's transaction the database's own
            error is raised.
    """
    owned = owned_rows(claim, jobs, unfenced=unfenced)
    return Change(bind, owned, owned.job_table.prepare(_completing)).apply()


def fail_jobs(
    bind: Bind,
    claim: Claim[Any],
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
            (up to 12 times), times a random factor between 0.5 and 1.5 of each row. The attempt
            stays counted; rows that have no attempts left are marked as failed.
        error: what went wrong; stored if the table has a column for it, the name of its type if
            the exception has no message. What the column cannot hold is escaped, and
            what is too long for it ends with ``...``.
        unfenced: as for :func:`complete_jobs`.

    Returns:
        How many rows were changed: all of them.

    Raises:
        ClaimLost, ClaimConflict, ClaimError: as for :func:`complete_jobs`.
    """
    owned = owned_rows(claim, jobs, unfenced=unfenced)
    outcomes = failures(owned.job_table, retry=retry, error=error)
    if error is None or owned.job_table.error is None:
        return Change(bind, owned, outcomes).apply()
    plain = failures(owned.job_table, retry=retry, error=error, plain=True)
    return Change(bind, owned, outcomes, plain).apply()


def release_jobs(
    bind: Bind, claim: Claim[Any], jobs: Iterable[Any] | None = None, *, unfenced: bool = False
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
    return Change(bind, owned, [_releasing(owned.job_table)]).apply()


def release_left(bind: Bind, claim: Claim[Any]) -> int:
    """Free the rows of a claim that still run, and skip those that are locked elsewhere.

    For the end of a loop that has ended its jobs in its own way: what it has not got to is freed.

    Returns:
        How many rows were freed.
    """
    owned = owned_rows(claim, None, unfenced=False)
    outcomes = [_releasing(owned.job_table)]

    def run(tx: Transaction) -> list[Key]:
        with tx.backend.limit_wait(tx, LONGEST_LOOK):
            return _change_unlocked(tx, owned.job_table, owned.keys, owned.guard(), outcomes)

    if freed := run_in(bind, owned.job_table, run, tries=1):
        report_ends(owned.job_table, dict.fromkeys(freed, "released"))
    return len(freed)


def extend_jobs(
    bind: Bind,
    claim: Claim[Any],
    jobs: Iterable[Any] | None = None,
    *,
    lease: timedelta | None = None,
) -> int:
    """Prolong the leases of claimed jobs, counted from now by the database's clock.

    A lease that is over can be prolonged until another worker claims the row; but not where the
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
    values = extension(owned.job_table, lease or owned.lease)
    return Change(bind, owned, [Outcome(values, lasting(owned.job_table))], ends=False).apply()


def sweep_jobs(bind: Bind, table: Any) -> int:
    """Mark as failed the rows that have no attempts left, and neither run nor have ended.

    Such a row is never claimed again: its lease ran out during its last attempt. An error that it
    has is kept. Rows that are locked elsewhere are left for the next time.

    Args:
        bind: as for :func:`claim_jobs`.
        table: a ``Table``, a mapped class or a :class:`JobTable` with attempts and a maximum.

    Returns:
        How many rows were marked.

    Raises:
        ClaimConflict: another transaction was in the way.
        ClaimError: the table has no attempts, no maximum or no mark for failed rows.
    """
    job_table = job_table_of(table, ordered=True)
    unspent = predicates.is_unspent(job_table)
    if not unspent:
        raise ClaimError(
            f"{job_table!r} says neither attempts=... nor max_attempts=...: nothing can be spent"
        )
    spent = and_(*map(not_, unspent), predicates.is_unowned(job_table))
    outcomes = sweeping(job_table)

    def run(tx: Transaction) -> list[Key]:
        keys = tx.tuples(select(*job_table.key).where(spent))
        return _change_unlocked(tx, job_table, keys, spent, outcomes)

    if swept := run_in(bind, job_table, run):
        report(Swept(job_table.table.fullname, tuple(swept)))
    return len(swept)


def requeue_jobs(
    bind: Bind,
    table: Any,
    *,
    where: Any = None,
    limit: int | None = None,
    keep_error: bool = True,
) -> int:
    """Free failed rows again, with all their attempts.

    Rows that run, are done or are locked elsewhere are left as they are.

    Args:
        bind: as for :func:`claim_jobs`.
        table: a ``Table``, a mapped class or a :class:`JobTable` with a mark for failed rows.
        where: further conditions on the table's own columns, an expression or a sequence of them.
        limit: how many rows at most, the first ones in the table's order; all if left out.
        keep_error: keep the error's text, or remove it.

    Returns:
        How many rows were freed.

    Raises:
        ClaimConflict: another transaction was in the way.
        ClaimError: the table has no mark for failed rows, or nothing says how they become free.
        ValueError, TypeError: ``limit`` is not an ``int`` of at least 1.
    """
    job_table = job_table_of(table, ordered=True)
    outcomes = [Outcome(requeuing(job_table, keep_error=keep_error))]
    failed = and_(
        *predicates.bears(job_table.failed),
        *predicates.not_ended_in(job_table, job_table.failed),
    )
    query = select(*job_table.key).where(failed, *conditions_of(where)).order_by(*job_table.order)
    if limit is not None:
        query = query.limit(checked_limit(limit))

    def run(tx: Transaction) -> list[Key]:
        return _change_unlocked(tx, job_table, tx.tuples(query), failed, outcomes)

    if freed := run_in(bind, job_table, run):
        report(Requeued(job_table.table.fullname, tuple(freed)))
    return len(freed)


def owned_rows(claim: Any, jobs: Iterable[Any] | None, *, unfenced: bool) -> Owned:
    """Return the rows of a claim, or only those of ``jobs``."""
    if not isinstance(claim, Claim):
        cure = (
            "pass Claim.from_ticket(table, ticket)"
            if isinstance(claim, Mapping)
            else ("pass what claim_jobs returned")
        )
        raise ClaimError(f"{claim!r} is not a claim: {cure}")
    if claim.token is None and not unfenced:
        raise ClaimError(
            f"{claim.table.table.fullname!r} has no token column that is known, so a row that "
            "was freed and claimed again cannot be told from this claim's: name one with "
            "JobTable(token=...), or agree to that with unfenced=True"
        )
    keys = claim.keys if jobs is None else claim.keys_of(jobs)
    return Owned(claim.table, keys, claim.token, claim.lease)


def lasting(job_table: JobTable) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions of an extension beside the claim's own.

    Once its lease is over, a row with an exclusive key has given the key away.
    """
    return () if job_table.exclusive_by is None else (predicates.is_held(job_table),)


def _owned_by(job_table: JobTable, token: Any) -> ColumnElement[bool]:
    """Build the condition that a row runs for the claim with a token."""
    if job_table.token is None:
        return predicates.is_running(job_table)
    return and_(job_table.token == token, predicates.is_running(job_table))


def _change_unlocked(
    tx: Transaction,
    job_table: JobTable,
    keys: Sequence[Key],
    guard: ColumnElement[bool],
    outcomes: Sequence[Outcome],
) -> list[Key]:
    """Change the rows that the guard is true for, except those that are locked elsewhere."""
    left: Sequence[Key] = tx.backend.unlocked(tx, job_table, keys, guard)
    changed = list[Key]()
    for outcome in outcomes:
        guarded = and_(guard, *outcome.conditions)
        changes = tx.backend.changes(job_table, guarded, outcome.values)
        found = tx.backend.change(tx, left, changes)
        left = _without(left, found)
        changed += found
    return changed


@dataclass
class Change:
    """One call's change of a claim's rows.

    Attributes:
        bind: where it runs.
        owned: the rows, and what proves that they are the claim's.
        outcomes: what becomes of them; the first whose conditions are true counts.
        plain: the outcomes with an error's text that every column can hold, if there is a text.
        ends: whether the rows run no longer afterwards.
        refused: the rows whose change the database has refused, and its errors.
        outcome_of: the names of the outcomes of the rows that were changed.
    """

    bind: Bind
    owned: Owned
    outcomes: Sequence[Outcome]
    plain: Sequence[Outcome] | None = None
    ends: bool = True
    refused: dict[Key, Exception] = field(default_factory=dict)
    outcome_of: dict[Key, str] = field(default_factory=dict)

    def apply(self) -> int:
        """Change what is still owned, and raise for what is not, or what the database refuses."""
        owned = self.owned
        run = partial(
            run_in,
            self.bind,
            owned.job_table,
            keyed=not self.ends and owned.job_table.exclusive_by is not None,
            recoverable=owned.token is not None,
        )
        try:
            changed = run(partial(self._run, keys=owned.keys))
        except (DBAPIError, UnicodeError) as error:
            changed = self._run_parts(run, owned.keys, error)
        if self.ends and owned.token is not None:
            ended_here.get(owned.token, Ended()).update(changed)
        if changed and self.ends and (subscribers or logs_claims()):
            report_ends(owned.job_table, {key: self.outcome_of[key] for key in changed})
        if len(changed) < len(owned.keys):
            _raise_unchanged(owned, changed, self.refused)
        return len(changed)

    def _run_parts(self, run: Runner, keys: Sequence[Key], error: Exception) -> list[Key]:
        """Change the rows in two transactions, and so on, until the ones refused are alone.

        A row that is refused alone gets a plain text; if that helps, the rows after it too.
        """
        if is_general(error) or not (isinstance(self.bind, Engine) or is_maker(self.bind)):
            raise error
        before, half = (self.outcomes, self.plain), len(keys) // 2
        if half == 0 and self.plain is None:
            self.refused[keys[0]] = error
            return []
        if half == 0:
            self.outcomes, self.plain = self.plain or (), None
        changed: list[Key] = []
        for part in filter(None, (keys[:half], keys[half:])):
            try:
                changed += run(partial(self._run, keys=part))
            except (DBAPIError, UnicodeError) as refusal:
                changed += self._run_parts(run, part, refusal)
        if half == 0 and not changed:
            self.outcomes, self.plain = before
        return changed

    def _run(self, tx: Transaction, keys: Sequence[Key]) -> list[Key]:
        if self.plain and tx.backend.checks_text and not tx.own:
            return self._run_in_callers(tx, keys)
        job_table, changed = self.owned.job_table, list[Key]()
        params = {} if job_table.token is None else {TOKEN: self.owned.token}
        for outcome in self.outcomes:
            left = _without(keys, changed) if changed else keys
            if (changes := outcome.statements.get(tx.backend)) is None:
                changes = outcome.statements[tx.backend] = _changes(job_table, outcome, tx.backend)
            if self.ends:
                found = tx.backend.change(tx, left, changes, params)
            else:
                found = tx.backend.extend(tx, job_table, left, changes, params)
            changed += found
            self.outcome_of.update(dict.fromkeys(found, outcome.name))
        if tx.after_disconnect and self.ends:
            # Afterwards: the earlier try may have been running still, and the change waits for it.
            for outcome in self.outcomes:
                found = self.owned.changed_before(tx, _without(keys, changed), outcome)
                changed += found
                self.outcome_of.update(dict.fromkeys(found, outcome.name))
        if not isinstance(tx.executor, Connection):
            written = {column for outcome in self.outcomes for column in outcome.values}
            _expire(tx.executor, job_table, changed, written)
        return changed

    def _run_in_callers(self, tx: Transaction, keys: Sequence[Key]) -> list[Key]:
        """Change the rows in the caller's transaction, which outlasts a text that is refused."""
        plain, self.plain = self.plain, None
        try:
            driver: Any = tx.connection.connection.dbapi_connection
            is_open = not tx.connection.dialect.detect_autocommit_setting(driver)
            with tx.connection.begin_nested() if is_open else nullcontext():
                return self._run(tx, keys)
        except (DBAPIError, UnicodeError) as error:
            conflicts = isinstance(error, DBAPIError) and tx.backend.is_conflict(error)
            if conflicts or is_general(error):
                raise
        self.outcomes = plain or ()
        return self._run(tx, keys)


def _raise_unchanged(
    owned: Owned, changed: Sequence[Key], refused: Mapping[Key, Exception]
) -> NoReturn:
    """Raise for the rows that are not the claim's, or that the database has refused."""
    name, total = owned.job_table.table.fullname, len(owned.keys)
    error: ClaimError | None = None
    for cause in refused.values():
        reason = getattr(cause, "orig", cause)
        error = ClaimError(
            f"the database refused the change of {len(refused)} of {total} jobs of {name!r}, "
            f"their keys: {list(refused)!r}, the last one: {reason}. They are still this claim's; "
            f"the other {len(changed)} were changed"
        )
        error.__cause__ = cause
    lost = _without(owned.keys, [*changed, *refused])
    if error is not None and not lost:
        raise error
    known = ended_here.get(owned.token or "", Ended()).lost
    if news := tuple(key for key in lost if key not in known):
        report(Lost(name, news))
    raise ClaimLost(
        f"{len(lost)} of {total} jobs of {name!r} are no longer this claim's, their keys: "
        f"{lost!r}. Another worker has them, or they have ended: do not apply their results. "
        f"The other {len(changed)} were changed",
        keys=lost,
    ) from error


def _without(keys: Sequence[Key], others: Collection[Key]) -> Sequence[Key]:
    """Return the keys without the others, in their order."""
    known = set(others)
    return [key for key in keys if key not in known]


def _completing(job_table: JobTable) -> Sequence[Outcome]:
    """Return the outcome of a completion, whose statements are prepared once."""
    return (Outcome(completion(job_table), name="done"),)


def _releasing(job_table: JobTable) -> Outcome:
    """Return the outcome of a release."""
    return Outcome(release(job_table), name="released")


def _changes(job_table: JobTable, outcome: Outcome, backend: Backend) -> Sequence[ByKey]:
    """Return the statements of an outcome, whose token is a parameter."""
    token = job_table.token
    given = None if token is None else bindparam(TOKEN, None, token.type)
    guard = and_(_owned_by(job_table, given), *outcome.conditions)
    return backend.changes(job_table, guard, outcome.values)


def _expire(
    session: Session, job_table: JobTable, keys: Iterable[Key], columns: Iterable[Any]
) -> None:
    """Have the claim's entities read again what was written behind their back."""
    mapper = job_table.mapper
    if mapper is None:
        return
    names = [mapper.get_property_by_column(column).key for column in columns]
    for key in keys:
        entity = session.identity_map.get(mapper.identity_key_from_primary_key(key))
        if entity is not None:
            session.expire(entity, names)
