"""The indexes that serve a claim, made of the claim's own words.

An index can hold what is the same at every claim: of ``free AND not ended AND due`` the first
two, and of a lease that has run out that the row runs. PostgreSQL puts these conditions into a
partial index, in the words of the claim, since it serves no others. MySQL and MariaDB have no
partial indexes, so that the columns that must equal something stand before the order. SQLite has
both: before ANALYZE its planner goes by how many columns of an index are told.

What changes from claim to claim, or may be declared again, is no condition of an index: whether a
row is due, and has attempts left. Where the database can tell by the index alone, the columns stand
behind the order, so that such rows are passed over without being read from the table one by one.
"""

from __future__ import annotations

import hashlib
import re
import sys
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

from atomic_claim import predicates
from atomic_claim.inference import plain_type
from atomic_claim.job_table import JobTable
from atomic_claim.sql_elements import DatabaseTime, OrderTerm

INNODB = ("mysql", "mariadb")
# PostgreSQL cuts off longer names, without a word.
LONGEST_NAME = 63
# Longer texts could make an index's rows too long, for no more than speed.
LONGEST_BEHIND = 64


@dataclass(frozen=True)
class NeededIndex:
    """An index by which a claim finds rows that are free for one reason.

    Attributes:
        reason: ``free``, ``expired`` or ``unleased``; ``keys`` or ``running`` for exclusive keys.
        table: the job table.
        conditions: what is the same at every claim, and what an index can hold of it.
        leading: the columns that equal what a call passes as a parameter.
        order: what the rows are read in order of.
        passing: what further has to be true of a row, else it is passed over.
    """

    reason: str
    table: Table
    conditions: tuple[ColumnElement[bool], ...]
    leading: tuple[ColumnClause[Any], ...]
    order: tuple[ColumnElement[Any], ...]
    passing: tuple[ColumnElement[bool], ...] = ()

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
        columns = (*_columns_of(self.conditions), *self.leading)
        return frozenset(column.name for column in columns)

    @property
    def is_partitioned(self) -> bool:
        """True if PostgreSQL has the table in partitions, where it refuses CONCURRENTLY."""
        return bool(self.table.dialect_options["postgresql"].get("partition_by"))

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
        """Render the index's definition, the part after ``CREATE INDEX name``."""
        return self._defined(dialect, self._behind(dialect))

    def _behind(self, dialect: Dialect) -> list[ColumnClause[Any]]:
        """Return the trailing columns that filter rows in the index without reading the table."""
        passing = self.passing
        if dialect.name == "postgresql":
            # It compares in the index, and reads the row for any other condition, as an OR.
            passing = tuple(each for each in passing if isinstance(each, BinaryExpression))
        found = _columns_of(passing)
        return [c for c in found if dialect.name == "sqlite" or not _is_wide(c)]

    def _defined(self, dialect: Dialect, behind: Iterable[ColumnClause[Any]]) -> str:
        parts, where = self._parts(dialect, behind)
        terms = [self._term(element, dialect) + suffix for element, suffix in parts]
        table = dialect.identifier_preparer.format_table(self.table)
        return f"ON {table} ({', '.join(terms)}){f' WHERE {where}' if where else ''}"

    def parts(self, dialect: Dialect) -> tuple[list[tuple[ColumnElement[Any], str]], str]:
        """Return the index's terms, each with its direction, and its condition."""
        return self._parts(dialect, self._behind(dialect))

    def _parts(
        self, dialect: Dialect, behind: Iterable[ColumnClause[Any]]
    ) -> tuple[list[tuple[ColumnElement[Any], str]], str]:
        before, where = self.leading, ""
        if dialect.name != "postgresql":
            before = self.equal
        if dialect.name in INNODB:
            # Of several values no order comes; but so the rows need not be read to be passed over.
            names = self.chosen_by if not before else ()
            behind = [*(c for c in self.table.columns if c.name in names), *behind]
        elif self.conditions:
            where = self._text(and_(*self.conditions), dialect)
        order = [OrderTerm.of(term) for term in self.order]
        ahead = {getattr(part, "name", None) for part in (*before, *(t.element for t in order))}
        found: list[tuple[ColumnElement[Any], str]] = [(part, "") for part in before]
        for term in order:
            descending = " DESC" if term.descending else ""
            found.append(
                (term.element, term.suffix if dialect.name == "postgresql" else descending)
            )
        found += [(part, "") for part in behind if part.name not in ahead]
        unique = {(self._term(element, dialect), suffix): element for element, suffix in found}
        return [(element, suffix) for (_, suffix), element in unique.items()], where

    def _term(self, element: ColumnElement[Any], dialect: Dialect) -> str:
        text = self._text(element, dialect)
        return text if _is_column(element) else f"({text})"

    def _text(self, clause: ColumnElement[Any], dialect: Dialect) -> str:
        options = {"include_table": False, "literal_binds": True}
        return str(clause.compile(dialect=dialect, compile_kwargs=options))

    def create(self, dialect: Dialect, name: str | None = None) -> str:
        """Render the statement that creates the index without blocking writes."""
        quote = dialect.identifier_preparer.quote
        name = quote(name or self.name)
        if dialect.name == "postgresql":
            how = "" if self.is_partitioned else "CONCURRENTLY "
            return f"CREATE INDEX {how}{name} {self.definition(dialect)}"
        if dialect.name in INNODB:
            definition = self.definition(dialect)
            return f"CREATE INDEX {name} {definition} ALGORITHM=INPLACE LOCK=NONE"
        if self.table.schema:
            name = f"{quote(self.table.schema)}.{name}"
            return f"CREATE INDEX {name} {_without_schema(self.definition(dialect))}"
        return f"CREATE INDEX {name} {self.definition(dialect)}"

    def drop(self, dialect: Dialect) -> str:
        """Render the statement that drops the index without blocking writes."""
        quote = dialect.identifier_preparer.quote
        name = quote(self.name)
        table = dialect.identifier_preparer.format_table(self.table)
        if dialect.name in INNODB:
            return f"ALTER TABLE {table} DROP INDEX {name}, ALGORITHM=INPLACE, LOCK=NONE"
        if self.table.schema:
            name = f"{quote(self.table.schema)}.{name}"
        alone = dialect.name == "postgresql" and not self.is_partitioned
        return f"DROP INDEX {'CONCURRENTLY ' if alone else ''}{name}"

    def is_declared(self, dialect: Dialect) -> bool:
        """Check whether the table's declaration already contains such an index.

        That of an earlier version, with no columns behind the order, will do.
        """
        wanted = [_normal(self.definition(dialect)), _normal(self._defined(dialect, ()))]
        return any(
            _normal(str(CreateIndex(index).compile(dialect=dialect)).partition(" ON ")[2]) in wanted
            for index in self.table.indexes
        )


def needed_indexes(job_table: JobTable, *, lease: str | None = None) -> list[NeededIndex]:
    """Return the indexes that serve a table's claims, one for each reason why a row is free.

    Args:
        job_table: what the columns mean.
        lease: the name of a lease column that is about to be added.
    """
    table, order = job_table.table, job_table.order or job_table.key
    own: Any = job_table.lease
    named: Any = own if own is not None else lease and column(lease)
    is_due, is_unspent = predicates.is_due(job_table), predicates.is_unspent(job_table)
    found = [_needed("free", table, predicates.is_free(job_table), order, is_due)]
    if named is not None:
        found.append(
            _needed("expired", table, predicates.is_running(job_table), (named,), is_unspent)
        )
    if job_table.unleased is not None:
        # The third reason's order is the time since which a row has been running.
        assert own is not None
        _, (since,) = predicates.claimable_branches(job_table)[2]
        running = and_(predicates.is_running(job_table), own.is_(None))
        found.append(_needed("unleased", table, running, (since,), is_unspent))
    if (key := job_table.exclusive_by) is not None:
        found.append(_needed("keys", table, predicates.is_free(job_table), (key, *order), is_due))
        found.append(_needed("running", table, predicates.is_running(job_table), (key,)))
    return found


def _needed(
    reason: str,
    table: Table,
    condition: ColumnElement[bool],
    order: Iterable[ColumnElement[Any]],
    passing: tuple[ColumnElement[bool], ...] = (),
) -> NeededIndex:
    conjuncts = list(_conjuncts(condition))
    leading = [
        found
        for each in conjuncts
        if not _is_immutable(each) and (found := _equal_column(each)) is not None
    ]
    immutable = tuple(each for each in conjuncts if _is_immutable(each))
    return NeededIndex(reason, table, immutable, tuple(leading), tuple(order), passing)


def _columns_of(conditions: Iterable[ColumnElement[bool]]) -> list[ColumnClause[Any]]:
    found = (part for condition in conditions for part in visitors.iterate(condition))
    return list(dict.fromkeys(part for part in found if isinstance(part, ColumnClause)))


def _conjuncts(condition: ColumnElement[bool]) -> Iterator[ColumnElement[bool]]:
    if isinstance(condition, BooleanClauseList) and condition.operator is operators.and_:
        for each in condition.clauses:
            yield from _conjuncts(each)
    else:
        yield condition


def _is_immutable(condition: ColumnElement[bool]) -> bool:
    """Check whether the condition and its SQL are the same for every claim."""
    changing = (BindParameter, DatabaseTime, functions.FunctionElement, SelectBase, TextClause)
    return not any(isinstance(part, changing) for part in visitors.iterate(condition))


def _equal_column(condition: ColumnElement[bool]) -> ColumnClause[Any] | None:
    """Return the column that the condition compares with one value or with NULL, if any."""
    if not isinstance(condition, BinaryExpression) or not isinstance(condition.left, ColumnClause):
        return None
    if condition.operator is operators.eq and not any(
        isinstance(part, (ColumnClause, DatabaseTime)) for part in visitors.iterate(condition.right)
    ):
        return condition.left
    if condition.operator is operators.is_ and isinstance(condition.right, Null):
        return condition.left
    return None


def _is_column(element: Any) -> bool:
    return isinstance(element, ColumnClause)


def _is_wide(element: Any) -> bool:
    type_ = plain_type(element.type)
    return isinstance(type_, String) and (type_.length or sys.maxsize) > LONGEST_BEHIND


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
