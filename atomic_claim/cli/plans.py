"""Read the EXPLAIN of a claim's own statement."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, Table, inspect, text
from sqlalchemy.sql import visitors
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import ColumnClause

from atomic_claim.backends import backend_for
from atomic_claim.plan import ClaimPlan, ClaimRequest
from atomic_claim.sql_elements import InlineLiteral, OrderTerm
from atomic_claim.statement import ClaimStatement

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
        sorts: whether it sorts all that it reads so.
        rows: how many rows it reads, as MySQL and MariaDB guess.
    """

    how: str
    index: str | None
    sorts: bool
    rows: int | None = None

    def __str__(self) -> str:
        return f"{self.how}, then a sort of all that was read" if self.sorts else self.how


@dataclass(frozen=True)
class Known:
    """An existing index of the database.

    Attributes:
        columns: its columns' names, None for an expression.
        where: the condition of a partial one.
        descending: on MySQL and MariaDB, which of the columns are.
    """

    columns: tuple[str | None, ...]
    where: str
    descending: tuple[bool, ...] = ()

    def decides(self, order: tuple[Any, ...], names: frozenset[str]) -> frozenset[str]:
        """Return the columns whose conditions hold for every row read in this order."""
        first = OrderTerm.of(order[0]).element
        name = getattr(first, "name", None)
        before = self.columns[: self.columns.index(name)] if name in self.columns else self.columns
        said = {each for each in names if re.search(rf"(?<!\w){re.escape(each)}(?!\w)", self.where)}
        return frozenset(said | {each for each in before if each is not None})


def explained(connection: Connection, statement: Executable, given: Mapping[str, Any]) -> list[Any]:
    """Return the rows of a statement's EXPLAIN, run with the parameters as a claim sends them."""
    sent, parameters = as_sent(connection, statement, given)
    words = EXPLAIN[_product(connection)] + sent
    return list(connection.exec_driver_sql(words, parameters).mappings())


def as_sent(
    connection: Connection, statement: Executable, given: Mapping[str, Any]
) -> tuple[str, Any]:
    """Return a statement's SQL and parameters as the driver receives them."""
    plain, keys = for_keys(statement)
    compiled: Any = plain.compile(dialect=connection.dialect)
    state = compiled.construct_expanded_state({**given, **keys})
    values = {
        name: _sent(compiled.binds.get(name), value, connection)
        for name, value in state.parameters.items()
    }
    parameters: Any = values
    if compiled.positional:
        parameters = tuple(values[name] for name in state.positiontup)
    return state.statement, parameters


def _sent(bind: Any, value: Any, connection: Connection) -> Any:
    if bind is None:
        return value
    process = bind.type.dialect_impl(connection.dialect).bind_processor(connection.dialect)
    return value if process is None else process(value)


def _product(connection: Connection) -> str:
    return (
        "mariadb" if getattr(connection.dialect, "is_mariadb", False) else connection.dialect.name
    )


def finding_statement(connection: Connection, plan: ClaimPlan) -> Executable:
    """Return the claim's statement that searches for jobs, on most databases its only one.

    PostgreSQL explains what the user may run, and no more; to one who may only read it explains
    the claim's SELECT of candidates.
    """
    if connection.dialect.name == "postgresql":
        # A dialect of another style, as the driver's doubles the percent signs in names.
        preparer = dialect_of("postgresql").identifier_preparer
        table = preparer.format_table(plan.job_table.table)
        asked = text("SELECT has_table_privilege(:name, 'UPDATE')")
        if not connection.scalar(asked, {"name": table}):
            return plan.candidates.select()
    if plan.job_table.has_keys:
        # A claim by keys finds its rows in several ways.
        return plan.candidates.select()
    return next(
        each
        for each in backend_for(connection.dialect).statements(plan)
        if isinstance(each, (ClaimStatement, Select))
    )


def accesses(
    connection: Connection, plan: ClaimPlan, request: ClaimRequest, *, as_it_is: bool = False
) -> list[Access]:
    """Explain how the claim would read the job table, on a connection that is rolled back.

    What is asked is what the indexes can do; ``as_it_is`` asks what the database would do now.
    """
    product = _product(connection)
    statement = finding_statement(connection, plan)
    for preference in () if as_it_is else PREFERENCES.get(product, ()):
        connection.execute(text(preference))
    rows = explained(connection, statement, request.parameters(token=True))
    connection.rollback()
    table = plan.job_table.table
    if product == "postgresql":
        roots = _roots(connection, table)
        return list(_of_postgresql(rows[0]["QUERY PLAN"][0]["Plan"], table, roots))
    if product == "sqlite":
        return list(_of_sqlite(rows, table))
    return list(_of_innodb(rows, table))


def _roots(connection: Connection, table: Table) -> dict[str, str]:
    """Return the names of the table, its indexes and their partitions, each with its root's."""
    query = text("""
        WITH RECURSIVE part(oid, root) AS (
            SELECT c.oid, c.relname FROM pg_class c
            WHERE c.oid = to_regclass(:name) OR c.oid IN (
                SELECT indexrelid FROM pg_index WHERE indrelid = to_regclass(:name)
            )
            UNION SELECT i.inhrelid, root FROM pg_inherits i JOIN part ON i.inhparent = part.oid
        )
        SELECT c.relname, root FROM part JOIN pg_class c USING (oid)
    """)
    name = dialect_of("postgresql").identifier_preparer.format_table(table)
    return {row.relname: row.root for row in connection.execute(query, {"name": name})}


def _of_postgresql(
    node: dict[str, Any], table: Table, roots: Mapping[str, str], *, sorts: bool = False
) -> Iterator[Access]:
    kind = node["Node Type"]
    if "Sort" in kind:
        sorts = True
    elif kind in {"Limit", "Aggregate", "CTE Scan"}:
        sorts = False
    if roots.get(node.get("Relation Name", "")) == table.name and "Scan" in kind:
        index = node.get("Index Name")
        index = roots.get(str(index), index)
        yield Access(f"{kind} using {index}" if index else kind, index, sorts)
    for below in node.get("Plans", []):
        apart = below.get("Parent Relationship") in {"InitPlan", "SubPlan"}
        yield from _of_postgresql(below, table, roots, sorts=sorts and not apart)


def _of_sqlite(rows: list[Any], table: Table) -> Iterator[Access]:
    """Read SQLite's plan, a tree where a sort is a sibling of the scan that it sorts."""
    for row in rows:
        found = re.match(rf"(?:SCAN|SEARCH) {re.escape(table.name)}\b", row["detail"])
        if found is None and not row["detail"].startswith("MULTI-INDEX OR"):
            continue
        beside = [each["detail"] for each in rows if each["parent"] == row["parent"]]
        index = re.search(r"USING (?:COVERING )?INDEX (.+?)(?: \(|$)", row["detail"])
        sorts = any("TEMP B-TREE FOR ORDER BY" in each for each in beside)
        yield Access(row["detail"], index[1] if index else None, sorts)


def _of_innodb(rows: list[Any], table: Table) -> Iterator[Access]:
    for row in rows:
        if row["table"] != table.name:
            continue
        how = f"{row['type']} access by {row['key']}" if row["key"] else f"{row['type']} access"
        sorts = "filesort" in (row["Extra"] or "")
        yield Access(how, row["key"], sorts, int(row["rows"] or 0))


def known_indexes(connection: Connection, table: Table) -> dict[str, Known]:
    """Return the usable indexes of a table in the database, by name."""
    if connection.dialect.name in INNODB:
        return _known_to_innodb(connection, table)
    found: dict[str, Known] = {}
    for index in inspect(connection).get_indexes(table.name, schema=table.schema):
        options = index.get("dialect_options", {})
        where = options.get("postgresql_where", options.get("sqlite_where", ""))
        if name := index["name"]:
            found[name] = Known(tuple(index["column_names"]), str(where))
    return found


def _known_to_innodb(connection: Connection, table: Table) -> dict[str, Known]:
    seen = "ignored = 'NO'" if _product(connection) == "mariadb" else "is_visible = 'YES'"
    query = text(
        "SELECT index_name AS name, column_name AS part, collation AS direction "  # noqa: S608
        "FROM information_schema.statistics "
        "WHERE table_schema = COALESCE(:schema, DATABASE()) AND table_name = :table "
        f"AND {seen} ORDER BY index_name, seq_in_index"
    )
    rows = connection.execute(query, {"schema": table.schema, "table": table.name})
    plan: dict[str, list[tuple[str | None, bool]]] = {}
    for name, column, direction in rows:
        plan.setdefault(name, []).append((column, direction == "D"))
    return {
        name: Known(tuple(c for c, _ in found), "", tuple(d for _, d in found))
        for name, found in plan.items()
    }


@dataclass(frozen=True)
class Unserved:
    """A reason for which rows are free that no index finds them by.

    Attributes:
        needed: the index that would.
        accesses: how the claim reads the table now.
    """

    needed: NeededIndex
    accesses: tuple[Access, ...]


def unserved(connection: Connection, plan: ClaimPlan, request: ClaimRequest) -> list[Unserved]:
    """Return the parts of a claim that no index serves, by the plan of its own statement.

    An index serves if the rows are read by it in their order, and if it decides on the columns
    that say whether a row is free and done. Failed rows are few, and may be passed over.
    """
    job_table = plan.job_table
    found = tuple(accesses(connection, plan, request))
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
        Unserved(needed, found)
        for needed in needed_indexes(job_table)
        if not any(_serves(needed, access, known, connection, optional) for access in found)
        and not (is_small and any(fits(needed, index) for index in known.values()))
        and not (needed.reason in BY_KEY and any(_leads(needed, i) for i in known.values()))
    ]


def _leads(needed: NeededIndex, index: Known) -> bool:
    """Check whether an index serves a search by key, which EXPLAIN does not show."""
    order = [getattr(OrderTerm.of(term).element, "name", None) for term in needed.order]
    equal = {column.name for column in needed.equal}
    ahead = set(index.columns[: len(equal)]) == equal
    following = index.columns[len(equal) :] if ahead else index.columns
    if index.where:
        found = [part for each in needed.conditions for part in visitors.iterate(each)]
        values = [str(part.value) for part in found if isinstance(part, InlineLiteral)]
        decided = all(word in index.where for word in (*equal, *values))
    else:
        decided = ahead
    return decided and list(following[: len(order)]) == order


def fits(needed: NeededIndex, index: Known) -> bool:
    """Check whether an index of MySQL or MariaDB matches the needed one."""
    equal = [column.name for column in needed.equal]
    terms = [OrderTerm.of(term) for term in needed.order]
    order = [(getattr(term.element, "name", None), term.descending) for term in terms]
    own = list(zip(index.columns, index.descending, strict=False))
    ahead, behind = own[: len(equal)], own[len(equal) : len(equal) + len(order)]
    turned = [(name, not descending) for name, descending in order]
    return {name for name, _ in ahead} == set(equal) and behind in (order, turned)


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
