"""One claim as data: what was asked for, and the pieces of SQL that a claim needs."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
from typing import Any, NamedTuple, NoReturn, cast

import sqlalchemy as sa
from sqlalchemy.sql import visitors
from sqlalchemy.sql.selectable import ScalarSelect
from sqlalchemy.types import Float

from .arguments import check_lease, check_tables, check_worker, checked_values, conditions_of
from .candidates import NOT_ALONE, Candidates, Waiting, alone_if
from .errors import ClaimError
from .job_table import JobTable
from .predicates import (
    any_of,
    claimable,
    claimable_branches,
    classes_by_value,
    is_due,
    is_free,
    is_last_chance,
    is_ripe,
    is_unspent,
)
from .predicates import marks as declared_marks
from .roles import highest
from .sql_elements import InlineLiteral, Preparing, key_in, labelled_terms

# Parameters; SQLAlchemy would write one that has a column's name to that column.
LIMIT = "_atomic_claim_limit"
SCAN_LIMIT = "_atomic_claim_reach"
TOKEN = "_atomic_claim_token"  # noqa: S105 - the name of a parameter
WORKER = "_atomic_claim_worker"
LEASE = "_atomic_claim_lease"
LEAST = "_atomic_claim_least"
INSTANT = "_atomic_claim_instant"
FAULT = "atomic_claim_fault"
NOT_MARKED = 1
CLAIMABLE = 2
# Seconds by which a column without fractions may cut a lease.
CUT = 1.0
# Rows that are looked at beyond those that are wanted: others may hold the first ones.
MARGIN = 100

new_token = partial(secrets.token_hex, 16)
"""Generates a fencing token on the client: 128 random bits as hexadecimal digits."""


class ClaimRequest(NamedTuple):
    """The arguments of one claim; see :func:`claim_statement`."""

    limit: int
    where: Any = None
    order_by: Any = None
    values: Mapping[Any, Any] | None = None
    worker: str | None = None
    lease: timedelta | None = None
    deletes: bool = False

    def parameters(self, *, token: bool = False) -> dict[str, Any]:
        """Return the parameters for one execution of the plan's statements, with a new token."""
        found: dict[str, Any] = {LIMIT: self.limit, SCAN_LIMIT: self.limit + MARGIN}
        if token:
            found[TOKEN] = new_token()
        if self.worker is not None:
            found[WORKER] = self.worker
        if self.lease is not None:
            found[LEASE] = seconds = self.lease.total_seconds()
            found[LEAST] = max(0.0, seconds - CUT)
        return found


@dataclass(frozen=True, eq=False)
class ClaimPlan(Preparing):
    """The pieces that the databases' sequences are built from, made once per table and shape.

    Attributes:
        job_table: what the columns mean.
        candidates: the keys of the rows to claim.
        conditions: what a row must still meet once it is locked.
        order: the terms of the order.
        values: what the claim writes, by column.
        entities: whether entities are wanted, rather than rows.
        single: whether the limit is one, so that there is no order to keep.
        marks: the conditions that a claimed row meets, without its lease.
        deletes: whether the rows are going to be deleted.
    """

    job_table: JobTable
    candidates: Candidates
    conditions: tuple[Any, ...]
    order: tuple[sa.ColumnElement[Any], ...]
    values: dict[sa.Column[Any], Any]
    entities: bool
    single: bool
    marks: tuple[sa.ColumnElement[bool], ...]
    deletes: bool = False

    def fault(self, *, later: bool = False) -> sa.ColumnElement[int]:
        """Return what is wrong with a row after its claim: ``NOT_MARKED``, ``CLAIMABLE`` or 0.

        The lease must exceed a time that is counted from now, or ``later``, in another statement
        than the mark, is the parameter :data:`INSTANT`. A row whose lease does has not expired, so
        that reason to be claimable is left out.
        """
        job_table = self.job_table
        marks, lease = list(self.marks), job_table.lease
        if lease is not None and self.values[lease] is None:
            marks.append(lease.is_(None))
        elif lease is not None:
            least = job_table.now(lease, sa.bindparam(LEAST, 0.0, Float()), floor=True)
            marks.append(lease > (sa.bindparam(INSTANT, None, lease.type) if later else least))
        free, *others = claimable_branches(job_table)
        wrong = sa.case(
            (any_of((free, *others[1:])), sa.literal_column(str(CLAIMABLE))),
            else_=sa.literal_column("0"),
        )
        found = sa.case(
            (sa.and_(sa.true(), *marks), wrong), else_=sa.literal_column(str(NOT_MARKED))
        )
        return sa.type_coerce(found, sa.Integer()).label(FAULT)

    def passing_over(self, keys: Sequence[tuple[Any, ...]]) -> ClaimPlan:
        """Return the plan of a claim of the same rows without those with these keys."""
        found = self.candidates.without(key_in(self.key_attributes, keys))
        return replace(self, candidates=found)

    @cached_property
    def multi_table(self) -> bool:
        """Return True if the mapped class has its columns in several tables."""
        mapper = self.job_table.mapper
        return mapper is not None and len(mapper.tables) > 1

    @cached_property
    def key_of(self) -> Callable[[Any], tuple[Any, ...]]:
        """Return a function that reads the key from an entity or a row of the claim."""
        table, mapper = self.job_table.table, self.job_table.mapper
        named = mapper if self.entities or self.multi_table else None
        names = [
            column.key if named is None else named.get_property_by_column(column).key
            for column in self.job_table.key
        ]
        if self.entities:
            read = operator.attrgetter(*names)
            return read if len(names) > 1 else lambda entity: (read(entity),)
        keys = list((table if named is None else named).columns.keys())
        first, *others = map(keys.index, names)
        if others:
            return operator.itemgetter(first, *others)
        return operator.itemgetter(slice(first, first + 1))

    @cached_property
    def columns(self) -> tuple[Any, ...]:
        """The columns of a claimed row."""
        job_table = self.job_table
        if self.multi_table:
            assert job_table.mapper is not None
            return tuple(job_table.mapper.columns.values())
        return tuple(job_table.table.columns)

    @cached_property
    def needs_select(self) -> bool:
        """Return True if entities or rows can be read by a SELECT of their own only.

        That is a class with columns in several tables, or with ``subquery`` loading, which
        SQLAlchemy leaves out for entities that a statement returns.
        """
        mapper = self.job_table.mapper
        if self.multi_table or not self.entities or mapper is None:
            return self.multi_table
        found = (each.relationships for each in mapper.self_and_descendants)
        return any(one.lazy == "subquery" for relationships in found for one in relationships)

    @cached_property
    def width(self) -> int:
        """The number of columns of a result that make up a claimed row or entity."""
        return 1 if self.entities else len(self.columns)

    def refuse_shared_keys(self, keys: Sequence[tuple[Any, ...]]) -> NoReturn:
        """Raise for rows that have one key between them."""
        shared = next(key for key in keys if keys.count(key) > 1)
        raise ClaimError(
            f"several rows of {self.job_table.table.fullname!r} have the key {shared!r}, so they "
            "cannot be told apart: with PostgreSQL's INHERITS a key is unique within each table "
            "only; declare each of the tables on its own, or make the key unique over all of them"
        )

    def refuse_fault(self, fault: int | None, row: Any) -> NoReturn:
        """Raise for a row whose :meth:`fault` is not 0; None tells that it was not marked."""
        job_table = self.job_table
        if fault == CLAIMABLE:
            raise ClaimError(
                f"{row!r} of {job_table.table.fullname!r} is claimable right after it was claimed, "
                f"by the condition {claimable(job_table)}: let JobTable(claimed=...) write a value "
                "that JobTable(free=...) excludes"
            )
        wanted = ", ".join(map(str, self.marks))
        if job_table.lease is not None:
            wanted += f", {job_table.lease} as written"
        raise ClaimError(
            f"{row!r} of {job_table.table.fullname!r} does not bear the mark of its claim, by the "
            f"condition {wanted}: look for a trigger that changes it or keeps it from being "
            "changed, a column that cannot hold the value, and a key that is NULL"
        )

    @property
    def key_attributes(self) -> tuple[Any, ...]:
        """The key as the mapped class has it, or else the table."""
        return _key_attributes(self.job_table)

    def source(self, *columns: Any) -> sa.Select[Any]:
        """Select from the table, or from the mapped class with its inheritance criteria."""
        return _source(self.job_table, *columns)

    @property
    def reading(self) -> sa.Select[Any]:
        """A SELECT of all entities or rows, to be narrowed to some keys."""
        job_table = self.job_table
        if self.entities:
            found = sa.select(cast("type[Any]", job_table.entity))
            return found.execution_options(populate_existing=True)
        return self.source(*self.columns) if self.multi_table else sa.select(job_table.table)

    @property
    def changes_key(self) -> bool:
        """Return True if the claim changes a column that a foreign key may reference."""
        table: sa.Table = self.job_table.table
        unique = {
            column
            for item in (*table.constraints, *table.indexes)
            if isinstance(item, sa.UniqueConstraint) or (isinstance(item, sa.Index) and item.unique)
            for column in item.columns
        }
        return self.deletes or not unique.union(self.job_table.key).isdisjoint(self.values)

    @property
    def changes_order(self) -> bool:
        """Return True if the claim may write a column that its order depends on."""
        return any(
            isinstance(part, ScalarSelect) or (isinstance(part, sa.Column) and part in self.values)
            for term in self.order
            for part in visitors.iterate(term)
        )

    @property
    def returned_table(self) -> Any:
        """Return the target of the one-statement claim: the mapped class, or its table."""
        return self.job_table.entity if self.entities else self.job_table.table


def checked_limit(limit: Any) -> int:
    """Return the limit, or raise if it is not an ``int`` of at least 1."""
    is_int = isinstance(limit, int) and not isinstance(limit, bool)
    if not is_int or limit < 1:
        error = ValueError if is_int else TypeError
        raise error(f"limit is {limit!r}; expected an int of at least 1")
    return int(limit)


def claim_plan(job_table: JobTable, request: ClaimRequest, *, entities: bool) -> ClaimPlan:
    """Return a claim's plan, cached on the ``JobTable`` if only parameters can differ."""
    if request.where is not None or request.order_by is not None or request.values is not None:
        return build_plan(job_table, request, entities=entities)
    shape = (
        request.limit == 1,
        request.worker is not None,
        request.lease is not None,
        request.deletes,
        entities,
    )
    if (known := job_table.prepared.get(shape)) is None:
        known = job_table.prepared[shape] = build_plan(job_table, request, entities=entities)
    elif request.worker is not None or request.lease is not None:
        _check(job_table, request)
    return known


def _check(job_table: JobTable, request: ClaimRequest) -> None:
    check_worker(job_table, request.worker)
    if not request.deletes:
        check_lease(job_table, request.lease)


def build_plan(job_table: JobTable, request: ClaimRequest, *, entities: bool) -> ClaimPlan:
    """Build a plan, or raise if an argument does not fit the table."""
    _check(job_table, request)
    key = _key_attributes(job_table)
    given = {} if request.values is None else checked_values(job_table, request.values)
    order = job_table.order if request.order_by is None else job_table.terms(request.order_by)
    order = order or key
    where = conditions_of(request.where)
    check_tables(job_table, (*where, *order))
    own = _claim_values(job_table, request)
    values = own | given
    marks = [
        column == own[column] for column in (job_table.worker, job_table.token) if column in own
    ]
    moved = [column.name for column in job_table.key if column in values]
    if moved and not request.deletes:
        raise ClaimError(
            f"a claim writes {', '.join(map(repr, moved))}, part of the primary key of "
            f"{job_table.table.fullname!r}, so its rows could not be found by key afterwards: "
            "keep the state in a column outside of the key"
        )
    limit = sa.bindparam(LIMIT, request.limit, sa.Integer(), literal_execute=True)
    shares = request.limit > 1 and not request.deletes
    alone = is_last_chance(job_table) if shares else None
    flags: list[list[Any]] = [[], []] if alone is None else [[NOT_ALONE], [alone_if(alone)]]
    free, other = (_source(job_table, *key, *flag, *labelled_terms(order)) for flag in flags)
    scan_limit = sa.bindparam(
        SCAN_LIMIT, request.limit + MARGIN, sa.Integer(), literal_execute=True
    )
    branches = [
        (other if place else free)
        .where(*branch.conditions, *where)
        .order_by(*(branch.order or order))
        .limit(scan_limit if place else limit)
        for place, branch in enumerate(claimable_branches(job_table))
    ]
    rows = _source(job_table, *key).where(claimable(job_table), *where)
    waiting = None
    if is_due(job_table):
        free = free.where(is_free(job_table), *where).order_by(*order)
        unspent, due = sa.and_(sa.true(), *is_unspent(job_table)), job_table.due
        ripe = sa.true() if due is None else is_ripe(job_table)
        classes = classes_by_value(job_table)
        waiting = Waiting(free, order, limit, scan_limit, due, ripe, unspent, classes)
    return ClaimPlan(
        job_table=job_table,
        candidates=Candidates(tuple(branches), order, limit, scan_limit, rows, waiting),
        conditions=(claimable(job_table), *where),
        order=order,
        values=values,
        entities=entities,
        single=request.limit == 1,
        marks=(*declared_marks(job_table), *marks),
        deletes=request.deletes,
    )


def _key_attributes(job_table: JobTable) -> tuple[Any, ...]:
    """Return the key as the class maps it, so that the SELECT includes its inheritance."""
    mapper = job_table.mapper
    if mapper is None:
        return job_table.key
    return tuple(
        getattr(job_table.entity, mapper.get_property_by_column(column).key).__clause_element__()
        for column in job_table.key
    )


def _source(job_table: JobTable, *columns: Any) -> sa.Select[Any]:
    found: sa.Select[Any] = cast("Any", sa.select(*columns))
    return found if job_table.entity is None else found.select_from(job_table.entity)


def _claim_values(job_table: JobTable, request: ClaimRequest) -> dict[sa.Column[Any], Any]:
    values: dict[sa.Column[Any], Any] = dict(job_table.claimed)
    for column in job_table.stamps:
        values.setdefault(column, job_table.now(column))
    if (column := job_table.worker) is not None and request.worker is not None:
        values[column] = sa.bindparam(WORKER, request.worker, column.type)
    if (column := job_table.token) is not None:
        values[column] = sa.bindparam(TOKEN, callable_=new_token, type_=column.type)
    if (column := job_table.attempts) is not None:
        values[column] = _counted(column, limited=isinstance(job_table.max_attempts, int))
    if (column := job_table.lease) is not None:
        values[column] = None
        if request.lease is not None:
            seconds = sa.bindparam(LEASE, request.lease.total_seconds(), Float())
            values[column] = job_table.now(column, seconds)
    return values | job_table.next_version


def _counted(column: sa.Column[Any], *, limited: bool) -> sa.ColumnElement[Any]:
    """Count a claim; a counter at the end of its type stays there.

    ``limited`` where such a row is not claimed anyway.
    """
    more: sa.ColumnElement[Any] = (sa.func.coalesce(column, 0) if column.nullable else column) + 1
    if limited:
        return more
    return sa.case((column >= InlineLiteral(highest(column.type), column.type), column), else_=more)
