"""Claims that are fair between keys: a turn in the order of the keys, whatever waits behind one.

A turn begins behind the key of the row that was claimed last. It takes the first row, in claim
order, of each of the next keys that have free rows, begins again at the smallest key after the
largest, and goes round again while rows are wanted. NULL is a key of its own, after the largest.
A row whose lease is over takes part if it is one of the first of those.

The rows are found through an index of (key, order), by a probe for each key: "the first rows
behind this key". PostgreSQL makes the probes of a round in one statement. So the cost grows with
the number of rows that are wanted, not with the number of keys or of waiting rows.

Where a claim writes its time, the row that was claimed last is found by an index on that time, so
that all workers share one turn. Each process also remembers the last row of its own. It goes on
from there if no row was claimed since, if its rows are deleted when they end, if the times have no
fractions of the second, or if there is no such column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count, groupby, islice, zip_longest
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from atomic_claim.plan import MARGIN, SCAN_LIMIT, ClaimPlan
from atomic_claim.sql_elements import ORDER, ByKey, OrderTerm

from .base import Backend, Transaction, locking_by_key
from .reading import FAIR, KEY, Candidate, Key, Tried, take_first

T = TypeVar("T")
Condition = Callable[[Any], sa.ColumnElement[bool]]

_fair_of = attrgetter(FAIR)
AFTER = "_atomic_claim_after"
ROWS = "_atomic_claim_rows"
# Rows that one probe reads: where keys have few rows each, it finds several keys.
AHEAD = 10
# Calls with a ``where`` of their own have turns of their own; the latest are remembered.
MOST_KEPT = 1000


class Position(NamedTuple):
    """Where a turn stands: the key and the primary key of the row that was claimed last."""

    key: Any
    row: Key


positions: WeakKeyDictionary[sa.Dialect, dict[Any, Position]] = WeakKeyDictionary()
"""The last rows that this process has claimed, by the dialect of their database and their turn."""


@dataclass(frozen=True, eq=False)
class FairSearch:
    """The statements that find the rows of a turn, made of the plan of a claim.

    Attributes:
        plan: the plan of the claim.
        backend: the database's.
        told: selects rows with the room of their exclusive keys, in an order, if any have.
    """

    plan: ClaimPlan
    backend: Backend
    told: Callable[[sa.FromClause, sa.ColumnElement[Any]], sa.Select[Any]] | None = None

    # The statements.

    @cached_property
    def behind(self) -> sa.Select[Any]:
        """The first rows behind a key, by key and claim order."""
        return self._rows(lambda key: key > self._after, walks=True)

    @cached_property
    def smallest(self) -> sa.Select[Any]:
        """The first rows that have a key."""
        return self._rows(lambda key: key.is_not(None), walks=True)

    @cached_property
    def of_null(self) -> sa.Select[Any]:
        """The first rows without a key."""
        return self._rows(lambda key: key.is_(None))

    @cached_property
    def of_key(self) -> sa.Select[Any]:
        """The first rows of one key."""
        return self._rows(lambda key: key == self._after)

    @cached_property
    def newest(self) -> tuple[sa.Select[Any], ByKey] | None:
        """The row that was claimed last: of all, and of those after one of this process's own.

        The latter reads rows that were claimed since and no others, so that it can regard the
        call's ``where``. It finds none if its own row is gone.
        """
        plan = self.plan
        if not (times := plan.job_table.claim_times):
            return None
        since, own = times[0], plan.job_table.table.alias("claim_mine")
        mine = sa.select(own.columns[since.key])
        found = plan.source(*plan.key_attributes, self._column)
        found = found.order_by(since.desc(), self._column.desc()).limit(sa.literal_column("1"))

        def following(is_mine: sa.ColumnElement[bool]) -> sa.Select[Any]:
            is_later = since > mine.where(is_mine).scalar_subquery()
            return found.where(is_later, *plan.conditions[1:])

        return found.where(since.is_not(None)), ByKey(tuple(own.primary_key), following)

    @property
    def statements(self) -> Sequence[sa.Select[Any] | ByKey]:
        """The statements of a turn, for people to read."""
        newest = () if self.newest is None else self.newest[1:]
        return (*newest, self.behind, self.smallest, self.of_null, self.of_key)

    def _rows(self, condition: Condition, *, walks: bool = False) -> sa.Select[Any]:
        """Select the first rows whose key meets a condition, by key and claim order."""
        plan, most = self.plan, sa.bindparam(ROWS, 1, sa.Integer(), literal_execute=True)
        columns = [self._column.label(FAIR)]
        if self.told is not None:
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
            found = sa.select(*rows.columns).where(condition(key)).order_by(*terms).limit(most)
        if self.told is None:
            return found.with_only_columns(*without_terms(found.selected_columns))
        rows = found.subquery("atomic_claim_turn")
        return self.told(rows, rows.columns[FAIR])

    def _walked(self, free: sa.Select[Any], first: sa.Select[Any]) -> sa.Select[Any]:
        """Select the first of these rows, and of each key behind its own the first one."""
        one: sa.ColumnElement[int] = sa.literal_column("1", sa.Integer())
        turn = first.limit(one).cte("atomic_claim_turns", recursive=True)
        behind = free.where(self._column > turn.columns[FAIR]).limit(one).lateral("claim_behind")
        following = sa.select(*behind.columns).select_from(turn.join(behind, sa.true()))
        return sa.select(*turn.union_all(following).columns)

    @property
    def _column(self) -> Any:
        return self.plan.job_table.fair_by

    @property
    def _after(self) -> sa.ColumnElement[Any]:
        return sa.bindparam(AFTER, None, self._column.type)

    # The position of the turn.

    def position(self, tx: Transaction) -> Position | None:
        """Return where the turn stands."""
        kept = positions.get(tx.connection.dialect, {})
        mine = next((kept[name] for name in self._names(tx) if name in kept), None)
        if self.newest is None:
            return mine
        first, following = self.newest
        found = tx.tuples(first) if mine is None else tx.tuples(*following.of([mine.row]))
        return Position(found[0][-1], found[0][:-1]) if found else mine

    def remember(self, tx: Transaction, taken: Sequence[Candidate]) -> None:
        """Remember the last of the rows that a claim has taken in a turn."""
        if not (last := [each for each in taken if each.fair][-1:]):
            return
        kept = positions.setdefault(tx.connection.dialect, {})
        for name in self._names(tx):
            kept.pop(name, None)
            kept[name] = Position(last[0].fair[0], last[0].row)
        for name in list(kept)[:-MOST_KEPT]:
            kept.pop(name, None)

    def _names(self, tx: Transaction) -> Sequence[Any]:
        """Return what tells this turn from others, and the same without the values in it.

        Values may be other ones at each call, such as times.
        """
        table = self.plan.job_table.table
        text, values = self._said
        turn = (tx.connection.schema_for_object(table), table.name, self._column.name, text)
        return (*turn, values), turn

    @cached_property
    def _said(self) -> tuple[str, str]:
        compiled = sa.and_(*self.plan.conditions).compile()
        return f"{self.plan.job_table.entity} {compiled}", repr(compiled.params)

    # The turn.

    def turn(self, tx: Transaction, limit: int) -> Iterator[Candidate]:
        """Yield the rows of a turn: the first of each key, then the second, and so on.

        They are read as they are asked for.
        """
        seen = set[Key]()
        for row in self._in_rounds(tx, limit):
            each = Candidate.of(row, self.plan.job_table)
            if each.row not in seen:
                seen.add(each.row)
                yield each

    def _in_rounds(self, tx: Transaction, limit: int) -> Iterator[sa.Row[Any]]:
        keys: dict[str, Any] = {}
        for row in self._heads(tx, limit):
            key = _fair_of(row)
            if repr(key) in keys:
                break
            keys[repr(key)] = key
            yield row
        step = -(-limit // max(1, len(keys)))
        for place in count(1, step):
            rounds = [self._of_key(tx, key, place + step)[place:] for key in keys.values()]
            if not any(rounds):
                return
            yield from filter(None, chain.from_iterable(zip_longest(*rounds)))

    def _heads(self, tx: Transaction, limit: int) -> Iterator[sa.Row[Any]]:
        """Yield the first row of each key, from the position on, until a key comes again."""
        position = self.position(tx)
        parts = [(self.smallest, None), (self.of_null, None)]
        if position is not None and position.key is not None:
            parts = [(self.behind, position.key), *reversed(parts)]
        ahead = limit if self.backend.has_lateral else min(limit, AHEAD)
        for statement, key in parts:
            rows = self._read(tx, statement, key, ahead)
            while rows:
                yield from (next(each) for _, each in groupby(rows, _fair_of))
                if len(rows) < ahead or statement is self.of_null:
                    break
                rows = self._read(tx, self.behind, _fair_of(rows[-1]), ahead)

    def _of_key(self, tx: Transaction, key: Any, number: int) -> Sequence[sa.Row[Any]]:
        return self._read(tx, self.of_null if key is None else self.of_key, key, number)

    def _read(
        self, tx: Transaction, statement: sa.Select[Any], key: Any, number: int
    ) -> Sequence[sa.Row[Any]]:
        given = {AFTER: key, ROWS: number, SCAN_LIMIT: number + MARGIN}
        return tx.execute(statement, given).all()


def lock_in_turn(tx: Transaction, plan: ClaimPlan, limit: int) -> list[Key]:
    """Lock the first rows of a turn, and return their keys in its order."""
    search = plan.prepare(FairSearch, tx.backend)
    locking, turn = plan.prepare(locking_by_key, tx.backend), search.turn(tx, limit)

    def batches() -> Iterator[list[Candidate]]:
        while fresh := list(islice(turn, limit)):
            yield from in_one_claim(fresh, attrgetter("alone"))

    def lock(candidates: Sequence[Candidate], wanted: int) -> Tried:
        tried = candidates[:wanted]
        locked = {
            tuple(row)
            for _, rows in tx.by_key(locking, [each.row for each in tried])
            for row in rows
        }
        return [each for each in tried if each.row in locked], candidates[wanted:]

    found = take_first(batches(), limit, lock)
    search.remember(tx, found)
    return [each.row for each in found]


def without_terms(columns: Iterable[sa.ColumnElement[Any]]) -> list[sa.ColumnElement[Any]]:
    """Return columns without the terms of the order, which the driver may not be able to read."""
    return [column for column in columns if not str(column.key).startswith(ORDER)]


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


def tie_breakers(plan: ClaimPlan) -> list[sa.ColumnElement[Any]]:
    """Return what puts rows of one place in an order, where it takes several columns.

    It goes the way of the last term, as an index does.
    """
    key: Any = plan.key_attributes
    if len(key) == 1:
        return []
    descends = OrderTerm.of(plan.order[-1]).descending
    return [column.desc() if descends else column.asc() for column in key]
