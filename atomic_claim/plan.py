"""One claim as data: what was asked for, and the pieces of SQL that a claim needs."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

from sqlalchemy import (
    Column,
    ColumnElement,
    CompoundSelect,
    Index,
    Integer,
    Select,
    Table,
    UniqueConstraint,
    and_,
    bindparam,
    func,
    or_,
    select,
    union_all,
)
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import ClauseElement, ColumnClause, False_, True_
from sqlalchemy.sql.selectable import FromClause, ScalarSelect, SelectBase
from sqlalchemy.types import JSON, Enum, Float, TypeDecorator

from .errors import ClaimError
from .job_table import JobTable
from .sql_elements import DatabaseTime, InlineLiteral, OrderTerm, labelled_terms

LIMIT = "atomic_claim_limit"
SCAN_LIMIT = "atomic_claim_reach"
TOKEN = "atomic_claim_token"  # noqa: S105 - the name of a parameter
WORKER = "atomic_claim_worker"
LEASE = "atomic_claim_lease"
# Rows that are looked at beyond those that are wanted: others may hold the first ones.
MARGIN = 100

T = TypeVar("T")


def new_token() -> str:
    """Generate a fencing token on the client: 128 random bits as hexadecimal digits."""
    return secrets.token_hex(16)


def limits(limit: int) -> dict[str, Any]:
    """Return the parameters for how many rows to claim and how many to look at."""
    return {LIMIT: limit, SCAN_LIMIT: limit + MARGIN}


class ClaimRequest(NamedTuple):
    """The arguments of one claim; see :func:`claim_statement`."""

    limit: int
    where: Any = None
    order_by: Any = None
    values: Mapping[Any, Any] | None = None
    worker: str | None = None
    lease: timedelta | None = None

    def parameters(self, token: str | None) -> dict[str, Any]:
        """Return the parameters for one execution of the parts' statements."""
        found: dict[str, Any] = limits(self.limit)
        if token is not None:
            found[TOKEN] = token
        if self.worker is not None:
            found[WORKER] = self.worker
        if self.lease is not None:
            found[LEASE] = self.lease.total_seconds()
        return found


@dataclass(frozen=True, eq=False)
class Candidates:
    """The keys of the rows to claim, ordered and limited.

    A row can be claimable for several reasons (it is free; its lease is over). Each reason is a
    SELECT of its own, since no index serves their OR in order. Free rows come in the claim's
    order; the others as their index has them, with a margin from which the claim's order is made.

    Attributes:
        branches: SELECTs of the key and the terms of the order, each ordered and limited.
        order: the terms of the order.
        limit: the parameter that limits the first of them, and all together.
        scan_limit: the parameter that limits the others.
        rows: the keys of all rows that may be claimed, in no order.
    """

    branches: tuple[Select[Any], ...]
    order: tuple[ColumnElement[Any], ...]
    limit: ColumnElement[Any]
    scan_limit: ColumnElement[Any]
    rows: Select[Any]

    def select(
        self,
        *,
        terms: bool = False,
        # A copy: compiling a SELECT of entities writes into it, which would change the cache key.
        lock: Callable[[Select[Any]], Select[Any]] = lambda branch: branch.where(),
    ) -> Select[Any]:
        """One SELECT of the keys, and of the order's terms (``claim_order_1`` ...) if asked for.

        ``lock`` makes each branch lock what it returns.
        """
        if len(self.branches) == 1:
            return lock(self.branches[0] if terms else self.only_keys(self.branches[0]))
        found = self.ordered(self.together(*map(lock, self.branches)).subquery("branches"))
        return (found if terms else self.only_keys(found)).limit(self.limit)

    def together(self, *branches: Select[Any]) -> CompoundSelect[Any]:
        """All that several SELECTs find."""
        numbered = enumerate(branches, 1)
        return union_all(*(select(each.subquery(f"branch_{place}")) for place, each in numbered))

    def ordered(self, found: FromClause) -> Select[Any]:
        """Keys and terms of the order, in that order."""
        columns = list(found.columns)
        terms = columns[len(columns) - len(self.order) :]
        return select(*columns).order_by(
            *(OrderTerm.of(term).applied(c) for term, c in zip(self.order, terms, strict=True))
        )

    def only_keys(self, branch: Select[Any]) -> Select[Any]:
        """Remove the order terms from the columns of a branch."""
        columns = list(branch.selected_columns)
        return branch.with_only_columns(*columns[: len(columns) - len(self.order)])


@dataclass(frozen=True, eq=False)
class ClaimPlan:
    """The pieces that the databases' sequences are built from, made once per table and shape.

    Attributes:
        job_table: what the columns mean.
        candidates: the keys of the rows to claim.
        conditions: what a row must still meet once it is locked.
        order: the terms of the order.
        values: what the claim writes, by column.
        entities: whether entities are wanted, rather than rows.
        single: whether the limit is one, so that there is no order to keep.
        prepared: what a database's backend has made of these plan.
    """

    job_table: JobTable
    candidates: Candidates
    conditions: tuple[Any, ...]
    order: tuple[ColumnElement[Any], ...]
    values: dict[Column[Any], Any]
    entities: bool
    single: bool
    prepared: dict[str, Any] = field(default_factory=dict)

    def prepare(self, name: str, make: Callable[[ClaimPlan], T]) -> T:
        """Call ``make`` with these parts once, and return its cached result."""
        if name not in self.prepared:
            self.prepared[name] = make(self)
        return self.prepared[name]  # type: ignore[no-any-return]

    @property
    def multi_table(self) -> bool:
        """Return True if the mapped class has its columns in several tables."""
        mapper = self.job_table.mapper
        return mapper is not None and len(mapper.tables) > 1

    @property
    def key_of(self) -> Callable[[Any], tuple[Any, ...]]:
        """Return a function that reads the key from an entity or a row of the claim."""
        return self.prepare("key_of", _key_reader)

    @property
    def key_attributes(self) -> tuple[Any, ...]:
        """The key as the mapped class has it, or else the table."""
        return _key_attributes(self.job_table)

    def source(self, *columns: Any) -> Select[Any]:
        """Select from the table, or from the mapped class with its inheritance criteria."""
        return _source(self.job_table, *columns)

    @property
    def reading(self) -> Select[Any]:
        """A SELECT of all entities or rows, to be narrowed to some keys."""
        job_table = self.job_table
        if self.entities:
            found = select(cast("type[Any]", job_table.entity))
            return found.execution_options(populate_existing=True)
        if self.multi_table:
            assert job_table.mapper is not None
            return self.source(*job_table.mapper.columns.values())
        return select(job_table.table)

    @property
    def changes_key(self) -> bool:
        """Return True if the claim writes a column that a foreign key may reference."""
        table: Table = self.job_table.table
        unique = {
            column
            for item in (*table.constraints, *table.indexes)
            if isinstance(item, UniqueConstraint) or (isinstance(item, Index) and item.unique)
            for column in item.columns
        }
        return not unique.union(self.job_table.key).isdisjoint(self.values)

    @property
    def changes_order(self) -> bool:
        """Return True if the claim may write a column that its order depends on."""
        return any(
            isinstance(part, ScalarSelect) or (isinstance(part, Column) and part in self.values)
            for term in self.order
            for part in visitors.iterate(term)
        )

    @property
    def returned_table(self) -> Any:
        """Return the target of the one-statement claim: the mapped class, or its table."""
        return (
            self.job_table.entity
            if self.entities and not self.multi_table
            else self.job_table.table
        )

    @property
    def may_be_unreadable(self) -> bool:
        """Return True if a column's type may be unable to read a stored value."""
        return self.prepare("may be unreadable", _may_be_unreadable)


def checked_limit(limit: Any) -> int:
    """Return the limit, or raise if it is not an ``int`` of at least 1."""
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"limit is {limit!r}; expected an int of at least 1")
    if limit < 1:
        raise ValueError(f"limit is {limit!r}; expected an int of at least 1")
    return limit


def claim_plan(job_table: JobTable, request: ClaimRequest, *, entities: bool) -> ClaimPlan:
    """Return a claim's plan, cached on the ``JobTable`` if only parameters can differ."""
    if request.where is not None or request.order_by is not None or request.values is not None:
        return build_plan(job_table, request, entities=entities)
    shape = (request.limit == 1, request.worker is not None, request.lease is not None, entities)
    if (known := job_table.statements.get(shape)) is None:
        known = job_table.statements[shape] = build_plan(job_table, request, entities=entities)
    else:
        _check(job_table, request)
    return known


def _check(job_table: JobTable, request: ClaimRequest) -> None:
    _check_worker(job_table, request.worker)
    _check_lease(job_table, request.lease)


def _check_worker(job_table: JobTable, worker: Any) -> None:
    if worker is None:
        return
    if not isinstance(worker, str):
        raise ClaimError(f"worker is {worker!r}; expected the worker's name, a str")
    if job_table.worker is None:
        raise ClaimError(
            f"worker={worker!r} needs a column to go to, and {job_table.table.fullname!r} has "
            "none that is known: name it with JobTable(worker=...)"
        )


def _check_lease(job_table: JobTable, lease: Any) -> None:
    if lease is None:
        return
    if not isinstance(lease, timedelta) or lease <= timedelta(0):
        raise ClaimError(f"lease is {lease!r}; expected a timedelta above zero")
    for role, type_ in (("lease", "TIMESTAMP NULL"), ("token", "VARCHAR(32) NULL")):
        if getattr(job_table, role) is None:
            raise ClaimError(
                f"lease={lease!r} needs a {role} column, and {job_table.table.fullname!r} has "
                f"none that is known: name it with JobTable({role}=...), or add one: ALTER TABLE "
                f"{job_table.table.fullname} ADD COLUMN claim_{role} {type_}"
            )


def _may_be_unreadable(plan: ClaimPlan) -> bool:
    return any(
        isinstance(column.type, (Enum, JSON, TypeDecorator))
        for column in plan.job_table.table.columns
    )


def _key_reader(plan: ClaimPlan) -> Callable[[Any], tuple[Any, ...]]:
    job_table = plan.job_table
    mapper = job_table.mapper
    if plan.entities:
        assert mapper is not None
        names = [mapper.get_property_by_column(column).key for column in job_table.key]
        if len(names) == 1:
            read = operator.attrgetter(names[0])
            return lambda entity: (read(entity),)
        return operator.attrgetter(*names)
    columns: Sequence[Any] = tuple(job_table.table.columns)
    if plan.multi_table:
        assert mapper is not None
        columns = [mapper.columns[key] for key in mapper.columns.keys()]  # noqa: SIM118
        wanted = [mapper.columns[mapper.get_property_by_column(c).key] for c in job_table.key]
    else:
        wanted = list(job_table.key)
    places = [next(i for i, c in enumerate(columns) if c is column) for column in wanted]
    if len(places) == 1:
        place = places[0]
        return lambda row: (row[place],)
    return operator.itemgetter(*places)


def _checked_values(job_table: JobTable, given: Mapping[Any, Any]) -> dict[Column[Any], Any]:
    """Return the call's own values, or raise if they undo the mark of the claim."""
    values = job_table.values(given, "values")
    if job_table.exclusive_by in values:
        raise ClaimError(
            f"values sets {job_table.exclusive_by.name!r}, the key by which claims exclude each "
            "other: change it before or after the claim"
        )
    for column in list(values):
        if column not in job_table.claimed:
            continue
        declared, value = job_table.claimed[column], values[column]
        if isinstance(declared, DatabaseTime) and value is not None:
            continue
        if not _is_mark(declared, value):
            raise ClaimError(
                f"values sets {column.name!r} to {value!r}, but a claimed row is marked by "
                f"{column.name} = {getattr(declared, 'value', declared)}: leave it out, or "
                "declare another JobTable(claimed=...)"
            )
        del values[column]
    return values


def _is_mark(declared: Any, value: Any) -> bool:
    """Check whether a value given by the call equals the mark that the claim writes."""
    if isinstance(value, ClauseElement) or isinstance(declared, DatabaseTime):
        return False
    if isinstance(declared, (True_, False_)):
        return value is not None and bool(value) == isinstance(declared, True_)
    if isinstance(declared, InlineLiteral):
        return bool(declared.value == value)
    return declared is None and value is None


def _conditions(where: Any) -> tuple[Any, ...]:
    if where is None:
        return ()
    given = tuple(where) if isinstance(where, (list, tuple)) else (where,)
    for condition in given:
        if not isinstance(condition, ClauseElement) and not hasattr(
            condition, "__clause_element__"
        ):
            raise ClaimError(
                f"where={condition!r}: expected an SQLAlchemy expression such as "
                "table.c.queue == 'mail', or a list of them"
            )
    return given


def build_plan(job_table: JobTable, request: ClaimRequest, *, entities: bool) -> ClaimPlan:
    """Build a plan, or raise if an argument does not fit the table."""
    _check(job_table, request)
    key = _key_attributes(job_table)
    given = {} if request.values is None else _checked_values(job_table, request.values)
    order = (
        job_table.order if request.order_by is None else _order_terms(job_table, request.order_by)
    )
    order = order or key
    where = _conditions(request.where)
    _check_tables(job_table, (*where, *order))
    limit = bindparam(LIMIT, request.limit, Integer(), literal_execute=True)
    source = _source(job_table, *key, *labelled_terms(order))
    scan_limit = bindparam(SCAN_LIMIT, request.limit + MARGIN, Integer(), literal_execute=True)
    branches = [
        source.where(*reason, *where)
        .order_by(*(first or order))
        .limit(scan_limit if place else limit)
        for place, (reason, first) in enumerate(job_table.claimable_branches)
    ]
    claimable = or_(*(and_(*reason) for reason, _ in job_table.claimable_branches))
    rows = _source(job_table, *key).where(claimable, *where)
    return ClaimPlan(
        job_table=job_table,
        candidates=Candidates(tuple(branches), order, limit, scan_limit, rows),
        conditions=(claimable, *where),
        order=order,
        values=_claim_values(job_table, request) | given,
        entities=entities,
        single=request.limit == 1,
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


def _source(job_table: JobTable, *columns: Any) -> Select[Any]:
    found: Select[Any] = cast("Any", select(*columns))
    return found if job_table.entity is None else found.select_from(job_table.entity)


def _order_terms(job_table: JobTable, order_by: Any) -> tuple[ColumnElement[Any], ...]:
    given = order_by if isinstance(order_by, (list, tuple)) else (order_by,)
    return tuple(job_table.term(term) for term in given)


def _check_tables(job_table: JobTable, clauses: Iterable[Any]) -> None:
    """Refuse columns of other tables, which would multiply the rows or lock too many."""
    mapper = job_table.mapper
    own = list(mapper.tables) if mapper is not None else [job_table.table]
    for column in _outer_columns(clauses):
        if not any(table.columns.contains_column(column) for table in own):
            name, other = job_table.table.fullname, getattr(column.table, "name", column.table)
            raise ClaimError(
                f"{column} is a column of {other}, and the claim is from {name} alone: use a "
                f"correlated subquery, such as exists().where({other}.c.job_id == "
                f"{name}.c.{job_table.key[0].key})"
            )


def _outer_columns(clauses: Iterable[Any]) -> Iterator[ColumnClause[Any]]:
    """Yield the columns of the clauses themselves, without those of their subqueries."""
    for clause in clauses:
        element = clause.__clause_element__() if hasattr(clause, "__clause_element__") else clause
        if isinstance(element, SelectBase):
            continue
        if isinstance(element, ColumnClause):
            if element.table is not None:
                yield element
        else:
            yield from _outer_columns(element.get_children())


def _claim_values(job_table: JobTable, request: ClaimRequest) -> dict[Column[Any], Any]:
    values: dict[Column[Any], Any] = dict(job_table.claimed)
    for column in job_table.stamps:
        values.setdefault(column, job_table.now(column))
    if (column := job_table.worker) is not None:
        named = bindparam(WORKER, request.worker, column.type)
        values[column] = None if request.worker is None else named
    if (column := job_table.token) is not None:
        values[column] = bindparam(TOKEN, callable_=new_token, type_=column.type)
    if (column := job_table.attempts) is not None:
        values[column] = (func.coalesce(column, 0) if column.nullable else column) + 1
    if (column := job_table.lease) is not None:
        values[column] = None
        if request.lease is not None:
            seconds = bindparam(LEASE, request.lease.total_seconds(), Float())
            values[column] = job_table.now(column, seconds)
    return values
