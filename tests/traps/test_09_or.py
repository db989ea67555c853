"""Trap 9: no index serves "free, or the lease has expired" in the order of the claim."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import takewhile
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, Index, Integer, String

from atomic_claim import JobTable, claim_jobs
from atomic_claim.candidates import RIPE
from atomic_claim.plan import MARGIN
from tests.conftest import fresh_database
from tests.counting import PRECISE
from tests.databases import NAMES

EXPIRED, RUNNING, WAITING = 1_000, 50_000, 100_000
LEASE = timedelta(minutes=5)

NUMBERS = """
    WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < :rows) {select} n
"""
# The places are a permutation, so that they have nothing to do with the order of insertion.
ROWS = """
    SELECT i, CASE WHEN i <= :expired + :running THEN 'running' ELSE 'waiting' END,
        (i * 7919) % 151007,
        CASE WHEN i <= :expired THEN :past WHEN i <= :expired + :running THEN :future END
    FROM
"""
INSERT = "INSERT INTO jobs (id, state, place, lease_until) "
DEPTHS = {"mysql": "cte_max_recursion_depth", "mariadb": "max_recursive_iterations"}
EXPLAIN = {
    "sqlite": "EXPLAIN QUERY PLAN ",
    "postgresql": "EXPLAIN (ANALYZE, FORMAT JSON) ",
    "mysql": "EXPLAIN FORMAT=TRADITIONAL ",
    "mariadb": "EXPLAIN ",
}


@dataclass(frozen=True)
class Plan:
    """A database's plan to find the rows to claim.

    Attributes:
        indexes: the indexes by which it reads jobs.
        sorts: whether it sorts jobs as it reads them, rather than the few that it has chosen.
        effort: the rows that it reads; on SQLite, which does not count them, the steps it takes.
    """

    indexes: frozenset[str]
    sorts: bool
    effort: int


@pytest.fixture(scope="module", params=NAMES)
def queue(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[sa.Engine, JobTable]]:
    """Yield a long queue with two indexes and fresh statistics, created once per database."""
    with fresh_database(request.param, request.config, tmp_path_factory) as database:
        engine = database.engine()
        yield engine, filled(engine)


def filled(engine: sa.Engine) -> JobTable:
    """Make the table and fill it."""
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        Column("id", Integer, primary_key=True),
        Column("state", String(20), nullable=False),
        Column("place", Integer, nullable=False),
        Column("claim_token", String(32)),
        Column("lease_until", PRECISE),
        Index("jobs_order", "state", "place"),
        Index("jobs_lease", "state", "lease_until"),
    )
    table.create(engine)
    values = {
        "rows": EXPIRED + RUNNING + WAITING,
        "expired": EXPIRED,
        "running": RUNNING,
        "past": "2020-01-01 00:00:00.000000",
        "future": "2999-01-01 00:00:00.000000",
    }
    insert = INSERT + NUMBERS.format(select=ROWS)
    if engine.dialect.name == "postgresql":
        rows = re.sub(r"(:past|:future)", r"CAST(\1 AS timestamp)", ROWS)
        insert = f"{INSERT} {rows} generate_series(1, :rows) AS i"
    with engine.begin() as connection:
        if (depth := DEPTHS.get(engine.dialect.name)) is not None:
            connection.execute(sa.text(f"SET SESSION {depth} = 1000000"))
        connection.execute(sa.text(insert), values)
    analyze = "ANALYZE TABLE jobs" if engine.dialect.name in DEPTHS else "ANALYZE"
    with engine.connect() as connection:
        connection.execute(sa.text(analyze))
        connection.commit()
    return JobTable(
        table,
        state="state",
        free="waiting",
        claimed="running",
        done="done",
        order="place",
        token="claim_token",
        lease="lease_until",
    )


@contextmanager
def statements(engine: sa.Engine) -> Iterator[list[tuple[str, Any]]]:
    """Record the statements sent during the block, with their parameters."""
    seen: list[tuple[str, Any]] = []

    def note(*arguments: Any) -> None:
        seen.append((arguments[2], arguments[3]))

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


@contextmanager
def efforts(connection: sa.Connection) -> Iterator[list[int]]:
    """Count the reads of a connection during the block, in parts, unless EXPLAIN counts them."""
    parts: list[int] = []
    if connection.dialect.name == "sqlite":
        driver: Any = connection.connection.driver_connection
        driver.set_progress_handler(lambda: parts.append(100), 100)
        yield parts
        driver.set_progress_handler(None, 0)
    elif connection.dialect.name == "postgresql":
        yield parts
    else:
        query = sa.text("SHOW SESSION STATUS LIKE 'Handler_read%'")
        before = sum(int(row[1]) for row in connection.execute(query))
        yield parts
        parts.append(sum(int(row[1]) for row in connection.execute(query)) - before)


def plan_of(engine: sa.Engine, limit: int, run: Callable[[sa.Connection], Any]) -> Plan:
    """Run something that finds as many jobs, and ask how the database runs its very statement."""
    with engine.connect() as connection:
        with statements(engine) as seen, efforts(connection) as parts:
            assert len(run(connection)) == limit
        connection.rollback()
        # Whatever follows on MySQL and MariaDB goes by the keys that were found.
        searching = [each for each in seen if "ORDER BY" in each[0]]
        of_keys = takewhile(lambda each: "FORCE INDEX" not in each[0], searching)
        asked = of_keys if engine.dialect.name in DEPTHS else searching[:1]
        found = [
            connection.exec_driver_sql(EXPLAIN[engine.dialect.name] + statement, parameters)
            for statement, parameters in asked
        ]
        if engine.dialect.name == "postgresql":
            plan = plan_of_postgresql(found[0].scalar_one()[0]["Plan"], limit)
        else:
            rows = [row for each in found for row in each.mappings()]
            read = plan_of_sqlite if engine.dialect.name == "sqlite" else plan_of_mysql
            plan = read(rows, sum(parts))
        connection.rollback()
    return plan


def plan_of_sqlite(rows: Any, effort: int) -> Plan:
    """Read `EXPLAIN QUERY PLAN`, a tree: what is sorted stands beside what is read."""
    beside: dict[int, list[str]] = {}
    for row in rows:
        beside.setdefault(row["parent"], []).append(row["detail"])
    reads = re.compile(r"(SCAN|SEARCH) jobs|MULTI-INDEX OR")
    sorts = any(
        any("TEMP B-TREE" in detail for detail in details) and any(map(reads.match, details))
        for details in beside.values()
    )
    text = "\n".join(row["detail"] for row in rows)
    assert "SCAN jobs" not in text or sorts
    return Plan(frozenset(re.findall(r"INDEX (jobs_\w+)", text)), sorts, effort)


def plan_of_postgresql(plan: dict[str, Any], limit: int) -> Plan:
    """Read `EXPLAIN (ANALYZE)`: what went into each sort, and what each scan came across."""
    nodes = list(nodes_of(plan))
    sorted_rows = [
        below["Actual Rows"] * below["Actual Loops"]
        for node in nodes
        if "Sort" in node["Node Type"]
        for below in node["Plans"]
    ]
    removed = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")
    effort = sum(
        node["Actual Loops"] * sum(node.get(name, 0) for name in removed)
        for node in nodes
        if node.get("Relation Name") == "jobs" and "Scan" in node["Node Type"]
    )
    indexes = {node["Index Name"] for node in nodes if "Index Name" in node} - {"jobs_pkey"}
    # Of each reason for which a row may be claimed, so many are looked at.
    most = max(2 * (limit + MARGIN), RIPE)
    return Plan(frozenset(indexes), max(sorted_rows, default=0) > most, int(effort))


def nodes_of(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the nodes of a plan at all depths."""
    yield plan
    for below in plan.get("Plans", []):
        yield from nodes_of(below)


def plan_of_mysql(rows: Any, effort: int) -> Plan:
    """Read `EXPLAIN`, a row for each table read; a filesort of jobs is said beside jobs."""
    reads = [row for row in rows if row["table"] == "jobs"]
    assert reads, "the claim reads no jobs"
    indexes = {name for row in reads for name in (row["key"] or "").split(",")} - {"PRIMARY", ""}
    sorts = any("filesort" in (row["Extra"] or "") for row in reads)
    return Plan(frozenset(indexes), sorts, effort)


@pytest.mark.parametrize("limit", [1, 50])
def test_free_and_expired_rows_each_have_their_index(
    queue: tuple[sa.Engine, JobTable], limit: int
) -> None:
    """However long the queue, a claim reads some rows by either index and sorts these alone."""
    engine, jobs = queue
    plan = plan_of(engine, limit, lambda bind: claim_jobs(bind, jobs, limit, lease=LEASE))
    assert plan.indexes == {"jobs_order", "jobs_lease"}
    assert not plan.sorts
    assert plan.effort < 4000 + 200 * limit


@pytest.mark.parametrize("limit", [1, 50])
def test_the_or_sorts_the_queue(queue: tuple[sa.Engine, JobTable], limit: int) -> None:
    """The twin: asked for in one condition, every waiting row is read and sorted."""
    engine, jobs = queue
    table = jobs.table
    state, expired = table.c.state, table.c.lease_until <= jobs.now(jobs.lease)
    waiting: Any = sa.literal_column("'waiting'")
    running: Any = sa.literal_column("'running'")
    query = sa.select(table.c.id).where((state == waiting) | ((state == running) & expired))
    query = query.order_by(table.c.place).limit(limit)
    plan = plan_of(engine, limit, lambda bind: bind.execute(query).all())
    assert plan.sorts
    assert plan.effort > WAITING
