"""Pair what a prepared statement returns with the keys of its rows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Result, Row
from sqlalchemy.engine import result_tuple

from atomic_claim.plan import ClaimPlan
from atomic_claim.sql_elements import ByKey

Key = tuple[Any, ...]
KeyedRows = list[tuple[Key, Any]]
"""Keys and the rows or entities they belong to, in claim order."""


@dataclass
class Reading:
    """Reads the rows or entities of one prepared statement.

    Attributes:
        plan: the claim's.
        statement: what returns them, and then what was added to them.
        checks: whether what was added is the fault of each.
        make: makes rows of the claim's columns, once the statement has returned some.
    """

    plan: ClaimPlan
    statement: Any
    checks: bool = True
    make: Callable[[Iterable[Any]], Row[Any]] | None = None

    def keyed(self, result: Result[Any]) -> KeyedRows:
        """Pair rows or entities with their keys, in the order of the result.

        Raises:
            ClaimError: a row does not bear the mark of the claim, or is claimable still; or
                several rows have one key.
        """
        plan = self.plan
        items: Sequence[Any]
        # A SELECT of entities may join what it loads for them.
        joins = plan.entities and isinstance(self.statement, ByKey)
        items = rows = result.unique().all() if joins else result.all()
        if not rows:
            return []
        width = plan.width
        if self.checks:
            for row in rows:
                if row[width] != 0:
                    plan.refuse_fault(row[width], tuple(row[:width]))
        if plan.entities:
            items = list(map(operator.itemgetter(0), rows))
        elif len(rows[0]) > width:
            if self.make is None:
                columns = [(column, column.key) for column in plan.columns]
                self.make = result_tuple(rows[0]._fields[:width], columns)
            items = list(map(self.make, map(operator.itemgetter(slice(width)), rows)))
        keys = list(map(plan.key_of, items))
        if len(set(keys)) < len(keys):
            plan.refuse_shared_keys(keys)
        return list(zip(keys, items, strict=True))
