"""Claims of rows that cannot be marked or read: the others are handed out, these are freed.

In a transaction of the call's own everything is rolled back, and the rows are marked and read by
halves under savepoints. What is committed already, or belongs to the caller's transaction, is
read one by one, and what cannot be read is freed by key and token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import CompileError, DBAPIError, ProgrammingError, SQLAlchemyError
from sqlalchemy.util import await_only

from atomic_claim import predicates
from atomic_claim.errors import ClaimConflict, ClaimError
from atomic_claim.outcomes import freeing
from atomic_claim.plan import TOKEN, ClaimPlan
from atomic_claim.sql_elements import ByKey

from .base import Backend, Transaction, Unreadable, mark_and_load, read_back
from .drivers import code_of
from .reading import Key, KeyedRows

T = TypeVar("T")

# How often a claim skips rows if none of them can be marked and read.
ROUNDS = 10

# How often, and for how many seconds each time, the end of a process is waited for.
PATIENCE, PAUSE = 200, 0.05

logger = logging.getLogger("atomic_claim")
Passed = dict[Key, tuple[str, BaseException]]
"""Keys of rows that a claim passes over, whether they cannot be "marked" or "read", and why."""


def in_parts(
    tx: Transaction,
    keys: Sequence[Key],
    change: Callable[[Sequence[Key]], list[T]],
    pass_over: Callable[[Key, Exception], object],
) -> list[T]:
    """Change rows under a savepoint; if that fails, each half of them, and so on.

    Args:
        tx: where it runs.
        keys: the keys of the rows.
        change: changes some of them, and returns something for each.
        pass_over: takes the key of a row that cannot be changed even alone, and the error.

    Returns:
        What ``change`` returned, in the order of ``keys``.
    """
    try:
        with tx.connection.begin_nested():
            return change(keys)
    except (ClaimError, CompileError):
        raise
    except Exception as error:
        if is_general(tx, error) or not keys:
            raise
        if len(keys) == 1:
            pass_over(keys[0], error)
            return []
    middle = len(keys) // 2
    first = in_parts(tx, keys[:middle], change, pass_over)
    return first + in_parts(tx, keys[middle:], change, pass_over)


def mark_carefully(
    tx: Transaction,
    plan: ClaimPlan,
    keys: Sequence[Key],
    params: Mapping[str, Any],
    *,
    passed: Passed,
) -> KeyedRows:
    """Mark and read rows that are locked, and pass over those for which that fails."""

    def mark(part: Sequence[Key]) -> KeyedRows:
        claimed = mark_and_load(tx, plan, part, params)
        if plan.entities:
            load_fully(tx, plan, claimed)
        return claimed

    def pass_over(key: Key, error: Exception) -> None:
        if isinstance(error, Unreadable):
            _pass_over(plan, key, "read", error.__cause__ or error, passed)
            _count_attempt(tx, plan, key)
        else:
            _pass_over(plan, key, "marked", error, passed)

    return in_parts(tx, keys, mark, pass_over)


def refusal(plan: ClaimPlan, passed: Passed, *, gives_up: bool) -> ClaimError | None:
    """Return why nothing was claimed: rows are refused, or there may be more than were tried.

    It is for the caller to raise once the attempts that were counted are committed.
    """
    refused = {key: why for key, why in passed.items() if why[0] == "marked"}
    told = refused or (passed if gives_up else {})
    if not told:
        return None
    key, (what, why) = next(iter(told.items()))
    error = ClaimError(
        f"none of {len(passed)} claimable rows of {plan.job_table.table.fullname!r} can "
        f"be handed out: {key!r} cannot be {what} ({getattr(why, 'orig', why)}). Correct that "
        "row, or remove what refuses it"
    )
    error.__cause__ = why
    return error


def is_general(tx: Transaction, error: Exception) -> bool:
    """Check whether an error is none of one row: a lost connection, a conflict, a wrong name."""
    if tx.has_lost(error):
        return True
    if isinstance(error, DBAPIError) and tx.backend.is_conflict(error):
        return True
    # psycopg has RAISE EXCEPTION of a trigger as a ProgrammingError, too.
    if not isinstance(error, ProgrammingError):
        return False
    code = code_of(error, str)
    return code is None or code.startswith("42")


def salvage(
    tx: Transaction, plan: ClaimPlan, params: Mapping[str, Any], error: BaseException
) -> tuple[KeyedRows, Passed]:
    """Hand out the rows of a failed claim that can be read, and free the others.

    Returns:
        The rows or entities with their keys, in claim order; and the others.

    Raises:
        BaseException: the claim's own error, where it has marked nothing, or has marked what it
            must not hand out, or was interrupted: then its rows are free again.
    """
    if tx.has_lost(error):
        raise error
    try:
        keys = tx.marked or traced(tx, plan, params)
    except SQLAlchemyError:
        # The transaction has failed, and nothing of it can be committed.
        raise error from None
    if not keys:
        raise error
    statement_failed = isinstance(error, DBAPIError) and not tx.autocommit and bool(tx.marked)
    if isinstance(error, ClaimError) or not isinstance(error, Exception) or statement_failed:
        _undo(tx, plan, keys, params, error)
        raise error
    found: KeyedRows = []
    passed: Passed = {}
    for key in keys:
        try:
            found += read_back(tx, plan, [key], None)
        except Exception as unread:  # noqa: BLE001 - types, hooks and drivers raise what they like
            _pass_over(plan, key, "read", unread, passed)
    if passed:
        _undo(tx, plan, list(passed), params, None)
    tx.marked.clear()
    return found, passed


def wait(dialect: sa.Dialect, seconds: float) -> None:
    """Wait between two tries; beside an event loop, leave it to others."""
    if not dialect.is_async:
        time.sleep(seconds)
        return
    import asyncio  # noqa: PLC0415 - loaded already beside an event loop

    await_only(asyncio.sleep(seconds))


def end_process(backend: Backend, connection: sa.Connection, process: Any, seconds: float) -> None:
    """End the server's process of a connection that was lost ``seconds`` ago, and await it.

    Afterwards a row that bears the claim's token was committed, and no other will be.
    """
    for _ in range(PATIENCE):
        is_gone = not backend.asks_to_end(connection, process, seconds)
        connection.rollback()
        if is_gone:
            return
        wait(connection.dialect, PAUSE)
    raise ClaimError(
        f"the server's process {process[0]} of a lost connection does not end, so the outcome "
        f"of the claim is unknown: end it with {backend.ending.format(process[0])}"
    )


def traced(tx: Transaction, plan: ClaimPlan, params: Mapping[str, Any]) -> Sequence[Key]:
    """Return the keys of the rows that bear the claim's token and are not free, in claim order."""
    job_table = plan.job_table
    if TOKEN not in params:
        return ()
    # A state that a trigger has made NULL is not free either.
    zero: sa.ColumnElement[int] = sa.literal_column("0")
    is_free = sa.case((predicates.is_free(job_table), sa.literal_column("1")), else_=zero)
    ours = sa.and_(job_table.token == params[TOKEN], is_free == zero)
    return tx.tuples(sa.select(*job_table.key).where(ours).order_by(*plan.order))


def free_traced(tx: Transaction, plan: ClaimPlan, params: Mapping[str, Any]) -> None:
    """Free the rows that bear the claim's token, after an interrupt."""
    if keys := traced(tx, plan, params):
        _undo(tx, plan, keys, params, None)


def _undo(
    tx: Transaction,
    plan: ClaimPlan,
    keys: Sequence[Key],
    params: Mapping[str, Any],
    cause: BaseException | None,
) -> None:
    """Free rows that this claim has marked; if that fails, keep them from being committed.

    Rows that were marked in this transaction are locked; others must bear the claim's token still,
    as it was stored.
    """
    job_table = plan.job_table
    try:
        if isinstance(cause, ClaimConflict):
            raise cause
        is_ours: sa.ColumnElement[bool] = sa.true()
        if TOKEN in params and (tx.autocommit or not tx.marked):
            stored = {params[TOKEN], *tx.tokens}
            is_ours = sa.or_(*map(job_table.token.is_not_distinct_from, stored))
        tx.change(keys, tx.backend.changes(job_table, is_ours, freeing(job_table)))
        free = tx.unlocked(job_table, keys, predicates.is_free(job_table))
        if len(free) < len(keys) and not tx.autocommit:
            raise ClaimError(f"{len(keys) - len(free)} rows could not be freed again")
    except (SQLAlchemyError, ClaimError) as error:
        # A transaction that has failed on the server cannot be committed in any case.
        if not isinstance(cause, DBAPIError):
            tx.connection.invalidate()
        if cause is None:
            raise
        cause.add_note(f"The rows {list(keys)!r} could not be freed again: {error}")


def _count_attempt(tx: Transaction, plan: ClaimPlan, key: Key) -> None:
    """Count the attempt of a row that cannot be read, so that ``max_attempts`` retires it."""
    job_table = plan.job_table
    if job_table.attempts is not None:
        counted = {job_table.attempts: plan.values[job_table.attempts]}
        tx.change([key], tx.backend.changes(job_table, sa.true(), counted))


def _pass_over(plan: ClaimPlan, key: Key, what: str, error: BaseException, passed: Passed) -> None:
    passed[key] = what, error
    name = plan.job_table.table.fullname
    logger.warning("row %r of %s cannot be %s: %s", key, name, what, reason(error))


def reason(error: BaseException) -> str:
    """Return the name of an error's class, or of the driver's: its text may contain values."""
    return type(getattr(error, "orig", None) or error).__qualname__


def load_fully(tx: Transaction, plan: ClaimPlan, found: KeyedRows) -> None:
    """Load what entities lack that will be detached: deferred columns, those of subclasses too."""
    incomplete = [key for key, entity in found if _unloaded(entity)]
    if not incomplete:
        return
    mapper = plan.job_table.mapper
    assert mapper is not None
    from sqlalchemy.orm import selectin_polymorphic, undefer  # noqa: PLC0415 - deferred: the ORM takes time to import

    options: list[Any] = [undefer("*")]
    if subclasses := [m.class_ for m in mapper.self_and_descendants if m is not mapper]:
        options.append(selectin_polymorphic(mapper.class_, subclasses))
    loading = ByKey(plan.key_attributes, plan.reading.options(*options).where)
    for _, result in tx.by_key(loading, incomplete):
        result.unique().all()
    for _, entity in found:
        if unloaded := _unloaded(entity):
            tx.executor.refresh(entity, unloaded)  # type: ignore[union-attr]


def _unloaded(entity: Any) -> list[str]:
    state = sa.inspect(entity)
    return sorted(state.unloaded.intersection(state.mapper.column_attrs.keys()))
