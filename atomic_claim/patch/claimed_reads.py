"""Legacy functions that load all and commit row by row: their reads are handed claimed rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BinaryExpression, ColumnClause
from sqlalchemy.sql.selectable import FromClause

from atomic_claim import predicates
from atomic_claim.backends import CHUNK, Find
from atomic_claim.claim import Claim, claim_jobs
from atomic_claim.errors import ClaimConflict, ClaimLost, PatchError
from atomic_claim.heartbeat import Beat
from atomic_claim.job_table import JobTable, job_table_of
from atomic_claim.lifecycle import owned_rows, release_jobs, release_left
from atomic_claim.roles import ADDED
from atomic_claim.sql_elements import key_in

from . import filters
from .calls import Options
from .patches import Patch, Run, make_patch
from .reads import Watch, unwatched, watching
from .replacing import ALL
from .selects import (
    adapted,
    baked,
    conjuncts,
    is_table,
    speaks_only_of,
    with_conditions,
    with_criteria,
)
from .tables import Tables, check_role, leased_only
from .targets import Target

R = TypeVar("R")

LEASE = timedelta(minutes=5)
"""The lease where the table can hold one and none was asked for; kept while the loop runs."""
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
        tables = Tables(table, Options(found), claimable)
        watch = partial(ClaimWatch, patch, tables, limit, lease=asked, worker=worker)
        return watching(patch, found.function, watch)

    def claimable(given: Any) -> JobTable:
        job_table = _leased(job_table_of(given), asked, at_most_once)
        check_role(job_table, "worker", "worker", worker)
        return job_table

    asked = filters.lease(lease)
    return make_patch(target, prepare)


def _leased(job_table: JobTable, lease: timedelta | None, at_most_once: bool) -> JobTable:
    """Return the table to claim with, or raise if a crash would lose jobs unnoticed."""
    name = job_table.table.fullname
    only_state = not job_table.done and not job_table.failed
    missing = [role for role in ("lease", "token") if getattr(job_table, role) is None]
    if not missing and only_state and job_table.state is not job_table.lease:
        return leased_only(job_table)
    if missing and (lease is not None or (only_state and not at_most_once)):
        why = (
            f"lease={lease!r} was asked for"
            if lease is not None
            else "its only state is the final one, so a row claimed by a worker that dies would "
            "never be done"
        )
        named = ", ".join(f"{role}=..." for role in missing)
        cures = [f"ALTER TABLE {name} ADD COLUMN {ADDED[role]} NULL" for role in missing]
        cures += [] if lease is not None else ["or agree to that with at_most_once=True"]
        raise PatchError(
            f"{name!r} has no {' and no '.join(missing)} column that is known, and {why}: name "
            f"what it has with JobTable({named}), or add it: {'; '.join(cures)}"
        )
    return job_table


class ClaimWatch(Watch):
    """A running call whose finds are claims."""

    def __init__(self, *watched: Any, lease: timedelta | None, worker: str | None) -> None:
        super().__init__(*watched)
        self._asked = lease
        self._worker = worker
        self._claims: list[tuple[sa.Engine, Claim[Any], Beat | None]] = []
        self._next_beat = float("inf")
        self._done: dict[Any, set[Any]] = {}
        self._marks = 0
        self._marks_before = 0

    def read(
        self, connection: sa.Connection, statement: Any, params: Mapping[str, Any]
    ) -> sa.Select[Any] | None:
        """Claim what the SELECT asks for, and make it read that."""
        find = self.find(connection, statement, params)
        if find is None or _looks_up(find):
            return None
        self.reads += 1
        if find.limit == 0:
            return None
        # A claim changes what the conditions on the state ask for.
        state, others = filters.parted(conjuncts(find.statement), find.place, find.job_table)
        where, engine = _wanted(find, state, others), connection.engine
        with unwatched():
            claim = self._claim(engine, find, where)
        self.patch.count(claimed=len(claim))
        if not claim:
            return with_conditions(find.statement, sa.false())
        return with_conditions(find.statement, *others, self._is_claimed(find.place, claim))

    @property
    def _lease(self) -> timedelta | None:
        can_hold = self.job_table.lease is not None and self.job_table.token is not None
        return LEASE if self._asked is None and can_hold else self._asked

    def _claim(self, engine: sa.Engine, find: Find, where: list[Any]) -> Claim[Any]:
        claim: Claim[Any] = claim_jobs(
            engine,
            self.job_table,
            ALL if find.limit is None else find.limit,
            where=filters.beside_the_lease(self.job_table, where) or None,
            order_by=_order(find),
            worker=self._worker,
            lease=self._lease,
        )
        beat = None
        if claim and self._lease is not None:
            beat = Beat(engine, owned_rows(claim, None, unfenced=False), self._lease / 3)
            self._next_beat = min(self._next_beat, time.monotonic() + beat.every)
        if claim:
            self._claims.append((engine, claim, beat))
        return claim

    def _is_claimed(self, place: FromClause, claim: Claim[Any]) -> Any:
        own = self.job_table
        # A statement may not have as many parameters as a large claim has keys.
        has_few = len(claim) <= CHUNK or claim.token is None
        ours = key_in(own.key, claim.keys) if has_few else own.token == claim.token
        return adapted(ours, own.table, place)

    def tick(self) -> None:
        """Extend the leases, since the loop itself does not while it works."""
        if time.monotonic() < self._next_beat:
            return
        beats = [beat for _, _, beat in self._claims if beat is not None]
        self._next_beat = time.monotonic() + min((b.every for b in beats), default=float("inf"))
        for beat in beats:
            with unwatched():
                lost = beat.once()
            if lost:
                raise ClaimLost(
                    f"{self.patch.target} stood still for longer than the lease of {self._lease}, "
                    f"and {len(lost)} of its jobs are other workers', their keys: {list(lost)!r}",
                    keys=lost,
                )
        # A call may go on for as long as its program runs.
        self._claims = [each for each in self._claims if each[2] is None or each[2].remaining]

    def mark(
        self,
        connection: sa.Connection,  # noqa: ARG002 - locks are a connection's, claims are not
        statement: sa.Update | sa.Delete | None,
    ) -> sa.Update | sa.Delete | None:
        """Allow changes of claimed rows by any transaction; rewrite the conditions on the state.

        An UPDATE that asks whether the row is still free, which it was until we claimed it, gets
        what the claim left of it.
        """
        self._marks += 1
        if statement is None or not self._claims:
            return None
        place: Any = statement.table
        own, others = filters.parted(conjuncts(statement), place, self.job_table)
        if not own:
            return None
        ours = sa.or_(*(self._is_claimed(place, claim) for _, claim, _ in self._claims))
        running = adapted(predicates.is_running(self.job_table), self.job_table.table, place)
        return with_criteria(statement, *others, sa.or_(sa.and_(*own), sa.and_(running, ours)))

    def flushing(self, entities: Iterable[Any]) -> None:
        """Note the rows that a session marks; a value that the claim wrote is no change."""
        self._marks_before = self._marks
        for state in map(sa.inspect, entities):
            for table in state.mapper.tables:
                if is_table(table, self.table):
                    self._done.setdefault(table, set()).add(state.identity)

    def flushed(self) -> None:
        """Leave only the marks whose rows are not known."""
        self._marks = self._marks_before

    def close(self) -> None:
        """Free what is still marked as claimed; what cannot be reached is left to its lease."""
        is_marked = self._marks or self._done or self.failed
        if not is_marked and any(claim.token for _, claim, _ in self._claims):
            logger.warning(UNMARKED, self.patch.target)
        while self._claims:
            engine, claim, _ = self._claims.pop()
            with suppress(ClaimConflict, SQLAlchemyError), unwatched():
                if claim.token is not None:
                    release_left(engine, claim)
                elif not self._marks and (self.failed or self._done):
                    self._give_back(engine, claim)

    def _give_back(self, engine: sa.Engine, claim: Claim[Any]) -> None:
        """Free the rows that no session has marked.

        The database compares the keys: another object for the table may have other types.
        """
        own = self.job_table
        unmarked = sa.select(*own.key).where(key_in(own.key, claim.keys))
        for table, marked in self._done.items():
            key = tuple(table.primary_key.columns)
            unmarked = unmarked.where(sa.not_(adapted(key_in(key, marked), table, own.table)))
        with engine.connect() as connection:
            left = [tuple(key) for key in connection.execute(unmarked)]
        if left:
            release_jobs(engine, claim, left, unfenced=True)


def _wanted(find: Find, state: list[Any], others: list[Any]) -> list[Any]:
    """Return the conditions of a SELECT, on the state and all others, as those of a claim."""
    if find.alone and all(speaks_only_of(each, find.place) for each in others):
        return _own(find, [*state, *others])
    keys = with_conditions(find.statement, *(baked(each, find.params) for each in others))
    keys = keys.order_by(None).with_only_columns(*find.key)
    if len(find.key) == 1:
        return [*_own(find, state), find.job_table.key[0].in_(keys)]
    found = keys.subquery()
    same = [a == b for a, b in zip(find.job_table.key, found.columns, strict=True)]
    return [*_own(find, state), found.select().where(*same).exists()]


def _own(find: Find, clauses: Iterable[Any]) -> list[Any]:
    """Return clauses of the SELECT as clauses on the table itself."""
    table = find.job_table.table
    return [baked(adapted(each, find.place, table), find.params) for each in clauses]


def _order(find: Find) -> list[Any] | None:
    """Return the SELECT's order if it uses only the table's own columns, else None."""
    terms = find.statement._order_by_clauses  # noqa: SLF001 - there is no public name for it
    if not terms or not all(speaks_only_of(term, find.place) for term in terms):
        return None
    return _own(find, terms)


def _looks_up(find: Find) -> bool:
    """Check whether the SELECT looks its rows up by primary key, as ``session.get()`` does."""
    found = {
        each.left.key
        for each in filters.conjuncts_of(conjuncts(find.statement))
        if isinstance(each, BinaryExpression)
        and isinstance(each.left, ColumnClause)
        and each.operator in {operators.eq, operators.in_op}
        and speaks_only_of(each.left, find.place)
        and not isinstance(each.right, ColumnClause)
    }
    return {column.key for column in find.job_table.key} <= found
