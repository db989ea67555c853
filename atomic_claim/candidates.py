"""The SELECTs of the rows that a claim may take, ordered and limited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, CompoundSelect, Select, select, union_all
from sqlalchemy.sql.selectable import FromClause

from .sql_elements import OrderTerm


@dataclass(frozen=True, eq=False)
class Candidates:
    """The keys of the rows to claim, ordered and limited.

    A row can be claimable for several reasons (it is free; its lease is over). Each reason is a
    SELECT of its own, since no index serves their OR in order. Free rows come in the claim's
    order; the others as their index has them, with a margin from which the claim's order is made.

    Attributes:
        branches: SELECTs of the key and the terms of the order, each ordered and limited.
        order: the terms of the order.
        limit: the parameter that limits the first of them, and all together.
        scan_limit: the parameter that limits the others.
        rows: the keys of all rows that may be claimed, in no order.
    """

    branches: tuple[Select[Any], ...]
    order: tuple[ColumnElement[Any], ...]
    limit: ColumnElement[Any]
    scan_limit: ColumnElement[Any]
    rows: Select[Any]

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
        found = self.ordered(self.together(*map(lock, self.branches)).subquery("branches"))
        return (found if terms else self.only_keys(found)).limit(self.limit)

    def together(self, *branches: Select[Any]) -> CompoundSelect[Any]:
        """All that several SELECTs find."""
        numbered = enumerate(branches, 1)
        return union_all(*(select(each.subquery(f"branch_{place}")) for place, each in numbered))

    def ordered(self, found: FromClause) -> Select[Any]:
        """Keys and terms of the order, in that order."""
        columns = list(found.columns)
        terms = columns[len(columns) - len(self.order) :]
        return select(*columns).order_by(
            *(OrderTerm.of(term).applied(c) for term, c in zip(self.order, terms, strict=True))
        )

    def only_keys(self, branch: Select[Any]) -> Select[Any]:
        """Remove the order terms from the columns of a branch."""
        columns = list(branch.selected_columns)
        return branch.with_only_columns(*columns[: len(columns) - len(self.order)])
