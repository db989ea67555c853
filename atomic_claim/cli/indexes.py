"""The indexes that serve a claim, made of the claim's own words.

An index can hold what is the same at every claim: of ``free AND not ended AND due`` the first
two, and of a lease that has run out that the row runs. PostgreSQL puts these conditions into a
partial index, in the words of the claim, since it serves no others. MySQL and MariaDB have no
partial indexes, so that the columns that must equal something stand before the order. SQLite has
both: before ANALYZE its planner goes by how many columns of an index are told.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ColumnElement, Dialect, String, Table, and_, column
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import CreateIndex
from sqlalchemy.sql import functions, operators, visitors
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    ColumnClause,
    Null,
    TextClause,
)
from sqlalchemy.sql.selectable import SelectBase

from atomic_claim.columns import JobTable
from atomic_claim.conventions import plain_type
from atomic_claim.elements import DatabaseNow
from atomic_claim.statement import OrderTerm

INNODB = ("mysql", "mariadb")
# PostgreSQL cuts off longer names, without a word.
LONGEST_NAME = 63


@dataclass(frozen=True)
class NeededIndex:
    """An index by which a claim finds rows that are free for one reason.

    Attributes:
        reason: ``free``, ``expired`` or ``unleased``; ``keys`` or ``running`` for exclusive keys.
        table: the job table.
        conditions: what is the same at every claim, and what an index can hold of it.
        leading: the columns that equal what a call passes as a parameter.
        order: what the rows are read in order of.
    """

    reason: str
    table: Table
    conditions: tuple[ColumnElement[bool], ...]
    leading: tuple[ColumnClause[Any], ...]
    order: tuple[ColumnElement[Any], ...]

    @property
    def name(self) -> str:
        """The index's name: the same for the same table."""
        name = f"{self.table.name}_claim_{self.reason}"
        if len(name) <= LONGEST_NAME:
            return name
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return f"{self.table.name[: LONGEST_NAME - 16 - len(self.reason)]}_claim_{digest}"

    @property
    def equal(self) -> tuple[ColumnClause[Any], ...]:
        """The columns that must equal one value, or be NULL."""
        found = [_equal_column(condition) for condition in self.conditions]
        return tuple(dict.fromkeys([*(c for c in found if c is not None), *self.leading]))

    @property
    def chosen_by(self) -> frozenset[str]:
        """The names of all columns that the conditions speak of."""
        named = [part for condition in self.conditions for part in visitors.iterate(condition)]
        columns = [part for part in (*named, *self.leading) if isinstance(part, ColumnClause)]
        return frozenset(column.name for column in columns)

    def refusal(self, dialect: Dialect) -> str | None:
        """Why this database cannot have such an index, if it cannot."""
        terms = [OrderTerm.of(term) for term in self.order]
        if dialect.name == "mariadb" and any(not _is_column(term.element) for term in terms):
            return "MariaDB has no indexes on expressions, so none can serve this order"
        if dialect.name in INNODB:
            for part in (*self.equal, *(term.element for term in terms)):
                if _is_column(part) and _is_long_text(part):
                    return (
                        f"{dialect.name} cannot index the whole of {part.name!r}, which is "
                        f"{plain_type(part.type)!r}: make it a VARCHAR(n)"
                    )
        return None

    def definition(self, dialect: Dialect) -> str:
        """The index as it is, after ``CREATE INDEX name``."""
        quote = dialect.identifier_preparer.quote
        before, where = self.leading, ""
        behind: tuple[ColumnClause[Any], ...] = ()
        if dialect.name != "postgresql":
            before = self.equal
        if dialect.name in INNODB:
            # Of several values no order comes; but so the rows need not be read to be passed over.
            names = self.chosen_by if not before else ()
            behind = tuple(c for c in self.table.columns if c.name in names)
        elif self.conditions:
            where = f" WHERE {self._text(and_(*self.conditions), dialect)}"
        terms = [
            *(quote(part.name) for part in before),
            *(self._term(OrderTerm.of(term), dialect) for term in self.order),
            *(quote(part.name) for part in behind),
        ]
        table = dialect.identifier_preparer.format_table(self.table)
        return f"ON {table} ({', '.join(dict.fromkeys(terms))}){where}"

    def _term(self, term: OrderTerm, dialect: Dialect) -> str:
        element = term.element
        text = self._text(element, dialect)
        text = text if _is_column(element) else f"({text})"
        if dialect.name != "postgresql":
            return text + (" DESC" if term.descending else "")
        return text + term.suffix

    def _text(self, clause: ColumnElement[Any], dialect: Dialect) -> str:
        options = {"include_table": False, "literal_binds": True}
        return str(clause.compile(dialect=dialect, compile_kwargs=options))

    def create(self, dialect: Dialect, name: str | None = None) -> str:
        """The statement that creates the index without stopping anybody's writing."""
        quote = dialect.identifier_preparer.quote
        name = quote(name or self.name)
        if dialect.name == "postgresql":
            return f"CREATE INDEX CONCURRENTLY {name} {self.definition(dialect)}"
        if dialect.name in INNODB:
            definition = self.definition(dialect)
            return f"CREATE INDEX {name} {definition} ALGORITHM=INPLACE LOCK=NONE"
        if self.table.schema:
            name = f"{quote(self.table.schema)}.{name}"
            return f"CREATE INDEX {name} {_without_schema(self.definition(dialect))}"
        return f"CREATE INDEX {name} {self.definition(dialect)}"

    def drop(self, dialect: Dialect) -> str:
        """The statement that takes the index away again, as gently."""
        quote = dialect.identifier_preparer.quote
        name = quote(self.name)
        table = dialect.identifier_preparer.format_table(self.table)
        if dialect.name in INNODB:
            return f"ALTER TABLE {table} DROP INDEX {name}, ALGORITHM=INPLACE, LOCK=NONE"
        if self.table.schema:
            name = f"{quote(self.table.schema)}.{name}"
        return f"DROP INDEX {'CONCURRENTLY ' if dialect.name == 'postgresql' else ''}{name}"

    def is_declared(self, dialect: Dialect) -> bool:
        """Whether the table's declaration has the very same index already."""
        wanted = _normal(self.definition(dialect))
        return any(
            wanted == _normal(str(CreateIndex(index).compile(dialect=dialect)).partition(" ON ")[2])
            for index in self.table.indexes
        )


def needed_indexes(job_table: JobTable, *, lease: str | None = None) -> list[NeededIndex]:
    """The indexes that serve a table's claims, one for each reason for which a row is free.

    Args:
        job_table: what the columns mean.
        lease: the name of a lease column that is about to be added.
    """
    table, order = job_table.table, job_table.order or job_table.key
    found = [_needed("free", table, job_table.is_free, order)]
    own: Any = job_table.lease
    named: Any = own if own is not None else lease and column(lease)
    if named is not None:
        found.append(_needed("expired", table, job_table.is_running, (named,)))
    if job_table.unleased is not None:
        # The third reason's order is the time since which a row has been running.
        assert own is not None
        _, (since,) = job_table.reasons[2]
        running = and_(job_table.is_running, own.is_(None))
        found.append(_needed("unleased", table, running, (since,)))
    if (key := job_table.exclusive_by) is not None:
        found.append(_needed("keys", table, job_table.is_free, (key, *order)))
        found.append(_needed("running", table, job_table.is_running, (key,)))
    return found


def _needed(
    reason: str,
    table: Table,
    condition: ColumnElement[bool],
    order: Iterable[ColumnElement[Any]],
) -> NeededIndex:
    conjuncts = list(_conjuncts(condition))
    leading = [
        found
        for each in conjuncts
        if not _is_immutable(each) and (found := _equal_column(each)) is not None
    ]
    immutable = tuple(each for each in conjuncts if _is_immutable(each))
    return NeededIndex(reason, table, immutable, tuple(leading), tuple(order))


def _conjuncts(condition: ColumnElement[bool]) -> Iterator[ColumnElement[bool]]:
    if isinstance(condition, BooleanClauseList) and condition.operator is operators.and_:
        for each in condition.clauses:
            yield from _conjuncts(each)
    else:
        yield condition


def _is_immutable(condition: ColumnElement[bool]) -> bool:
    """Whether the condition is the same at every claim, and its words too."""
    changing = (BindParameter, DatabaseNow, functions.FunctionElement, SelectBase, TextClause)
    return not any(isinstance(part, changing) for part in visitors.iterate(condition))


def _equal_column(condition: ColumnElement[bool]) -> ColumnClause[Any] | None:
    """The column that the condition holds to one value, or to NULL."""
    if not isinstance(condition, BinaryExpression) or not isinstance(condition.left, ColumnClause):
        return None
    if condition.operator is operators.eq and not any(
        isinstance(part, (ColumnClause, DatabaseNow)) for part in visitors.iterate(condition.right)
    ):
        return condition.left
    if condition.operator is operators.is_ and isinstance(condition.right, Null):
        return condition.left
    return None


def _is_column(element: Any) -> bool:
    return isinstance(element, ColumnClause)


def _is_long_text(element: Any) -> bool:
    type_ = plain_type(element.type)
    if not isinstance(element, Column) or not isinstance(type_, String):
        return False
    return type_.length is None or isinstance(type_, (mysql.TEXT, mysql.MEDIUMTEXT, mysql.LONGTEXT))


def _without_schema(definition: str) -> str:
    """SQLite wants the schema before the index's name, and not before the table's."""
    return re.sub(r'^ON ("[^"]*"|\w+)\.', "ON ", definition)


def _normal(definition: str) -> str:
    return " ".join(definition.removeprefix("ON ").split())
