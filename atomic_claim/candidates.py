"""The candidates of a claim: the SELECTs that find rows to claim, in the claim's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Integer,
    Select,
    and_,
    case,
    func,
    literal_column,
    not_,
    or_,
    select,
    union_all,
)
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.selectable import FromClause
from sqlalchemy.sql.visitors import InternalTraversal

from .sql_elements import ORDER, OrderTerm

ALONE = "claim_alone"
# Rows whose time has come that are sorted at most; where there are more, the claim's order is read.
RIPE = 1000
_STEPS = [literal_column(str(step), Integer()) for step in range(3)]
DUE = "claim_due"
FREE = "claim_free"


@dataclass(eq=False, repr=False)
class Waiting(ClauseElement):
    """The free rows of a table with a due column, whether they are due or not.

    No index serves both a range of times and an order. So the first rows in claim order are looked
    at, and only where too few of them are due, the others are found by an index of (due column,
    order): rows without a time, which it has in claim order, and those whose time has come, which
    are sorted.

    Attributes:
        rows: their keys and what the order compares, in claim order.
        order: the terms of the order.
        limit: the parameter that limits the rows to claim.
        scan_limit: the parameter that limits the first rows to look at.
        time: the due column.
        ripe: the condition that the time in it has come.
        unspent: the condition that attempts are left.
        nullable: whether rows without a time are due.
    """

    _traverse_internals = [  # noqa: RUF012
        ("rows", InternalTraversal.dp_clauseelement),
        ("order", InternalTraversal.dp_clauseelement_tuple),
        ("limit", InternalTraversal.dp_clauseelement),
        ("scan_limit", InternalTraversal.dp_clauseelement),
        ("time", InternalTraversal.dp_clauseelement),
        ("ripe", InternalTraversal.dp_clauseelement),
        ("unspent", InternalTraversal.dp_clauseelement),
        ("nullable", InternalTraversal.dp_boolean),
    ]

    rows: Select[Any]
    order: tuple[ColumnElement[Any], ...]
    limit: ColumnElement[Any]
    scan_limit: ColumnElement[Any]
    time: ColumnElement[Any]
    ripe: ColumnElement[bool]
    unspent: ColumnElement[bool]
    nullable: bool

    @property
    def is_sorted(self) -> bool:
        """Return True if the rows that are due come first in claim order."""
        first = OrderTerm.of(self.order[0])
        return first.element is self.time and not (first.descending or self.nullable)

    @property
    def near(self) -> Select[Any]:
        """Select the rows that are due among the first ones."""
        return self._chosen(self._first.subquery("claim_near")).limit(self.limit)

    @property
    def farther(self) -> tuple[Select[Any], ...]:
        """Select all rows that are due, for a planner that compares what its indexes cost."""
        ripe = self.rows.where(self.ripe, self.unspent).limit(self.limit)
        return (self._timeless(self.limit), ripe) if self.nullable else (ripe,)

    @property
    def gated(self) -> tuple[Select[Any], ...]:
        """Select as :attr:`near` or, if that finds too few, all: a limit of 0 reads no row."""
        near = self._first.cte("claim_near")
        ripe = self.rows.where(self.ripe, self.unspent).order_by(None).order_by(self.time)
        counted = ripe.limit(RIPE).subquery("claim_counted")
        is_many = select(func.count() == RIPE).select_from(counted).scalar_subquery()
        is_all = or_(func.count() < self.scan_limit, func.total(near.columns[DUE]) >= self.limit)
        step = case((is_all, _STEPS[0]), (not_(is_many), _STEPS[1]), else_=_STEPS[2])
        steps = select(step.label("step")).select_from(near).cte("claim_step")
        now = select(steps.columns.step).scalar_subquery()

        def at(step: int, limit: Any = self.limit) -> ColumnElement[int]:
            return case((now == _STEPS[step], limit), else_=_STEPS[0])

        by_time = ripe.limit(at(1, RIPE)).subquery("claim_ripe")
        found = [
            self._chosen(near).limit(at(0)),
            select(*by_time.columns).order_by(*_terms(self.order, by_time)).limit(self.limit),
            self.rows.where(self._is_due).limit(at(2)),
        ]
        if self.nullable:
            found.append(self._timeless(at(1)))
        return tuple(found)

    @property
    def _is_due(self) -> ColumnElement[bool]:
        is_ripe = self.time.is_(None) | self.ripe if self.nullable else self.ripe
        return and_(is_ripe, self.unspent)

    @property
    def _first(self) -> Select[Any]:
        return self.rows.add_columns(self._is_due.label(DUE)).limit(self.scan_limit)

    def _timeless(self, limit: ColumnElement[Any]) -> Select[Any]:
        """Return the rows without a time; NULLs come first, and the order has only one index."""
        rows = self.rows.where(self.unspent).order_by(None).order_by(self.time, *self.order)
        found = rows.add_columns(self.time.is_(None).label(DUE)).limit(limit)
        return self._chosen(found.subquery("claim_timeless"))

    def _chosen(self, found: FromClause) -> Select[Any]:
        columns = [column for column in found.columns if column.key != DUE]
        return select(*columns).where(found.columns[DUE]).order_by(*_terms(self.order, found))


@dataclass(eq=False, repr=False)
class Candidates(ClauseElement):
    """The keys of the rows to claim, ordered and limited.

    A row can be claimable for several reasons (it is free; its lease is over). Each reason is a
    SELECT of its own, since no index serves their OR in order. Free rows come in the claim's
    order; the others as their index has them, with a margin from which the claim's order is made.

    A row for which :func:`~atomic_claim.predicates.is_last_chance` is claimed alone: the rows
    behind it wait for the next claim, and it waits for the rows before it.

    Attributes:
        branches: SELECTs of the key, of whether the row is claimed alone (if any may be) and of
            the terms of the order; each ordered and limited.
        order: the terms of the order.
        limit: the parameter that limits the first of them, and all together.
        scan_limit: the parameter that limits the others.
        rows: the keys of all rows that may be claimed, in no order.
        waiting: the free rows, where they have a due column.
    """

    _traverse_internals = [  # noqa: RUF012
        ("branches", InternalTraversal.dp_clauseelement_tuple),
        ("order", InternalTraversal.dp_clauseelement_tuple),
        ("limit", InternalTraversal.dp_clauseelement),
        ("scan_limit", InternalTraversal.dp_clauseelement),
        ("rows", InternalTraversal.dp_clauseelement),
        ("waiting", InternalTraversal.dp_clauseelement),
    ]

    branches: tuple[Select[Any], ...]
    order: tuple[ColumnElement[Any], ...]
    limit: ColumnElement[Any]
    scan_limit: ColumnElement[Any]
    rows: Select[Any]
    waiting: Waiting | None = None

    def finding(self, *free: Select[Any]) -> Candidates:
        """Return the candidates with other SELECTs of the free rows."""
        return replace(self, branches=(*free, *self.branches[1:]))

    def steps(self) -> tuple[Candidates, ...]:
        """Return what to find candidates by in turn, until there are enough.

        The first step may miss free rows that come before rows whose lease is over, so the
        branches say which rows are free.
        """
        if self.waiting is None or not self.waiting.nullable:
            return (self,)
        near, farther = (self.waiting.near,), self.waiting.farther
        if len(self.branches) == 1:
            return self.finding(*near), self.finding(*farther)
        others = tuple(branch.add_columns(_ZERO.label(FREE)) for branch in self.branches[1:])
        return tuple(
            replace(self, branches=(*(b.add_columns(_ONE.label(FREE)) for b in free), *others))
            for free in (near, farther)
        )

    def gated(self) -> Candidates:
        """Return the candidates that find the rows that are due in steps of one statement."""
        waiting = self.waiting
        if waiting is None or waiting.is_sorted:
            return self
        return self.finding(*waiting.gated)

    def without(self, condition: ColumnElement[bool]) -> Candidates:
        """Return the candidates that do not meet the condition."""
        others = not_(condition)
        waiting = self.waiting
        return replace(
            self,
            branches=tuple(branch.where(others) for branch in self.branches),
            rows=self.rows.where(others),
            waiting=None if waiting is None else replace(waiting, rows=waiting.rows.where(others)),
        )

    def select(
        self,
        *,
        terms: bool = False,
        # A copy: compiling a SELECT of entities writes into it, which would change the cache key.
        lock: Callable[[Select[Any]], Select[Any]] = lambda branch: branch.where(),
    ) -> Select[Any]:
        """One SELECT of the keys, and of the order's terms (``claim_order_1`` ...) if asked for.

        ``lock`` makes each branch lock what it returns.
        """
        if len(self.branches) == 1:
            return lock(self.branches[0] if terms else self.only_keys(self.branches[0]))
        found = self.in_one_claim(self._first(lock)).limit(self.limit)
        return found if terms else self.only_keys(found)

    def select_with_flags(self) -> Select[Any]:
        """One SELECT of the keys, of whether a row is claimed alone, and of whether it is free.

        Each of the two only if the branches say it.
        """
        if not (self.tells_alone or self.tells_free):
            return self.select()
        found = self._first(lambda branch: branch).limit(self.limit)
        only = self.only_keys(found, and_alone=self.tells_alone)
        return only.add_columns(found.selected_columns[FREE]) if self.tells_free else only

    @property
    def tells_free(self) -> bool:
        """Return True if the branches say for each row whether it is free."""
        return FREE in self.branches[0].selected_columns

    @property
    def tells_alone(self) -> bool:
        """Return True if the branches say for each row whether it is claimed alone."""
        return ALONE in self.branches[0].selected_columns

    @property
    def shared_branches(self) -> list[Select[Any]]:
        """The branches without the rows that are claimed alone."""
        if not self.tells_alone:
            return list(self.branches)
        flags = [cast("Any", branch.selected_columns[ALONE]).element for branch in self.branches]
        return [b.where(flag == _ZERO) for b, flag in zip(self.branches, flags, strict=True)]

    def _first(self, lock: Callable[[Select[Any]], Select[Any]]) -> Select[Any]:
        together = self.together(*map(lock, self.branches)).subquery("branches")
        return self.ordered(together)

    def together(self, *branches: Select[Any]) -> CompoundSelect[Any]:
        """All that several SELECTs find."""
        numbered = enumerate(branches, 1)
        return union_all(*(select(each.subquery(f"branch_{place}")) for place, each in numbered))

    def terms(self, found: FromClause) -> list[ColumnElement[Any]]:
        """Order what has been found as the claim does."""
        return _terms(self.order, found)

    def ordered(self, found: FromClause) -> Select[Any]:
        """All columns, in claim order."""
        return select(*found.columns).order_by(*self.terms(found))

    def in_one_claim(self, found: Select[Any]) -> Select[Any]:
        """Remove the rows that may not be claimed together with the first one."""
        if ALONE not in found.selected_columns:
            return found
        rows = found.subquery("found")
        order = self.terms(rows)
        place = func.row_number().over(order_by=order).label("place")
        leader = func.first_value(rows.columns[ALONE]).over(order_by=order).label("leader")
        placed = select(*rows.columns, place, leader).subquery("placed")
        is_shared = and_(placed.columns.leader == _ZERO, placed.columns[ALONE] == _ZERO)
        left = self.ordered(placed).where(or_(placed.columns.place == _ONE, is_shared))
        columns = list(placed.columns)[: len(rows.columns)]
        return cast("Select[Any]", left.with_only_columns(*columns))

    def only_keys(self, branch: Select[Any], *, and_alone: bool = False) -> Select[Any]:
        """Keep the columns of the key, and the one that tells whether a row is claimed alone."""
        width = len(self.rows.selected_columns) + and_alone
        return branch.with_only_columns(*list(branch.selected_columns)[:width])


def _terms(order: Sequence[ColumnElement[Any]], found: FromClause) -> list[ColumnElement[Any]]:
    terms = enumerate(order, 1)
    return [OrderTerm.of(term).applied(found.columns[f"{ORDER}{n}"]) for n, term in terms]


def alone_if(condition: ColumnElement[bool]) -> ColumnElement[int]:
    """Return the column that tells whether a candidate is claimed alone."""
    return case((condition, _ONE), else_=_ZERO).label(ALONE)


_ZERO, _ONE = literal_column("0", Integer()), literal_column("1", Integer())
