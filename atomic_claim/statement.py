"""The claim as one SQLAlchemy construct."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

from sqlalchemy import Update
from sqlalchemy.sql.visitors import InternalTraversal

from .errors import ClaimError
from .job_table import job_table_of
from .plan import ClaimPlan, ClaimRequest, build_plan, checked_limit


class ClaimStatement(Update):
    """An UPDATE that claims free rows and returns them; made by :func:`claim_statement`.

    It renders as one statement on every supported database. Where one statement cannot return
    the rows it claims (MySQL, MariaDB) it is for reading only: executing it is refused.
    """

    # What makes up the cache key, in the form that SQLAlchemy documents for its extensions.
    _traverse_internals = [  # noqa: RUF012
        *Update._traverse_internals,  # noqa: SLF001
        ("candidates", InternalTraversal.dp_clauseelement),
        ("changes_key", InternalTraversal.dp_boolean),
        ("checked", InternalTraversal.dp_boolean),
    ]

    def __init__(self, plan: ClaimPlan) -> None:
        super().__init__(plan.returned_table)
        self.candidates = plan.candidates
        self.changes_key = plan.changes_key
        self.checked = False
        self.written = dict(plan.values)


def statement_of(plan: ClaimPlan) -> ClaimStatement:
    """Return the one-statement claim of a plan; it returns an entity, or a row's columns."""
    statement = ClaimStatement(plan).values(plan.values).returning(plan.returned_table)
    if plan.entities:
        from sqlalchemy.orm import lazyload  # noqa: PLC0415 - loaded with the mapped class

        # What is joined for a collection would multiply the rows of RETURNING.
        statement = statement.options(lazyload("*"))
    statement = statement.execution_options(synchronize_session=False, populate_existing=True)
    return cast("ClaimStatement", statement)


def claim_statement(
    table: Any,
    limit: int = 1,
    *,
    where: Any = None,
    order_by: Any = None,
    values: Mapping[Any, Any] | None = None,
    worker: str | None = None,
    lease: timedelta | None = None,
) -> ClaimStatement:
    """Build the claim as an SQLAlchemy construct, to execute or to compile.

    ``session.scalars(claim_statement(Job, 10))`` claims where one statement can return the rows:
    PostgreSQL, in claim order, and SQLite, whose ``RETURNING`` promises no order. On MySQL and
    MariaDB it compiles, and executing it is refused: :func:`claim_jobs` runs the sequence needed
    there. Where the table has a token column, every execution writes a new token.

    Args:
        table: a ``Table``, a mapped class or a :class:`JobTable`.
        limit: how many rows at most, an ``int`` of at least 1.
        where: further conditions on the table's own columns, an expression or a sequence of them.
        order_by: what comes first, in place of the ``JobTable``'s order.
        values: further values to write, by column, attribute or name.
        worker: the claiming worker's name; needs a worker column.
        lease: for how long the claim holds; needs a lease and a token column.

    Returns:
        The construct; it returns the mapped class's entities, or the table's columns as rows.

    Raises:
        ClaimError: an argument does not fit the table.
        AmbiguousTable: the table's columns cannot be read with certainty.
        ValueError, TypeError: ``limit`` is not an ``int`` of at least 1.
    """
    request = ClaimRequest(checked_limit(limit), where, order_by, values, worker, lease)
    job_table = job_table_of(table, ordered=order_by is not None)
    if job_table.has_keys:
        raise ClaimError(
            f"{job_table!r} has exclusive_by or fair_by, whose claims take more than one "
            "statement: use claim_jobs(bind, table, ...)"
        )
    plan = build_plan(job_table, request, entities=job_table.entity is not None)
    if plan.multi_table:
        raise ClaimError(
            f"{plan.job_table.entity!r} has its columns in several tables, which one UPDATE "
            "cannot return: use claim_jobs(session, ...)"
        )
    return statement_of(plan)
