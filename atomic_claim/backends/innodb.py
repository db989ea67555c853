"""The search for rows to claim on MySQL and MariaDB: its statements, and how it locks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import Integer, String

from atomic_claim.plan import LIMIT, ClaimPlan, ClaimRequest
from atomic_claim.sql_elements import ByKey

from .base import CHUNK, Backend, Transaction, locking_rows, naive_columns
from .drivers import code_of
from .reading import Key

NAMES = ("mysql", "mariadb")
# A hint for "mysql" renders nothing for mariadb://, so both names are said.
HINTS: Mapping[str, str] = dict.fromkeys(NAMES, "FORCE INDEX (PRIMARY)")
# ER_LOCK_NOWAIT of MySQL; MariaDB says ER_LOCK_WAIT_TIMEOUT.
HELD = frozenset({1205, 3572})
# How many locks of a claim that must not skip rows may fail before it puts rows aside.
PATIENCE = 8
# What has to be known of a session: its isolation level; and whether the error with which NOWAIT
# fails rolls back all of the transaction, which MySQL's does not.
MYSQL_SESSION = ("@@transaction_isolation", "0")
MARIADB_SESSION = ("@@tx_isolation", "@@innodb_rollback_on_timeout")
# Seconds by which the session's zone is ahead of UTC.
SKEW = sa.func.timestampdiff(sa.text("SECOND"), sa.func.utc_timestamp(), sa.func.now()).label(
    "skew"
)


class InnoDBStatements:
    """The statements of a search for rows to claim, built once per plan.

    Attributes:
        candidates: each reads keys in claim order, what
            :meth:`~atomic_claim.candidates.Candidates.select_with_flags` tells of a row, and what
            has to be known of the session; the last one finds all rows.
        width: how many columns stand before what has to be known of the session.
        tells_alone: whether the one behind the key tells whether a row is claimed alone.
        free_at: the place of the column that tells whether a row is free, if rows may be missing
            that come before others that are not.
        session: reads the latter alone.
        asks_zone: whether that includes the session's time zone.
        lock: locks those of the rows that are free and not locked.
        lock_first: the same, but only the first ones in the order of the key.
        lock_unless_held: locks the rows, and returns whether they are free; it fails if another
            transaction has locked one of them.
        latest: a locking read of the keys of each branch of the candidates.
    """

    def __init__(self, plan: ClaimPlan, backend: Backend, is_mariadb: bool) -> None:
        key, of = plan.job_table.key, plan.job_table.table if plan.multi_table else None
        # What has to be known of the session comes with the candidates, for no further round trip.
        level, rolls_back = MARIADB_SESSION if is_mariadb else MYSQL_SESSION
        session: list[sa.ColumnElement[Any]] = [sa.literal_column(level, String())]
        session.append(sa.literal_column(rolls_back, Integer()))
        self.asks_zone = bool(naive_columns(plan.job_table, backend))
        if self.asks_zone:
            session.append(SKEW)
        self.session = sa.select(*session)
        steps = plan.candidates.steps()
        self.candidates = [step.select_with_flags().add_columns(*session) for step in steps]
        self.tells_alone = plan.candidates.tells_alone
        self.width = len(key) + self.tells_alone + steps[0].tells_free + 1
        # All but the first step find all free rows.
        self.free_at = self.width - 2 if steps[0].tells_free else None

        free = locking_rows(plan, backend).where(*plan.conditions)
        self.lock = ByKey(key, free.where)
        limit = sa.bindparam(LIMIT, 1, Integer(), literal_execute=True)
        self.lock_first = ByKey(key, free.order_by(*plan.key_attributes).limit(limit).where)
        # That it returns whether a row is free is also what makes it read by key: a SELECT of
        # nothing but the key is covered by the index, and then scans all of it, forced or not.
        all_rows = locking_rows(plan, backend, sa.and_(*plan.conditions))
        self.lock_unless_held = ByKey(key, all_rows.with_for_update(nowait=True, of=of).where)
        latest = list(plan.candidates.shared_branches)
        if (fair := plan.job_table.fair_by) is not None:
            # In the order of the index that there is.
            latest[0] = latest[0].order_by(None).order_by(fair, *plan.order)
        self.latest = [
            plan.candidates.only_keys(branch).with_for_update(skip_locked=True, of=of)
            for branch in latest
        ]


@dataclass
class Search:
    """The rows that one search has locked.

    Attributes:
        tx: where it runs.
        statements: its statements.
        limit: how many rows are wanted.
        step: which of the statements finds the candidates.
        taken: the keys of the rows that are locked and free.
        patience: how many more locks may fail before rows are put aside.
        aside: rows in the order of their keys that are tried again at the end.
        is_stale: whether a candidate was claimed or gone, which shows that the snapshot is old.
        missed: how many locks found no free row.
    """

    tx: Transaction
    statements: InnoDBStatements
    limit: int
    step: int = 0
    taken: set[Key] = field(default_factory=set)
    patience: int = PATIENCE
    aside: list[list[Key]] = field(default_factory=list)
    is_stale: bool = False
    missed: int = 0

    def goes_farther(self) -> bool:
        """Turn to the statement that finds more than the first rows; return False if it has run."""
        is_first = self.step == 0 and len(self.statements.candidates) > 1
        self.step += is_first
        return is_first

    def lock_free(self, fresh: list[Key], are_numbers: bool) -> int:
        """Lock the first of the candidates, and return how many were tried.

        READ COMMITTED at once unlocks rows that do not meet the WHERE; a transaction of the
        call's own is over soon. So that may try more rows after those that others hold, and leave
        some locked that it does not claim. There is no other way either where a lock that fails
        rolls back the whole transaction.
        """
        wanted = self.limit - len(self.taken)
        window = fresh[:CHUNK]
        if are_numbers and window == sorted(window):
            # The order of the claim is that of the keys, in Python and in SQL.
            lock = self.statements.lock_first.of(window, {LIMIT: wanted})
        else:
            window = window[: wanted * (2**self.missed if self.tx.own else 1)]
            lock = self.statements.lock.of(window)
        locked = {tuple(row) for row in self.tx.execute(*lock)}
        self.missed += not locked
        self.taken.update([key for key in window if key in locked][:wanted])
        return len(window)

    def lock_without_gaps(self, fresh: list[Key], are_numbers: bool) -> int:
        """Lock likewise in a REPEATABLE READ transaction that may go on for long.

        There SKIP LOCKED locks the gap behind a row that it skips: behind the table's last row,
        no producer could insert until the transaction ends. NOWAIT fails and locks no gap; what
        it had locked before, it takes in the next try. So the rows that are held are found by
        trying fewer, and after some failures the rows behind one are put aside, none locked.
        """
        keys = fresh[: min(self.limit - len(self.taken), CHUNK)]
        tried = ahead = len(keys)
        if are_numbers:
            keys.sort()
        while keys:
            part = keys[:ahead]
            try:
                rows = self.tx.execute(*self.statements.lock_unless_held.of(part)).all()
            except DBAPIError as error:
                if code_of(error, int) not in HELD:
                    raise
                self.patience -= 1
                if len(part) > 1:
                    ahead = len(part) // 2 if self.patience >= 0 else 1
                    continue
                del keys[0]
                if self.patience < 0 and are_numbers:
                    self.aside.append(keys)
                    break
                continue
            for row in rows:
                if row[-1]:
                    self.taken.add(row[:-1])
                else:
                    self.is_stale = True
            if len(rows) < len(part):
                self.is_stale = True
            del keys[:ahead]
            ahead *= 2
        return tried

    def lock_aside(self) -> None:
        """Lock what was put aside, which is all that is left."""
        self.patience = sys.maxsize
        while self.aside and len(self.taken) < self.limit:
            keys = self.aside.pop(0)
            if rest := keys[self.lock_without_gaps(keys, True) :]:
                self.aside.insert(0, rest)

    def lock_latest(self) -> list[Key]:
        """Lock rows that are newer than the snapshot of the caller's transaction.

        Only a locking read sees them, and it locks what it scans, so this is done only where the
        snapshot has turned out to be old.
        """
        asked = ClaimRequest(self.limit).parameters()
        found = [key for each in self.statements.latest for key in self.tx.tuples(each, asked)]
        return [key for key in found if key not in self.taken]
