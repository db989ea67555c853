"""The claim as SQL: what every database's sequence is made of, and the one-statement form."""

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
    Update,
    and_,
    bindparam,
    func,
    or_,
    select,
    union_all,
)
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import (
    BindParameter,
    ClauseElement,
    ColumnClause,
    False_,
    True_,
    UnaryExpression,
)
from sqlalchemy.sql.selectable import FromClause, ScalarSelect, SelectBase
from sqlalchemy.sql.visitors import InternalTraversal
from sqlalchemy.types import JSON, Boolean, DateTime, Enum, Float, Numeric, TypeDecorator

from .columns import JobTable, job_table_of
from .elements import DatabaseNow, Declared
from .errors import ClaimError

LIMIT = "atomic_claim_limit"
REACH = "atomic_claim_reach"
TOKEN = "atomic_claim_token"  # noqa: S105 - the name of a parameter
WORKER = "atomic_claim_worker"
LEASE = "atomic_claim_lease"
KEYS = "atomic_claim_keys"
ORDER = "claim_order_"
# So many rows more than are wanted are looked at where a lease has run out, or to pass over what
# others hold.
MARGIN = 100

T = TypeVar("T")


def new_token() -> str:
    """Generate a fencing token on the client: 128 random bits as hexadecimal digits."""
    return secrets.token_hex(16)


def limits(limit: int) -> dict[str, Any]:
    """Return the parameters for how many rows to claim and how many to look at."""
    return {LIMIT: limit, REACH: limit + MARGIN}


class Ask(NamedTuple):
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


class ClaimStatement(Update):
    """An UPDATE that claims free rows and returns them; made by :func:`claim_statement`.

    It renders as one statement on every supported database. Where one statement cannot return
    the rows it claims (MySQL, MariaDB) it is for reading only: executing it is refused.
    """

    # What makes up the cache key, in the form that SQLAlchemy documents for its extensions.
    _traverse_internals = [  # noqa: RUF012
        *Update._traverse_internals,  # noqa: SLF001
        ("branches", InternalTraversal.dp_clauseelement_tuple),
        ("order_terms", InternalTraversal.dp_clauseelement_tuple),
        ("limit_parameter", InternalTraversal.dp_clauseelement),
        ("reach_parameter", InternalTraversal.dp_clauseelement),
        ("claimable_rows", InternalTraversal.dp_clauseelement),
        ("single", InternalTraversal.dp_boolean),
        ("changes_key", InternalTraversal.dp_boolean),
        ("spread", InternalTraversal.dp_boolean),
        ("guarded", InternalTraversal.dp_boolean),
    ]

    def __init__(self, parts: ClaimParts) -> None:
        super().__init__(parts.returned_table)
        self.branches = parts.candidates.branches
        self.order_terms = parts.order
        self.limit_parameter = parts.candidates.limit
        self.reach_parameter = parts.candidates.reach
        self.claimable_rows = parts.candidates.rows
        self.single = parts.single
        self.changes_key = parts.changes_key
        self.spread = parts.spread
        self.guarded = False
        self.written = dict(parts.values)

    @property
    def candidates(self) -> Candidates:
        """Return the candidates, built from elements that are part of the cache key."""
        return Candidates(
            self.branches,
            self.order_terms,
            self.limit_parameter,
            self.reach_parameter,
            self.claimable_rows,
        )


@dataclass(frozen=True, eq=False)
class Candidates:
    """The keys of the rows to claim, ordered and limited.

    Where a row is free for one of several reasons (nobody has claimed it; its lease is over),
    each reason is a SELECT of its own, since no index can serve their OR in order. Free rows come
    in the claim's order; others as their index has them, some more than are wanted, so that the
    claim's order can be made of what is found.

    Attributes:
        branches: SELECTs of the key and the terms of the order, each ordered and limited.
        order: the terms of the order.
        limit: the parameter that limits the first of them, and all together.
        reach: the parameter that limits the others.
        rows: the keys of all rows that may be claimed, in no order.
    """

    branches: tuple[Select[Any], ...]
    order: tuple[ColumnElement[Any], ...]
    limit: ColumnElement[Any]
    reach: ColumnElement[Any]
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
class ClaimParts:
    """The pieces that the databases' sequences are built from, made once per table and shape.

    Attributes:
        job_table: what the columns mean.
        candidates: the keys of the rows to claim.
        conditions: what a row must still meet once it is locked.
        order: the terms of the order.
        values: what the claim writes, by column.
        entities: whether entities are wanted, rather than rows.
        single: whether the limit is one, so that there is no order to keep.
        prepared: what a database's strategy has made of these parts.
    """

    job_table: JobTable
    candidates: Candidates
    conditions: tuple[Any, ...]
    order: tuple[ColumnElement[Any], ...]
    values: dict[Column[Any], Any]
    entities: bool
    single: bool
    prepared: dict[str, Any] = field(default_factory=dict)

    def prepare(self, name: str, make: Callable[[ClaimParts], T]) -> T:
        """Call ``make`` with these parts once, and return its cached result."""
        if name not in self.prepared:
            self.prepared[name] = make(self)
        return self.prepared[name]  # type: ignore[no-any-return]

    @property
    def spread(self) -> bool:
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
        if self.spread:
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
        return self.job_table.entity if self.entities and not self.spread else self.job_table.table

    @property
    def statement(self) -> ClaimStatement:
        """The one-statement claim; it returns an entity, or a row's columns."""
        return self.prepare("statement", ClaimParts._statement)

    def _statement(self) -> ClaimStatement:
        returned = self.job_table.key if self.spread else (self.returned_table,)
        statement = ClaimStatement(self).values(self.values).returning(*returned)
        if self.entities and not self.spread:
            from sqlalchemy.orm import lazyload  # noqa: PLC0415 - loaded with the mapped class

            # What is joined for a collection would multiply the rows of RETURNING.
            statement = statement.options(lazyload("*"))
        statement = statement.execution_options(synchronize_session=False, populate_existing=True)
        return cast("ClaimStatement", statement)

    @property
    def may_be_unreadable(self) -> bool:
        """Return True if a column's type may be unable to read a stored value."""
        return self.prepare("may be unreadable", _may_be_unreadable)


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
    ask = Ask(checked_limit(limit), where, order_by, values, worker, lease)
    job_table = job_table_of(table, ordered=order_by is not None)
    if job_table.exclusive_by is not None:
        raise ClaimError(
            f"{job_table!r} has a key of which only {job_table.max_per_key} may run, which takes "
            "more than one statement: use claim_jobs(bind, table, ...)"
        )
    parts = _build(job_table, ask, entities=job_table.entity is not None)
    if parts.spread:
        raise ClaimError(
            f"{parts.job_table.entity!r} has its columns in several tables, which one UPDATE "
            "cannot return: use claim_jobs(session, ...)"
        )
    # Not yet anybody's: the statement was built for this call.
    parts.statement.guarded = True
    return parts.statement


def checked_limit(limit: Any) -> int:
    """Return the limit, or raise if it is not an ``int`` of at least 1."""
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"limit is {limit!r}; expected an int of at least 1")
    if limit < 1:
        raise ValueError(f"limit is {limit!r}; expected an int of at least 1")
    return limit


def claim_parts(job_table: JobTable, ask: Ask, *, entities: bool) -> ClaimParts:
    """Return a claim's parts, cached on the ``JobTable`` if only parameters can differ."""
    if ask.where is not None or ask.order_by is not None or ask.values is not None:
        return _build(job_table, ask, entities=entities)
    shape = (ask.limit == 1, ask.worker is not None, ask.lease is not None, entities)
    if (known := job_table.statements.get(shape)) is None:
        known = job_table.statements[shape] = _build(job_table, ask, entities=entities)
    else:
        _check(job_table, ask)
    return known


def key_in(key: Sequence[ColumnElement[Any]], keys: Iterable[Sequence[Any]]) -> ColumnElement[bool]:
    """Build the condition that a row's key is one of ``keys``.

    Several columns are compared one by one: MariaDB reads the whole index for a list of tuples.
    """
    if len(key) == 1:
        return key[0].in_([values[0] for values in keys])
    return or_(*(and_(*(c == v for c, v in zip(key, values, strict=True))) for values in keys))


class ByKey:
    """A statement for some rows, built once and executed with their keys.

    Only a key of several columns needs another text, and so another statement, for every number
    of rows.
    """

    def __init__(
        self,
        key: Sequence[ColumnElement[Any]],
        build: Callable[[ColumnElement[bool]], Any],
    ) -> None:
        self.key = key
        self.build = build
        parameter: BindParameter[Any] = bindparam(KEYS, expanding=True)
        self.statement = build(key[0].in_(parameter)) if len(key) == 1 else None

    def of(
        self, keys: Sequence[Sequence[Any]], params: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Return the statement for the rows with these keys, and its parameters."""
        given = dict(params or {})
        if self.statement is None:
            return self.build(key_in(self.key, keys)), given
        return self.statement, given | {KEYS: [values[0] for values in keys]}


def key_equals(
    key: Sequence[ColumnElement[Any]], others: Sequence[ColumnElement[Any]]
) -> ColumnElement[bool]:
    """Build the condition that two keys are equal, column by column."""
    return and_(*(column == other for column, other in zip(key, others, strict=True)))


@dataclass(frozen=True, eq=False)
class OrderTerm:
    """A term of an ORDER BY, taken apart: what is compared, which way, and where NULLs go."""

    element: ColumnElement[Any]
    descending: bool = False
    nulls_first: bool | None = None

    @classmethod
    def of(cls, term: ColumnElement[Any]) -> OrderTerm:
        """Take a term apart."""
        descending, nulls_first = False, None
        while isinstance(term, UnaryExpression) and term.modifier in _MODIFIERS:
            if term.modifier is operators.desc_op:
                descending = True
            elif term.modifier is not operators.asc_op:
                nulls_first = term.modifier is operators.nulls_first_op
            term = term.element
        return cls(term, descending, nulls_first)

    def applied(self, element: ColumnElement[Any]) -> ColumnElement[Any]:
        """Order another element in the same direction, with NULLs in the same place."""
        found: ColumnElement[Any] = element.desc() if self.descending else element.asc()
        if self.nulls_first is None:
            return found
        return found.nulls_first() if self.nulls_first else found.nulls_last()

    @property
    def suffix(self) -> str:
        """The words after the expression."""
        nulls = {None: "", True: " NULLS FIRST", False: " NULLS LAST"}[self.nulls_first]
        return (" DESC" if self.descending else "") + nulls

    @property
    def collates(self) -> bool:
        """Return True if the comparison may follow a collation that only the database knows."""
        return not (
            isinstance(self.element, Column)
            and isinstance(self.element.type, (Integer, Numeric, Float, Boolean, DateTime))
        )


def labelled_terms(order: Iterable[ColumnElement[Any]]) -> list[ColumnElement[Any]]:
    """Return what the terms of an order compare, as columns named ``claim_order_1`` and so on."""
    terms = enumerate(order, 1)
    return [OrderTerm.of(term).element.label(f"{ORDER}{place}") for place, term in terms]


_MODIFIERS = (
    operators.asc_op,
    operators.desc_op,
    operators.nulls_first_op,
    operators.nulls_last_op,
)


def _check(job_table: JobTable, ask: Ask) -> None:
    _check_worker(job_table, ask.worker)
    _check_lease(job_table, ask.lease)


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


def _may_be_unreadable(parts: ClaimParts) -> bool:
    return any(
        isinstance(column.type, (Enum, JSON, TypeDecorator))
        for column in parts.job_table.table.columns
    )


def _key_reader(parts: ClaimParts) -> Callable[[Any], tuple[Any, ...]]:
    job_table = parts.job_table
    mapper = job_table.mapper
    if parts.entities:
        assert mapper is not None
        names = [mapper.get_property_by_column(column).key for column in job_table.key]
        if len(names) == 1:
            read = operator.attrgetter(names[0])
            return lambda entity: (read(entity),)
        return operator.attrgetter(*names)
    columns: Sequence[Any] = tuple(job_table.table.columns)
    if parts.spread:
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
        if isinstance(declared, DatabaseNow) and value is not None:
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
    if isinstance(value, ClauseElement) or isinstance(declared, DatabaseNow):
        return False
    if isinstance(declared, (True_, False_)):
        return value is not None and bool(value) == isinstance(declared, True_)
    if isinstance(declared, Declared):
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


def _build(job_table: JobTable, ask: Ask, *, entities: bool) -> ClaimParts:
    _check(job_table, ask)
    key = _key_attributes(job_table)
    given = {} if ask.values is None else _checked_values(job_table, ask.values)
    order = job_table.order if ask.order_by is None else _order_terms(job_table, ask.order_by)
    order = order or key
    where = _conditions(ask.where)
    _check_tables(job_table, (*where, *order))
    limit = bindparam(LIMIT, ask.limit, Integer(), literal_execute=True)
    source = _source(job_table, *key, *labelled_terms(order))
    reach = bindparam(REACH, ask.limit + MARGIN, Integer(), literal_execute=True)
    branches = [
        source.where(*reason, *where).order_by(*(first or order)).limit(reach if place else limit)
        for place, (reason, first) in enumerate(job_table.reasons)
    ]
    reasons = or_(*(and_(*reason) for reason, _ in job_table.reasons))
    rows = _source(job_table, *key).where(reasons, *where)
    return ClaimParts(
        job_table=job_table,
        candidates=Candidates(tuple(branches), order, limit, reach, rows),
        conditions=(reasons, *where),
        order=order,
        values=_claim_values(job_table, ask) | given,
        entities=entities,
        single=ask.limit == 1,
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


def _claim_values(job_table: JobTable, ask: Ask) -> dict[Column[Any], Any]:
    values: dict[Column[Any], Any] = dict(job_table.claimed)
    for column in job_table.stamps:
        values.setdefault(column, job_table.now(column))
    if (column := job_table.worker) is not None:
        named = bindparam(WORKER, ask.worker, column.type)
        values[column] = None if ask.worker is None else named
    if (column := job_table.token) is not None:
        values[column] = bindparam(TOKEN, callable_=new_token, type_=column.type)
    if (column := job_table.attempts) is not None:
        values[column] = (func.coalesce(column, 0) if column.nullable else column) + 1
    if (column := job_table.lease) is not None:
        values[column] = None
        if ask.lease is not None:
            seconds = bindparam(LEASE, ask.lease.total_seconds(), Float())
            values[column] = job_table.now(column, seconds)
    return values
