"""Conditions on a job table's rows: free, claimable, running, held, due, and bearing a mark.

Each is built from a declaration once, and used by claims, by the calls that end them, by the guard
triggers and by ``doctor``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import wraps
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Column, ColumnElement, and_, func, literal, not_, or_, true
from sqlalchemy.sql.elements import Null
from sqlalchemy.types import DateTime, Float, Integer

from .inference import ORDER, plain_type
from .job_table import JobTable
from .sql_elements import DatabaseTime, InlineLiteral
from .state_values import is_same, opposite

T = TypeVar("T")
Conditions = tuple[ColumnElement[bool], ...]
# Attempts that a claim reads one by one at most, where no index can leave out the others.
MOST_VALUES = 100


class Classes(NamedTuple):
    """Conditions for rows that have attempts left.

    Attributes:
        fresh: for rows that an index reads in one order, each.
        tried: for the others, if there are any.
        order: what such an index has before that order.
    """

    fresh: tuple[ColumnElement[bool], ...]
    tried: ColumnElement[bool] | None
    order: tuple[ColumnElement[Any], ...]


class Branch(NamedTuple):
    """One reason why rows may be claimed.

    Attributes:
        conditions: together true for such rows.
        order: what comes first among them; the claim's own order if empty.
    """

    conditions: Conditions
    order: tuple[ColumnElement[Any], ...] = ()


def _once(make: Callable[[JobTable], T]) -> Callable[[JobTable], T]:
    """Build a predicate once per declaration."""

    @wraps(make)
    def found(job_table: JobTable) -> T:
        return job_table.prepare(make)

    return found


def bears(values: Mapping[Any, Any]) -> Iterator[ColumnElement[bool]]:
    """Yield the conditions that a row holds these values, as far as they can be compared.

    A time counts as held if the column is not NULL.
    """
    for column, value in values.items():
        if value is None or isinstance(value, Null):
            yield column.is_(None)
        elif isinstance(value, DatabaseTime):
            yield column.is_not(None)
        elif isinstance(value, InlineLiteral):
            yield column == value


@_once
def marks(job_table: JobTable) -> Conditions:
    """Build the conditions that a row bears the declared values of a claim."""
    return tuple(bears(job_table.claimed))


@_once
def is_free(job_table: JobTable) -> ColumnElement[bool]:
    """Build the condition that a row is neither claimed nor ended."""
    return and_(job_table.free, *not_ended(job_table))


@_once
def is_running(job_table: JobTable) -> ColumnElement[bool]:
    """Build the condition that a row bears the mark of a claim and has not ended."""
    return and_(*(marks(job_table) or [not_(job_table.free)]), *not_ended(job_table))


@_once
def is_held(job_table: JobTable) -> ColumnElement[bool]:
    """Build the condition that a row is running and that its worker still owns it."""
    lease, running = job_table.lease, is_running(job_table)
    if lease is None:
        return running
    lasts: list[ColumnElement[bool]] = [lease > job_table.now(lease)]
    if job_table.unleased is not None:
        since = running_since(job_table)[0]
        lasts.append(and_(lease.is_(None), or_(since.is_(None), not_(_is_old(job_table)))))
    elif lease.nullable:
        lasts.append(lease.is_(None))
    return and_(running, or_(*lasts))


@_once
def claimable(job_table: JobTable) -> ColumnElement[bool]:
    """Build the condition that a row may be claimed, whatever the call's ``where``."""
    return any_of(claimable_branches(job_table))


@_once
def claimable_branches(job_table: JobTable) -> tuple[Branch, ...]:
    """Return the reasons why a row may be claimed; the first one is that it is free."""
    unspent = is_unspent(job_table)
    expired = (Branch((*each.conditions, *unspent), each.order) for each in _expired(job_table))
    return (Branch((is_free(job_table), *is_due(job_table))), *expired)


def _expired(job_table: JobTable) -> tuple[Branch, ...]:
    """Return the reasons why a running row's worker no longer owns it."""
    lease, running = job_table.lease, is_running(job_table)
    # Where a lease that is over is what makes rows free, there is no other reason.
    if lease is None or (lease is job_table.state and not lease.nullable):
        return ()
    over = Branch((running, lease <= job_table.now(lease)), (lease,))
    if job_table.unleased is None:
        return (over,)
    old = (running, lease.is_(None), _is_old(job_table))
    return over, Branch(old, running_since(job_table)[:1])


@_once
def is_last_chance(job_table: JobTable) -> ColumnElement[bool] | None:
    """Build the condition that a claim is the last attempt of a row whose worker has died.

    None if attempts are not limited, or if a dead worker's rows do not come back.
    """
    attempts, most = job_table.attempts, job_table.max_attempts
    expired = _expired(job_table)
    if attempts is None or most is None or not expired:
        return None
    claims: ColumnElement[Any] = func.coalesce(attempts, 0) + 1
    least = InlineLiteral(most, Integer()) if isinstance(most, int) else most
    return and_(any_of(expired), claims >= least)


@_once
def is_unowned(job_table: JobTable) -> ColumnElement[bool]:
    """Build the condition that no worker owns the row, and that it has not ended."""
    return any_of([Branch((is_free(job_table),)), *_expired(job_table)])


def any_of(branches: Collection[Branch]) -> ColumnElement[bool]:
    """Build the condition that at least one of the reasons applies."""
    return or_(*(and_(*branch.conditions) for branch in branches))


@_once
def is_failed(job_table: JobTable) -> ColumnElement[bool]:
    """Build the condition that a row is marked as failed, where there is such a mark."""
    return and_(*bears(job_table.failed), *not_ended_in(job_table, job_table.failed))


@_once
def not_ended(job_table: JobTable) -> Conditions:
    """Build the conditions that a row is neither done nor failed nor withdrawn."""
    return not_ended_in(job_table, ())


def not_ended_in(job_table: JobTable, others: Collection[Column[Any]]) -> Conditions:
    """Return the :func:`not_ended` conditions that do not use the columns in ``others``."""
    found: list[ColumnElement[bool]] = []
    for mark in (job_table.done, job_table.failed):
        telling = _telling(job_table, mark).items()
        terms = [_is_not(column, value) for column, value in telling if column not in others]
        found += [or_(*terms)] if terms else []
    for column, value in job_table.withdrawn.items():
        found += [] if column in others else [_is_not(column, value)]
    return tuple(found)


def _telling(job_table: JobTable, mark: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return the values of an end that tell its rows from free and running ones."""
    if any(c in mark and is_same(mark[c], value) for c, value in job_table.withdrawn.items()):
        return {}
    state = job_table.state
    if state not in mark or not job_table.free_values:
        return mark
    # The state of a free or a running row is known: another value tells enough.
    known = (*job_table.free_values, job_table.claimed[state])
    if not any(is_same(mark[state], value) for value in known):
        return {}
    return {column: value for column, value in mark.items() if column is not state}


@_once
def is_due(job_table: JobTable) -> Conditions:
    """Build the conditions that a row's time has come and its attempts are not spent."""
    due = job_table.due
    if due is None:
        return is_unspent(job_table)
    return (_null_or(due, is_ripe(job_table)), *is_unspent(job_table))


def is_ripe(job_table: JobTable) -> ColumnElement[bool]:
    """Build the condition that the time in the due column, which is not NULL, has come."""
    due: ColumnElement[Any] | None = job_table.due
    assert due is not None
    return due <= job_table.now(job_table.due)


@_once
def is_unspent(job_table: JobTable) -> Conditions:
    """Build the condition that a row has attempts left; empty if attempts are not limited."""
    attempts, most = job_table.attempts, job_table.max_attempts
    if attempts is None or most is None:
        return ()
    if isinstance(most, int):
        return (_null_or(attempts, attempts < InlineLiteral(most, Integer())),)
    return (_null_or(most, _null_or(attempts, attempts < most)),)


@_once
def classes_by_value(job_table: JobTable) -> Classes:
    """Return the conditions that a row has attempts left, by their number if the limit is known."""
    attempts, most, due = job_table.attempts, job_table.max_attempts, job_table.due
    times = () if due is None else (due,)
    if attempts is None or not isinstance(most, int) or most > MOST_VALUES:
        return Classes((and_(true(), *is_unspent(job_table)),), None, times)
    zero, *others = (InlineLiteral(number, Integer()) for number in range(most))
    fresh = ([attempts.is_(None)] if attempts.nullable else []) + [attempts == zero]
    tried = or_(attempts < zero, attempts.in_(others)) if others else attempts < zero
    return Classes(tuple(fresh), tried, (attempts, *times))


def running_since(job_table: JobTable) -> tuple[Column[Any], ...]:
    """Return the columns that tell since when a row runs; the first one counts."""
    return (*job_table.claim_times, *job_table.stamps)


def waiting_since(job_table: JobTable) -> tuple[Column[Any], ...]:
    """Return the columns that tell since when a row waits; the first that is not NULL counts."""
    written = {job_table.lease, *job_table.claimed, *job_table.stamps}
    named = [column for column in job_table.table.columns if column.name in ORDER]
    return tuple(
        column
        for column in dict.fromkeys((job_table.due, *job_table.order, *named))
        if isinstance(column, Column)
        and isinstance(plain_type(column.type), DateTime)
        and column not in written
    )


def _is_old(job_table: JobTable) -> ColumnElement[bool]:
    """Build the condition that a row without a lease has been running for ``unleased``."""
    assert job_table.unleased is not None
    since = running_since(job_table)[0]
    age = literal(-job_table.unleased.total_seconds(), Float())
    return since <= job_table.now(since, age)


def _null_or(column: Column[Any], condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return or_(column.is_(None), condition) if column.nullable else condition


def _is_not(column: Column[Any], value: Any) -> ColumnElement[bool]:
    """Build the condition that a column does not hold the value; NULL is held by NULL alone."""
    if value is None or isinstance(value, Null):
        return column.is_not(None)
    if isinstance(value, DatabaseTime):
        return column.is_(None)
    if (other := opposite(value)) is not None:
        return column.is_not(value) if column.nullable else column == other
    return _null_or(column, column != value)
