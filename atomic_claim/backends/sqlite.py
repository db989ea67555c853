"""SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import visitors
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ClauseElement, UnaryExpression
from sqlalchemy.sql.operators import custom_op
from sqlalchemy.types import Integer, String

from atomic_claim.errors import UnsupportedDialect
from atomic_claim.job_table import JobTable
from atomic_claim.plan import INSTANT, LIMIT, ClaimPlan
from atomic_claim.sql_elements import ByKey, DatabaseTime, OrderTerm
from atomic_claim.statement import ClaimStatement

from .base import CHUNK, Backend, Find, KeyLocks, Mark, Transaction
from .by_key import statements_of
from .fair import lock_in_turn
from .reading import Key, KeyedRows, Reading, instant

MARK = "/* claimable */"
IS_TRIGGER = sa.text("type = 'trigger' AND lower(tbl_name) = lower(:name)")


class SQLite(Backend):
    """One statement, which takes the write lock before it reads; and one that reads in order.

    .. code-block:: sql

        UPDATE jobs SET processing = 1 WHERE jobs.id IN (
            SELECT jobs.id FROM jobs WHERE <free and due> ORDER BY jobs.created_at LIMIT 10)
        RETURNING id;
        SELECT ... FROM jobs WHERE jobs.id IN (...) ORDER BY +jobs.created_at

    ``RETURNING`` has no order (https://www.sqlite.org/lang_returning.html). Where the order
    depends on what the claim writes, the rows are found and locked first:

    .. code-block:: sql

        UPDATE jobs SET id = id WHERE 0 = 1;   -- takes the write lock, changes nothing
        SELECT jobs.id FROM jobs WHERE <free and due> ORDER BY lower(jobs.name) LIMIT 10;
        UPDATE jobs SET processing = 1 WHERE jobs.id IN (...);
        SELECT ... FROM jobs WHERE jobs.id IN (...)
    """

    names = ("sqlite",)
    required = {"sqlite": ("SQLite", (3, 35), "RETURNING")}  # noqa: RUF012
    conflicts = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
    # A signed integer of 64 bits: https://www.sqlite.org/lang_corefunc.html#random
    random = "(random() / 18446744073709551616.0 + 0.5)"
    checks_text = False
    # The claim takes the write lock.
    key_locks = KeyLocks()
    cure = (
        "roll back, and claim as the first statement of the transaction: a transaction that has "
        "read cannot become a writer once another connection has written "
        "(https://www.sqlite.org/lang_transaction.html)"
    )

    def is_single(self, plan: ClaimPlan) -> bool:
        if plan.multi_table or plan.job_table.has_keys:
            return False
        return (plan.single or not plan.changes_order) and not _has_cte(*plan.values.values())

    def claim(
        self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any], mark: Mark | None = None
    ) -> KeyedRows:
        fits = params[LIMIT] <= CHUNK and not tx.needs_steps(plan)
        if mark or not fits or not plan.prepare(self.is_single):
            return super().claim(tx, plan, params, mark)
        given = dict(params)
        if (asking := plan.prepare(instant)) is not None:
            given[INSTANT] = tx.connection.scalar(asking, params)
        keys = tx.tuples(plan.prepare(_claiming), params)
        tx.marked.extend(keys)
        reading = plan.prepare(_reading)
        found = reading.keyed(tx.execute(*reading.statement.of(keys, given))) if keys else []
        if len(found) < len(keys):
            plan.refuse_fault(None, set(keys).difference(key for key, _ in found).pop())
        # What is claimed alone may be left for the next claim.
        left = params[LIMIT] - len(keys) if not (keys and plan.candidates.tells_alone) else 0
        if left and tx.tuples(plan.prepare(_hindrances), {"name": plan.job_table.table.name}):
            # Some rows may be found and not marked, without an error; this way they are counted.
            found += super().claim(tx, plan, {**params, LIMIT: left})
        return found

    def statements(self, plan: ClaimPlan) -> Sequence[Executable | ByKey]:
        if self.is_single(plan):
            return (plan.prepare(_claiming), plan.prepare(_reading).statement)
        return (_lock(plan.job_table), *statements_of(self, plan, plan.prepare(_candidates)))

    def lock(self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any]) -> list[Key]:
        self.before_search(tx, plan.job_table)
        if plan.job_table.fair_by is None:
            return tx.tuples(plan.prepare(_candidates), params)
        return lock_in_turn(tx, plan, params[LIMIT])

    def lock_read(self, tx: Transaction, find: Find) -> sa.Select[Any]:
        self.before_search(tx, find.job_table)
        return find.statement

    def before_search(self, tx: Transaction, job_table: JobTable) -> None:
        """Take the write lock as the transaction's first statement would, and change nothing."""
        tx.execute(job_table.prepare(_lock))
        tx.refuse_autocommit("another claim could come between this one's statements")

    @contextmanager
    def limit_wait(self, tx: Transaction, seconds: float) -> Iterator[None]:
        before = tx.connection.scalar(sa.text("PRAGMA busy_timeout"))
        milliseconds = max(1, round(seconds * 1000))
        tx.connection.execute(sa.text(f"PRAGMA busy_timeout = {milliseconds}"))
        try:
            yield
        finally:
            tx.connection.execute(sa.text(f"PRAGMA busy_timeout = {before}"))

    def changes(
        self, job_table: JobTable, guard: sa.ColumnElement[bool], values: Mapping[Any, Any]
    ) -> Sequence[ByKey]:
        """Hide the guard from the planner, which else reads an index of all running rows."""
        hidden: sa.ColumnElement[bool] = sa.func.coalesce(guard, sa.false())
        return super().changes(job_table, hidden, values)

    def compile_claim(self, element: ClaimStatement, compiler: SQLCompiler, **kw: Any) -> str:
        if _has_cte(*element.written.values()):
            raise UnsupportedDialect(
                "values with a CTE make a statement that starts with WITH, for which sqlite3 "
                "begins no transaction: use claim_jobs(bind, table, ...)"
            )
        key = tuple(element.table.primary_key)
        target = key[0] if len(key) == 1 else sa.tuple_(*key)
        candidates = element.candidates.gated(_gate).select().correlate(None).prefix_with(MARK)
        sql = compiler.visit_update(element.where(target.in_(candidates)), **kw)
        # A WITH of the user's goes into the subquery, so that sqlite3 sees an UPDATE and begins.
        ctes = ", \n".join((compiler.ctes or {}).values())
        before, _, statement = sql.partition(ctes) if ctes else ("", "", sql)
        return statement.lstrip().replace(f"SELECT {MARK}", f"{before}{ctes} SELECT".lstrip())

    def compile_time(self, element: DatabaseTime, compiler: SQLCompiler, **kw: Any) -> str:
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


def _lock(job_table: JobTable) -> sa.Update:
    """Build the UPDATE that takes the write lock and changes no row."""
    key = job_table.key[0]
    return sa.update(job_table.table).values({key: key}).where(sa.false())


def _gate(found: sa.Select[Any], limit: Any, is_open: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """Limit to 0 rows, since SQLite evaluates a condition for each row that it reads."""
    return found.limit(sa.case((is_open, limit), else_=0))


def _candidates(plan: ClaimPlan) -> sa.Select[Any]:
    return plan.candidates.gated(_gate).select()


def _hindrances(plan: ClaimPlan) -> sa.CompoundSelect[Any]:
    """Select what may keep a row from being marked without an error: triggers, and NULL keys."""
    table, one = plan.job_table.table, sa.literal_column("1", Integer())
    masters = sa.table("sqlite_master", schema=table.schema), sa.table("sqlite_temp_master")
    triggers = (sa.select(one).select_from(each).where(IS_TRIGGER) for each in masters)
    has_null = sa.or_(*(column.is_(None) for column in plan.job_table.key))
    return sa.union_all(*triggers, sa.select(one).select_from(table).where(has_null)).limit(1)


def _has_cte(*clauses: Any) -> bool:
    return any(
        isinstance(part, sa.CTE)
        for clause in clauses
        if isinstance(clause, ClauseElement)
        for part in visitors.iterate(clause)
    )


def _claiming(plan: ClaimPlan) -> Executable:
    """Return the claim; it returns keys.

    Its check is no part of RETURNING, where SQLite 3.40 takes ``IS NULL`` for false if the table's
    first column is NOT NULL.
    """
    statement = ClaimStatement(plan).values(plan.values).returning(*plan.key_attributes)
    return statement.execution_options(synchronize_session=False)


def _reading(plan: ClaimPlan) -> Reading:
    """Return the SELECT of claimed rows, in claim order; with an index it would read all of it."""
    terms = map(OrderTerm.of, plan.order)
    plus = custom_op[Any]("+")
    order = [term.applied(UnaryExpression(term.element, operator=plus)) for term in terms]
    found = plan.reading.add_columns(plan.fault(later=True)).order_by(*order)
    return Reading(plan, ByKey(plan.key_attributes, found.where))
