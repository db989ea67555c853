"""Exclusive keys: of the rows with one key no more than some run at a time, in claim order.

A key's running rows are those that bear the mark of a claim and whose lease, if they have one,
is not over; so a crashed holder frees its key with its lease. That a row may be claimed is decided
inside the claim, by what each database offers for it:

* PostgreSQL locks the keys of the candidates for the rest of the transaction
  (``pg_try_advisory_xact_lock``; a key that another claim holds is passed over) and looks for
  running rows in a later statement, whose snapshot is younger than the lock, or in the same one
  where no transaction was committed in between. The transaction has to be READ COMMITTED, and
  every key takes a place in the server's lock table (``max_locks_per_transaction``).
* MySQL and MariaDB hold a named lock of the table (``GET_LOCK``) from the look to the mark, not to
  the commit. Uncommitted marks are seen by a second connection, which reads uncommitted rows and
  then the committed ones: a row whose end may still be rolled back runs. On a cluster with several
  writable nodes such a lock is one node's, and keys are not exclusive there: a Galera node is
  refused, other clusters cannot be told.
* SQLite has one writer, whose statement decides alone.

Which rows come next is looked for in three ways, each where the one before it did not find
enough. The first rows in claim order are numbered key by key. If they are all of keys that are
busy, the keys themselves are walked, with one step in the index for each, up to ``MOST_KEYS`` of
them; if there are more, the rows are read in claim order and those of busy keys passed over, one
by one. So a busy key with a million rows costs a step, unless there are more than ``MOST_KEYS``
keys with waiting rows. Wanted are an index of the free rows by key and claim order, and one of the
running rows by key; ``atomic-claim migration`` writes both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import (
    CTE,
    Column,
    ColumnElement,
    CompoundSelect,
    FromClause,
    Integer,
    Select,
    and_,
    bindparam,
    case,
    func,
    literal_column,
    not_,
    or_,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import Label

from .statement import LIMIT, ORDER, REACH, ClaimParts, OrderTerm

KEY = "claim_key"
PLACE = "claim_place"
# Recursion ends at 1,000 steps on MySQL and MariaDB.
MOST_KEYS = 900
# So many rows more than are wanted are looked at before the keys are.
NEAR = 16
# So many claims that found enough by key begin with that, before the first rows are tried again.
CLAIMS_BY_KEY = 32
# So many of a key's rows are found by its first ones where LATERAL is not to be had.
MOST_FIRST = 10

Only = Callable[[Select[Any], ColumnElement[int]], Select[Any]]
"""Limits a SELECT, if it is to read anything."""


@dataclass
class Habit:
    """How the claims by exclusive keys of one shape have been going.

    Attributes:
        pause: how many of them do not try to be one statement.
        first: which way of searching they begin with.
        left: how many of them do so before they try the first again.
    """

    pause: int = 0
    first: int = 0
    left: int = 0

    def found(self, place: int) -> None:
        """Begin with the way that has found enough, for a while."""
        if place > self.first:
            self.first, self.left = place, CLAIMS_BY_KEY
        elif self.first and (left := self.left - 1) >= 0:
            self.first, self.left = (place if left else 0), left


@dataclass(frozen=True, eq=False)
class Turns:
    """The pieces that find whose turn it is, made of the parts of a claim.

    Attributes:
        parts: the parts of the claim, which know nothing of keys.
        lateral: whether the database has LATERAL.
    """

    parts: ClaimParts
    lateral: bool = False

    @property
    def column(self) -> Any:
        """The column of the key."""
        return self.parts.job_table.exclusive_by

    @property
    def most(self) -> ColumnElement[int]:
        """How many rows of a key may run."""
        return number(self.parts.job_table.max_per_key)

    @property
    def limit(self) -> ColumnElement[int]:
        """How many rows are wanted."""
        return bindparam(LIMIT, 1, Integer(), literal_execute=True)

    @property
    def reach(self) -> ColumnElement[int]:
        """How many rows are looked at."""
        return bindparam(REACH, 1, Integer(), literal_execute=True)

    def near(self, name: str, only: Only) -> CTE:
        """Build the CTE of the first rows in claim order, whatever their keys."""
        return self._together(*(only(branch, self.reach) for branch in self._branches)).cte(name)

    def passing(self, name: str, only: Only) -> CTE:
        """Build the CTE of the first rows in claim order whose keys are below their limit."""
        first, *others = self._branches
        held = self.parts.job_table.is_held
        busy = select(self.column).where(self.column.is_not(None), held).group_by(self.column)
        if self.parts.job_table.max_per_key > 1:
            busy = busy.having(func.count() >= self.most)
        first = first.where(or_(self.column.is_(None), self.column.not_in(busy)))
        return self._together(*(only(each, self.reach) for each in (first, *others))).cte(name)

    def keys(self, name: str, *conditions: ColumnElement[bool]) -> CTE:
        """Build the recursive CTE of the free rows' keys, up to ``MOST_KEYS``; a NULL ends it.

        Of a key not all rows are read, but the first entry in an index.
        """
        free = (
            select(self.column)
            .where(self.parts.job_table.is_free)
            .order_by(self.column)
            .limit(number(1))
        )
        first = free.where(self.column.is_not(None)).scalar_subquery()
        found = select(first.label(KEY), number(1).label("step")).where(*conditions)
        keys = found.cte(name, recursive=True)
        following = free.where(self.column > keys.columns[KEY]).correlate(keys).scalar_subquery()
        step = keys.columns["step"]
        further = select(following, step + number(1)).where(
            keys.columns[KEY].is_not(None), step <= number(MOST_KEYS)
        )
        return keys.union_all(further)

    def heads(self, name: str, *conditions: ColumnElement[bool]) -> CTE:
        """Build the recursive CTE of each key's first row; one index step finds key and row.

        For databases that have LATERAL, and for one row of a key. In place of an end, ``step``
        counts the keys, as far as ``MOST_KEYS`` go.
        """
        branch = self._branches[0].order_by(None).limit(number(1))
        branch = branch.order_by(self.column, *self.parts.order)
        first = branch.where(self.column.is_not(None), *conditions).subquery("claim_first")
        heads = select(*first.columns, number(1).label("step")).cte(name, recursive=True)
        ahead = branch.where(self.column > heads.columns[KEY]).correlate(heads)
        row = ahead.lateral("claim_following")
        step = heads.columns["step"]
        following = select(*row.columns, step + number(1)).select_from(heads.join(row, true()))
        return heads.union_all(following.where(step <= number(MOST_KEYS)))

    def distinct_keys(self, name: str) -> CTE:
        """Build the CTE of the free rows' keys with DISTINCT, for MySQL and MariaDB.

        Their planners do not use an index for the recursive step. They do skip from key to key if
        the columns before it in the index are selected, too.
        """
        free = self.parts.job_table.is_free
        named = [part for part in visitors.iterate(free) if isinstance(part, Column)]
        columns = [part for part in dict.fromkeys(named) if part is not self.column]
        found = select(*columns, self.column.label(KEY)).where(free).distinct()
        most = number(MOST_KEYS + 1)
        some = found.limit(most).subquery("claim_some_keys")
        # Without a LIMIT of its own MySQL would read them once for each place that names them.
        return select(some.columns[KEY].label(KEY)).limit(most).cte(name)

    def of_keys(self, name: str, keys: CTE, only: Only) -> CTE:
        """Build the CTE of each key's first rows, of rows without a key and of expired rows."""
        first, *others = self._branches
        unrestricted = only(first.where(self.column.is_(None)), self.reach)
        expired = [only(branch, self.reach) for branch in others]
        width = len(first.selected_columns)
        if len(keys.columns) > width:
            firsts: list[Select[Any]] = [select(*list(keys.columns)[:width])]
        else:
            firsts = self._firsts(first, keys)
        return self._together(*firsts, unrestricted, *expired).cte(name)

    def _firsts(self, branch: Select[Any], keys: CTE) -> list[Select[Any]]:
        of_key = branch.where(self.column == keys.columns[KEY])
        if self.lateral:
            rows = of_key.limit(self.most).correlate(keys).lateral("claim_first")
            return [select(*rows.columns).select_from(keys).join(rows, true())]
        # An index without the key serves the claim order too, and MySQL would read the rows of all
        # keys by it.
        of_key = of_key.order_by(None).order_by(self.column, *self.parts.order)
        found: list[Select[Any]] = []
        for place in range(min(self.parts.job_table.max_per_key, MOST_FIRST)):
            row = of_key.limit(number(1)).offset(number(place)).correlate(keys)
            found.append(self._one_by_one(row, keys))
        return found

    def _one_by_one(self, row: Select[Any], keys: CTE) -> Select[Any]:
        """Select one row for each key, with a scalar subquery for each column."""
        columns = list(row.selected_columns)[:-1]
        # The order may be that of the primary key, which need not be looked for twice.
        known = list({hash(_unlabelled(column)): column for column in columns}.values())
        places = {hash(_unlabelled(column)): place for place, column in enumerate(known)}
        asked = [
            row.with_only_columns(column).scalar_subquery().label(f"value_{place}")
            for place, column in enumerate(known)
        ]
        found = select(*asked, keys.columns[KEY].label(KEY)).select_from(keys).subquery()
        values = list(found.columns)
        named = [values[places[hash(_unlabelled(c))]].label(c.key) for c in columns]
        rows = cast("Select[Any]", select(*named, values[-1].label(KEY)))
        return rows.where(values[0].is_not(None))

    def numbered(self, name: str, read: FromClause) -> CTE:
        """Assign each row its place within its key, and keep the rows up to the key's limit."""
        key = read.columns[KEY]
        order = [*self.order(read), *self.ids(read)]
        place = func.row_number().over(partition_by=key, order_by=order).label(PLACE)
        found = select(read, place).subquery(f"{name}_all")
        within = or_(found.columns[KEY].is_(None), found.columns[PLACE] <= self.most)
        return select(found).where(within).cte(name)

    def singled(self, read: FromClause) -> FromClause:
        """Assign the place 1 to rows that were read one for each key."""
        return select(read, number(1).label(PLACE)).subquery("claim_singled")

    def may_run(self, found: FromClause) -> ColumnElement[bool]:
        """Build the condition that a numbered row's key has room for it."""
        job_table = self.parts.job_table
        key, place = found.columns[KEY], found.columns[PLACE]
        running = select(func.count()).select_from(job_table.table)
        running = running.where(self.column == key, job_table.is_held).correlate(found)
        return or_(key.is_(None), place + running.scalar_subquery() <= self.most)

    def key_is_in(self, keys: Any) -> ColumnElement[bool]:
        """Build the condition that a row's primary key is in ``keys``."""
        key: Any = self.parts.key_attributes
        return key[0].in_(keys) if len(key) == 1 else tuple_(*key).in_(keys)

    def ids(self, found: FromClause) -> list[ColumnElement[Any]]:
        """Return the primary key columns of ``found``."""
        columns: list[ColumnElement[Any]] = list(found.columns)
        return columns[: len(self.parts.job_table.key)]

    def terms(self, found: FromClause) -> list[ColumnElement[Any]]:
        """Return the columns of ``found`` that hold the order terms."""
        return [found.columns[f"{ORDER}{place}"] for place, _ in enumerate(self.parts.order, 1)]

    def order(self, found: FromClause) -> list[ColumnElement[Any]]:
        """Return the ORDER BY terms that put ``found`` in claim order."""
        terms = zip(self.parts.order, self.terms(found), strict=True)
        return [OrderTerm.of(term).applied(column) for term, column in terms]

    def described(self, rows: Select[Any], *, with_key: bool = False) -> Select[Any]:
        """Add the order terms, and the exclusive key if asked for, to a SELECT of primary keys."""
        terms = [
            OrderTerm.of(term).element.label(f"{ORDER}{place}")
            for place, term in enumerate(self.parts.order, 1)
        ]
        return rows.add_columns(*terms, *([self.column.label(KEY)] if with_key else []))

    @property
    def _branches(self) -> list[Select[Any]]:
        key = self.column.label(KEY)
        return [branch.add_columns(key) for branch in self.parts.candidates.branches]

    def _together(self, *branches: Select[Any]) -> Select[Any] | CompoundSelect[Any]:
        """All that several SELECTs find: a UNION of its own, which MySQL reads once.

        A SELECT from the UNION it would merge into each place that names it.
        """
        return branches[0] if len(branches) == 1 else self.parts.candidates.together(*branches)


@dataclass(frozen=True, eq=False)
class Pool:
    """All three ways to find candidates in one statement, each read only if it is needed.

    Attributes:
        rows: the numbered candidates, of whose keys some may have no room.
        exhausted: true if there are no more candidates than these.
    """

    rows: FromClause
    exhausted: ColumnElement[bool]


def pool(turns: Turns, gated: Callable[[ColumnElement[bool]], Only]) -> Pool:
    """Combine the three searches in one statement; ``gated`` makes a SELECT conditional."""
    limit, reach = turns.limit, turns.reach
    near_read = turns.near("claim_near_read", limited)
    near = turns.numbered("claim_near", near_read)
    room = select(number(1)).select_from(near).where(turns.may_run(near)).limit(limit).subquery()
    is_short = and_(count_of(near_read) >= reach, count_of(room) < limit)
    short = select(case((is_short, number(1)), else_=number(0)).label("is_short")).cte(
        "claim_short"
    )
    needed = select(short.columns["is_short"]).scalar_subquery() == number(1)

    far, are_many = _by_key(turns, gated, needed)
    deep_read = turns.passing("claim_deep_read", gated(and_(needed, are_many)))
    deep = turns.numbered("claim_deep", deep_read)
    found = union_all(
        select(near).where(not_(needed)),
        select(*far.columns).where(needed, not_(are_many)),
        select(deep).where(needed, are_many),
    ).subquery("claim_pool")
    exhausted = or_(
        count_of(near_read) < reach,
        and_(needed, or_(not_(are_many), count_of(deep_read) < reach)),
    )
    return Pool(found, exhausted)


def near_alone(turns: Turns) -> FromClause:
    """Build the first search alone."""
    return turns.numbered("claim_near", turns.near("claim_near_read", limited))


def by_key_alone(turns: Turns) -> FromClause:
    """Build the second search alone; it is empty if there are more than ``MOST_KEYS`` keys."""
    far, are_many = _by_key(turns, where_needed)
    return select(*far.columns).where(not_(are_many)).subquery("claim_pool")


def _unlabelled(column: Any) -> Any:
    return column.element if isinstance(column, Label) else column


def limited(rows: Select[Any], most: ColumnElement[int]) -> Select[Any]:
    """Limit the SELECT, without a condition."""
    return rows.limit(most)


def where_needed(needed: ColumnElement[bool]) -> Only:
    """Make a SELECT conditional: PostgreSQL evaluates ``needed`` before it reads any row."""
    return lambda rows, most: rows.where(needed).limit(most)


def _by_key(
    turns: Turns, gated: Callable[[ColumnElement[bool]], Only], *needed: ColumnElement[bool]
) -> tuple[FromClause, ColumnElement[bool]]:
    """Build the numbered first rows of each key, and the condition that there are too many keys."""
    one_each = turns.parts.job_table.max_per_key == 1 and len(turns.parts.candidates.branches) == 1
    by_heads = turns.lateral and one_each
    keys = (turns.heads if by_heads else turns.keys)("claim_keys", *needed)
    are_more = case((count_of(keys) > number(MOST_KEYS), number(1)), else_=number(0))
    many = select(are_more.label("many")).cte("claim_many")
    are_many = select(many.columns["many"]).scalar_subquery() == number(1)
    read = turns.of_keys("claim_far_read", keys, gated(and_(*needed, not_(are_many))))
    return turns.singled(read) if by_heads else turns.numbered("claim_far", read), are_many


def number(value: int) -> ColumnElement[int]:
    """Return the number as a literal in the statement's text."""
    return literal_column(str(value), Integer())


def count_of(found: FromClause) -> ColumnElement[int]:
    """How many rows something has."""
    return select(func.count()).select_from(found).scalar_subquery()
