"""PostgreSQL's exclusive keys: an advisory lock for each, and a look that is younger than it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Connection,
    Dialect,
    FromClause,
    Integer,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    false,
    func,
    literal_column,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import REGCLASS

from atomic_claim.columns import JobTable
from atomic_claim.errors import ClaimError, UnsupportedDialect
from atomic_claim.exclusive import (
    KEY,
    NEAR,
    Turns,
    by_key_alone,
    near_alone,
    number,
    pool,
    where_needed,
)
from atomic_claim.statement import KEYS, LIMIT, MARGIN, REACH, ClaimParts, key_in

from .base import Found, Key, Strategy, Work, effective_name, refuse_autocommit

TABLE = "atomic_claim_table"
LEVELS = {"read committed", "read uncommitted"}
# So often a claim is tried anew whose keys others claimed between its two statements.
TRIES = 8
# So many rows are looked at for more than what has been found.
FARTHEST = 10_000
AUTOCOMMIT = "the locks on the keys would be gone before the rows are claimed"
SAVEPOINT = "atomic_claim_turn"


@dataclass(frozen=True, eq=False)
class Turn:
    """A claim by exclusive keys, as two statements.

    Attributes:
        find: finds candidates, and locks their keys until the transaction ends.
        parts: the parts of a claim of those candidates whose keys still have room.
    """

    find: Select[Any]
    parts: ClaimParts


def turn_of(parts: ClaimParts) -> Turn:
    """Both statements, built once per parts."""
    return parts.prepare("turn", lambda it: Turn(_finding(it), _chosen(it)))


def key_lock(job_table: JobTable, key: ColumnElement[Any]) -> ColumnElement[bool]:
    """Locks a key until the transaction ends; false if another transaction holds it.

    The lock's two numbers stand for the table (the one that its name means in this session) and
    for the key. Keys that differ in case alone share a number, as some do by chance: while one of
    them is locked, the other is passed over, which costs a claim some rows and nothing else.
    """
    return func.pg_try_advisory_xact_lock(*key_numbers(job_table, key), type_=Boolean())


def key_numbers(
    job_table: JobTable, key: ColumnElement[Any]
) -> tuple[ColumnElement[int], ColumnElement[int]]:
    """Return the two integers that identify a key's advisory lock."""
    name = bindparam(TABLE, job_table.table.name, type_=Text(), literal_execute=True)
    table = cast(cast(cast(name, Text()), REGCLASS()), Integer())
    return table, func.hashtext(func.lower(cast(key, Text())))


def wait_for_keys(work: Work, job_table: JobTable, keys: Sequence[Key]) -> None:
    """Lock the exclusive keys of some rows until the transaction ends, in an order of their own."""
    column = job_table.exclusive_by
    numbers = key_numbers(job_table, column)
    found = select(*(each.label(f"part_{place}") for place, each in enumerate(numbers)))
    found = found.where(column.is_not(None), key_in(job_table.key, keys)).distinct()
    ordered = found.order_by(literal_column("2")).subquery("claim_keys")
    locks = select(func.pg_advisory_xact_lock(*ordered.columns))
    work.execute(locks, table_name(work.connection, job_table)).all()


def require_locks(dialect: Dialect) -> None:
    """Refuse databases whose advisory locks do nothing, such as CockroachDB's."""
    if dialect.name != "postgresql":
        raise UnsupportedDialect(
            f"exclusive_by needs advisory locks, and those of {dialect.name} are not known to "
            "hold: leave exclusive_by out"
        )


def table_name(connection: Connection, job_table: JobTable) -> dict[str, str]:
    """Return the parameter that identifies the table in the advisory locks of its keys."""
    return {TABLE: effective_name(connection, job_table.table)}


def _locking(turns: Turns, found: FromClause) -> Select[Any]:
    """Build the SELECT that locks the candidates' keys in claim order, up to the limit."""
    ordered = select(found).order_by(*turns.order(found)).subquery("claim_ordered")
    key = ordered.columns[KEY]
    # In this order: what has no room must not be locked.
    is_ours = case(
        (key.is_(None), true()),
        (turns.may_run(ordered), key_lock(turns.parts.job_table, key)),
        else_=false(),
    )
    return select(*turns.ids(ordered)).where(is_ours).limit(turns.limit)


def _finding(parts: ClaimParts) -> Select[Any]:
    turns = Turns(parts, lateral=True)
    found = pool(turns, where_needed)
    locked = _locking(turns, found.rows).subquery("claim_locked")
    about = select(
        func.current_setting(literal_column("'transaction_isolation'")).label("level"),
        found.exhausted.label("exhausted"),
    ).subquery("claim_about")
    # At least one row comes back, whatever was found.
    return select(*about.columns, *locked.columns).select_from(about.outerjoin(locked, true()))


def at_once(parts: ClaimParts) -> tuple[ClaimParts, ClaimParts]:
    """Claims in one statement: of the first rows in order, and of the first rows of each key."""
    turns = Turns(parts, lateral=True)
    return _at_once(turns, near_alone(turns)), _at_once(turns, by_key_alone(turns))


def _at_once(turns: Turns, candidates: FromClause) -> ClaimParts:
    """Build a one-statement claim that returns no rows if its snapshot may be out of date.

    Its snapshot is older than the locks on the keys. So once it has the locks, it asks of every
    transaction that its snapshot does not see whether it has been committed since: those that
    were under way, and those that were given a number between the snapshot and now. Where there
    is none, the snapshot is as good as a new one.
    """
    parts = turns.parts
    locked = _locking(turns, candidates).cte("claim_locked")
    # Asked of the locked rows, so that it is asked after they are locked.
    count = select(func.count().label("n")).select_from(locked).subquery("claim_count")
    is_locked = count.columns["n"] >= number(0)
    snapshot = func.txid_current_snapshot()
    # As a subquery: else the planner, to estimate the series, would have the number given out
    # before the snapshot is used.
    last = select(func.txid_current() - number(1)).where(is_locked).correlate(count)
    begun = func.txid_snapshot_xmax(snapshot), last.scalar_subquery()
    unseen = [
        select(func.txid_snapshot_xip(snapshot).label("txid")).where(is_locked),
        select(func.generate_series(*begun).label("txid")).where(is_locked),
    ]
    others = union_all(*(each.correlate(count) for each in unseen)).lateral("claim_unseen")
    committed = func.txid_status(others.columns["txid"]) == literal_column("'committed'")
    newer = select(func.count()).select_from(count.join(others, true())).where(committed)
    level = func.current_setting(literal_column("'transaction_isolation'"))
    is_young = and_(newer.scalar_subquery() == number(0), level.in_(_literals(LEVELS)))
    rows = parts.candidates.rows
    branch = turns.described(rows.where(is_young, turns.key_is_in(select(*locked.columns))))
    return parts.narrowed(branch.order_by(*parts.order), rows)


def _literals(values: Iterable[str]) -> list[ColumnElement[str]]:
    return [literal_column(f"'{value}'") for value in sorted(values)]


def _chosen(parts: ClaimParts) -> ClaimParts:
    """Build the claim of rows whose keys are locked, within the room that each key has left."""
    turns = Turns(parts)
    free = parts.candidates.rows.where(turns.key_is_in(bindparam(KEYS, expanding=True)))
    given = turns.described(free, with_key=True).subquery("claim_given")
    numbered = turns.numbered("claim_chosen", given)
    having_room = select(*turns.ids(numbered)).where(turns.may_run(numbered))
    chosen = turns.described(free).where(turns.key_is_in(having_room))
    return parts.narrowed(chosen.order_by(*parts.order), free)


@dataclass(frozen=True)
class InTurn:
    """One claim by exclusive keys."""

    strategy: Strategy
    work: Work
    turn: Turn
    claim_rows: Callable[[Work, ClaimParts, dict[str, Any]], Found]

    def claim(self, params: dict[str, Any]) -> Found:
        """Claim as many rows as the parameters say, or as there are."""
        found: Found = []
        limit, reach, tries = params[LIMIT], params[LIMIT] + NEAR, TRIES
        while True:
            given = {**params, LIMIT: limit - len(found), REACH: reach}
            with self._savepoint() as undo:
                keys, exhausted = self._find(given)
                more = self._claim(keys, given)
                # Meanwhile somebody else claimed of these keys, and let go of their locks.
                raced = len(more) < len(keys) and tries > 0
                if raced:
                    tries -= 1
                    more = undo(more)
            found += more
            if len(found) == limit or (exhausted and not raced):
                return found
            if not raced:
                if found and reach > FARTHEST:
                    return found
                reach = 4 * reach + MARGIN

    def _find(self, params: dict[str, Any]) -> tuple[list[Key], bool]:
        connection = self.work.connection
        require_locks(connection.dialect)
        named = table_name(connection, self.turn.parts.job_table)
        rows = self.work.execute(self.turn.find, params | named).all()
        refuse_autocommit(self.strategy, self.work, AUTOCOMMIT)
        level, exhausted = tuple(rows[0])[:2]
        if level not in LEVELS:
            raise ClaimError(
                f"the transaction is {level.upper()}, where a look for running rows sees an old "
                'snapshot: exclusive_by needs isolation_level="READ COMMITTED"'
            )
        found = [tuple(row)[2:] for row in rows]
        return [key for key in found if key[0] is not None], exhausted

    def _claim(self, keys: list[Key], params: dict[str, Any]) -> Found:
        if not keys:
            return []
        given = keys if len(self.turn.parts.job_table.key) > 1 else [key for (key,) in keys]
        return self.claim_rows(self.work, self.turn.parts, {**params, KEYS: given})

    @contextmanager
    def _savepoint(self) -> Iterator[Callable[[Found], Found]]:
        """Yield a function that undoes a try, by a savepoint in the caller's transaction.

        Without it the locks of a failed try would last as long as that transaction. In a
        transaction of our own the function does nothing.
        """
        if self.work.own:
            yield lambda found: found
            return
        connection, session = self.work.connection, self.work.executor
        if self.work.in_autocommit:
            # A listener may begin a transaction before the first statement.
            connection.exec_driver_sql("SELECT 1")
            refuse_autocommit(self.strategy, self.work, AUTOCOMMIT)
        connection.exec_driver_sql(f"SAVEPOINT {SAVEPOINT}")

        def undo(found: Found) -> Found:
            connection.exec_driver_sql(f"ROLLBACK TO SAVEPOINT {SAVEPOINT}")
            if not isinstance(session, Connection):
                for _, item in found:
                    if self.turn.parts.entities:
                        session.expire(item)
            return []

        yield undo
        connection.exec_driver_sql(f"RELEASE SAVEPOINT {SAVEPOINT}")
