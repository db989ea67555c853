"""Legacy functions that load all and commit row by row: their reads are handed claimed rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection, Delete, Engine, Select, Update, and_, false, or_
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.sql.elements import BinaryExpression, ColumnClause
from sqlalchemy.sql.selectable import FromClause

from atomic_claim import predicates
from atomic_claim.backends import CHUNK, Find
from atomic_claim.claim import Claim, claim_jobs
from atomic_claim.errors import ClaimConflict, ClaimLost, PatchError
from atomic_claim.execution import patiently
from atomic_claim.heartbeat import Beat
from atomic_claim.job_table import JobTable, job_table_of
from atomic_claim.lifecycle import owned_rows, release_jobs, release_left
from atomic_claim.sql_elements import key_in

from . import filters
from .calls import Options
from .patches import Patch, Run, make_patch
from .reads import Watch, unwatched, watching
from .selects import (
    adapted,
    baked,
    conjuncts,
    is_table,
    order_terms,
    speaks_only_of,
    with_conditions,
    with_criteria,
)
from .tables import Tables, leased_only
from .targets import Target

R = TypeVar("R")

LEASE = timedelta(minutes=5)
"""The lease where the table can hold one and none was asked for; kept while the loop runs."""
ALL = 2**31 - 1
logger = logging.getLogger("atomic_claim")
UNMARKED = (
    "%s was handed claimed rows, and changed none of them: they are free again. If its caller "
    "marks them, use patch_claims(..., lease=..., commit=True). If it looks at their state again "
    "before the work, leave the state to it: JobTable(..., state=<the lease column>)"
)


def claim_reads(
    target: Any,
    table: Any,
    *,
    lease: Any = None,
    worker: str | None = None,
    limit: int | None = None,
    at_most_once: bool = False,
) -> Patch:
    """Make a function that loads all its jobs, and commits row by row, loop over claimed rows.

    The function runs as it is. While it does, each of its SELECTs that finds rows of the table
    claims them first, in a transaction of its own that is committed before the function has them,
    and then reads those rows, in its own session and order. Entities and relationships that are
    loaded of what was found, and rows that are looked up by their primary key, are read as ever.

    A generator is watched whenever it runs, and not while its consumer does; an UPDATE of it that
    asks whether a row is still free finds it so.

    With a lease, a dead worker's rows come back when it ends; it is prolonged by the function's
    own statements once a third of it is over. What the function leaves marked as claimed, because
    it failed or passed over it, is free again when the call ends.

    Args:
        target: as for :func:`patch_claims`.
        table: as for :func:`patch_claims`. If nothing but its state says how a job ends
            (``sent``), that state is left to the function to write, and the lease alone says that a
            row is taken.
        lease: for how long a claim holds, a ``timedelta`` or seconds; more than the work of one
            row takes. Left out, 5 minutes if the table has a lease column.
        worker: the claiming worker's name; needs a worker column.
        limit: how many rows each find claims at most; left out, as many as it asks for.
        at_most_once: agree to a table without a lease whose only state is the final one: it is
            written before the work, and what a worker had in hand when it died is never done. Rows
            that a living worker's session has not marked when the call ends are free again.

    Returns:
        The :class:`Patch`. Its ``passed_through`` counts the calls that found nothing to claim by.
        A call that was handed rows under a lease and changed none of them is logged.

    Raises:
        PatchError: the target or the table does not fit; or, by a call, a SELECT whose rows cannot
            be claimed, or raw SQL that reads the table.
        ClaimLost: by a call, the loop stood still for longer than the lease, and other workers
            have its rows.
        AmbiguousTable: the table's columns cannot be read with certainty.
    """

    def prepare(patch: Patch, found: Target) -> Run:
        tables = Tables(table, Options(found.signature, found.name), claimable)
        options: dict[str, Any] = {"lease": asked, "worker": worker, "limit": limit}
        return watching(patch, found, lambda call: ClaimWatch(patch, tables, call, **options))

    def claimable(given: Any) -> JobTable:
        job_table = _leased(job_table_of(given), asked, at_most_once)
        if worker is not None and job_table.worker is None:
            raise PatchError(
                f"worker={worker!r} needs a column to go to, and {job_table.table.fullname!r} has "
                "none that is known: name it with JobTable(worker=...)"
            )
        return job_table

    asked = filters.lease(lease)
    return make_patch(target, prepare)


def _leased(job_table: JobTable, lease: timedelta | None, at_most_once: bool) -> JobTable:
    """Return the table to claim with, or raise if a crash would lose jobs unnoticed."""
    name = job_table.table.fullname
    only_state = not job_table.done and not job_table.failed
    columns = {"lease": job_table.lease, "token": job_table.token}
    missing = [role for role, column in columns.items() if column is None]
    if not missing and only_state and job_table.state is not job_table.lease:
        return leased_only(job_table)
    if missing and (lease is not None or (only_state and not at_most_once)):
        why = (
            f"lease={lease!r} was asked for"
            if lease is not None
            else "its only state is the final one, so a row claimed by a worker that dies would "
            "never be done"
        )
        raise PatchError(
            f"{name!r} has no {' and no '.join(missing)} column that is known, and {why}: name "
            "them with JobTable(lease=..., token=...), or add them: "
            f"ALTER TABLE {name} ADD COLUMN lease_until TIMESTAMP NULL; "
            f"ALTER TABLE {name} ADD COLUMN claim_token VARCHAR(32) NULL"
            + ("" if lease is not None else "; or agree to that with at_most_once=True")
        )
    return job_table


class ClaimWatch(Watch):
    """A running call whose finds are claims."""

    def __init__(
        self,
        *watched: Any,
        lease: timedelta | None,
        worker: str | None,
        limit: int | None,
    ) -> None:
        super().__init__(*watched)
        self._limit = ALL if limit is None else limit
        self._asked = lease
        self._worker = worker
        self._claims: list[tuple[Engine, Claim[Any]]] = []
        self._beats: list[tuple[Engine, Beat]] = []
        self._next_beat = float("inf")
        self._done: set[Any] = set()
        self._marks = 0
        self._marks_before = 0

    def read(
        self, connection: Connection, statement: Any, params: Mapping[str, Any]
    ) -> Select[Any] | None:
        """Claim what the SELECT asks for, and make it read that."""
        find = self.find(connection, statement, params)
        if find is None or _looks_up(find):
            return None
        self.reads += 1
        if find.limit == 0:
            return None
        search = _Search.of(find, filters.written(self.job_table))
        engine = connection.engine
        claim = self._ours(engine, lambda: self._claim(engine, find, search))
        self.patch.count(claimed=len(claim))
        if not claim:
            return with_conditions(find.statement, false())
        self._claims.append((engine, claim))
        return with_conditions(
            find.statement, *search.others, self._is_claimed(find.place, find.key, claim)
        )

    @property
    def _lease(self) -> timedelta | None:
        can_hold = self.job_table.lease is not None and self.job_table.token is not None
        return LEASE if self._asked is None and can_hold else self._asked

    def _claim(self, engine: Engine, find: Find, search: _Search) -> Claim[Any]:
        claim: Claim[Any] = claim_jobs(
            engine,
            self.job_table,
            self._limit if find.limit is None else min(find.limit, self._limit),
            where=filters.beside_the_lease(self.job_table, search.where(find)) or None,
            order_by=search.order(find),
            worker=self._worker,
            lease=self._lease,
        )
        if claim and self._lease is not None:
            beat = Beat(engine, owned_rows(claim, None, unfenced=False), self._lease / 3)
            beat.reached = time.monotonic()
            self._beats.append((engine, beat))
            self._next_beat = min(self._next_beat, time.monotonic() + beat.every)
        return claim

    def _is_claimed(self, place: FromClause, key: Sequence[Any], claim: Claim[Any]) -> Any:
        if len(claim) <= CHUNK or claim.token is None:
            return key_in(key, claim.keys)
        # More keys than a statement may have parameters.
        return place.columns[self.job_table.token.key] == claim.token

    def _ours(self, engine: Engine, run: Callable[[], R]) -> R:
        """Run statements of our own, with pauses that an event loop survives."""
        with unwatched():
            return patiently(run) if engine.dialect.is_async else run()

    def tick(self) -> None:
        """Extend the leases, since the loop itself does not while it works."""
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + min(beat.every for _, beat in self._beats)
        for engine, beat in self._beats:
            if lost := self._ours(engine, beat.once):
                raise ClaimLost(
                    f"{self.patch.target} stood still for longer than the lease of {self._lease}, "
                    f"and {len(lost)} of its jobs are other workers', their keys: {list(lost)!r}",
                    keys=lost,
                )

    def mark(
        self,
        connection: Connection,  # noqa: ARG002 - locks are a connection's, claims are not
        statement: Update | Delete | None,
    ) -> Update | Delete | None:
        """Allow changes of claimed rows by any transaction; rewrite the conditions on the state.

        An UPDATE that asks whether the row is still free, which it was until we claimed it, gets
        what the claim left of it.
        """
        self._marks += 1
        if statement is None or not self._claims:
            return None
        table = self.job_table.table
        # It may be another object for the same table.
        place: Any = table if statement.table == table else statement.table
        own, others = _parted(conjuncts(statement), place, filters.written(self.job_table))
        if not own:
            return None
        key = [place.columns[column.key] for column in self.job_table.key]
        ours = or_(*(self._is_claimed(place, key, claim) for _, claim in self._claims))
        running = adapted(predicates.is_running(self.job_table), table, place)
        return with_criteria(statement, *others, or_(and_(*own), and_(running, ours)))

    def flushing(self, entities: Iterable[Any]) -> None:
        """Note the rows that a session marks; a value that the claim wrote is no change."""
        self._marks_before = self._marks
        for state in map(sa_inspect, entities):
            if any(is_table(each, self.table) for each in state.mapper.tables):
                self._done.add(state.identity)

    def flushed(self) -> None:
        """Leave only the marks whose rows are not known."""
        self._marks = self._marks_before

    def close(self) -> None:
        """Free what is still marked as claimed; what cannot be reached is left to its lease."""
        has_marks = bool(self._marks or self._done)
        if not has_marks and not self.failed and any(c.token for _, c in self._claims):
            logger.warning(UNMARKED, self.patch.target)
        while self._claims:
            engine, claim = self._claims.pop()
            with suppress(ClaimConflict, SQLAlchemyError):
                if claim.token is not None:
                    self._ours(engine, partial(release_left, engine, claim))
                elif not self._marks and (self.failed or self._done):
                    left = [key for key in claim.keys if key not in self._done]
                    give_back = partial(release_jobs, engine, claim, left, unfenced=True)
                    if left:
                        self._ours(engine, give_back)


class _Search:
    """The conditions of a SELECT: on the state, on the table's other columns and other tables."""

    def __init__(self, state: list[Any], others: list[Any]) -> None:
        self.state = state
        self.others = others

    @classmethod
    def of(cls, find: Find, written: set[str]) -> _Search:
        """Take a SELECT's conditions apart; a claim changes what those on the state ask for."""
        return cls(*_parted(conjuncts(find.statement), find.place, written))

    def where(self, find: Find) -> list[Any]:
        """Return the SELECT's conditions as conditions of a claim."""
        table = find.job_table.table
        own = [baked(adapted(each, find.place, table), find.params) for each in self.state]
        if find.alone and all(speaks_only_of(each, find.place) for each in self.others):
            rest = [adapted(each, find.place, table) for each in self.others]
            return [*own, *(baked(each, find.params) for each in rest)]
        others = [baked(each, find.params) for each in self.others]
        keys = with_conditions(find.statement, *others).order_by(None)
        keys = keys.with_only_columns(*find.key)
        if len(find.key) == 1:
            return [*own, find.job_table.key[0].in_(keys)]
        found = keys.subquery()
        same = [a == b for a, b in zip(find.job_table.key, found.columns, strict=True)]
        return [*own, found.select().where(*same).exists()]

    def order(self, find: Find) -> list[Any] | None:
        """Return the SELECT's order if it uses only the table's own columns, else None."""
        terms = order_terms(find.statement)
        if not terms or not all(speaks_only_of(term, find.place) for term in terms):
            return None
        return [adapted(term, find.place, find.job_table.table) for term in terms]


def _parted(
    conditions: Iterable[Any], place: FromClause, written: set[str]
) -> tuple[list[Any], list[Any]]:
    """Split the conditions into those on columns that a claim writes and all others."""
    state: list[Any] = []
    others: list[Any] = []
    for condition in filters.conjuncts_of(conditions):
        is_state = speaks_only_of(condition, place) and filters.speaks_of(condition, written)
        (state if is_state else others).append(condition)
    return state, others


def _looks_up(find: Find) -> bool:
    """Check whether the SELECT looks its rows up by primary key, as ``session.get()`` does."""
    found = {
        each.left.key
        for each in filters.conjuncts_of(conjuncts(find.statement))
        if isinstance(each, BinaryExpression)
        and isinstance(each.left, ColumnClause)
        and getattr(each.operator, "__name__", "") in {"eq", "in_op"}
        and speaks_only_of(each.left, find.place)
        and not isinstance(each.right, ColumnClause)
    }
    return {column.key for column in find.job_table.key} <= found
