"""SQLite."""

from __future__ import annotations

import operator
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    Dialect,
    Row,
    Select,
    Update,
    false,
    func,
    select,
    text,
    tuple_,
    type_coerce,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import visitors
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.types import NullType, String

from atomic_claim.errors import UnsupportedDialect
from atomic_claim.job_table import JobTable
from atomic_claim.plan import INSTANT, LIMIT, ClaimPlan
from atomic_claim.sql_elements import ORDER, ByKey, DatabaseTime, OrderTerm, RandomFraction
from atomic_claim.statement import ClaimStatement, statement_of

from .base import Backend, Find, Mark, Transaction, instant, mark_and_load, marked_by_key
from .by_key import claim_by_key, keyed_statements, refuse_view
from .fair import FairSearch, lock_in_turn
from .reading import Key, KeyedRows, Reading
from .versions import require

MARK = "/* claimable */"
TRIGGERS = text("SELECT 1 FROM sqlite_master WHERE type = 'trigger' AND tbl_name = :name LIMIT 1")


class SQLite(Backend):
    """One statement, which takes the write lock before it reads.

    .. code-block:: sql

        UPDATE jobs SET processing = 1 WHERE jobs.id IN (
            SELECT jobs.id FROM jobs WHERE <free and due> ORDER BY jobs.created_at LIMIT 10)
        RETURNING id, ...

    ``RETURNING`` has no order (https://www.sqlite.org/lang_returning.html). Numbers and times
    that the claim leaves as they are come back as they are stored, and are put in SQLite's own
    order of stored values; where the order depends on a collation, on an expression, or on what
    the claim writes, the database says it:

    .. code-block:: sql

        UPDATE jobs SET id = id WHERE 0 = 1;   -- takes the write lock, changes nothing
        SELECT jobs.id FROM jobs WHERE <free and due> ORDER BY lower(jobs.name) LIMIT 10;
        UPDATE jobs SET processing = 1 WHERE jobs.id IN (...);
        SELECT ... FROM jobs WHERE jobs.id IN (...)
    """

    names = ("sqlite",)
    checks_text = False
    cure = (
        "roll back, and claim as the first statement of the transaction: a transaction that has "
        "read cannot become a writer once another connection has written "
        "(https://www.sqlite.org/lang_transaction.html)"
    )

    def check(self, dialect: Dialect) -> None:
        require(dialect, "SQLite", (3, 35), "RETURNING")

    def is_single(self, plan: ClaimPlan) -> bool:
        if plan.needs_select or plan.job_table.has_keys:
            return False
        if _has_cte(*plan.values.values()):
            return False
        return plan.single or not (plan.changes_order or any(t.collates for t in _terms(plan)))

    def claim(
        self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any], mark: Mark | None = None
    ) -> KeyedRows:
        if plan.job_table.exclusive_by is not None:
            try:
                self._take_write_lock(tx, plan.job_table)
            except DBAPIError:
                refuse_view(tx.connection, plan.job_table.table)
                raise
            return claim_by_key(tx, plan, params, mark or mark_and_load)
        if mark or not plan.prepare(self.is_single) or tx.needs_steps(plan):
            return super().claim(tx, plan, params, mark)
        given = dict(params)
        if (asking := plan.prepare(instant)) is not None:
            given[INSTANT] = tx.connection.scalar(asking, params)
        claiming = plan.prepare(_claiming)
        rows = list(tx.execute(claiming.statement, params).all())
        # What is claimed alone may be left for the next claim.
        may_be_all = not (rows and plan.candidates.tells_alone)
        if may_be_all and len(rows) < params[LIMIT]:
            rows += self._passed_over(tx, plan, params, len(rows))
        found = claiming.keyed(_in_order(plan, rows))
        keys = [key for key, _ in found]
        tx.marked.extend(keys)
        for _, result in tx.by_key(plan.prepare(_wrong), keys, given):
            if wrong := result.all():
                plan.refuse_fault(wrong[0][-1], wrong[0][:-1])
        return found

    def _passed_over(
        self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any], count: int
    ) -> Sequence[Row[Any]]:
        """Refuse rows that a trigger keeps from being marked without an error.

        Returns:
            Rows that have become due since the first statement.
        """
        if not tx.tuples(TRIGGERS, {"name": plan.job_table.table.name}):
            return ()
        if not (left := tx.tuples(plan.prepare(_first_left), params)):
            return ()
        wanted = {**params, LIMIT: params[LIMIT] - count}
        more = tx.execute(plan.prepare(_claiming).statement, wanted).all()
        if not more and left == tx.tuples(plan.prepare(_first_left), params):
            plan.refuse_fault(None, left[0])
        return more

    def statements(self, plan: ClaimPlan) -> Sequence[Executable | ByKey]:
        if self.is_single(plan):
            return (plan.prepare(_claiming).statement, plan.prepare(_wrong))
        if plan.job_table.exclusive_by is not None:
            return (_lock(plan.job_table), *keyed_statements(self, plan))
        if plan.job_table.fair_by is not None:
            turn = plan.prepare(FairSearch, self).statements
            return (_lock(plan.job_table), *turn, *marked_by_key(plan, self))
        return (_lock(plan.job_table), plan.candidates.select(), *marked_by_key(plan, self))

    def lock(
        self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any], *, deletes: bool = False
    ) -> list[Key]:
        self._take_write_lock(tx, plan.job_table)
        if plan.job_table.fair_by is not None:
            return lock_in_turn(tx, plan.prepare(FairSearch, self), params[LIMIT], None)
        return tx.tuples(plan.prepare(_candidates), params)

    def lock_read(self, tx: Transaction, find: Find) -> Select[Any]:
        self._take_write_lock(tx, find.job_table)
        return find.statement

    def _take_write_lock(self, tx: Transaction, job_table: JobTable) -> None:
        """Take the write lock as the transaction's first statement would, and change nothing."""
        tx.execute(job_table.prepare(_lock))
        tx.refuse_autocommit("another claim could come between this one's statements")

    @contextmanager
    def limit_wait(self, tx: Transaction, seconds: float) -> Iterator[None]:
        before = tx.connection.scalar(text("PRAGMA busy_timeout"))
        milliseconds = max(1, round(seconds * 1000))
        tx.connection.execute(text(f"PRAGMA busy_timeout = {milliseconds}"))
        try:
            yield
        finally:
            tx.connection.execute(text(f"PRAGMA busy_timeout = {before}"))

    def changes(
        self, job_table: JobTable, guard: ColumnElement[bool], values: Mapping[Any, Any]
    ) -> Sequence[ByKey]:
        """Hide the guard from the planner, which else reads an index of all running rows."""
        hidden: ColumnElement[bool] = func.coalesce(guard, false())
        return super().changes(job_table, hidden, values)

    def is_conflict(self, error: DBAPIError) -> bool:
        code = getattr(error.orig, "sqlite_errorcode", None)
        # The low byte is the primary result code: https://www.sqlite.org/rescode.html
        return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _lock(job_table: JobTable) -> Update:
    """Build the UPDATE that takes the write lock and changes no row."""
    key = job_table.key[0]
    return update(job_table.table).values({key: key}).where(false())


def _candidates(plan: ClaimPlan) -> Select[Any]:
    return plan.candidates.select()


def _has_cte(*clauses: Any) -> bool:
    return any(
        isinstance(part, CTE)
        for clause in clauses
        if isinstance(clause, ClauseElement)
        for part in visitors.iterate(clause)
    )


def _terms(plan: ClaimPlan) -> list[OrderTerm]:
    return [OrderTerm.of(term) for term in plan.order]


def _claiming(plan: ClaimPlan) -> Reading:
    """Return the claim with the stored values of its order terms."""
    stored = [
        type_coerce(term.element, NullType()).label(f"{ORDER}{place}")
        for place, term in enumerate(_terms(plan), 1)
    ]
    statement: Any = statement_of(plan).returning(*stored)
    if plan.entities:
        found = select(plan.returned_table, *stored).from_statement(statement)
        statement = found.execution_options(populate_existing=True)
    return Reading(plan, statement, checks=False)


def _wrong(plan: ClaimPlan) -> ByKey:
    """Return the SELECT of the claimed rows that have a fault, and of the fault.

    It is no part of RETURNING, where SQLite 3.40 takes ``IS NULL`` for false if the table's first
    column is NOT NULL.
    """
    key, fault = plan.job_table.key, plan.fault(later=True)
    return ByKey(key, select(*key, fault).where(fault.element != 0).where)


def _first_left(plan: ClaimPlan) -> Executable:
    """Return the SELECT of a row that a claim of all claimable rows has left."""
    return plan.candidates.rows.limit(1)


def _in_order(plan: ClaimPlan, rows: Sequence[Any]) -> list[Any]:
    """Sort the rows by the order terms at their end, as SQLite compares stored values."""
    found = list(rows)
    if plan.single:
        return found
    terms = plan.prepare(_terms)
    for behind, term in enumerate(reversed(terms), 1):
        last = operator.itemgetter(-behind)
        if len(set(map(type, map(last, found)))) == 1 and last(found[0]) is not None:
            found.sort(key=last, reverse=term.descending)
            continue
        nulls = [row for row in found if last(row) is None]
        others = [row for row in found if last(row) is not None]
        others.sort(key=lambda row, last=last: _storage_class(last(row)), reverse=term.descending)  # type: ignore[misc]
        # NULL is the smallest value: https://www.sqlite.org/datatype3.html#sort_order
        first = not term.descending if term.nulls_first is None else term.nulls_first
        found = nulls + others if first else others + nulls
    return found


def _storage_class(value: Any) -> tuple[int, Any]:
    """Numbers before text before blobs, as SQLite compares them."""
    return (1 if isinstance(value, str) else 2 if isinstance(value, bytes) else 0), value


@compiles(ClaimStatement, "sqlite")
def _claim(element: ClaimStatement, compiler: SQLCompiler, **kw: Any) -> str:
    SQLite().check(compiler.dialect)
    if _has_cte(*element.written.values()):
        raise UnsupportedDialect(
            "values with a CTE make a statement that starts with WITH, for which sqlite3 begins no "
            "transaction: use claim_jobs(bind, table, ...)"
        )
    key = tuple(element.table.primary_key)
    target = key[0] if len(key) == 1 else tuple_(*key)
    candidates = element.candidates.select().correlate(None).prefix_with(MARK)
    sql = compiler.visit_update(element.where(target.in_(candidates)), **kw)
    # A WITH of the user's goes into the subquery, so that sqlite3 sees an UPDATE and begins.
    ctes = ", \n".join((compiler.ctes or {}).values())
    before, _, statement = sql.partition(ctes) if ctes else ("", "", sql)
    return statement.lstrip().replace(f"SELECT {MARK}", f"{before}{ctes} SELECT".lstrip())


@compiles(RandomFraction, "sqlite")
def _random(_: RandomFraction, __: SQLCompiler, **___: Any) -> str:
    # A signed integer of 64 bits: https://www.sqlite.org/lang_corefunc.html#random
    return "(random() / 18446744073709551616.0 + 0.5)"


@compiles(DatabaseTime, "sqlite")
def _now(element: DatabaseTime, compiler: SQLCompiler, **kw: Any) -> str:
    # SQLAlchemy writes six digits of the second, %f gives three; as text they must be as long,
    # since '20:00:00.000000' is not <= '20:00:00'.
    form, padding = "%Y-%m-%d %H:%M:%f", " || '000'"
    if element.form is not None:
        form, padding = element.form, ""
    literal = compiler.render_literal_value(form, String())
    zone = ", 'localtime'" if element.clock == "server" else ""
    if element.offset is None:
        return f"(strftime({literal}, 'now'{zone}){padding})"
    seconds = f"({compiler.process(element.offset, **kw)})"
    if "%f" not in form and not element.floor:
        # Fractions are cut off.
        seconds = f"({seconds} + 0.999)"
    added = f", {seconds} || ' seconds'"
    sql = f"strftime({literal}, 'now'{added}{zone})"
    if zone:
        by_wall = f"strftime({literal}, 'now'{zone}{added})"
        sql = f"{'max' if element.later else 'min'}({sql}, {by_wall})"
    return f"({sql}{padding})"
