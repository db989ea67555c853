"""SQL elements that the stock constructs lack: declared values and the database's clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime
from functools import cached_property
from operator import itemgetter
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import operators
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import BindParameter
from sqlalchemy.sql.visitors import InternalTraversal
from sqlalchemy.types import Float, TypeEngine

T = TypeVar("T")

KEYS = "_atomic_claim_keys"
ORDER = "claim_order_"


@dataclass(eq=False, repr=False)
class InlineLiteral(sa.ColumnElement[Any]):
    """A value known when the table is declared, rendered as a literal by its type.

    An index that is partial on ``state = 'waiting'`` serves a query only if the planner sees the
    value, and under a generic plan it does not see parameters. The value is part of the cache
    key, so that another value never reuses this one's text.
    """

    value: object
    type: TypeEngine[Any] = field()

    # What makes up the cache key, in the form that SQLAlchemy documents for its extensions.
    _traverse_internals = [  # noqa: RUF012
        ("value", InternalTraversal.dp_plain_obj),
        ("type", InternalTraversal.dp_type),
    ]


@compiles(InlineLiteral)
def _inline(element: InlineLiteral, compiler: SQLCompiler, **_: Any) -> str:
    # A DOMAIN of PostgreSQL's has no literals of its own.
    type_ = getattr(element.type, "data_type", element.type)
    value = element.value
    if isinstance(type_, sa.Boolean):
        return str(compiler.process(sa.true() if value else sa.false()))
    if type_.__visit_name__ == "BIT":
        # PostgreSQL's are texts; MySQL's are numbers.
        number = int.from_bytes(value) if isinstance(value, bytes) else value
        digits = number if isinstance(number, str) else f"{number:b}"
        return "b" + compiler.render_literal_value(digits, sa.String())
    return compiler.render_literal_value(value, type_)


@dataclass(eq=False, repr=False)
class DatabaseTime(sa.ColumnElement[datetime]):
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

    type: TypeEngine[Any] = field()
    clock: str
    offset: sa.ColumnElement[Any] | None = None
    _: KW_ONLY
    floor: bool = False
    form: str | None = None

    _traverse_internals = [  # noqa: RUF012
        ("type", InternalTraversal.dp_type),
        ("clock", InternalTraversal.dp_string),
        ("offset", InternalTraversal.dp_clauseelement),
        ("floor", InternalTraversal.dp_boolean),
        ("later", InternalTraversal.dp_boolean),
        ("form", InternalTraversal.dp_string),
    ]

    @property
    def later(self) -> bool:
        """Return True if the later of two times is meant where the clock repeats an hour."""
        value = self.offset.value if isinstance(self.offset, BindParameter) else None
        return value is None or value >= 0


class RandomFraction(sa.ColumnElement[float]):
    """A random number from 0 to 1, drawn by the database for each row."""

    inherit_cache = True
    type = Float()


def key_in(
    key: Sequence[sa.ColumnElement[Any]], keys: Iterable[Sequence[Any]]
) -> sa.ColumnElement[bool]:
    """Build the condition that a row's key is one of ``keys``.

    Several columns are compared one by one: MariaDB reads the whole index for a list of tuples.
    """
    if len(key) == 1:
        return key[0].in_([values[0] for values in keys])
    return sa.or_(
        *(sa.and_(*(c == v for c, v in zip(key, values, strict=True))) for values in keys)
    )


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
        if key not in self.prepared:
            self.prepared[key] = make(self, *given)
        return self.prepared[key]  # type: ignore[no-any-return]


class ByKey:
    """A statement for some rows, built once and executed with their keys.

    Only a key of several columns needs another text, and so another statement, for every number
    of rows.
    """

    def __init__(
        self,
        key: Sequence[sa.ColumnElement[Any]],
        build: Callable[[sa.ColumnElement[bool]], Any],
    ) -> None:
        self.key = key
        self.build = build
        parameter: BindParameter[Any] = sa.bindparam(KEYS, expanding=True)
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
    key: Sequence[sa.ColumnElement[Any]], others: Sequence[sa.ColumnElement[Any]]
) -> sa.ColumnElement[bool]:
    """Build the condition that two keys are equal, column by column."""
    return sa.and_(*(column == other for column, other in zip(key, others, strict=True)))


@dataclass(frozen=True, eq=False)
class OrderTerm:
    """A term of an ORDER BY, taken apart: what is compared, which way, and where NULLs go."""

    element: sa.ColumnElement[Any]
    descending: bool = False
    nulls_first: bool | None = None

    @classmethod
    def of(cls, term: sa.ColumnElement[Any]) -> OrderTerm:
        """Take a term apart."""
        found, element = set[Any](), cast("Any", term)
        while operators.is_ordering_modifier(getattr(element, "modifier", cast("Any", None))):
            found.add(element.modifier)
            element = element.element
        nulls_first = operators.nulls_first_op in found
        placed = nulls_first or operators.nulls_last_op in found
        return cls(element, operators.desc_op in found, nulls_first if placed else None)

    def applied(self, element: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Order another element in the same direction, with NULLs in the same place."""
        found: sa.ColumnElement[Any] = element.desc() if self.descending else element.asc()
        if self.nulls_first is None:
            return found
        return found.nulls_first() if self.nulls_first else found.nulls_last()

    @property
    def suffix(self) -> str:
        """The words after the expression."""
        nulls = {None: "", True: " NULLS FIRST", False: " NULLS LAST"}[self.nulls_first]
        return (" DESC" if self.descending else "") + nulls


def labelled_terms(order: Iterable[sa.ColumnElement[Any]]) -> list[sa.ColumnElement[Any]]:
    """Return what the terms of an order compare, as columns named ``claim_order_1`` and so on."""
    terms = enumerate(order, 1)
    return [OrderTerm.of(term).element.label(f"{ORDER}{place}") for place, term in terms]
