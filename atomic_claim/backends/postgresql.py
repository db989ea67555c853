"""PostgreSQL, and the databases that speak its dialect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Dialect,
    Result,
    Select,
    func,
    literal_column,
    select,
    text,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.selectable import FromClause
from sqlalchemy.types import DateTime, Integer

from atomic_claim.errors import ClaimError
from atomic_claim.inference import plain_type
from atomic_claim.job_table import JobTable
from atomic_claim.plan import MARGIN, Candidates, ClaimPlan
from atomic_claim.sql_elements import (
    ORDER,
    ByKey,
    DatabaseTime,
    InlineLiteral,
    OrderTerm,
    key_equals,
)
from atomic_claim.statement import ClaimStatement, statement_of

from .advisory import (
    LEVEL,
    limit_idleness,
    lock_candidates,
    lock_number,
    refuse_snapshot,
    require_locks,
    wait_for_keys,
)
from .base import (
    CHUNK,
    Backend,
    Candidate,
    Find,
    Key,
    KeyedRows,
    Pooled,
    Transaction,
    chunks,
    load,
    mark_and_load,
    reading_by_key,
    refuse_autocommit,
    require,
    returned,
)
from .by_key import claim_by_key, keyed_statements, refuse_view
from .direct import Direct, Failed, learn

NAMES = ("postgresql", "cockroachdb", "yugabytedb")
UTC_NAMES = frozenset(
    [
        "utc",
        "etc/utc",
        "gmt",
        "etc/gmt",
        "zulu",
        "etc/zulu",
        "uct",
        "etc/uct",
        "universal",
        "etc/universal",
        "greenwich",
        "etc/greenwich",
        "gmt0",
        "etc/gmt0",
        "gmt+0",
        "etc/gmt+0",
        "gmt-0",
        "etc/gmt-0",
    ]
)
# The isolation that a statement by itself has, if nobody says otherwise.
PLAIN_LEVELS = {"READ COMMITTED"}
# Of psycopg's transaction status.
IDLE = 0
EMPTY: Mapping[str, Any] = {}
NOTHING_ANEW = {"populate_existing": False}
# https://www.postgresql.org/docs/current/errcodes-appendix.html: serialization_failure,
# deadlock_detected, lock_not_available.
CONFLICTS = frozenset({"40001", "40P01", "55P03"})

KEYS_UNLOCKED = "the locks on the keys would be gone before the rows change"


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

    Where leases that have run out are a second reason for a row to be free, the first rows of each
    reason are read without locks and put in order, and LATERAL locks them one after the other
    until there are enough: a lock on each reason's first rows would hold twice as many. Only where
    others hold most of what was looked at are the farther rows locked reason by reason.

    Where a listener may add criteria to a session's SELECTs, the rows are locked by a SELECT of the
    session's own, and marked by key.

    The row lock keeps the planner from inlining the CTE, so the LIMIT holds whatever the plan;
    ``NO KEY`` lets rows be claimed to which another transaction is adding children (manual,
    13.3.2, row-level locks).
    """

    names = NAMES

    def check(self, dialect: Dialect) -> None:
        if dialect.name == "postgresql":
            require(dialect, "PostgreSQL", (9, 5), "SKIP LOCKED")

    def is_single(self, plan: ClaimPlan) -> bool:
        return not plan.multi_table and plan.job_table.exclusive_by is None

    def claim(self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any]) -> KeyedRows:
        if plan.job_table.exclusive_by is not None:
            require_locks(tx.dialect)
            refuse_view(tx.connection, plan.job_table.table)
            self._check_zone(tx, plan)
            return claim_by_key(self, tx, plan, params)
        return self._claim(tx, plan, params)

    def key_session(self, job_table: JobTable) -> Sequence[ColumnElement[Any]]:
        return (LEVEL,)

    def check_key_session(self, job_table: JobTable, found: Sequence[Any]) -> None:
        refuse_snapshot(*found)

    def key_number(self, job_table: JobTable, key: ColumnElement[Any]) -> ColumnElement[Any]:
        return lock_number(job_table, key)

    def lock_keys(
        self, tx: Transaction, job_table: JobTable, candidates: Sequence[Candidate], wanted: int
    ) -> tuple[Sequence[Candidate], Sequence[Candidate]]:
        return lock_candidates(tx, job_table, candidates, wanted)

    def begin_keyed(self, connection: Connection) -> None:
        limit_idleness(connection)

    def _claim(self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any]) -> KeyedRows:
        if plan.entities and tx.has_criteria:
            keys = self.lock(tx, plan, params)
            return mark_and_load(tx, plan, keys, params, self.hints)
        self._check_zone(tx, plan)
        result = _executed(tx, plan, params)
        learn(tx, plan, result, self._claim_directly)
        found = returned(plan, result)
        if not plan.multi_table:
            return found
        return load(tx, plan, [key for key, _ in found], self.hints)

    def _claim_directly(
        self,
        plan: ClaimPlan,
        direct: Direct,
        pooled: PoolProxiedConnection,
        params: Mapping[str, Any],
    ) -> KeyedRows:
        if self._has_naive(plan):
            if (zone := _known_zone(pooled)) is None:
                raise Failed
            self._check_zone_name(plan, zone)
        return direct.found(plan, direct.fetch(pooled, params))

    def lock(
        self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any], *, deletes: bool = False
    ) -> list[Key]:
        """Lock the candidates; for a DELETE, skip rows that inserts of child rows have locked."""
        self._check_zone(tx, plan)
        make = partial(_locked_candidates, deletes=deletes)
        locked = plan.prepare(f"locked {deletes}", make)
        return [tuple(row) for row in tx.execute(locked, params)]

    def lock_read(self, tx: Transaction, find: Find) -> Select[Any]:
        refuse_autocommit(self, tx, "a row lock is gone as soon as the row is read")
        return find.statement.with_for_update(of=find.place, skip_locked=True, key_share=True)

    def _has_naive(self, plan: ClaimPlan) -> bool:
        return bool(plan.prepare("naive columns", lambda it: self.naive_columns(it.job_table)))

    def _check_zone(self, tx: Transaction, plan: ClaimPlan) -> None:
        if self._has_naive(plan):
            self._check_zone_name(plan, _time_zone(tx))

    def _check_zone_name(self, plan: ClaimPlan, zone: str) -> None:
        if zone.lower() not in UTC_NAMES:
            self.refuse_naive(plan.job_table, repr(zone))

    def statements(self, plan: ClaimPlan) -> Sequence[Executable | ByKey]:
        if plan.job_table.exclusive_by is not None:
            return keyed_statements(self, plan)
        reading = (reading_by_key(plan, self.hints),) if plan.multi_table else ()
        return (statement_of(plan), *reading)

    def extend(
        self,
        tx: Transaction,
        job_table: JobTable,
        keys: Sequence[Key],
        guard: ColumnElement[bool],
        values: Mapping[Any, Any],
    ) -> list[Key]:
        """Lock the exclusive keys first, since the UPDATE reads the clock at its start."""
        if job_table.exclusive_by is not None:
            for chunk in chunks(keys, CHUNK):
                wait_for_keys(tx, job_table, chunk)
            refuse_autocommit(self, tx, KEYS_UNLOCKED)
        return self.change(tx, job_table, keys, guard, values)

    def limit_wait(self, tx: Transaction, seconds: float) -> AbstractContextManager[None]:
        milliseconds = max(1, round(seconds * 1000))
        tx.connection.execute(text(f"SET LOCAL lock_timeout = {milliseconds}"))
        return nullcontext()

    def autocommit(
        self, dialect: Dialect, pooled: PoolProxiedConnection
    ) -> AbstractContextManager[None] | None:
        """Only psycopg is known here: what BEGIN would say it keeps in these attributes."""
        if dialect.driver != "psycopg" or dialect.is_async:
            return None
        driver: Any = pooled.driver_connection
        if driver.pgconn.transaction_status != IDLE:
            return None
        if (level := driver.isolation_level) is not None:
            # SQLAlchemy leaves the default level on a connection that was once in AUTOCOMMIT.
            default = dialect.default_isolation_level
            if default not in PLAIN_LEVELS or level.name != default.replace(" ", "_"):
                return None
        if driver.read_only or driver.deferrable:
            return None
        return nullcontext() if driver.autocommit else _Autocommit(driver)

    def in_transaction(self, pooled: Pooled) -> bool:
        driver: Any = pooled.driver_connection
        if (connection := getattr(driver, "pgconn", None)) is not None:  # psycopg
            return bool(connection.transaction_status != IDLE)
        if hasattr(driver, "is_in_transaction"):  # asyncpg
            return bool(driver.is_in_transaction())
        status = getattr(getattr(driver, "info", None), "transaction_status", 0)  # psycopg2
        return bool(status != 0)

    def is_conflict(self, error: DBAPIError) -> bool:
        found = error.orig
        code = getattr(found, "sqlstate", None) or getattr(found, "pgcode", None)
        return code in CONFLICTS

    def outages(self, dialect: Dialect) -> tuple[type[Exception], ...]:
        """Of asyncpg, a refusal to connect may reach us as it was raised."""
        found = super().outages(dialect)
        driver: Any = getattr(dialect.dbapi, "asyncpg", None)
        return found if driver is None else (*found, driver.PostgresError, driver.InterfaceError)


class _Autocommit(AbstractContextManager[None]):
    """The driver commits by itself until the block ends; no generator, for every claim's sake."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def __enter__(self) -> None:
        self.driver.autocommit = True

    def __exit__(self, *_: object) -> None:
        if not self.driver.closed:
            self.driver.autocommit = False


def _time_zone(tx: Transaction) -> str:
    """Return the session's time zone, from the driver or else from the server."""
    asking = text("SELECT current_setting('TimeZone')")
    return _known_zone(tx.connection.connection) or str(tx.connection.scalar(asking))


def _known_zone(pooled: PoolProxiedConnection) -> str | None:
    """Return the session's time zone if the driver tracks it, or None."""
    driver: Any = pooled.driver_connection
    status = getattr(getattr(driver, "info", None), "parameter_status", None)
    return (status("TimeZone") if status is not None else None) or None


def _executed(tx: Transaction, plan: ClaimPlan, params: dict[str, Any]) -> Result[Any]:
    """Execute the claim; of entities as a SELECT would be, which takes a session less time."""
    session, statement = tx.executor, statement_of(plan)
    if plan.multi_table or not plan.entities or isinstance(session, Connection):
        return tx.execute(statement, params)
    from sqlalchemy.orm import Session  # noqa: PLC0415 - whoever has a session has loaded it

    # Whoever chooses engines by the kind of statement has to see an UPDATE.
    if type(session).get_bind is not Session.get_bind:
        return tx.execute(statement, params)
    reading = plan.prepare("from statement", _from_statement)
    # Of nothing that the session has, or is about to have, there is anything to read anew.
    has_none = next(iter(session), None) is None
    return session.execute(
        reading,
        params,
        execution_options=NOTHING_ANEW if has_none else EMPTY,
        bind_arguments={"bind": tx.connection},
    )


def _from_statement(plan: ClaimPlan) -> Executable:
    from sqlalchemy.orm import lazyload  # noqa: PLC0415 - loaded with the mapped class

    # What is joined for a collection would multiply the rows of RETURNING.
    found = select(plan.returned_table).options(lazyload("*")).from_statement(statement_of(plan))
    return found.execution_options(populate_existing=True)


Lock = Callable[[Select[Any]], Select[Any]]


def _lock(of: Any, changes_key: bool) -> Lock:
    return lambda branch: branch.with_for_update(skip_locked=True, key_share=not changes_key, of=of)


def _locked_candidates(plan: ClaimPlan, deletes: bool) -> Select[Any]:
    of = plan.job_table.table if plan.multi_table else None
    lock = _lock(of, deletes or plan.changes_key)
    found = plan.candidates
    if len(found.branches) == 1:
        return found.select(lock=lock)
    return found.only_keys(found.ordered(_claimable(found, lock, terms=True).subquery()))


def _claimable(candidates: Candidates, lock: Lock, *, terms: bool) -> Select[Any]:
    """Build the SELECT of the candidates that locks no more rows than it returns."""
    prefix = "claim_"
    if len(candidates.branches) == 1:
        return candidates.select(terms=terms, lock=lock)
    limit, scan_limit = candidates.limit, candidates.scan_limit
    branches = [branch.limit(scan_limit) for branch in candidates.branches]
    near = candidates.together(*branches).subquery("branches")
    nearest = candidates.ordered(near).cte(f"{prefix}nearest")
    key = list(nearest.columns)[: len(nearest.columns) - len(candidates.order)]

    # One after the other, until there are enough: LATERAL leaves the planner no other way.
    own = list(candidates.rows.selected_columns)
    held = lock(candidates.rows.where(key_equals(own, key))).lateral("held")
    taken = [
        select(*held.columns, *list(nearest.columns)[len(key) :])
        .select_from(nearest.join(held, true()))
        .limit(limit)
        .cte(f"{prefix}taken")
    ]
    # Others hold so many of the nearest that the farther ones are to be looked at.
    is_deep = _count(nearest) >= scan_limit
    for place, branch in enumerate(candidates.branches, 1):
        columns = list(branch.selected_columns)[: len(key)]
        others = [
            tuple_(*columns).not_in(select(*list(found.columns)[: len(key)])) for found in taken
        ]
        missing = limit - sum((_count(found) for found in taken), literal_column("0"))
        farther = lock(branch.where(is_deep, *others).limit(missing))
        taken.append(farther.cte(f"{prefix}taken_{place}"))
    together = union_all(*(select(found) for found in taken)).subquery(f"{prefix}all")
    # There are no more in any case; but so the planner knows it.
    return select(*(together.columns if terms else list(together.columns)[: len(key)])).limit(limit)


def _of_one(candidates: Candidates) -> Candidates:
    """Return the candidates of a claim of one row, with limits that are compiled as literals."""
    limit, scan_limit = (InlineLiteral(number, Integer()) for number in (1, 1 + MARGIN))
    first, *others = candidates.branches
    branches = (first.limit(limit), *(branch.limit(scan_limit) for branch in others))
    return replace(candidates, branches=branches, limit=limit, scan_limit=scan_limit)


def _count(found: FromClause) -> ColumnElement[int]:
    return select(func.count()).select_from(found).scalar_subquery()


@compiles(ClaimStatement, *NAMES)
def _claim(element: ClaimStatement, compiler: SQLCompiler, **kw: Any) -> str:
    PostgreSQL().check(compiler.dialect)
    key = tuple(element.table.primary_key)
    terms = [] if element.single else [OrderTerm.of(term) for term in element.order_terms]
    names = [f"{ORDER}{place}" for place in range(1, len(terms) + 1)]

    # A CTE must not be called like the table that is updated.
    table_name = getattr(element.table, "name", None)
    claimable_name, claimed_name = (
        name + "_" if table_name == name else name for name in ("claimable", "claimed")
    )

    lock = _lock(element.table if element.multi_table else None, element.changes_key)
    candidates = _of_one(element.candidates) if element.single else element.candidates
    claimable = _claimable(candidates, lock, terms=not element.single).cte(claimable_name)
    taken = list(claimable.columns)[: len(key)]
    update = element.where(key_equals(key, taken))
    sql = compiler.visit_update(update, guard_clock=element.guarded, **kw)
    if element.single:
        return sql
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
    return (
        f"{before}{ctes}, \n{claimed_name} AS \n({statement.strip()})\n SELECT {claimed_name}.* \n"
        f"FROM {claimed_name} JOIN {claimable_name} ON {same} \nORDER BY {order}"
    )


@compiles(DatabaseTime, *NAMES)
def _now(
    element: DatabaseTime, compiler: SQLCompiler, *, guard_clock: bool = False, **kw: Any
) -> str:
    # now() would be the start of the transaction, which may be long ago.
    sql = "statement_timestamp()"
    if element.offset is not None:
        sql = f"({sql} + make_interval(secs => {compiler.process(element.offset, **kw)}))"
    type_ = plain_type(element.type)
    if isinstance(type_, DateTime) and type_.timezone:
        return sql
    if element.clock == "server":
        return f"CAST({sql} AS TIMESTAMP WITHOUT TIME ZONE)"
    sql = f"timezone('UTC', {sql})"
    if element.clock == "unsaid" and guard_clock:
        # Nobody of ours is there to look at the session when the caller executes a construct.
        names = ", ".join(f"'{name}'" for name in sorted(UTC_NAMES))
        refusal = "'JobTable(naive_times=...) has to say what times mean in ' || "
        zone = "current_setting('TimeZone')"
        refusal = f"CAST({refusal}{zone} AS TIMESTAMP WITHOUT TIME ZONE)"
        return f"(CASE WHEN lower({zone}) IN ({names}) THEN {sql} ELSE {refusal} END)"
    return sql
