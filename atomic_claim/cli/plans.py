"""Read the EXPLAIN of a claim's own statement."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Select, Table, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import visitors
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ClauseElement, ColumnClause

from atomic_claim.backends import backend_for
from atomic_claim.backends.drivers import product_of
from atomic_claim.job_table import JobTable
from atomic_claim.plan import ClaimPlan, ClaimRequest
from atomic_claim.sql_elements import InlineLiteral, OrderTerm
from atomic_claim.statement import ClaimStatement

from .checks.catalog import query
from .indexes import INNODB, NeededIndex, needed_indexes
from .texts import dialect_of, for_keys

EXPLAIN = {
    "postgresql": "EXPLAIN (FORMAT JSON) ",
    "sqlite": "EXPLAIN QUERY PLAN ",
    "mysql": "EXPLAIN FORMAT=TRADITIONAL ",
    "mariadb": "EXPLAIN ",
}
FEW = 1000
# Why an index is needed that only exclusive and fair keys want.
BY_KEY = ("keys", "running", "fair", "claimed")
# What an index can do is asked, not whether so few rows are worth it.
PREFERENCES = {
    "postgresql": (
        "SET LOCAL enable_seqscan = off",
        "SET LOCAL enable_bitmapscan = off",
        "SET LOCAL enable_sort = off",
    ),
    "mysql": ("SET SESSION max_seeks_for_key = 1",),
    "mariadb": ("SET SESSION max_seeks_for_key = 1",),
}


@dataclass(frozen=True)
class Access:
    """One way in which a claim reads the job table.

    Attributes:
        how: in the database's own words.
        index: the name of the index by which it reads, if by one.
        sorts: the database's word for the sort of all that it reads so, if there is one.
        rows: how many rows it reads, as MySQL and MariaDB guess.
    """

    how: str
    index: str | None
    sorts: str = ""
    rows: int | None = None

    def __str__(self) -> str:
        sort = f", then a sort of all it reads ({self.sorts})" if self.sorts else ""
        return self.how + sort


@dataclass(frozen=True)
class Known:
    """An existing index of the database.

    Attributes:
        columns: its columns' names, None for an expression.
        descending: which of the columns are.
        where: the condition of a partial one.
        is_usable: False if it was never finished, or is hidden from the planner.
    """

    columns: tuple[str | None, ...]
    descending: tuple[bool, ...]
    where: str
    is_usable: bool

    def decides(self, order: tuple[Any, ...], names: frozenset[str]) -> frozenset[str]:
        """Return the columns whose conditions hold for every row read in this order."""
        first = OrderTerm.of(order[0]).element
        name = getattr(first, "name", None)
        before = self.columns[: self.columns.index(name)] if name in self.columns else self.columns
        said = {each for each in names if re.search(rf"(?<!\w){re.escape(each)}(?!\w)", self.where)}
        return frozenset(said | {each for each in before if each is not None})


class Explained(Executable, ClauseElement):
    """The EXPLAIN of a statement."""

    inherit_cache = False

    def __init__(self, statement: Any, words: str) -> None:
        self.statement = statement
        self.words = words


@compiles(Explained)
def _explain(element: Explained, compiler: SQLCompiler, **options: Any) -> str:
    sent = compiler.process(element.statement, **options)
    # What comes back are the rows of the plan.
    compiler.isinsert = compiler.isupdate = compiler.isdelete = False
    return element.words + sent


def explained(
    connection: Connection, statement: Executable, given: Mapping[str, Any]
) -> tuple[str, list[Any]]:
    """Explain a statement, with the parameters as a claim sends them.

    Returns:
        The statement as the driver receives it, and the rows of its plan.
    """
    plain, keys = for_keys(statement)
    words = EXPLAIN[product_of(connection.dialect)]
    result = connection.execute(Explained(plain, words), {**given, **keys})
    # Of the cursor, as the result would take the plan's columns for those of the statement.
    cursor: Any = result.cursor
    names = [column[0] for column in cursor.description]
    rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    return result.context.statement.removeprefix(words), rows


def finding_statement(connection: Connection, plan: ClaimPlan) -> Executable:
    """Return the claim's statement that searches for jobs, on most databases its only one.

    PostgreSQL explains what the user may run, and no more; to one who may only read it explains
    the claim's SELECT of candidates.
    """
    if connection.dialect.name == "postgresql":
        asked = text("SELECT has_table_privilege(:name, 'UPDATE')")
        if not connection.scalar(asked, {"name": _sql_name(plan.job_table.table)}):
            return plan.candidates.select()
    if plan.job_table.has_keys:
        # A claim by keys finds its rows in several ways.
        return plan.candidates.select()
    return next(
        each
        for each in backend_for(connection.dialect).statements(plan)
        if isinstance(each, (ClaimStatement, Select))
    )


def _sql_name(table: Table) -> str:
    # By a dialect of another style, as the driver's doubles the percent signs in names.
    return dialect_of("postgresql").identifier_preparer.format_table(table)


def accesses(
    connection: Connection, plan: ClaimPlan, request: ClaimRequest, *, as_it_is: bool = False
) -> list[Access]:
    """Explain how the claim would read the job table, on a connection that is rolled back.

    What is asked is what the indexes can do; ``as_it_is`` asks what the database would do now.
    """
    product = product_of(connection.dialect)
    statement = finding_statement(connection, plan)
    for preference in () if as_it_is else PREFERENCES.get(product, ()):
        connection.execute(text(preference))
    _, rows = explained(connection, statement, request.parameters(token=True))
    connection.rollback()
    table = plan.job_table.table
    if product == "postgresql":
        roots = _roots(connection, table)
        return list(_of_postgresql(rows[0]["QUERY PLAN"][0]["Plan"], table, roots))
    return list((_of_sqlite if product == "sqlite" else _of_innodb)(rows, table))


def _roots(connection: Connection, table: Table) -> dict[str, str]:
    """Return the names of the table, its indexes and their partitions, each with its root's."""
    rows = connection.execute(query("partitions", "postgresql"), {"table": _sql_name(table)})
    return {row.relname: row.root for row in rows}


def _of_postgresql(
    node: dict[str, Any], table: Table, roots: Mapping[str, str], *, sorts: str = ""
) -> Iterator[Access]:
    kind = node["Node Type"]
    if "Sort" in kind:
        sorts = "a Sort"
    elif kind in {"Limit", "Aggregate", "CTE Scan"}:
        sorts = ""
    if roots.get(node.get("Relation Name", "")) == table.name and "Scan" in kind:
        index = node.get("Index Name")
        index = roots.get(str(index), index)
        whole = f"a scan of the whole table ({kind})" if kind == "Seq Scan" else kind
        yield Access(f"{kind} using {index}" if index else whole, index, sorts)
    for below in node.get("Plans", []):
        apart = below.get("Parent Relationship") in {"InitPlan", "SubPlan"}
        yield from _of_postgresql(below, table, roots, sorts="" if apart else sorts)


def _of_sqlite(rows: list[Any], table: Table) -> Iterator[Access]:
    """Read SQLite's plan, a tree where a sort is a sibling of the scan that it sorts."""
    for row in rows:
        how = row["detail"]
        found = re.match(rf"(?:SCAN|SEARCH) {re.escape(table.name)}\b", how)
        if found is None and not how.startswith("MULTI-INDEX OR"):
            continue
        beside = [each["detail"] for each in rows if each["parent"] == row["parent"]]
        sort = "USE TEMP B-TREE FOR ORDER BY"
        index = re.search(r"USING (?:COVERING )?INDEX (.+?)(?: \(|$)", how)
        how = f"a scan of the whole table ({how})" if how == f"SCAN {table.name}" else how
        yield Access(how, index and index[1], sort if any(sort in each for each in beside) else "")


def _of_innodb(rows: list[Any], table: Table) -> Iterator[Access]:
    for row in rows:
        if row["table"] != table.name:
            continue
        how = f"{row['type']} access by {row['key']}" if row["key"] else f"{row['type']} access"
        how = f"a scan of the whole table ({how})" if how == "ALL access" else how
        sorts = "Using filesort" if "filesort" in (row["Extra"] or "") else ""
        yield Access(how, row["key"], sorts, int(row["rows"] or 0))


def known_indexes(connection: Connection, table: Table) -> dict[str, Known]:
    """Return the indexes of a table in the database, by name."""
    given = {"name": table.name, "schema": table.schema, "table": _sql_name(table)}
    found: dict[str, list[Any]] = {}
    for row in connection.execute(query("indexes", product_of(connection.dialect)), given):
        found.setdefault(row.name, []).append(row)
    return {
        name: Known(
            tuple(row.part for row in rows),
            tuple(bool(row.descending) for row in rows),
            # SQLite has the whole statement.
            re.sub(r"(?is)^CREATE\b.*?\)\s*WHERE\s+", "", rows[0].said or ""),
            bool(rows[0].usable),
        )
        for name, rows in found.items()
    }


def unserved(connection: Connection, plan: ClaimPlan, request: ClaimRequest) -> list[NeededIndex]:
    """Return the indexes that a claim lacks, by the plan of its own statement.

    An index serves if the rows are read by it in their order, and if it decides on the columns
    that say whether a row is free and done. Failed rows are few, and may be passed over.
    """
    job_table = plan.job_table
    found = accesses(connection, plan, request)
    known = known_indexes(connection, job_table.table)
    optional = frozenset(
        column.name
        for ends in (job_table.failed, job_table.withdrawn)
        for column in ends
        if column is not job_table.state and column not in job_table.done
    )
    # MySQL and MariaDB sort a few rows rather than read them by the index that is there.
    is_small = all(access.rows is not None and access.rows < FEW for access in found)
    return [
        needed
        for needed in needed_indexes(job_table)
        if needed.reason != "due"
        and not any(_serves(needed, access, known, connection, optional) for access in found)
        and not (is_small and any(fits(needed, index, connection) for index in known.values()))
        and not (
            needed.reason in BY_KEY
            and any(_leads(needed, index, connection) for index in known.values())
        )
    ]


def passes_slowly(connection: Connection, job_table: JobTable) -> NeededIndex | None:
    """Return the index that a claim lacks to pass over many free rows, if any."""
    dialect = dialect_of(product_of(connection.dialect))
    known = known_indexes(connection, job_table.table).values()
    for needed in needed_indexes(job_table):
        if needed.reason == "due" and not needed.refusal(dialect):
            return None if any(fits(needed, index, connection) for index in known) else needed
    return None


def _leads(needed: NeededIndex, index: Known, connection: Connection) -> bool:
    """Check whether an index serves a search by key, which EXPLAIN does not show."""
    order = [getattr(OrderTerm.of(term).element, "name", None) for term in needed.order]
    equal = {column.name for column in needed.equal}
    ahead = set(index.columns[: len(equal)]) == equal
    following = index.columns[len(equal) :] if ahead else index.columns
    if index.where:
        found = [part for each in needed.conditions for part in visitors.iterate(each)]
        dialect = dialect_of(product_of(connection.dialect))
        literals = (part for part in found if isinstance(part, InlineLiteral))
        values = [str(literal.compile(dialect=dialect)) for literal in literals]
        decided = all(word.lower() in index.where.lower() for word in (*equal, *values))
    else:
        decided = ahead
    return index.is_usable and decided and list(following[: len(order)]) == order


def fits(needed: NeededIndex, index: Known, connection: Connection) -> bool:
    """Check whether an index begins with the needed columns, and has the needed condition."""
    dialect = dialect_of(product_of(connection.dialect))
    terms, where = replace(needed, passing=()).parts(dialect)
    ahead = len(needed.before(dialect))
    wanted = [
        (t.element.name if isinstance(t.element, ColumnClause) else None, "DESC" in t.suffix)
        for t in terms[: ahead + len(needed.order)]
    ]
    own = list(zip(index.columns, index.descending, strict=True))[: len(wanted)]
    turned = [(name, not descending) for name, descending in wanted]
    return (
        index.is_usable
        and _plain(index.where) == _plain(where)
        and {name for name, _ in own[:ahead]} == {name for name, _ in wanted[:ahead]}
        and own[ahead:] in (wanted[ahead:], turned[ahead:])
    )


def _plain(condition: str) -> str:
    """Normalize a condition: drop the casts, parentheses and spaces that databases add."""
    return re.sub(r"::(?:character varying|\w+)|[()\s]", "", condition.lower())


def _serves(
    needed: NeededIndex,
    access: Access,
    known: Mapping[str, Known],
    connection: Connection,
    optional: frozenset[str],
) -> bool:
    index = known.get(access.index or "")
    if index is None or access.sorts:
        return False
    first = OrderTerm.of(needed.order[0]).element
    if isinstance(first, ColumnClause) and first.name not in index.columns:
        return False
    wanted = needed.chosen_by - optional
    if connection.dialect.name in INNODB:
        wanted &= {column.name for column in needed.equal}
    return wanted <= index.decides(needed.order, needed.chosen_by)
