"""Claims by exclusive keys: of the rows with one key no more than some run, in claim order.

A key's running rows are those that bear the mark of a claim and whose lease, if they have one,
is not over; so a crashed holder frees its key with its lease. The rule on all databases: whatever
makes or keeps a row running (a claim, an extension) locks the key first, looks for running rows
in a later statement that reads committed data, and keeps the lock until the commit. An end that is
not committed still counts as running.

* PostgreSQL locks the keys of the candidates (``pg_try_advisory_xact_lock``); a key that another
  transaction holds is passed over.
* MySQL and MariaDB hold a named lock of the table (``GET_LOCK``) until after the commit, so the
  claim has a transaction of its own. It is READ COMMITTED, so each look is newer than the lock.
* SQLite has one writer, and the claim takes the write lock first.

The candidates are read without locks, in two searches. The *window* is the first free rows in
claim order. If it is full and too few of its keys have room, the *heads* are read: the first rows
of every key that has free rows, one step in an index of (key, order) each. So a busy key with a
million waiting rows costs a step, and the cost grows with the number of keys that have free rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from operator import attrgetter
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.sql import visitors
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import Label

from atomic_claim import predicates
from atomic_claim.plan import LIMIT, MARGIN, SCAN_LIMIT, ClaimPlan
from atomic_claim.sql_elements import ByKey, labelled_terms

from .base import CHUNK, Backend, Mark, Transaction, locking_by_key, mark_and_load, marked_by_key
from .fair import FairSearch, in_one_claim, tie_breakers, without_terms
from .reading import KEY, LOCK, ROOM, Candidate, Key, KeyedRows, Tried, take_first

PLACE = "atomic_claim_place"
# Rows of one key that its heads find at most.
MOST_HEADS = 10


@dataclass(frozen=True, eq=False)
class KeySearch:
    """The statements that find rows whose keys have room, made of the plan of a claim.

    Attributes:
        backend: the database's.
        plan: the plan of the claim, which does not regard keys.
    """

    plan: ClaimPlan
    backend: Backend

    # The statements.

    @cached_property
    def window(self) -> sa.Select[Any]:
        """The first rows in claim order, whether their keys have room or not."""
        return self._first("first", *self._branches)

    @cached_property
    def heads(self) -> sa.Select[Any]:
        """The first rows in claim order of all keys that have free rows and room; and others.

        Those are rows without a key and rows whose lease is over, whether they have room or not.
        """
        first, *expired = self._branches
        keys = self._walked_keys() if self.backend.walks_keys else self._distinct_keys()
        free = first.order_by(None).order_by(self._column, *self.plan.order)
        of_key = free.where(self._column == keys.columns[KEY])
        of_key = of_key.order_by(*tie_breakers(self.plan))
        most = min(self.plan.job_table.max_per_key, MOST_HEADS)
        heads = [self._one_by_one(of_key, place, keys) for place in range(most)]
        without = first.where(self._column.is_(None))
        return self._first("heads", *heads, without, *expired)

    @cached_property
    def chosen(self) -> ByKey:
        """Select, of rows given by key, those whose exclusive keys have room, in claim order."""

        def build(is_one: sa.ColumnElement[bool]) -> sa.Select[Any]:
            given = self.plan.candidates.rows.where(is_one)
            given = given.add_columns(*labelled_terms(self.plan.order), self._column.label(KEY))
            read = given.cte("atomic_claim_given")
            order = [*self.plan.candidates.terms(read), *self._ids(read)]
            key = read.columns[KEY]
            place = sa.func.row_number().over(partition_by=key, order_by=order).label(PLACE)
            rows = sa.select(read, place).subquery("atomic_claim_placed")
            has_room = sa.or_(rows.columns[KEY].is_(None), rows.columns[PLACE] <= self._room(rows))
            found = cast("sa.Select[Any]", sa.select(*self._ids(rows)).where(has_room))
            return found.order_by(*self.plan.candidates.terms(rows))

        return ByKey(self.plan.key_attributes, build)

    @cached_property
    def locking(self) -> ByKey:
        """Lock the rows given by key that are free and not locked; return both their keys."""
        return locking_by_key(self.plan, self.backend, self._column)

    @cached_property
    def turns(self) -> FairSearch | None:
        """The search that takes turns, if the table declares one."""
        if self.plan.job_table.fair_by is None:
            return None
        return FairSearch(self.plan, self.backend, self._told)

    # The search.

    def batches(self, tx: Transaction, limit: int) -> Iterator[list[Candidate]]:
        """Yield lists of candidates, each once, in claim order, until there are no more.

        The candidates of a list may be claimed together. Those of the lists between two reads are
        enough for the limit, as far as it was read. Where claims take turns, the first lists are in
        the order of the turn.
        """
        tried: set[Key] = set()
        pending: list[Candidate] = []
        number = limit + MARGIN
        found = tx.execute(self.window, {SCAN_LIMIT: number}).all()
        if not found:
            return
        if self.turns is not None:
            # Not all rows are looked at: most keys may be busy.
            first = islice(self.turns.turn(tx, limit), number)
            pending = list(islice(_having_room(first), limit))
            tried.update(each.row for each in pending)
            if len(pending) == limit:
                yield from in_one_claim(pending, attrgetter("alone"))
                pending = []
        while True:
            is_all = len(found) < number
            candidates = (Candidate.of(row, self.plan.job_table) for row in found)
            fresh = [each for each in candidates if each.row not in tried]
            pending = list(_having_room([*pending, *fresh]))
            tried.update(each.row for each in pending)
            if pending and (is_all or len(pending) >= limit):
                yield from in_one_claim(pending, attrgetter("alone"))
                pending = []
            if is_all:
                return
            number *= 4
            found = tx.execute(self.heads, {SCAN_LIMIT: number}).all()

    def lock(
        self, tx: Transaction, candidates: Sequence[Candidate], limit: int
    ) -> tuple[list[Key], Sequence[Candidate]]:
        """Lock the first candidates whose keys have room.

        Returns:
            Their primary keys in claim order, and the candidates that were not tried.
        """
        job_table = self.plan.job_table
        tx.backend.key_locks.lock_table(tx, job_table)
        tried, rest = tx.backend.key_locks.lock(tx, job_table, candidates[:CHUNK], limit)
        rest = [*rest, *candidates[CHUNK:]]
        tx.refuse_autocommit("the locks would be gone before the rows are marked")
        if not tried:
            return [], rest
        keys = {each.row: each.key for each in tried}
        chosen = tx.tuples(*self.chosen.of(list(keys)))
        if self.turns is not None:
            chosen = list(filter(set(chosen).__contains__, keys))
        chosen = chosen[:limit]
        if len(chosen) == limit:
            last = 1 + max(map(list(keys).index, chosen))
            rest = [*tried[last:], *rest]
        held = tx.tuples(*self.locking.of(chosen)) if chosen else []
        # A row may have been given another key since the search.
        ours = {row[:-1] for row in held if row[-1] == keys[row[:-1]]}
        return [row for row in chosen if row in ours], rest

    # The pieces.

    @property
    def _column(self) -> Any:
        return self.plan.job_table.exclusive_by

    @property
    def _branches(self) -> list[sa.Select[Any]]:
        key, found = self._column.label(KEY), self.plan.candidates
        return [branch.add_columns(key).limit(found.scan_limit) for branch in found.branches]

    def _first(self, name: str, *branches: sa.Select[Any]) -> sa.Select[Any]:
        """Select the first rows that these SELECTs find, in a CTE, which MySQL reads once."""
        only, found = len(branches) == 1, self.plan.candidates
        rows: sa.Select[Any] | sa.CompoundSelect[Any]
        rows = branches[0] if only else found.together(*branches)
        return self._told(rows.cte(f"atomic_claim_{name}")).limit(found.scan_limit)

    def _room(self, rows: sa.FromClause) -> sa.ColumnElement[int]:
        """Count how many more rows may run that have the key of a row."""
        job_table, key = self.plan.job_table, rows.columns[KEY]
        running = sa.select(sa.func.count()).select_from(job_table.table)
        running = running.where(self._column == key, predicates.is_held(job_table))
        return _number(job_table.max_per_key) - running.correlate(rows).scalar_subquery()

    def _told(self, rows: sa.FromClause, *order: sa.ColumnElement[Any]) -> sa.Select[Any]:
        """Select what a :class:`Candidate` is made of, in an order and then in claim order."""
        lock = self.backend.key_locks.number(rows.columns[KEY]).label(LOCK)
        found = sa.select(*without_terms(rows.columns), lock, self._room(rows).label(ROOM))
        return found.order_by(*order, *self.plan.candidates.terms(rows))

    def _ids(self, found: sa.FromClause) -> list[sa.ColumnElement[Any]]:
        columns: list[sa.ColumnElement[Any]] = list(found.columns)
        return columns[: len(self.plan.job_table.key)]

    # The keys that have free rows.

    def _walked_keys(self) -> sa.CTE:
        """Walk an index from key to key, with one step for each; a NULL ends it."""
        free = sa.select(self._column).where(predicates.is_free(self.plan.job_table))
        free = free.order_by(self._column).limit(_number(1))
        first = free.where(self._column.is_not(None)).scalar_subquery()
        keys = sa.select(first.label(KEY)).cte("atomic_claim_free_keys", recursive=True)
        following = free.where(self._column > keys.columns[KEY]).correlate(keys)
        return keys.union_all(
            sa.select(following.scalar_subquery()).where(keys.columns[KEY].is_not(None))
        )

    def _distinct_keys(self) -> sa.CTE:
        """Read the keys with DISTINCT, where the planner skips from key to key by itself.

        It does if the columns before the key in the index are selected, too. The second DISTINCT
        has MySQL read them once, not once for each place that names them.
        """
        free = predicates.is_free(self.plan.job_table)
        own = self.plan.job_table.table.columns
        named = dict.fromkeys(
            part for part in visitors.iterate(free) if isinstance(part, sa.Column)
        )
        columns = [part for part in named if part is not self._column and own.contains_column(part)]
        found = sa.select(*columns, self._column.label(KEY)).where(free).distinct()
        some = found.subquery("atomic_claim_some_keys")
        return sa.select(some.columns[KEY].label(KEY)).distinct().cte("atomic_claim_free_keys")

    def _one_by_one(self, rows: sa.Select[Any], place: int, keys: sa.CTE) -> sa.Select[Any]:
        """Select a row of each key that has room for it, with a scalar subquery for each column."""
        row = rows.limit(_number(1)).offset(_number(place)).correlate(keys)
        columns = list(row.selected_columns)[:-1]
        # The order may be that of the primary key, which need not be looked for twice.
        asked = {
            element: row.with_only_columns(element).scalar_subquery()
            for element in map(_unlabelled, columns)
        }
        found = sa.select(*asked.values(), keys.columns[KEY].label(KEY)).select_from(keys)
        found = found.where(self._room(keys) > _number(place))
        values = list(found.subquery("atomic_claim_head").columns)
        places = {element: place for place, element in enumerate(asked)}
        named = [values[places[_unlabelled(column)]].label(column.key) for column in columns]
        head = cast("sa.Select[Any]", sa.select(*named, values[-1].label(KEY)))
        return head.where(values[0].is_not(None))


def _having_room(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Yield the candidates whose exclusive keys have room beside those before them."""
    counts: Counter[str] = Counter()
    for each in candidates:
        # Of keys that cannot be hashed, too.
        counts[repr(each.key)] += 1
        if each.key is None or counts[repr(each.key)] <= each.room:
            yield each


def _number(value: int) -> sa.ColumnElement[int]:
    return sa.literal_column(str(value), sa.Integer())


def _unlabelled(column: Any) -> Any:
    return column.element if isinstance(column, Label) else column


def statements_of(
    backend: Backend, plan: ClaimPlan, *finding: Executable | ByKey
) -> Sequence[Executable | ByKey]:
    """Return the statements of a claim in steps, but for the locks of exclusive keys."""
    job_table = plan.job_table
    found: Sequence[Executable | ByKey] = finding
    if job_table.exclusive_by is not None:
        search = plan.prepare(KeySearch, backend)
        turn = () if search.turns is None else search.turns.statements
        found = (search.window, *turn, search.chosen, search.locking)
    elif job_table.fair_by is not None:
        locking = plan.prepare(locking_by_key, backend)
        found = (*plan.prepare(FairSearch, backend).statements, locking)
    return (*found, *marked_by_key(plan, backend))


def claim_by_key(
    tx: Transaction, plan: ClaimPlan, params: dict[str, Any], mark: Mark | None = None
) -> KeyedRows:
    """Claim by exclusive keys as many rows as the limit allows, as far as their keys have room.

    Search, lock the keys, look which of the rows have room beside the running ones, lock the rows,
    and mark them: a statement each.
    """
    search, limit = plan.prepare(KeySearch, tx.backend), params[LIMIT]
    found: KeyedRows = []

    def take(candidates: Sequence[Candidate], wanted: int) -> Tried:
        ours, rest = search.lock(tx, candidates, wanted)
        marked = (mark or mark_and_load)(tx, plan, ours, params)
        found.extend(marked)
        keys = {key for key, _ in marked}
        return [each for each in candidates if each.row in keys], rest

    try:
        tx.backend.before_search(tx, plan.job_table)
    finally:
        # Of a view, SQLite says no more than that it cannot be changed.
        tx.backend.key_locks.check(tx, plan.job_table)
    taken = take_first(search.batches(tx, limit), limit, take)
    if search.turns is not None:
        search.turns.remember(tx, taken)
    return found
