"""Claims that are fair between keys: a turn in the order of the keys, whatever waits behind one.

A turn begins behind the key of the row that was claimed last. It takes the first row, in claim
order, of each of the next keys that have free rows, begins again at the smallest key after the
largest, and goes round again while rows are wanted. NULL is a key of its own, after the largest.
A row whose lease is over takes part if it is one of the first of those.

The rows are found through an index of (key, order), by a probe for each key: "the first rows
behind this key". So the cost grows with the number of rows that are wanted, not with the number of
keys or of waiting rows.

Where a claim writes its time, the row that was claimed last is found by an index on that time, so
that all workers share one turn. Each process also remembers the last row of its own. It goes on
from there if no row was claimed since, if its rows are deleted when they end, if the times have no
fractions of the second, or if there is no such column.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, groupby, islice
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import (
    ColumnElement,
    Dialect,
    Integer,
    Select,
    and_,
    bindparam,
    literal_column,
    select,
    true,
)

from atomic_claim.plan import MARGIN, SCAN_LIMIT, ClaimPlan
from atomic_claim.sql_elements import ByKey, OrderTerm, key_equals

from .base import Backend, Candidate, Transaction
from .reading import Key

T = TypeVar("T")
Condition = Callable[[Any], ColumnElement[bool]]

KEY = "atomic_claim_key"
FAIR = "atomic_claim_fair"
AFTER = "atomic_claim_after"
ROWS = "atomic_claim_rows"
MINE = "atomic_claim_mine_"
# Rows that one probe reads: where keys have few rows each, it finds several keys.
AHEAD = 10
# Calls with a ``where`` of their own have turns of their own; the latest are remembered.
MOST_KEPT = 1000


class Position(NamedTuple):
    """Where a turn stands: the key and the primary key of the row that was claimed last."""

    key: Any
    row: Key


positions: WeakKeyDictionary[Dialect, dict[Any, Position]] = WeakKeyDictionary()
"""The last rows that this process has claimed, by the dialect of their database and their turn."""


@dataclass(frozen=True, eq=False)
class FairSearch:
    """The statements that find the rows of a turn, made of the plan of a claim.

    Attributes:
        plan: the plan of the claim.
        backend: the database's.
        with_room: adds to a SELECT of rows whether their exclusive keys have room, if any have.
    """

    plan: ClaimPlan
    backend: Backend
    with_room: Callable[[Select[Any]], Select[Any]] | None = None

    # The statements.

    @cached_property
    def behind(self) -> Select[Any]:
        """The first rows behind a key, by key and claim order."""
        return self._rows(lambda key: key > self._after, walks=True)

    @cached_property
    def smallest(self) -> Select[Any]:
        """The first rows that have a key."""
        return self._rows(lambda key: key.is_not(None), walks=True)

    @cached_property
    def of_null(self) -> Select[Any]:
        """The first rows without a key."""
        return self._rows(lambda key: key.is_(None))

    @cached_property
    def of_key(self) -> Select[Any]:
        """The first rows of one key."""
        return self._rows(lambda key: key == self._after)

    @cached_property
    def newest(self) -> tuple[Select[Any], Select[Any]] | None:
        """The row that was claimed last: of all, and of those after one of this process's own.

        The latter reads rows that were claimed since and no others, so that it can regard the
        call's ``where``. It finds none if its own row is gone.
        """
        plan = self.plan
        if not (times := plan.job_table.claim_times):
            return None
        since, own = times[0], plan.job_table.table.alias("claim_mine")
        key = tuple(own.primary_key)
        given = [bindparam(f"{MINE}{place}", None, c.type) for place, c in enumerate(key)]
        mine = select(own.columns[since.key]).where(key_equals(key, given)).scalar_subquery()
        found = plan.source(*plan.key_attributes, self._column)
        found = found.order_by(since.desc(), self._column.desc()).limit(literal_column("1"))
        return found.where(since.is_not(None)), found.where(since > mine, *plan.conditions[1:])

    @property
    def statements(self) -> Sequence[Select[Any]]:
        """The statements of a turn, for people to read."""
        newest = () if self.newest is None else self.newest[1:]
        return (*newest, self.behind, self.smallest, self.of_null, self.of_key)

    def _rows(self, condition: Condition, *, walks: bool = False) -> Select[Any]:
        """Select the first rows whose key meets a condition, by key and claim order."""
        plan, most = self.plan, bindparam(ROWS, 1, Integer(), literal_execute=True)
        columns = [self._column.label(FAIR)]
        if self.with_room is not None:
            columns.append(plan.job_table.exclusive_by.label(KEY))
        free, *expired = (branch.add_columns(*columns) for branch in plan.candidates.branches)
        order = (self._column, *plan.order, *tie_breakers(plan))
        free = free.order_by(None).order_by(*order)
        found = free.where(condition(self._column))
        if walks and self.backend.has_lateral:
            found = self._walked(free, found)
        found = found.limit(most)
        if expired:
            # The first ones of all keys.
            rows = plan.candidates.together(found, *expired).subquery("claim_rows")
            key = rows.columns[FAIR]
            terms = [key, *plan.candidates.terms(rows)]
            found = select(*rows.columns).where(condition(key)).order_by(*terms).limit(most)
        return found if self.with_room is None else self.with_room(found)

    def _walked(self, free: Select[Any], first: Select[Any]) -> Select[Any]:
        """Select the first of these rows, and of each key behind its own the first one."""
        one: ColumnElement[int] = literal_column("1", Integer())
        turn = first.limit(one).cte("claim_turn", recursive=True)
        behind = free.where(self._column > turn.columns[FAIR]).limit(one).lateral("claim_behind")
        following = select(*behind.columns).select_from(turn.join(behind, true()))
        return select(*turn.union_all(following).columns)

    @property
    def _column(self) -> Any:
        return self.plan.job_table.fair_by

    @property
    def _after(self) -> ColumnElement[Any]:
        return bindparam(AFTER, None, self._column.type)

    # Their rows.

    @cached_property
    def key_of(self) -> Callable[[Sequence[Any]], Any]:
        """Return the fair key of a row."""
        return itemgetter(len(self.plan.candidates.branches[0].selected_columns))

    def candidate(self, row: Sequence[Any]) -> Candidate:
        """Make a candidate of a row."""
        width = len(self.plan.job_table.key)
        alone = row[width] if self.plan.candidates.tells_alone else 0
        key, lock, has_room = row[-3:] if self.with_room else (None, None, True)
        fair = (self.key_of(row),)
        return Candidate(tuple(row[:width]), key, lock, alone, fair, bool(has_room))

    # The position of the turn.

    def position(self, tx: Transaction) -> Position | None:
        """Return where the turn stands."""
        kept = positions.get(tx.connection.dialect, {})
        mine = next((kept[name] for name in self._names(tx) if name in kept), None)
        if self.newest is None:
            return mine
        first, following = self.newest
        if mine is None:
            found = tx.tuples(first)
        else:
            given = {f"{MINE}{place}": value for place, value in enumerate(mine.row)}
            found = tx.tuples(following, given)
        return Position(found[0][-1], found[0][:-1]) if found else mine

    def remember(self, tx: Transaction, taken: Sequence[Candidate]) -> None:
        """Remember the last of the rows that a claim has taken in a turn."""
        if not taken or not taken[-1].fair:
            return
        kept = positions.setdefault(tx.connection.dialect, {})
        for name in self._names(tx):
            kept.pop(name, None)
            kept[name] = Position(taken[-1].fair[0], taken[-1].row)
        for name in list(kept)[:-MOST_KEPT]:
            kept.pop(name, None)

    def _names(self, tx: Transaction) -> Sequence[Any]:
        """Return what tells this turn from others, and the same without the values in it.

        Values may be other ones at each call, such as times.
        """
        job_table, dialect = self.plan.job_table, tx.connection.dialect
        if (said := self._texts.get(dialect.name)) is None:
            compiled = and_(*self.plan.conditions).compile(dialect=dialect)
            said = self._texts[dialect.name] = str(compiled), repr(compiled.params)
        schema = tx.connection.schema_for_object(job_table.table)
        turn = (schema, job_table.table.name, self._column.name, job_table.entity, said[0])
        return (*turn, said[1]), turn

    @cached_property
    def _texts(self) -> dict[str, tuple[str, str]]:
        return {}


@dataclass
class Turn:
    """The rows of one turn, read as far as they are asked for.

    Attributes:
        search: its statements.
        tx: where they run.
        limit: how many rows the claim wants.
        rows: what was asked for, by primary key, in the order of the turn.
        known: the first rows of each key, as far as they were read.
        cut: the keys that may have more rows than are known.
    """

    search: FairSearch
    tx: Transaction
    limit: int
    rows: dict[Key, Candidate] = field(default_factory=dict)
    known: dict[str, list[Any]] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)

    def first(self, number: int) -> list[Candidate]:
        """Return the first rows of the turn, fewer if there are no more."""
        deque(islice(self.following, max(0, number - len(self.rows))), 0)
        return list(self.rows.values())[:number]

    @cached_property
    def following(self) -> Iterator[Candidate]:
        """The rows that were not asked for yet."""
        return self._each_once()

    def _each_once(self) -> Iterator[Candidate]:
        for candidate in map(self.search.candidate, self._in_rounds()):
            if candidate.row not in self.rows:
                self.rows[candidate.row] = candidate
                yield candidate

    def _in_rounds(self) -> Iterator[Any]:
        """Yield the first row of each key, then the second, and so on."""
        yield from self._heads()
        for place in count(1):
            is_over = True
            for name, rows in self.known.items():
                if place == len(rows) and name in self.cut:
                    self._read_on(name, rows)
                if place < len(rows):
                    is_over = False
                    yield rows[place]
            if is_over:
                return

    def _heads(self) -> Iterator[Any]:
        """Yield the first row of each key, from the position all around."""
        search, position = self.search, self.search.position(self.tx)
        parts = [(search.smallest, None), (search.of_null, None)]
        if position is not None and position.key is not None:
            parts = [(search.behind, position.key), *reversed(parts)]
        walks = search.backend.has_lateral
        ahead = self.limit if walks else min(self.limit, AHEAD)
        for statement, key in parts:
            rows = self._read(statement, key, ahead)
            while rows:
                *whole, last = (list(each) for _, each in groupby(rows, search.key_of))
                for each in (*whole, last):
                    if (name := repr(search.key_of(each[0]))) in self.known:
                        return
                    self.known[name] = each
                    if walks or (each is last and len(rows) == ahead):
                        self.cut.add(name)
                    yield each[0]
                if len(rows) < ahead or statement is search.of_null:
                    break
                rows = self._read(search.behind, search.key_of(last[0]), ahead)

    def _read_on(self, name: str, rows: list[Any]) -> None:
        """Read more rows of a key."""
        key, number = self.search.key_of(rows[0]), 4 * len(rows) + AHEAD
        statement = self.search.of_null if key is None else self.search.of_key
        found = self._read(statement, key, number)
        width = len(self.search.plan.job_table.key)
        ids = {row[:width] for row in rows}
        rows += (row for row in found if row[:width] not in ids)
        if len(found) < number:
            self.cut.discard(name)

    def _read(self, statement: Select[Any], key: Any, number: int) -> Sequence[Any]:
        given = {AFTER: key, ROWS: number, SCAN_LIMIT: self.limit + MARGIN}
        return self.tx.tuples(statement, given)


def lock_in_turn(
    tx: Transaction, search: FairSearch, limit: int, locking: ByKey | None
) -> list[Key]:
    """Lock the first rows of a turn, and return their keys in its order.

    Args:
        tx: where it runs.
        search: the statements of the turn.
        limit: how many rows at most.
        locking: locks those of some rows that are free and not locked; None if nothing can be
            locked by others.
    """
    turn, tried = Turn(search, tx, limit), 0
    found: list[Candidate] = []
    while len(found) < limit and not (found and found[0].alone):
        fresh = turn.first(tried + limit - len(found))[tried:]
        if not fresh:
            break
        tried += len(fresh)
        for batch in in_one_claim(fresh, attrgetter("alone")):
            if found and (batch[0].alone or found[0].alone):
                continue
            if locking is not None:
                rows = [each.row for each in batch]
                held = {tuple(row) for _, result in tx.by_key(locking, rows) for row in result}
                found += (each for each in batch if each.row in held)
            else:
                found += batch
    search.remember(tx, found)
    return [each.row for each in found]


def first_with_room(search: FairSearch, limit: int, tx: Transaction) -> list[Candidate]:
    """Return the first rows of a turn whose exclusive keys have room, beside each other too.

    Not all rows are looked at: most keys may be busy.
    """
    found: list[Candidate] = []
    counts: Counter[str] = Counter()
    for each in islice(Turn(search, tx, limit).following, limit + MARGIN):
        if each.key is not None:
            counts[repr(each.key)] += 1
        if each.has_room and counts[repr(each.key)] <= search.plan.job_table.max_per_key:
            found.append(each)
        if len(found) == limit:
            break
    return found


def in_one_claim(candidates: Sequence[T], is_alone: Callable[[T], Any]) -> list[list[T]]:
    """Part candidates in claim order into lists that may be claimed together, in the same order.

    A row that is claimed alone is a list; all others are one, in the place of their first.
    """
    found: list[list[T]] = []
    others: list[T] = []
    for candidate in candidates:
        if is_alone(candidate):
            found.append([candidate])
            continue
        if not others:
            found.append(others)
        others.append(candidate)
    return found


def tie_breakers(plan: ClaimPlan) -> list[ColumnElement[Any]]:
    """Return what puts rows of one place in an order, where it takes several columns.

    It goes the way of the last term, as an index does.
    """
    key: Any = plan.key_attributes
    if len(key) == 1:
        return []
    descends = OrderTerm.of(plan.order[-1]).descending
    return [column.desc() if descends else column.asc() for column in key]
