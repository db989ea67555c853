"""The end of a claim: complete, fail, release, extend, sweep; each as one guarded UPDATE.

A row is changed only while it bears the token that the claim wrote, so a worker whose lease ran
out cannot overwrite its successor's result. The token compared is the one kept in the ``Claim``:
an entity that a commit has expired would read the successor's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, not_, select
from sqlalchemy.exc import DBAPIError

from . import predicates
from .arguments import conditions_of
from .backends import Transaction
from .backends.recovery import in_parts, is_general
from .claim import Claim, Key
from .errors import ClaimError, ClaimLost
from .execution import Bind, Operation
from .job_table import JobTable, job_table_of
from .orm import note_changes
from .outcomes import Outcome, completion, extension, failures, release, requeuing, sweeping
from .plan import TOKEN, checked_limit
from .sql_elements import ByKey
from .telemetry import Event, Lost, Requeued, Swept, logs_claims, report, report_ends, subscribers

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

LONGEST_LOOK = 0.25
"""Seconds that is waited for others before rows are left to the end of their lease."""


class EndedHere(set[Key]):
    """The rows of a claim that this process has ended: gone, but not lost.

    Attributes:
        lost: the rows that ``keep_claims`` has found lost, and reported.
    """

    lost: frozenset[Key] = frozenset()


ended_here: WeakValueDictionary[str, EndedHere] = WeakValueDictionary()
"""By token, for the claims whose leases are being kept."""


def complete_jobs(
    bind: Bind, claim: Claim[Any], jobs: Iterable[Any] | None = None, *, unfenced: bool = False
) -> int:
    """Mark as done the claimed jobs that this claim still owns.

    A row keeps its attempts. Where it then is free for the next step of a workflow, let the mark
    reset them, or each step spends the next one's: ``done={"stage": "parsed", "attempts": 0}``.

    Args:
        bind: as for :func:`claim_jobs`; the claim's own transaction, or any later one.
        claim: what ``claim_jobs`` or :meth:`Claim.from_ticket` returned, or a slice of it.
        jobs: a list of some of the claim's jobs, as entities, rows or keys; all of them if left
            out.
        unfenced: allow a table without a token column, where a row that another worker has claimed
            again cannot be told from this claim's own, and is marked as done all the same.

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
    return _apply(bind, owned, owned.table.prepare(completion))


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
    outcomes = partial(failures, owned.table, retry=retry, error=error)
    has_text = error is not None and owned.table.error is not None
    return _apply(bind, owned, outcomes(), outcomes(plain=True) if has_text else None)


def release_jobs(
    bind: Bind, claim: Claim[Any], jobs: Iterable[Any] | None = None, *, unfenced: bool = False
) -> int:
    """Free claimed jobs as if they had not been claimed; the attempt is not counted.

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
    return _apply(bind, owned, release(owned.table))


def release_left(bind: Bind, claim: Claim[Any]) -> int:
    """Free the rows of a claim that still run, and skip those that are locked elsewhere.

    For the end of a loop that ends its jobs in its own way: jobs that it has not started are freed.

    Returns:
        How many rows were freed.
    """
    owned = owned_rows(claim, None, unfenced=False)
    job_table, guard = owned.table, owning(owned.table, owned.token)
    outcomes, longest = release(job_table), LONGEST_LOOK
    change = Change(bind, job_table, guard, outcomes, owned.keys, longest=longest, tries=1)
    if changed := change.execute():
        report_ends(job_table, changed)
    for error in change.refused.values():
        raise error
    return len(changed)


def extend_jobs(
    bind: Bind,
    claim: Claim[Any],
    jobs: Iterable[Any] | None = None,
    *,
    lease: timedelta | None = None,
) -> int:
    """Extend the leases of claimed jobs, counted from now by the database's clock.

    A lease that is over can be extended until another worker claims the row, but not where the
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
    outcomes = [Outcome(extension(owned.table, lease or owned.lease))]
    return _apply(bind, owned, outcomes, runs=True)


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
        ClaimError: the table has no attempts, no maximum or no mark for failed rows, or the
            database refused the change of some rows, as for :func:`complete_jobs`.
    """
    job_table = job_table_of(table, ordered=True)
    unspent = predicates.is_unspent(job_table)
    if not unspent:
        raise ClaimError(
            f"{job_table!r} has no limit of attempts, so no row has used them up: declare "
            "JobTable(attempts=..., max_attempts=...)"
        )
    spent = and_(*map(not_, unspent), predicates.is_unowned(job_table))
    query = select(*job_table.key).where(spent)
    return Change(bind, job_table, spent, sweeping(job_table), query=query).reported(Swept)


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
        where: further conditions on the table's own columns, an expression or a sequence of them;
            a row that no longer meets them when it is locked stays failed.
        limit: how many rows at most, the first ones in the table's order; all if left out.
        keep_error: keep the error's text, or remove it.

    Returns:
        How many rows were freed.

    Raises:
        ClaimConflict: another transaction was in the way.
        ClaimError: the table has no mark for failed rows, or nothing says how they become free,
            or the database refused the change of some rows, as for :func:`complete_jobs`.
        ValueError, TypeError: ``limit`` is not an ``int`` of at least 1.
    """
    job_table = job_table_of(table, ordered=True)
    outcomes = requeuing(job_table, keep_error=keep_error)
    # The lock and the change ask it again: another program may have changed a row that was found.
    failed = and_(predicates.is_failed(job_table), *conditions_of(where))
    query = select(*job_table.key).where(failed).order_by(*job_table.order)
    if limit is not None:
        query = query.limit(checked_limit(limit))
    return Change(bind, job_table, failed, outcomes, query=query).reported(Requeued)


def owned_rows(claim: Any, jobs: Iterable[Any] | None, *, unfenced: bool) -> Claim[Any]:
    """Return a claim, or only its part with ``jobs``; raise if it does not tell its rows."""
    if not isinstance(claim, Claim):
        is_ticket = isinstance(claim, Mapping)
        cure = "Claim.from_ticket(table, ticket)" if is_ticket else "what claim_jobs returned"
        raise ClaimError(f"{claim!r} is not a claim: pass {cure}")
    if claim.token is None and not unfenced:
        raise ClaimError(
            f"{claim.table.table.fullname!r} has no token column that is known, so a row that "
            "was freed and claimed again cannot be told from this claim's: name one with "
            "JobTable(token=...), or agree to that with unfenced=True"
        )
    if jobs is None:
        return claim
    keys = claim.keys_of(jobs)
    return replace(claim, jobs=keys, keys=keys)


@dataclass
class Change(Operation[dict[Key, str]]):
    """A change of rows; if some are refused by ``Engine`` or ``sessionmaker``, of the others.

    It returns the rows that were changed, and the names of their outcomes.

    Attributes:
        guard: the condition that a row must meet.
        outcomes: what becomes of them; the first whose conditions are true counts.
        keys: the rows.
        plain: the outcomes with an error's text that every column can hold, if there is a text.
        query: finds the rows, where they are not known. Those that are locked are left.
        longest: how many seconds it waits for tables and other locks, where locked rows are left.
        refused: the rows whose change the database has refused, and its errors.
    """

    guard: ColumnElement[bool]
    outcomes: Sequence[Outcome]
    keys: Sequence[Key] = ()
    _: KW_ONLY
    plain: Sequence[Outcome] | None = None
    query: Select[Any] | None = None
    longest: float | None = None
    refused: dict[Key, Exception] = field(default_factory=dict)
    careful: bool | None = False

    def run(self, tx: Transaction) -> dict[Key, str]:
        """Change the rows; after a failure, those that the database does not refuse."""
        keys, change = self.keys, partial(self._change, tx, self.outcomes)
        if self.plain and (tx.careful or (tx.backend.checks_text and not tx.own)):
            change = partial(self._change_text, tx)
        with nullcontext() if self.longest is None else tx.backend.limit_wait(tx, self.longest):
            if self.query is not None:
                keys = self.keys = tx.tuples(self.query)
            if self.query is not None or self.longest is not None:
                keys = tx.unlocked(self.job_table, keys, self.guard)
            if not tx.careful:
                return dict(change(keys))
            self.refused.clear()
            return dict(in_parts(tx, keys, change, self.refused.__setitem__))

    def _change_text(self, tx: Transaction, keys: Sequence[Key]) -> list[tuple[Key, str]]:
        """Change rows, with a plain text where the database refuses another."""
        if not tx.connection.in_transaction():
            tx.connection.begin()
        try:
            with nullcontext() if tx.in_autocommit() else tx.connection.begin_nested():
                return self._change(tx, self.outcomes, keys)
        except (DBAPIError, UnicodeError) as error:
            if is_general(tx, error):
                raise
        return self._change(tx, self.plain or (), keys)

    def _change(
        self, tx: Transaction, outcomes: Sequence[Outcome], keys: Sequence[Key]
    ) -> list[tuple[Key, str]]:
        job_table, changed = self.job_table, dict[Key, str]()
        params = {} if self.token is None else {TOKEN: self.token}
        for outcome in outcomes:
            left = [key for key in keys if key not in changed] if changed else keys
            if (changes := outcome.statements.get(tx.backend)) is None:
                guard = and_(self.guard, *outcome.conditions)
                changes = tx.backend.changes(job_table, guard, outcome.values)
                outcome.statements[tx.backend] = changes
            extends = job_table if self.runs else None
            found = tx.change(left, changes, params, extends=extends)
            changed |= dict.fromkeys(found, outcome.name)
        if tx.after_disconnect and not self.runs:
            # Afterwards: the earlier try may have been running still, and the change waits for it.
            for outcome in outcomes:
                left = [key for key in keys if key not in changed]
                found = _changed_before(tx, job_table, self.token, left, outcome)
                changed |= dict.fromkeys(found, outcome.name)
        if not isinstance(tx.executor, Connection):
            written = {column for outcome in outcomes for column in outcome.values}
            _expire(tx.executor, job_table, changed, written)
        return list(changed.items())

    def reported(self, event: type[Event]) -> int:
        """Change the rows and report it; raise for those that the database has refused."""
        if changed := self.execute():
            report(event(self.job_table.table.fullname, tuple(changed)))
        if error := self.refusal(len(changed)):
            raise error
        return len(changed)

    def refusal(self, changed: int) -> ClaimError | None:
        """Return the error that names the rows whose change the database has refused, if any."""
        if not self.refused:
            return None
        cause = list(self.refused.values())[-1]
        error = ClaimError(
            f"the database refused the change of {len(self.refused)} of {len(self.keys)} jobs of "
            f"{self.job_table.table.fullname!r}, their keys: {list(self.refused)!r}, the last one: "
            f"{getattr(cause, 'orig', cause)}. They are as they were, and the other {changed} "
            "were changed. Remove what refuses them, or end them in another way"
        )
        error.__cause__ = cause
        return error


def _apply(
    bind: Bind,
    claim: Claim[Any],
    outcomes: Sequence[Outcome],
    plain: Sequence[Outcome] | None = None,
    *,
    runs: bool = False,
) -> int:
    """Change what is still the claim's, and raise for what is not, or what is refused."""
    job_table, keys, token = claim.table, claim.keys, claim.token
    guard = job_table.prepare(lasting if runs else owning)
    change = Change(bind, job_table, guard, outcomes, keys, token=token, plain=plain, runs=runs)
    changed, here = change.execute(), ended_here.get(token or "", EndedHere())
    if not runs:
        here.update(changed)
        if changed and (subscribers or logs_claims()):
            report_ends(job_table, changed)
    if len(changed) == len(keys):
        return len(changed)
    name, error = job_table.table.fullname, change.refusal(len(changed))
    lost = [key for key in keys if key not in changed and key not in change.refused]
    if error is not None and not lost:
        raise error
    if news := tuple(key for key in lost if key not in here.lost):
        report(Lost(name, news))
    raise ClaimLost(
        f"{len(lost)} of {len(keys)} jobs of {name!r} are no longer this claim's, their keys: "
        f"{lost!r}. Another worker has them, or they have ended: do not apply their results. The "
        f"other {len(changed)} were changed",
        keys=lost,
    ) from error


def owning(job_table: JobTable, value: str | None = None) -> ColumnElement[bool]:
    """Build the condition that a row runs for the claim whose token is a parameter."""
    token = job_table.token
    owned = [] if token is None else [token == bindparam(TOKEN, value, token.type)]
    return and_(*owned, predicates.is_running(job_table))


def lasting(job_table: JobTable, value: str | None = None) -> ColumnElement[bool]:
    """Build the condition that a row may be extended for the claim whose token is a parameter.

    Once its lease is over, a row with an exclusive key has given the key away.
    """
    owned = owning(job_table, value)
    return owned if job_table.exclusive_by is None else and_(owned, predicates.is_held(job_table))


def is_ended(job_table: JobTable, token: str | None) -> ColumnElement[bool]:
    """Build the condition that the claim with a token was a row's last owner and has ended it."""
    return and_(job_table.token == token, not_(predicates.is_running(job_table)))


def visible(
    tx: Transaction, job_table: JobTable, keys: Iterable[Key], *conditions: ColumnElement[bool]
) -> list[Key]:
    """Return the keys of the rows that meet the conditions, as this transaction sees them."""
    query = ByKey(job_table.key, select(*job_table.key).where(*conditions).where)
    return [tuple(row) for _, rows in tx.by_key(query, tuple(keys)) for row in rows]


def _changed_before(
    tx: Transaction, job_table: JobTable, token: str | None, keys: Sequence[Key], outcome: Outcome
) -> list[Key]:
    """Return the keys of rows that an earlier try ended before its connection was lost."""
    marks = predicates.bears(outcome.values)
    otherwise = predicates.not_ended_in(job_table, outcome.values)
    return visible(tx, job_table, keys, is_ended(job_table, token), *marks, *otherwise)


def _expire(
    session: Session, job_table: JobTable, keys: Iterable[Key], columns: Iterable[Any]
) -> None:
    """Expire the attributes of the claim's entities that a Core statement has written."""
    mapper = job_table.mapper
    if mapper is None:
        return
    written = {*columns, *(c for c in job_table.table.columns if c.onupdate or c.server_onupdate)}
    names = [each.key for each in mapper.column_attrs if not written.isdisjoint(each.columns)]
    identities = map(mapper.identity_key_from_primary_key, keys)
    found = map(session.identity_map.get, identities)
    entities = [entity for entity in found if entity is not None]
    note_changes(session, entities)
    for entity in entities:
        session.expire(entity, names)
