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
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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

from .texts import literal_text

INNODB = ("mysql", "mariadb")
# Refused rather than built while writers wait.
ONLINE = ", ALGORITHM=INPLACE, LOCK=NONE"
# PostgreSQL cuts off longer names, without a word.
LONGEST_NAME = 63
# Longer texts could make an index's rows too long, for no more than speed.
LONGEST_BEHIND = 64


class Term(NamedTuple):
    """A column or an expression in an index, its SQL, and its direction."""

    element: ColumnElement[Any]
    text: str
    suffix: str

    @classmethod
    def of(cls, element: ColumnElement[Any], suffix: str, dialect: Dialect) -> Term:
        """Render the element."""
        text = literal_text(element, dialect)
        return cls(element, text if _is_column(element) else f"({text})", suffix)


@dataclass(frozen=True)
class NeededIndex:
    """An index by which a claim finds rows that are free for one reason.

    Attributes:
        reason: ``free``, ``due``, ``expired`` or ``unleased``; ``keys`` or ``running`` for
            exclusive keys; ``fair`` or ``claimed`` for claims that take turns.
        table: the job table.
        conditions: what is the same at every claim, and what an index can hold of it.
        leading: the columns that equal what a call passes as a parameter.
        order: what the rows are read in order of.
        passing: what further has to be true of a row, else it is passed over.
        unspent: the condition that attempts are left, if the index has no other rows; where there
            are no partial indexes, the rows stand in it by their attempts.
    """

    reason: str
    table: Table
    conditions: tuple[ColumnElement[bool], ...]
    leading: tuple[ColumnClause[Any], ...]
    order: tuple[ColumnElement[Any], ...]
    passing: tuple[ColumnElement[bool], ...] = ()
    unspent: tuple[ColumnElement[bool], ...] = ()

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
        """Return why this database cannot have such an index, or None."""
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
        terms, where = self.parts(dialect)
        # SQLite wants the schema before the index's name alone.
        has_schema = dialect.name != "sqlite"
        table = dialect.identifier_preparer.format_table(self.table, use_schema=has_schema)
        columns = ", ".join(term.text + term.suffix for term in terms)
        return f"ON {table} ({columns}){f' WHERE {where}' if where else ''}"

    def parts(self, dialect: Dialect) -> tuple[list[Term], str]:
        """Return the index's terms and its condition."""
        before = self.before(dialect)
        behind, where = self._behind(dialect), ""
        if dialect.name in INNODB:
            # Of several values no order comes; but so the rows need not be read to be passed over.
            names = self.chosen_by if not before else ()
            behind = [*(c for c in self.table.columns if c.name in names), *behind]
        elif self.conditions or self.unspent:
            where = literal_text(and_(*self.conditions, *self.unspent), dialect)
        order = [OrderTerm.of(term) for term in self.order]
        ahead = {part.name for part in (*before, *(t.element for t in order)) if _is_column(part)}
        found = [Term.of(part, "", dialect) for part in before]
        for term in order:
            descending = " DESC" if term.descending else ""
            suffix = term.suffix if dialect.name == "postgresql" else descending
            found.append(Term.of(term.element, suffix, dialect))
        behind = [part for part in behind if not (_is_column(part) and part.name in ahead)]
        found += [Term.of(part, "", dialect) for part in behind]
        return list({(term.text, term.suffix): term for term in found}.values()), where

    def before(self, dialect: Dialect) -> tuple[ColumnClause[Any], ...]:
        """Return the columns that stand before the order."""
        if dialect.name == "postgresql":
            return self.leading
        by_value = _columns_of(self.unspent) if dialect.name in INNODB else []
        return (*self.equal, *by_value) if len(by_value) == 1 else self.equal

    def _behind(self, dialect: Dialect) -> list[Any]:
        """Return the trailing columns that filter rows in the index without reading the table."""
        found = _columns_of(self.passing)
        return [each for each in found if dialect.name == "sqlite" or not _is_wide(each)]

    def create(self, dialect: Dialect) -> str:
        """Render the statement that creates the index without blocking writes."""
        preparer, definition = dialect.identifier_preparer, self.definition(dialect)
        if dialect.name in INNODB:
            table, name = preparer.format_table(self.table), preparer.quote(self.name)
            columns = definition.removeprefix(f"ON {table} ")
            return f"ALTER TABLE {table} ADD INDEX {name} {columns}{ONLINE}"
        name = self._name(dialect, has_schema=dialect.name == "sqlite")
        return f"CREATE INDEX {self._how(dialect)}{name} {definition}"

    def drop(self, dialect: Dialect) -> str:
        """Render the statement that drops the index without blocking writes."""
        preparer = dialect.identifier_preparer
        if dialect.name in INNODB:
            table, name = preparer.format_table(self.table), preparer.quote(self.name)
            return f"ALTER TABLE {table} DROP INDEX {name}{ONLINE}"
        return f"DROP INDEX {self._how(dialect)}{self._name(dialect, has_schema=True)}"

    def _how(self, dialect: Dialect) -> str:
        is_alone = dialect.name == "postgresql" and not self.is_partitioned
        return "CONCURRENTLY " if is_alone else ""

    def _name(self, dialect: Dialect, *, has_schema: bool) -> str:
        quote, schema = dialect.identifier_preparer.quote, self.table.schema
        return (f"{quote(schema)}." if schema and has_schema else "") + quote(self.name)

    def is_declared(self, dialect: Dialect) -> bool:
        """Check whether the table's declaration already contains such an index.

        That of an earlier version, with no columns behind the order, will do.
        """
        wanted = [each.definition(dialect) for each in (self, replace(self, passing=()))]
        made = [str(CreateIndex(each).compile(dialect=dialect)) for each in self.table.indexes]
        return any(f"ON {each.partition(' ON ')[2]}" in wanted for each in made)


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
    free, fair = predicates.is_free(job_table), job_table.fair_by
    found = []
    if fair is None or job_table.exclusive_by is not None:
        found.append(_needed("free", table, free, order, is_due))
        if is_due and job_table.exclusive_by is None:
            found += _for_passing(job_table, free, order, is_unspent)
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
        found.append(_needed("keys", table, free, (key, *order), is_due))
        found.append(_needed("running", table, predicates.is_running(job_table), (key,)))
    if fair is not None and fair is not key:
        found.append(_needed("fair", table, free, (fair, *order), is_due))
    if fair is not None and (times := job_table.claim_times):
        found.append(_needed("claimed", table, times[0].is_not(None), (times[0], fair)))
    return found


def _for_passing(
    job_table: JobTable,
    free: ColumnElement[bool],
    order: Sequence[ColumnElement[Any]],
    is_unspent: tuple[ColumnElement[bool], ...],
) -> Iterator[NeededIndex]:
    """Yield the index of the rows that can be claimed, if the one of the free rows passes others.

    See :class:`~atomic_claim.candidates.Waiting`.
    """
    due, first = job_table.due, OrderTerm.of(order[0])
    is_first = due is not None and first.element is due and not first.descending
    if due is not None and (due.nullable or not is_first):
        # The order has the due column behind these.
        by_time = due.nulls_first() if due.nullable else due
        order = (by_time, *(term for term in order if OrderTerm.of(term).element is not due))
    elif not is_unspent:
        return
    found = _needed("due", job_table.table, free, order, is_unspent)
    yield replace(found, unspent=is_unspent)


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
