"""Read what a prepared statement returns: claimed rows with their keys, and candidates."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Result, Row, bindparam, select
from sqlalchemy.engine import result_tuple
from sqlalchemy.sql.base import Executable
from sqlalchemy.types import Float

from atomic_claim.candidates import ALONE
from atomic_claim.job_table import JobTable
from atomic_claim.plan import CLAIMABLE, LEAST, ClaimPlan
from atomic_claim.sql_elements import ByKey

Key = tuple[Any, ...]
KeyedRows = list[tuple[Key, Any]]
"""Keys and the rows or entities they belong to, in claim order."""


# The columns of a search from which a Candidate is made, beside the row's primary key and ALONE.
KEY = "atomic_claim_key"
LOCK = "atomic_claim_lock"
ROOM = "atomic_claim_room"
FAIR = "atomic_claim_fair"


class Candidate(NamedTuple):
    """A row that may be claimed, unless another claim was faster.

    Attributes:
        row: the row's primary key.
        alone: 1 if the row is claimed alone, else 0.
        key: its exclusive key.
        lock: the number of the key's lock, where keys are locked one by one.
        room: how many rows of its exclusive key could be claimed when it was found.
        fair: the key by which claims take turns, if it was found in one.
    """

    row: Key
    alone: int = 0
    key: Any = None
    lock: int | None = None
    room: int = 0
    fair: tuple[Any, ...] = ()

    @classmethod
    def of(cls, found: Row[Any], job_table: JobTable) -> Candidate:
        """Return the candidate of a row that a search has found."""
        return cls(
            tuple(found[: len(job_table.key)]),
            getattr(found, ALONE, 0),
            getattr(found, KEY, None),
            getattr(found, LOCK, None),
            getattr(found, ROOM, 0),
            (getattr(found, FAIR),) if FAIR in found._fields else (),
        )


Tried = tuple[Sequence[Candidate], Sequence[Candidate]]
"""The candidates that were taken, and those that were not tried."""


def take_first(
    batches: Iterable[Sequence[Candidate]],
    limit: int,
    take: Callable[[Sequence[Candidate], int], Tried],
) -> list[Candidate]:
    """Take the first candidates, batch by batch, until there are as many as the limit.

    Those of a batch may be claimed together, and with those of other batches but for a row that is
    claimed alone.
    """
    found: list[Candidate] = []
    for batch in batches:
        rest = [] if found and batch[0].alone else batch
        while rest and len(found) < limit:
            taken, rest = take(rest, limit - len(found))
            found += taken
        if len(found) == limit or (found and found[0].alone):
            break
    return found


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

    def keyed(self, result: Result[Any], tx: Any = None) -> KeyedRows:
        """Pair rows or entities with their keys, in the order of the result.

        Args:
            result: of the statement.
            tx: where it runs, if the statement is the mark itself: told what is marked at fault.

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
                    if tx is not None:
                        self._trace(tx, rows)
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

    def _trace(self, tx: Any, rows: Sequence[Row[Any]]) -> None:
        """Tell what finds the marked rows again: their keys, and tokens as they were stored."""
        plan, token = self.plan, self.plan.job_table.token
        marked = [row for row in rows if row[plan.width] is not None]
        tx.marked += [plan.key_of(row[0] if plan.entities else row) for row in marked]
        if token is not None and not plan.entities:
            place = [column is token for column in plan.columns].index(True)
            # A row that is claimable may be another's by now.
            tx.tokens = frozenset(row[place] for row in marked if row[plan.width] != CLAIMABLE)


def instant(plan: ClaimPlan) -> Executable | None:
    """Return the SELECT of the time that the leases of rows marked from now on must exceed.

    It is read before the mark, since the rows are checked by a later statement; None if there are
    no leases.
    """
    lease = plan.job_table.lease
    if lease is None or plan.values[lease] is None:
        return None
    return select(plan.job_table.now(lease, bindparam(LEAST, 0.0, Float()), floor=True))
