"""Extend leases while the work goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

from sqlalchemy import Engine, Float, and_, literal, or_
from sqlalchemy.exc import SQLAlchemyError

from . import predicates
from .backends import Transaction
from .backends.recovery import logger, reason
from .claim import Claim, Key
from .errors import ClaimConflict, ClaimError, ClaimLost, UnsupportedDialect
from .execution import SHARED, OwnBind, Statements
from .lifecycle import EndedHere, ended_here, is_ended, lasting, owned_rows, visible
from .orm import is_own
from .outcomes import extension
from .telemetry import Lost, report

OnLost = Callable[[tuple[Key, ...]], Any]

LATE = "%d leases of %s are not extended: %s; the keys: %r"
LONGEST_WAIT = 0.25
"""Seconds that a beat waits for a lock at most: the end of the block waits for the beat."""
LONGEST_END = 1.0
"""Seconds that the end of the block waits for a beat that does not come back."""


class Keeper:
    """A block's view of the leases that are kept for it.

    Attributes:
        error: why leases are not extended: the first error since the last extension, or None.
    """

    def __init__(self, claim: Claim[Any]) -> None:
        assert claim.lease is not None
        assert claim.token is not None
        self.claim = claim
        self.lease = claim.lease.total_seconds()
        self.remaining = claim.keys
        self.ended = ended_here.setdefault(claim.token, EndedHere())
        self.error: Exception | None = None
        self.reached = time.monotonic()
        self.stopped: float | None = None

    def __repr__(self) -> str:
        return f"<Keeper, {len(self.lost)} lost>"

    @property
    def lost(self) -> tuple[Key, ...]:
        """The keys of the rows that are no longer the claim's, a tuple each.

        All of them, if none could be extended for the length of the lease.
        """
        gone = self.ended.lost.union(self.remaining if self.is_over else ())
        return tuple(key for key in self.claim.keys if key in gone and key not in self.ended)

    @property
    def is_over(self) -> bool:
        """Check whether no beat has succeeded for the length of the lease."""
        now = time.monotonic() if self.stopped is None else self.stopped
        return now - self.reached >= self.lease

    def check(self) -> None:
        """Raise ``ClaimLost`` if a row is no longer the claim's; :attr:`error` is its cause."""
        if lost := self.lost:
            raise ClaimLost(
                f"{len(lost)} jobs are no longer this claim's, their keys: "
                f"{list(lost)!r}; stop working on them",
                keys=lost,
            ) from self.error


@contextmanager
def keep_claims(
    bind: OwnBind,
    claim: Claim[Any],
    *,
    every: timedelta | None = None,
    on_lost: OnLost | None = None,
) -> Iterator[Keeper]:
    """Extend the leases of a claim from a thread while the block runs.

    Rows that the block itself has locked (by a completion that is not yet committed) are skipped
    without waiting, and rows that it has ended are not extended any more. If the leases cannot be
    extended, because the database cannot be reached or, on SQLite, while the block itself is
    writing, this is tried again and the reason is logged once. When the lease is over, the rows
    count as lost.

    Args:
        bind: an ``Engine`` or ``sessionmaker``, since the thread needs a connection of its own.
        claim: what ``claim_jobs`` returned with a ``lease``, or a ticket of it. It must be
            committed.
        every: how often; a third of the lease if left out.
        on_lost: called from the thread with the keys of rows that are no longer the claim's. If it
            raises, leases are extended no more, and the end of the block raises its exception,
            unless the block has raised one.

    Yields:
        A :class:`Keeper`, whose ``lost``, ``error`` and ``check()`` tell the block what it lost.

    Raises:
        ClaimLost: rows had ended, were cancelled or taken before the block; its ``keys`` names
            them, and the other rows are still the claim's.
        ClaimError: the claim has no lease, is not committed, or the bind is no ``Engine`` or
            ``sessionmaker``.
    """
    beat = prepared_beat(bind, claim, every)
    stopped = threading.Event()
    run = partial(beat.keep, stopped.wait, on_lost)
    thread = threading.Thread(target=run, name="atomic_claim.keep_claims", daemon=True)
    thread.start()
    try:
        yield beat
    finally:
        beat.stop()
        stopped.set()
        thread.join(LONGEST_END)
    beat.raise_crash()


class Beat(Keeper):
    """One claim's heartbeat: what is done each time, and what it found out."""

    def __init__(self, bind: Any, claim: Claim[Any], every: timedelta) -> None:
        super().__init__(claim)
        self.bind = bind
        self.every = every.total_seconds()
        self.guard = lasting(claim.table, claim.token)
        self.values = extension(claim.table, claim.lease)
        self.crash: Exception | None = None

    def stop(self) -> None:
        """Keep the present result: later changes of the rows do not concern the block."""
        self.stopped = time.monotonic()

    def keep(self, wait: Callable[[float], bool], on_lost: OnLost | None) -> None:
        """Beat until the block ends; keep an exception for it, and count all rows as lost.

        Args:
            wait: waits for a number of seconds, and returns True if the block has ended.
            on_lost: as for :func:`keep_claims`.
        """
        try:
            while not wait(self.pause()):
                if (lost := self.once()) and on_lost is not None:
                    on_lost(lost)
        except Exception as error:  # noqa: BLE001 - of on_lost, and raised by the block
            self.error = self.crash = error
        finally:
            if self.stopped is None:
                self.give_up()

    def raise_crash(self) -> None:
        """Raise the exception that ended the beats before the block did."""
        if self.crash is not None:
            raise self.crash

    def pause(self) -> float:
        """Return the seconds until the next beat; few after one that failed."""
        return self.every if self.error is None else min(self.every, 0.5)

    def once(self) -> tuple[Key, ...]:
        """Extend what is still the claim's, and return the keys that turned out to be lost."""
        if not self.remaining:
            return ()
        began = time.monotonic()
        found = self._run(self._extend, runs=True)
        if found is not None:
            self.reached, self.error = began, None
            return self._keep(found)
        # On SQLite other connections can read, but not write, while the block has written.
        found = self._run(lambda tx: self._standing(tx, set(self.remaining)))
        lost = () if found is None else self._keep(found)
        return lost + self.give_up() if self.is_over else lost

    def give_up(self) -> tuple[Key, ...]:
        """Count all that is left as lost, but not what the block has ended."""
        return self._keep(set(self.ended))

    def _keep(self, ours: set[Key]) -> tuple[Key, ...]:
        gone = [key for key in self.remaining if key not in ours]
        lost = tuple(key for key in gone if key not in self.ended)
        self.remaining = tuple(key for key in self.remaining if key in ours)
        self.ended.lost = self.ended.lost.union(lost)
        if lost:
            report(Lost(self.claim.table.table.fullname, lost))
        return lost

    def _run(
        self, run: Callable[[Transaction], set[Key]], *, runs: bool = False
    ) -> set[Key] | None:
        """Run it and return the keys that it finds, or None if the attempt failed."""

        def patient(tx: Transaction) -> set[Key]:
            with tx.backend.limit_wait(tx, min(self.every / 4, LONGEST_WAIT)):
                return run(tx)

        operation = Statements(self.bind, self.claim.table, patient, runs=runs, tries=1)
        try:
            return operation.execute()
        except UnsupportedDialect:
            raise
        except Exception as error:
            is_failure = isinstance(error, (ClaimConflict, SQLAlchemyError))
            if not (is_failure or operation.is_unreachable(error)):
                raise
            if self.error is None:
                self.error = error
                name, keys = self.claim.table.table.fullname, self.remaining
                logger.warning(LATE, len(keys), name, reason(error), keys)
            return None

    def _extend(self, tx: Transaction) -> set[Key]:
        job_table = self.claim.table
        # Keys before rows, as everywhere: else two extensions of a row could wait for each other.
        tx.backend.key_locks.lock_table(tx, job_table)
        free = tx.unlocked(job_table, self.remaining, self.guard)
        # SQLite locks nothing: the block may have ended some of them meanwhile.
        changes = tx.backend.changes(job_table, self.guard, self.values)
        ours = set(tx.change(free, changes, extends=job_table))
        # Running, and still this claim's: an end that the block had begun was rolled back.
        self.ended.difference_update(ours)
        return ours | self._standing(tx, set(self.remaining).difference(ours))

    def _standing(self, tx: Transaction, keys: set[Key]) -> set[Key]:
        """Return the keys still owned by committed state: the block itself may lock the rows.

        A row that was not extended in time may be claimed at any moment, unless the block has
        ended it and not committed yet.
        """
        job_table, token = self.claim.table, self.claim.token
        ours = set(visible(tx, job_table, keys, self.guard, predicates.is_held(job_table)))
        ours.update(visible(tx, job_table, keys & self.ended, self.guard))
        if rest := keys.difference(ours):
            self.ended.update(visible(tx, job_table, rest, is_ended(job_table, token)))
        return ours


def prepared_beat(bind: Any, claim: Claim[Any], every: timedelta | None) -> Beat:
    """Create the heartbeat of a claim, or raise if the claim has no lease to keep."""
    if not is_own(bind):
        raise ClaimError(
            f"keep_claims needs an Engine or sessionmaker, for a connection of its own; {bind!r} "
            "is the caller's"
        )
    claim = owned_rows(claim, None, unfenced=False)
    job_table, lease = claim.table, claim.lease
    if lease is None:
        raise ClaimError("the claim has no lease to keep: claim_jobs(..., lease=timedelta(...))")
    every = lease / 3 if every is None else every
    if not timedelta(0) < every < lease:
        raise ClaimError(f"every is {every!r}; expected less than the lease, {lease!r}")

    beat = Beat(bind, claim, every)
    # A row whose lease lasts as long needs no extension before the first beat.
    least = max(beat.lease / 2, 2 * beat.every)
    beat.reached -= max(0, beat.lease - least)
    lasts = job_table.lease > job_table.now(job_table.lease, literal(least, Float()))
    # As it was before a claim that is not committed.
    others = or_(job_table.token.is_(None), job_table.token != claim.token)
    unclaimed = and_(others, predicates.is_unowned(job_table))

    def look(tx: Transaction) -> tuple[list[Key], set[Key], list[Key]]:
        _refuse_single(tx.connection.engine)
        seen = set(visible(tx, job_table, claim.keys, beat.guard))
        safe = visible(tx, job_table, claim.keys, beat.guard, lasts)
        missing = [key for key in claim.keys if key not in seen]
        return missing, seen.difference(safe), visible(tx, job_table, missing, unclaimed)

    missing, urgent, uncommitted = Statements(bind, job_table, look).execute()
    if uncommitted:
        raise ClaimError(
            f"the claim of {uncommitted!r} is not visible to other connections: commit it before "
            "keep_claims"
        )
    if missing:
        raise ClaimLost(
            f"{len(missing)} of {len(claim.keys)} jobs are not this claim's before keep_claims, "
            f"their keys: {missing!r}. They have ended, or another worker has them: pass a slice "
            "of the claim without them",
            keys=missing,
        )
    if urgent:
        # Claimed a while ago: the first beat may not wait.
        beat.once()
    return beat


def _refuse_single(engine: Engine) -> None:
    """Refuse a pool whose connection is the block's own, or leads to another database."""
    if isinstance(engine.pool, SHARED):
        raise ClaimError(
            f"keep_claims needs a connection beside the block's, and the engine's "
            f"{type(engine.pool).__name__} has one connection: use another pool, and on SQLite a "
            "file in place of memory"
        )
