"""MySQL's and MariaDB's exclusive keys: one claim at a time looks, and sees what is uncommitted."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

from sqlalchemy import (
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    Select,
    case,
    event,
    func,
    literal,
    literal_column,
    select,
    text,
    true,
)
from sqlalchemy.sql.selectable import CTE
from sqlalchemy.types import Integer, String

from atomic_claim.columns import JobTable
from atomic_claim.errors import ClaimConflict
from atomic_claim.exclusive import KEY, PLACE, Turns, count_of, limited, number
from atomic_claim.statement import ByKey, ClaimParts

from .base import Key, Work, chunks

CHUNK = 500
# Seconds that a claim waits for those before it, each of which takes some milliseconds.
LONGEST_TURN = 10

lookers: WeakKeyDictionary[Dialect, tuple[int, Engine]] = WeakKeyDictionary()
"""What the second connections come from, and in which process, by the dialect of their database."""


class Ways:
    """The statements of a search by exclusive keys, built once per parts.

    Each returns how many rows or keys it has read, and the keys of the candidates with their
    places, in claim order; one row at least. ``by_key_first`` counts the claims that still begin
    with the second way, since the first has not found enough of late.
    """

    def __init__(self, parts: ClaimParts) -> None:
        self.parts = parts
        self.turns = turns = Turns(parts)
        self.by_key_first = 0
        near = turns.near("claim_near_read", limited)
        self.near = self._told(near, near)
        keys = turns.distinct_keys("claim_keys")
        by_key = turns.of_keys("claim_far_read", keys, limited)
        first = select(by_key).order_by(*turns.order(by_key)).limit(turns.reach)
        self.by_key = self._told(keys, first.cte("claim_far_first"))
        passing = turns.passing("claim_deep_read", limited)
        self.passing = self._told(passing, passing)
        self.running = self._running()
        self.held = ByKey(
            parts.job_table.key, select(*parts.job_table.key).where(parts.job_table.is_held).where
        )

    def _told(self, counted: CTE, read: CTE) -> Select[Any]:
        turns = self.turns
        found = turns.numbered("claim_found", read)
        key = found.columns[KEY]
        place = case((key.is_(None), number(1)), else_=found.columns[PLACE]).label(PLACE)
        usable = select(*turns.ids(found), *turns.terms(found), place)
        usable_rows = usable.where(turns.may_run(found)).subquery("claim_usable")
        about = select(count_of(counted).label("seen")).subquery("claim_about")
        columns = [*about.columns, *turns.ids(usable_rows), usable_rows.columns[PLACE]]
        found_rows = cast("Select[Any]", select(*columns))
        found_rows = found_rows.select_from(about.outerjoin(usable_rows, true()))
        return found_rows.order_by(*turns.order(usable_rows))

    def _running(self) -> ByKey:
        """Pairs of candidates and the rows that run with the same key."""
        job_table = self.parts.job_table
        table, column = job_table.table, job_table.exclusive_by
        candidate = table.alias("claim_candidate")
        own = [candidate.columns[part.key] for part in job_table.key]
        pairs = (
            select(*own, *(part.label(f"running_{n}") for n, part in enumerate(job_table.key)))
            .prefix_with("STRAIGHT_JOIN")
            .select_from(candidate.join(table, column == candidate.columns[column.key]))
            .where(job_table.is_held)
        )
        return ByKey(own, pairs.where)


@dataclass(frozen=True)
class Candidates:
    """The result of one search for candidates.

    Attributes:
        seen: how many rows or keys were read.
        places: the candidates, in claim order, with their places within their keys.
    """

    seen: int
    places: dict[Key, int]


@dataclass(frozen=True)
class SecondLook:
    """A second connection, whose reads see what others have not committed.

    Attributes:
        side: the connection.
        ways: what it executes.
    """

    side: Connection
    ways: Ways

    def candidates(self, way: Select[Any], params: Mapping[str, Any]) -> Candidates:
        """Search one way."""
        rows = self.side.execute(way, dict(params)).all()
        found = {tuple(row[1:-1]): row[-1] for row in rows if row[-1] is not None}
        return Candidates(rows[0][0], found)

    def running_beside(
        self, keys: Sequence[Key], fresh: Connection | None = None
    ) -> dict[Key, set[Key]]:
        """Return the running rows that share an exclusive key with each candidate.

        ``fresh`` is a connection whose snapshot is yet to be taken, if there is one.

        A row runs if it does by what is uncommitted, or by what is committed: its end may be
        rolled back. The uncommitted comes first, else a row whose claim is committed, and whose
        end is begun, between the two looks would be seen by neither.
        """
        found: dict[Key, set[Key]] = defaultdict(set)
        if self.ways.parts.job_table.max_per_key > 1:
            # Of one at a time, the search has looked for them.
            self._add_pairs(self.side, found, keys)
        if fresh is not None:
            self._add_pairs(fresh, found, keys)
            return found
        for chunk in chunks(keys, CHUNK):
            self.side.execute(text("SET TRANSACTION ISOLATION LEVEL READ COMMITTED"))
            self._add_pairs(self.side, found, chunk)
        return found

    def _add_pairs(
        self, connection: Connection, found: dict[Key, set[Key]], keys: Sequence[Key]
    ) -> None:
        width = len(self.ways.parts.job_table.key)
        for chunk in chunks(keys, CHUNK):
            for row in connection.execute(*self.ways.running.of(chunk)):
                found[tuple(row[:width])].add(tuple(row[width:]))

    def ending(self, keys: set[Key]) -> set[Key]:
        """Return the running rows that an uncommitted transaction has ended."""
        found = set(keys)
        for chunk in chunks(list(keys), CHUNK):
            found -= {tuple(row) for row in self.side.execute(*self.ways.held.of(chunk))}
        return found


GALERA = literal_column("@@wsrep_on", Integer())
SESSION: tuple[ColumnElement[Any], ...] = (
    func.database(type_=String()),
    literal_column("@@SESSION.time_zone", String()),
)
"""What the second connection has to have in common with the first."""


@contextmanager
def second_look(work: Work, ways: Ways, database: str, zone: str) -> Iterator[SecondLook]:
    """Open a second connection with the database, time zone and schema map of the first."""
    with _looker(work.connection).connect() as side:
        if side.info.get("atomic_claim") != (database, zone):
            quoted = side.dialect.identifier_preparer.quote_identifier(database)
            side.exec_driver_sql(f"USE {quoted}")
            side.execute(text("SET SESSION time_zone = :zone"), {"zone": zone})
            side.info["atomic_claim"] = database, zone
        options = work.connection.get_execution_options()
        if "schema_translate_map" in options:
            side.execution_options(schema_translate_map=options["schema_translate_map"])
        yield SecondLook(side, ways)


@contextmanager
def turn_at(
    work: Work, job_table: JobTable, asked: Sequence[ColumnElement[Any]] = ()
) -> Iterator[tuple[Any, ...]]:
    """Hold the lock under which claims of a table by exclusive keys look and mark.

    It belongs to the session, not to the transaction, and is given back before the transaction
    ends: the next claim sees uncommitted marks by its dirty look. ``asked`` is what is asked of
    the session on the way.
    """
    connection = work.connection
    schema = connection.schema_for_object(job_table.table)
    database = func.database() if schema is None else literal(schema)
    full_name = func.concat_ws(".", database, literal(job_table.table.name))
    digest = func.sha2(full_name, number(256))
    name = func.left(func.concat("atomic_claim.", digest), number(64))
    locked = func.get_lock(name, number(LONGEST_TURN)).label("is_locked")
    said = tuple(connection.execute(select(locked, *asked)).one())
    if said[0] != 1:
        raise ClaimConflict(
            f"claims from {job_table.table.fullname!r} have been waiting for each other for "
            f"{LONGEST_TURN} s: roll back, and claim again in a new transaction"
        )
    try:
        yield said[1:]
    finally:
        # A lost connection has lost its locks.
        if not connection.invalidated and not connection.closed:
            connection.execute(select(func.release_lock(name)))


def _looker(connection: Connection) -> Engine:
    """Return an engine for the same database whose connections are READ UNCOMMITTED."""
    dialect = connection.dialect
    pid, engine = lookers.get(dialect, (0, None))
    if engine is None or pid != os.getpid():
        engine = Engine(connection.engine.pool.recreate(), dialect, connection.engine.url)
        event.listen(engine, "connect", _read_uncommitted)
        lookers[dialect] = os.getpid(), engine
    return engine


def _read_uncommitted(driver: Any, _: Any) -> None:
    cursor = driver.cursor()
    cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ UNCOMMITTED")
    cursor.execute("SET SESSION autocommit = 1")
    cursor.close()


@event.listens_for(Engine, "engine_disposed")
def _dispose(engine: Engine) -> None:
    pid, looker = lookers.pop(engine.dialect, (0, None))
    if looker is not None and looker is not engine:
        # Another process's connections are not ours to close.
        looker.dispose(close=pid == os.getpid())
