"""SQL elements that the stock constructs lack: declared values and the database's clock."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.visitors import InternalTraversal
from sqlalchemy.types import TypeEngine


class Declared(ColumnElement[Any]):
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


@compiles(Declared)
def _declared(element: Declared, compiler: SQLCompiler, **_: Any) -> str:
    return compiler.render_literal_value(element.value, element.type)


class DatabaseNow(ColumnElement[datetime]):
    """The database's clock at the start of the statement, in the form in which a column stores it.

    ``clock`` is ``"utc"`` or ``"server"`` (for a column without a zone: UTC, or the session's
    zone), ``"unsaid"``, or ``"text:"`` and a ``strftime`` format of SQLite (UTC). ``offset`` is
    an expression in seconds that is added. ``floor`` asks that a column which holds fewer digits
    of the second is not given a time that is still to come. Every dialect renders it in its own
    module.
    """

    _traverse_internals = [  # noqa: RUF012
        ("type", InternalTraversal.dp_type),
        ("clock", InternalTraversal.dp_string),
        ("offset", InternalTraversal.dp_clauseelement),
        ("floor", InternalTraversal.dp_boolean),
    ]

    def __init__(
        self,
        type_: TypeEngine[Any],
        clock: str,
        offset: ColumnElement[Any] | None = None,
        *,
        floor: bool = False,
    ) -> None:
        self.type = type_
        self.clock = clock
        self.offset = offset
        self.floor = floor
