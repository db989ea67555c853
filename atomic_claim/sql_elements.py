"""SQL elements that the stock constructs lack: declared values and the database's clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from operator import itemgetter
from typing import Any, TypeVar, cast

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Integer,
    Select,
    and_,
    bindparam,
    case,
    func,
    literal_column,
    or_,
    select,
    union_all,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import operators
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import BindParameter, ClauseElement, UnaryExpression
from sqlalchemy.sql.selectable import FromClause
from sqlalchemy.sql.visitors import InternalTraversal
from sqlalchemy.types import Float, TypeEngine

T = TypeVar("T")

KEYS = "atomic_claim_keys"
ORDER = "claim_order_"
ALONE = "claim_alone"


class InlineLiteral(ColumnElement[Any]):
    """A value known when the table is declared, rendered as a literal by its type.

    An index that is partial on ``state = 'waiting'`` serves a query only if the planner sees the
    value, and under a generic plan it does not see parameters. The value is part of the cache
    key, so that another value never reuses this one's text.
    """

    # What makes up the cache key, in the form that SQLAlchemy documents for its extensions.
    _traverse_internals = [  # noqa: RUF012
        ("value", InternalTraversal.dp_plain_obj),
        ("type", InternalTraversal.dp_type),
    ]

    def __init__(self, value: object, type_: TypeEngine[Any]) -> None:
        self.value = value
        self.type = type_


@compiles(InlineLiteral)
def _inline(element: InlineLiteral, compiler: SQLCompiler, **_: Any) -> str:
    # A DOMAIN of PostgreSQL's has no literals of its own.
    type_ = getattr(element.type, "data_type", element.type)
    value = element.value
    if type_.__visit_name__ == "BIT" and not isinstance(value, str):
        # MySQL's; PostgreSQL's is a text.
        number = int.from_bytes(value) if isinstance(value, bytes) else int(value)  # type: ignore[call-overload]
        return f"b'{number:b}'"
    return compiler.render_literal_value(value, type_)


class DatabaseTime(ColumnElement[datetime]):
    """The database's clock at the start of the statement, in the form in which a column stores it.

    ``clock`` is ``"utc"`` or ``"server"`` (for a column without a zone: UTC, or the session's
    zone) or ``"unsaid"``. ``form`` is the ``strftime`` format of a text column on SQLite.
    ``offset`` is an expression in seconds that is added. A column without fractions of the second
    is given a later time rather than an earlier one, so that a lease is not cut; with ``floor`` an
    earlier one. The database's backend renders it.

    In a zone with daylight saving, seconds are added in UTC. A column without a zone cannot tell
    the two passes of the hour that autumn repeats, so an offset that ends after the clocks went
    back is counted by the clock on the wall, too, and the later time is taken: up to the hour
    longer than asked, and never shorter. A negative offset takes the earlier one.
    """

    _traverse_internals = [  # noqa: RUF012
        ("type", InternalTraversal.dp_type),
        ("clock", InternalTraversal.dp_string),
        ("offset", InternalTraversal.dp_clauseelement),
        ("floor", InternalTraversal.dp_boolean),
        ("later", InternalTraversal.dp_boolean),
        ("form", InternalTraversal.dp_string),
    ]

    def __init__(
        self,
        type_: TypeEngine[Any],
        clock: str,
        offset: ColumnElement[Any] | None = None,
        *,
        floor: bool = False,
        form: str | None = None,
    ) -> None:
        self.type = type_
        self.clock = clock
        self.offset = offset
        self.floor = floor
        self.form = form
        value = offset.value if isinstance(offset, BindParameter) else None
        self.later = value is None or value >= 0


class RandomFraction(ColumnElement[float]):
    """A random number from 0 to 1, drawn by the database for each row."""

    inherit_cache = True
    type = Float()


def key_in(key: Sequence[ColumnElement[Any]], keys: Iterable[Sequence[Any]]) -> ColumnElement[bool]:
    """Build the condition that a row's key is one of ``keys``.

    Several columns are compared one by one: MariaDB reads the whole index for a list of tuples.
    """
    if len(key) == 1:
        return key[0].in_([values[0] for values in keys])
    return or_(*(and_(*(c == v for c, v in zip(key, values, strict=True))) for values in keys))


class Preparing:
    """A base class that caches what is built from an immutable object.

    A backend passes types and methods of its own, so backends share nothing.
    """

    @cached_property
    def prepared(self) -> dict[Any, Any]:
        """Results by the function that made them and its arguments."""
        return {}

    def prepare(self, make: Callable[..., T], *given: Any) -> T:
        """Call ``make`` with this object and ``given`` once, and return its kept result."""
        key = (make, *given)
        try:
            return self.prepared[key]  # type: ignore[no-any-return]
        except KeyError:
            pass
        found = self.prepared[key] = make(self, *given)
        return found


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
        return self.statement, given | {KEYS: list(map(itemgetter(0), keys))}


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


@dataclass(eq=False, repr=False)
class Candidates(ClauseElement):
    """The keys of the rows to claim, ordered and limited.

    A row can be claimable for several reasons (it is free; its lease is over). Each reason is a
    SELECT of its own, since no index serves their OR in order. Free rows come in the claim's
    order; the others as their index has them, with a margin from which the claim's order is made.

    A row for which :func:`~atomic_claim.predicates.is_last_chance` is claimed alone: the rows
    behind it wait for the next claim, and it waits for the rows before it.

    Attributes:
        branches: SELECTs of the key, of whether the row is claimed alone (if any may be) and of
            the terms of the order; each ordered and limited.
        order: the terms of the order.
        limit: the parameter that limits the first of them, and all together.
        scan_limit: the parameter that limits the others.
        rows: the keys of all rows that may be claimed, in no order.
    """

    _traverse_internals = [  # noqa: RUF012
        ("branches", InternalTraversal.dp_clauseelement_tuple),
        ("order", InternalTraversal.dp_clauseelement_tuple),
        ("limit", InternalTraversal.dp_clauseelement),
        ("scan_limit", InternalTraversal.dp_clauseelement),
        ("rows", InternalTraversal.dp_clauseelement),
    ]

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
        found = self.in_one_claim(self._first(lock)).limit(self.limit)
        return found if terms else self.only_keys(found)

    def select_with_alone(self) -> Select[Any]:
        """One SELECT of the keys and, if any row may be claimed alone, of whether it is."""
        if not self.tells_alone:
            return self.select()
        found = self._first(lambda branch: branch).limit(self.limit)
        return self.only_keys(found, and_alone=True)

    @property
    def tells_alone(self) -> bool:
        """Return True if the branches say for each row whether it is claimed alone."""
        return ALONE in self.branches[0].selected_columns

    @property
    def shared_branches(self) -> list[Select[Any]]:
        """The branches without the rows that are claimed alone."""
        if not self.tells_alone:
            return list(self.branches)
        flags = [cast("Any", branch.selected_columns[ALONE]).element for branch in self.branches]
        return [b.where(flag == _ZERO) for b, flag in zip(self.branches, flags, strict=True)]

    def _first(self, lock: Callable[[Select[Any]], Select[Any]]) -> Select[Any]:
        together = self.together(*map(lock, self.branches)).subquery("branches")
        return self.ordered(together)

    def together(self, *branches: Select[Any]) -> CompoundSelect[Any]:
        """All that several SELECTs find."""
        numbered = enumerate(branches, 1)
        return union_all(*(select(each.subquery(f"branch_{place}")) for place, each in numbered))

    def terms(self, found: FromClause) -> list[ColumnElement[Any]]:
        """Order what has been found as the claim does."""
        terms = enumerate(self.order, 1)
        return [OrderTerm.of(term).applied(found.columns[f"{ORDER}{n}"]) for n, term in terms]

    def ordered(self, found: FromClause) -> Select[Any]:
        """All columns, in claim order."""
        return select(*found.columns).order_by(*self.terms(found))

    def in_one_claim(self, found: Select[Any]) -> Select[Any]:
        """Remove the rows that may not be claimed together with the first one."""
        if ALONE not in found.selected_columns:
            return found
        rows = found.subquery("found")
        order = self.terms(rows)
        place = func.row_number().over(order_by=order).label("place")
        leader = func.first_value(rows.columns[ALONE]).over(order_by=order).label("leader")
        placed = select(*rows.columns, place, leader).subquery("placed")
        is_shared = and_(placed.columns.leader == _ZERO, placed.columns[ALONE] == _ZERO)
        left = self.ordered(placed).where(or_(placed.columns.place == _ONE, is_shared))
        columns = list(placed.columns)[: len(rows.columns)]
        return cast("Select[Any]", left.with_only_columns(*columns))

    def only_keys(self, branch: Select[Any], *, and_alone: bool = False) -> Select[Any]:
        """Keep the columns of the key, and the one that tells whether a row is claimed alone."""
        width = len(self.rows.selected_columns) + and_alone
        return branch.with_only_columns(*list(branch.selected_columns)[:width])


def alone_if(condition: ColumnElement[bool]) -> ColumnElement[int]:
    """Return the column that tells whether a candidate is claimed alone."""
    return case((condition, _ONE), else_=_ZERO).label(ALONE)


def labelled_terms(order: Iterable[ColumnElement[Any]]) -> list[ColumnElement[Any]]:
    """Return what the terms of an order compare, as columns named ``claim_order_1`` and so on."""
    terms = enumerate(order, 1)
    return [OrderTerm.of(term).element.label(f"{ORDER}{place}") for place, term in terms]


_ZERO, _ONE = literal_column("0", Integer()), literal_column("1", Integer())
_MODIFIERS = (
    operators.asc_op,
    operators.desc_op,
    operators.nulls_first_op,
    operators.nulls_last_op,
)
