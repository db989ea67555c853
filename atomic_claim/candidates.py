"""The candidates of a claim: the SELECTs that find rows to claim, in the claim's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.selectable import FromClause
from sqlalchemy.sql.visitors import InternalTraversal

from .predicates import Classes
from .sql_elements import ORDER, OrderTerm

ALONE = "claim_alone"
# Rows that are sorted at most; where there are more, the claim's order is read.
RIPE = 1000
DUE = "claim_due"
FREE = "claim_free"
_FALSE = sa.false()


Limited = Callable[[sa.Select[Any], Any], sa.Select[Any]]
# Limits a SELECT so that it reads no row unless the condition is true.
Gate = Callable[[sa.Select[Any], Any, sa.ColumnElement[bool]], sa.Select[Any]]


@dataclass(eq=False, repr=False)
class Waiting(ClauseElement):
    """The free rows of a table, where some may not be due, or may have spent their attempts.

    No index serves both a range of values and an order. So the first rows in claim order are looked
    at, and only where too few of them can be claimed, the others are found by an index of their
    own: those that it has in claim order, such as rows without a time, and the rest, such as those
    whose time has come, which are sorted unless there are too many.

    Attributes:
        rows: their keys and what the order compares, in claim order.
        order: the terms of the order.
        limit: the parameter that limits the rows to claim.
        scan_limit: the parameter that limits the first rows to look at.
        due: the due column, if there is one.
        ripe: the condition that the time in it has come.
        unspent: the condition that attempts are left.
        by_value: the same where no index can leave out other rows.
    """

    _traverse_internals = [  # noqa: RUF012
        ("rows", InternalTraversal.dp_clauseelement),
        ("order", InternalTraversal.dp_clauseelement_tuple),
        ("limit", InternalTraversal.dp_clauseelement),
        ("scan_limit", InternalTraversal.dp_clauseelement),
        ("due", InternalTraversal.dp_clauseelement),
        ("ripe", InternalTraversal.dp_clauseelement),
        ("unspent", InternalTraversal.dp_clauseelement),
        # by_value is part of no ClaimStatement's text.
    ]

    rows: sa.Select[Any]
    order: tuple[sa.ColumnElement[Any], ...]
    limit: sa.ColumnElement[Any]
    scan_limit: sa.ColumnElement[Any]
    due: sa.Column[Any] | None
    ripe: sa.ColumnElement[bool]
    unspent: sa.ColumnElement[bool]
    by_value: Classes

    @property
    def is_sorted(self) -> bool:
        """Return True if an index that leaves out spent rows has the rows in claim order."""
        first, due = OrderTerm.of(self.order[0]), self.due
        return due is None or (first.element is due and not (first.descending or due.nullable))

    @property
    def unsplit(self) -> Classes:
        """The rows that have attempts left, for an index of no others."""
        due = self.due
        times = () if due is None else (due.nulls_first() if due.nullable else due,)
        return Classes((self.unspent,), None, times)

    def steps(self) -> Iterator[tuple[tuple[sa.Select[Any], ...], sa.ColumnElement[bool]]]:
        """Yield what finds the first rows, all of them by an index, and all of them in claim order.

        Each with the condition that it would have too many rows to sort, so that the next one finds
        what it misses.
        """
        classes = self.by_value
        yield (self._chosen(self._first.subquery("claim_near")).limit(self.limit),), sa.false()
        ordered = tuple(self._ordered(classes, self.limit, sa.Select.limit))
        if (rest := self._rest(classes)) is None:
            yield ordered, sa.false()
            return
        found = self._found_by_index(classes)
        much = _is_much(found.subquery("claim_counted"))
        yield (*ordered, self._sorted(found.subquery("claim_rest"))), much
        yield (*ordered, self.rows.where(rest).limit(self.limit)), sa.false()

    def gated(
        self, limit: sa.ColumnElement[Any], gate: Gate
    ) -> tuple[list[sa.Select[Any]], sa.ColumnElement[bool]]:
        """Select by the same steps in one statement.

        Args:
            limit: limits each SELECT.
            gate: limits a SELECT so that it reads no row unless a condition is true.

        Returns:
            the SELECTs, and the condition that the first of them finds rows.
        """
        near = self._first.cte("atomic_claim_near")
        due = sa.select(near).where(near.columns[DUE]).limit(self.limit).subquery("claim_enough")
        is_near = sa.or_(count_of(due) >= self.limit, count_of(near) < self.scan_limit)
        classes, rest = self.unsplit, self._rest(self.unsplit)
        assert rest is not None
        others = self._found_by_index(classes).cte("atomic_claim_rest")
        step = sa.case((is_near, _ZERO), (_is_much(others), _TWO), else_=_ONE)
        steps = sa.select(step.label("step")).cte("atomic_claim_step")
        now = sa.select(steps.columns.step).scalar_subquery()
        found = [
            gate(self._chosen(near), limit, now == _ZERO),
            *self._ordered(classes, limit, lambda rows, most: gate(rows, most, now != _ZERO)),
            gate(self._sorted(others), limit, now == _ONE),
            gate(self.rows.where(rest), limit, now == _TWO),
        ]
        return found, now == _ZERO

    @property
    def _is_claimable(self) -> sa.ColumnElement[bool]:
        due = self.due
        is_ripe = self.ripe if due is None or not due.nullable else sa.or_(due.is_(None), self.ripe)
        return sa.and_(is_ripe, self.unspent)

    @property
    def _first(self) -> sa.Select[Any]:
        return self.rows.add_columns(self._is_claimable.label(DUE)).limit(self.scan_limit)

    def _ordered(self, classes: Classes, limit: Any, limited: Limited) -> Iterator[sa.Select[Any]]:
        """Yield the rows that an index has in claim order."""
        due = self.due
        for rows in map(self.rows.where, classes.fresh):
            if due is None:
                yield limited(rows, limit)
            elif due.nullable:
                # NULLs come first, and the order has only one index.
                terms = (term for term in self.order if OrderTerm.of(term).element is not due)
                timeless = rows.order_by(None).order_by(*classes.order[-1:], *terms)
                found = limited(timeless.add_columns(due.is_(None).label(DUE)), limit)
                yield self._chosen(found.subquery("claim_timeless"))

    def _sorted(self, found: FromClause) -> sa.Select[Any]:
        """Put what an index found in claim order."""
        return sa.select(*found.columns).order_by(*_terms(self.order, found)).limit(self.scan_limit)

    def _found_by_index(self, classes: Classes) -> sa.Select[Any]:
        """Select the others, unless there are too many to sort."""
        rest = self._rest(classes)
        assert rest is not None
        return self.rows.where(rest).order_by(None).order_by(*classes.order).limit(_ripe())

    def _rest(self, classes: Classes) -> sa.ColumnElement[bool] | None:
        """Build the condition for the others, if there are any."""
        due, tried = self.due, classes.tried
        if due is None:
            return tried
        others = [] if tried is None else [tried]
        ripe = sa.and_(sa.or_(*classes.fresh, *others), self.ripe)
        return sa.or_(ripe, *(sa.and_(each, due.is_(None)) for each in others if due.nullable))

    def _chosen(self, found: FromClause) -> sa.Select[Any]:
        columns = [column for column in found.columns if column.key != DUE]
        return sa.select(*columns).where(found.columns[DUE]).order_by(*_terms(self.order, found))


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
        waiting: the free rows, where some may not be due, or have spent their attempts.
        much: the condition that too many rows would be sorted, so that some are missing.
    """

    _traverse_internals = [  # noqa: RUF012
        ("branches", InternalTraversal.dp_clauseelement_tuple),
        ("order", InternalTraversal.dp_clauseelement_tuple),
        ("limit", InternalTraversal.dp_clauseelement),
        ("scan_limit", InternalTraversal.dp_clauseelement),
        ("rows", InternalTraversal.dp_clauseelement),
        ("waiting", InternalTraversal.dp_clauseelement),
        ("much", InternalTraversal.dp_clauseelement),
    ]

    branches: tuple[sa.Select[Any], ...]
    order: tuple[sa.ColumnElement[Any], ...]
    limit: sa.ColumnElement[Any]
    scan_limit: sa.ColumnElement[Any]
    rows: sa.Select[Any]
    waiting: Waiting | None = None
    much: sa.ColumnElement[bool] = _FALSE

    @property
    def is_plain(self) -> bool:
        """Return True if one ordered SELECT finds all of them."""
        return len(self.branches) == 1 and self.stepwise is None

    @property
    def stepwise(self) -> Waiting | None:
        """Return the free rows, if no partial index has those that can be claimed in order."""
        return None if self.waiting is None or self.waiting.is_sorted else self.waiting

    def steps(self) -> tuple[Candidates, ...]:
        """Return what to find candidates by in turn, until there are enough.

        The first step may miss free rows that come before rows whose lease is over, so the
        branches say which rows are free.
        """
        waiting = self.waiting
        if waiting is None or (waiting.is_sorted and waiting.by_value.tried is None):
            return (self,)
        others = [branch.add_columns(_ZERO.label(FREE)) for branch in self.branches[1:]]
        free = [_ONE.label(FREE)] if others else []
        return tuple(
            replace(self, branches=(*(b.add_columns(*free) for b in found), *others), much=much)
            for found, much in waiting.steps()
        )

    def gated(self, gate: Gate) -> Candidates:
        """Return the candidates that find what can be claimed in steps of one statement."""
        if (waiting := self.stepwise) is None:
            return self
        found, _ = waiting.gated(self.limit, gate)
        return replace(self, branches=(*found, *self.branches[1:]))

    def without(self, condition: sa.ColumnElement[bool]) -> Candidates:
        """Return the candidates that do not meet the condition."""
        others = sa.not_(condition)
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
        lock: Callable[[sa.Select[Any]], sa.Select[Any]] = lambda branch: branch.where(),
    ) -> sa.Select[Any]:
        """One SELECT of the keys, and of the order's terms (``claim_order_1`` ...) if asked for.

        ``lock`` makes each branch lock what it returns.
        """
        if len(self.branches) == 1:
            return lock(self.branches[0] if terms else self.only_keys(self.branches[0]))
        found = self.in_one_claim(self._first(lock)).limit(self.limit)
        return found if terms else self.only_keys(found)

    def select_with_flags(self) -> sa.Select[Any]:
        """One SELECT of the keys, of whether a row is claimed alone, and of whether it is free.

        Each of the two only if the branches say it. Behind them stands :attr:`much`.
        """
        if not (self.tells_alone or self.tells_free):
            return self.select().add_columns(self.much)
        found = self._first(lambda branch: branch).limit(self.limit)
        only = self.only_keys(found, and_alone=self.tells_alone)
        flags = [found.selected_columns[FREE]] if self.tells_free else []
        return only.add_columns(*flags, self.much)

    @property
    def tells_free(self) -> bool:
        """Return True if the branches say for each row whether it is free."""
        return FREE in self.branches[0].selected_columns

    @property
    def tells_alone(self) -> bool:
        """Return True if the branches say for each row whether it is claimed alone."""
        return ALONE in self.branches[0].selected_columns

    @property
    def shared_branches(self) -> list[sa.Select[Any]]:
        """The branches without the rows that are claimed alone."""
        free, *others = self.branches
        if not self.tells_alone:
            return [free, *others]
        flags = [cast("Any", branch.selected_columns[ALONE]).element for branch in others]
        return [free, *(b.where(flag == _ZERO) for b, flag in zip(others, flags, strict=True))]

    def _first(self, lock: Callable[[sa.Select[Any]], sa.Select[Any]]) -> sa.Select[Any]:
        together = self.together(*map(lock, self.branches)).subquery("branches")
        return self.ordered(together)

    def together(self, *branches: sa.Select[Any]) -> sa.CompoundSelect[Any]:
        """All that several SELECTs find."""
        numbered = enumerate(branches, 1)
        return sa.union_all(
            *(sa.select(each.subquery(f"branch_{place}")) for place, each in numbered)
        )

    def terms(self, found: FromClause) -> list[sa.ColumnElement[Any]]:
        """Order what has been found as the claim does."""
        return _terms(self.order, found)

    def ordered(self, found: FromClause) -> sa.Select[Any]:
        """All columns, in claim order."""
        return sa.select(*found.columns).order_by(*self.terms(found))

    def in_one_claim(self, found: sa.Select[Any]) -> sa.Select[Any]:
        """Remove the rows that may not be claimed together with the first one."""
        if ALONE not in found.selected_columns:
            return found
        rows = found.subquery("found")
        order = self.terms(rows)
        place = sa.func.row_number().over(order_by=order).label("place")
        leader = sa.func.first_value(rows.columns[ALONE]).over(order_by=order).label("leader")
        placed = sa.select(*rows.columns, place, leader).subquery("placed")
        is_shared = sa.and_(placed.columns.leader == _ZERO, placed.columns[ALONE] == _ZERO)
        left = self.ordered(placed).where(sa.or_(placed.columns.place == _ONE, is_shared))
        columns = list(placed.columns)[: len(rows.columns)]
        return cast("sa.Select[Any]", left.with_only_columns(*columns))

    def only_keys(self, branch: sa.Select[Any], *, and_alone: bool = False) -> sa.Select[Any]:
        """Keep the columns of the key, and the one that tells whether a row is claimed alone."""
        width = len(self.rows.selected_columns) + and_alone
        return branch.with_only_columns(*list(branch.selected_columns)[:width])


def _is_much(found: FromClause) -> sa.ColumnElement[bool]:
    """Build the condition that too many would be sorted."""
    return count_of(found) == _ripe()


def count_of(found: FromClause) -> sa.ColumnElement[int]:
    """Count the rows of what has been found."""
    return sa.select(sa.func.count()).select_from(found).scalar_subquery()


def _ripe() -> sa.ColumnElement[int]:
    """Return the limit in the text, where PostgreSQL's planner sees it."""
    return sa.literal_column(str(RIPE), sa.Integer())


def _terms(
    order: Sequence[sa.ColumnElement[Any]], found: FromClause
) -> list[sa.ColumnElement[Any]]:
    terms = enumerate(order, 1)
    return [OrderTerm.of(term).applied(found.columns[f"{ORDER}{n}"]) for n, term in terms]


def alone_if(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    """Return the column that tells whether a candidate is claimed alone."""
    return sa.case((condition, _ONE), else_=_ZERO).label(ALONE)


_ZERO, _ONE, _TWO = (sa.literal_column(number, sa.Integer()) for number in "012")
NOT_ALONE = _ZERO.label(ALONE)
