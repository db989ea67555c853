"""PostgreSQL, and the databases that speak its dialect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import DateTime

from atomic_claim.candidates import ALONE, Candidates, count_of
from atomic_claim.errors import ClaimError
from atomic_claim.inference import plain_type
from atomic_claim.job_table import JobTable
from atomic_claim.plan import LIMIT, ClaimPlan
from atomic_claim.sql_elements import ORDER, ByKey, DatabaseTime, OrderTerm, key_equals
from atomic_claim.statement import ClaimStatement, statement_of

from .advisory import AdvisoryLocks
from .base import Backend, Find, Mark, Transaction, naive_columns, refuse_naive
from .by_key import statements_of
from .drivers import is_stale
from .fair import lock_in_turn
from .reading import Key, KeyedRows, Reading

NAMES = ("postgresql", "cockroachdb", "yugabytedb")
UTC = ("utc", "gmt", "zulu", "uct", "universal", "greenwich", "gmt0", "gmt+0", "gmt-0")
UTC_NAMES = frozenset(folder + name for folder in ("", "etc/") for name in UTC)
ASKED = sa.text(
    "SELECT pid, backend_start, current_setting('transaction_isolation') FROM pg_stat_activity "
    "WHERE pid = pg_backend_pid()"
)
TERMINATE = sa.text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :pid "
    "AND backend_start = :start AND state <> 'idle' "
    "AND coalesce(xact_start, query_start) <= clock_timestamp() - make_interval(secs => :since)"
)
# https://www.postgresql.org/docs/current/errcodes-appendix.html: serialization_failure,
# deadlock_detected, lock_not_available.
CONFLICTS = frozenset({"40001", "40P01", "55P03"})


class PostgreSQL(Backend):
    """One statement.

    .. code-block:: sql

        WITH claimable AS (
            SELECT jobs.id FROM jobs WHERE <free and due> ORDER BY jobs.created_at LIMIT 10
            FOR NO KEY UPDATE SKIP LOCKED
        ), claimed AS (
            UPDATE jobs SET processing = true FROM claimable WHERE jobs.id = claimable.id
            RETURNING jobs.id, ...
        )
        SELECT claimed.* FROM claimed JOIN claimable ON claimed.id = claimable.id
        ORDER BY claimable.claim_order_1

    Where leases have run out, which are a second reason for a row to be free, the first rows of
    each reason are read without locks and put in order, and LATERAL locks them one after the other
    until there are enough: a lock on each reason's first rows would hold twice as many. Only where
    others hold most of what was looked at are the farther rows locked reason by reason. All of it
    is one UNION ALL under the limit, which PostgreSQL reads, and locks, no farther than it has to:
    where no lease has run out, nothing but the SELECT of the free rows.

    Where a listener may add criteria to a session's SELECTs, the rows are locked by a SELECT of the
    session's own, and marked by key.

    The row lock keeps the planner from inlining the CTE, so the LIMIT holds whatever the plan;
    ``NO KEY`` lets rows be claimed to which another transaction is adding children (manual,
    13.3.2, row-level locks).
    """

    names = NAMES
    required = {"postgresql": ("PostgreSQL", (9, 5), "SKIP LOCKED")}  # noqa: RUF012
    conflicts = CONFLICTS
    has_lateral = True
    key_locks = AdvisoryLocks()
    ending = "SELECT pg_terminate_backend({})"

    def is_single(self, plan: ClaimPlan) -> bool:
        return not (plan.job_table.has_keys or plan.needs_select)

    def claim(
        self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any], mark: Mark | None = None
    ) -> KeyedRows:
        single, asks_zone = plan.prepare(self._single)
        is_plain = tx.own and not plan.entities
        if mark or single is None or not (is_plain or not tx.needs_steps(plan)):
            return super().claim(tx, plan, params, mark)
        if asks_zone:
            self.before_search(tx, plan.job_table)
        return single.keyed(tx.execute(single.statement, params), tx)

    def lock(self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any]) -> list[Key]:
        """Lock the candidates; for a DELETE, skip rows that inserts of child rows have locked."""
        self.before_search(tx, plan.job_table)
        if plan.job_table.fair_by is None:
            locked = tx.tuples(plan.prepare(_locked_candidates), params)
        else:
            locked = lock_in_turn(tx, plan, params[LIMIT])
        tx.refuse_autocommit("the row locks would be gone before the rows are marked")
        return locked

    def lock_read(self, tx: Transaction, find: Find) -> sa.Select[Any]:
        tx.refuse_autocommit("a row lock is gone as soon as the row is read")
        return find.statement.with_for_update(of=find.place, skip_locked=True, key_share=True)

    def _single(self, plan: ClaimPlan) -> tuple[Reading | None, bool]:
        single = Reading(plan, claiming(plan)) if self.is_single(plan) else None
        return single, bool(plan.job_table.prepare(naive_columns, self))

    def before_search(self, tx: Transaction, job_table: JobTable) -> None:
        """Refuse naive columns whose meaning is not declared in a session that is not in UTC."""
        if not job_table.prepare(naive_columns, self):
            return
        if (zone := _time_zone(tx)).lower() not in UTC_NAMES:
            refuse_naive(job_table, self, repr(zone))

    def statements(self, plan: ClaimPlan) -> Sequence[Executable | ByKey]:
        if self.is_single(plan):
            return (claiming(plan),)
        return statements_of(self, plan, plan.prepare(_locked_candidates))

    def limit_wait(self, tx: Transaction, seconds: float) -> AbstractContextManager[None]:
        milliseconds = max(1, round(seconds * 1000))
        tx.connection.execute(sa.text(f"SET LOCAL lock_timeout = {milliseconds}"))
        return nullcontext()

    def check_at_once(self, connection: sa.Connection) -> None:
        if connection.dialect.name != "cockroachdb":
            connection.execute(sa.text("SET CONSTRAINTS ALL IMMEDIATE"))

    def process(self, connection: sa.Connection) -> tuple[Any, str | None]:
        if connection.dialect.name != "postgresql":
            return None, None
        pid, start, level = connection.execute(ASKED).one()
        return (pid, start), level.upper()

    def asks_to_end(self, connection: sa.Connection, process: Any, seconds: float) -> bool:
        if process is None:
            raise ClaimError(
                f"{connection.dialect.name} does not tell which process served a lost connection, "
                "so the outcome of the claim is unknown: look for its rows by their token"
            )
        pid, start = process
        # A pooler may have given the process to another client since.
        asked = {"pid": pid, "start": start, "since": seconds}
        return connection.execute(TERMINATE, asked).first() is not None

    def is_conflict(self, error: DBAPIError) -> bool:
        return super().is_conflict(error) or is_stale(error)

    def compile_claim(self, element: ClaimStatement, compiler: SQLCompiler, **kw: Any) -> str:
        key = tuple(element.table.primary_key)
        terms = [OrderTerm.of(term) for term in element.candidates.order]
        names = [f"{ORDER}{place}" for place in range(1, len(terms) + 1)]

        # A CTE must not be called like the table that is updated.
        table_name = getattr(element.table, "name", None)
        claimable_name, claimed_name = (
            name + "_" if table_name == name else name for name in ("claimable", "claimed")
        )

        lock = _lock(None, element.changes_key)
        claimable = _claimable(element.candidates, lock).cte(claimable_name)
        taken = list(claimable.columns)[: len(key)]
        update = element.where(key_equals(key, taken))
        sql = compiler.visit_update(update, guard_clock=not element.checked, **kw)
        # compiler.ctes holds the text of each CTE: the UPDATE becomes one more of them.
        before, ctes, statement = sql.partition(", \n".join((compiler.ctes or {}).values()))
        if not statement:
            raise ClaimError(
                "where has a CTE with nesting=True, which a claim cannot hold: leave it out"
            )
        quote = compiler.preparer.quote
        same = " AND ".join(
            f"{claimed_name}.{quote(column.name)} = {claimable_name}.{quote(other.name)}"
            for column, other in zip(key, taken, strict=True)
        )
        order = ", ".join(
            f"{claimable_name}.{name}{term.suffix}" for term, name in zip(terms, names, strict=True)
        )
        # A row that was found and not marked is told as a row of NULLs.
        join = "RIGHT JOIN" if element.checked else "JOIN"
        return (
            f"{before}{ctes}, \n{claimed_name} AS \n({statement.strip()})\n "
            f"SELECT {claimed_name}.* \nFROM {claimed_name} {join} {claimable_name} "
            f"ON {same} \nORDER BY {order}"
        )

    def compile_time(
        self, element: DatabaseTime, compiler: SQLCompiler, *, guard_clock: bool = False, **kw: Any
    ) -> str:
        # now() would be the start of the transaction, which may be long ago.
        sql = now = "statement_timestamp()"
        type_ = plain_type(element.type)
        interval = ""
        if element.offset is not None:
            seconds = compiler.process(element.offset, **kw)
            if getattr(type_, "precision", None) == 0 and not element.floor:
                # What is without fractions is rounded.
                seconds += " + 0.5"
            interval = f" + make_interval(secs => {seconds})"
            sql = f"({now}{interval})"
        if isinstance(type_, DateTime) and type_.timezone:
            return sql
        if element.clock == "server":
            sql = f"CAST({sql} AS TIMESTAMP WITHOUT TIME ZONE)"
            if not interval:
                return sql
            by_wall = f"CAST({now} AS TIMESTAMP WITHOUT TIME ZONE){interval}"
            return f"{'GREATEST' if element.later else 'LEAST'}({sql}, {by_wall})"
        sql = f"timezone('UTC', {sql})"
        if element.clock == "unsaid" and guard_clock:
            # The caller executes the construct, so the session cannot be checked before.
            names = ", ".join(f"'{name}'" for name in sorted(UTC_NAMES))
            refusal = "'JobTable(naive_times=...) has to say what times mean in ' || "
            zone = "current_setting('TimeZone')"
            refusal = f"CAST({refusal}{zone} AS TIMESTAMP WITHOUT TIME ZONE)"
            return f"(CASE WHEN lower({zone}) IN ({names}) THEN {sql} ELSE {refusal} END)"
        return sql


def _time_zone(tx: Transaction) -> str:
    """Return the session's time zone, from the driver or else from the server."""
    driver: Any = tx.connection.connection.driver_connection
    status = getattr(getattr(driver, "info", None), "parameter_status", None)
    known = status("TimeZone") if status is not None else None
    return str(known or tx.connection.scalar(sa.text("SELECT current_setting('TimeZone')")))


def claiming(plan: ClaimPlan) -> Executable:
    """Return the one-statement claim with the fault of each row, for entities as a SELECT."""
    fault = plan.fault()
    statement = cast("ClaimStatement", statement_of(plan).returning(fault))
    statement.checked = True
    if not plan.entities:
        return statement
    found = sa.select(plan.returned_table, fault).from_statement(statement)
    return found.execution_options(populate_existing=True)


def _gate(found: sa.Select[Any], limit: Any, is_open: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """Ask once, under a limit that the planner knows: else its costs make it compile (JIT)."""
    return found.where(is_open).limit(limit)


Lock = Callable[[sa.Select[Any]], sa.Select[Any]]


def _lock(of: Any, changes_key: bool) -> Lock:
    return lambda branch: branch.with_for_update(skip_locked=True, key_share=not changes_key, of=of)


def _locked_candidates(plan: ClaimPlan) -> sa.Select[Any]:
    lock = _lock(plan.job_table.table if plan.multi_table else None, plan.changes_key)
    found = plan.candidates
    if found.is_plain:
        return found.select(lock=lock)
    return found.only_keys(found.ordered(_claimable(found, lock).subquery()))


def _claimable(candidates: Candidates, lock: Lock) -> sa.Select[Any]:
    """Build the SELECT of the candidates that locks no more rows than it returns."""
    prefix = "atomic_claim_"
    if candidates.is_plain:
        return candidates.select(terms=True, lock=lock)
    limit, scan_limit = candidates.limit, candidates.scan_limit
    free, *reasons = candidates.branches
    found, may_be_free = [free.limit(scan_limit)], cast("sa.ColumnElement[bool]", sa.true())
    if (waiting := candidates.stepwise) is not None:
        found, may_be_free = waiting.gated(scan_limit, _gate)
    near, *found = found
    is_deep: list[sa.ColumnElement[bool]] = []
    if reasons:
        expired = sa.union_all(*reasons).cte(f"{prefix}expired")
        # Only where there are any must the first free rows be put in order with them.
        found = [near.where(sa.exists().select_from(expired)), *found, sa.select(expired)]
        is_deep = [count_of(expired) >= scan_limit] * len(reasons)
    nearest = candidates.ordered(sa.union_all(*found).subquery("branches")).cte(f"{prefix}nearest")
    is_deep = [sa.or_(may_be_free, count_of(nearest) >= scan_limit), *is_deep]
    key = list(nearest.columns)[: len(candidates.rows.selected_columns)]

    # One after the other, until there are enough: LATERAL leaves the planner no other way.
    own = list(candidates.rows.selected_columns)
    held = lock(candidates.rows.where(key_equals(own, key))).lateral("held")
    locked = sa.select(*held.columns, *list(nearest.columns)[len(key) :])
    locked = locked.select_from(nearest.join(held, sa.true()))
    taken: list[sa.Select[Any]] = []
    may_share: list[sa.ColumnElement[bool]] = []
    if candidates.tells_alone:
        first = locked.limit(sa.literal_column("1")).cte(f"{prefix}first")
        taken.append(sa.select(first))
        is_alone = sa.select(first.columns[ALONE]).scalar_subquery()
        zero: sa.ColumnElement[int] = sa.literal_column("0")
        may_share.append(sa.func.coalesce(is_alone, zero) == zero)
        shares = nearest.columns[ALONE] == zero
        locked = locked.where(*may_share, shares, _not_in(key, first))
    taken.append(locked)
    for branch, goes_on in zip(candidates.shared_branches, is_deep, strict=True):
        untried = _not_in(list(branch.selected_columns)[: len(key)], nearest)
        taken.append(lock(branch.where(goes_on, *may_share, untried).limit(limit)))
    # Each is read, and locks, only as far as those before it are not enough.
    return sa.select(candidates.together(*taken).subquery(f"{prefix}all")).limit(limit)


def _not_in(key: Sequence[sa.ColumnElement[Any]], found: sa.CTE) -> sa.ColumnElement[bool]:
    """Build the condition that a row is none of those that are found."""
    return sa.tuple_(*key).not_in(sa.select(*list(found.columns)[: len(key)]))
