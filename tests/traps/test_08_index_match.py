"""Trap 8: an index serves a condition only if both have the same words."""

import pytest
import sqlalchemy as sa
from sqlalchemy import Column

from atomic_claim import JobTable, claim_jobs
from tests.databases import Database
from tests.jobs import ids, job_table
from tests.statements import Sent, explained, sent_by

pytestmark = pytest.mark.databases("postgresql")

WAITING = 20_000

# By which index a queue of `processing = false` may be read in its order.
FREE_INDEXES = {
    "partial": "(created_at) WHERE processing = false",
    "partial, negated": "(created_at) WHERE NOT processing",
    "plain": "(processing, created_at)",
}
NOT_FAILED = "(created_at) WHERE processing = false AND has_error IS NOT TRUE"


def made(
    database: Database, index: str, *, nullable: bool = False
) -> tuple[sa.Engine, sa.Table, JobTable]:
    """Create a long, analysed queue behind running jobs, with the index `jobs_free`."""
    engine = database.engine()
    table = job_table(
        Column("has_error", sa.Boolean),
        Column("claim_token", sa.String(32)),
        processing=Column("processing", sa.Boolean, nullable=nullable),
    )
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO jobs (id, processing, created_at, has_error) "
            "SELECT n, n <= 10, timestamp '2024-01-01' + n * interval '1 minute', "
            "CASE WHEN mod(n, 2) = 0 THEN false END "
            f"FROM generate_series(1, {WAITING + 10}) AS n"
        )
        connection.exec_driver_sql(f"CREATE INDEX jobs_free ON jobs {index}")
        connection.exec_driver_sql("ANALYZE jobs")
    return (
        engine,
        table,
        JobTable(table, state="processing", order="created_at", token="claim_token"),
    )


def plan_of_claim(engine: sa.Engine, jobs: JobTable, limit: int) -> str:
    """Execute a claim and return the plan of its exact statement."""
    sent = sent_by(engine)
    with engine.connect() as connection:
        assert ids(claim_jobs(connection, jobs, limit)) == list(range(11, 11 + limit))
        connection.rollback()
        [claim] = sent
        return explained(connection, claim)


def plan_of(engine: sa.Engine, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> str:
    """Return the plan of a plain SELECT of the first row."""
    sent = sent_by(engine)
    with engine.connect() as connection:
        query = sa.select(table.c.id).where(*conditions).order_by(table.c.created_at).limit(1)
        connection.execute(query)
        found: Sent = sent[0]
        return explained(connection, found)


def reads_in_order(plan: str) -> bool:
    """Return True if the plan reads the queue by its index without sorting."""
    # Where several rows are claimed, what was claimed is sorted once more, outside of this.
    claimable = plan.partition("CTE claimed")[0].partition("CTE claimable")[2] or plan
    by_index = "using jobs_free on jobs" in claimable
    assert by_index != ("Seq Scan on jobs" in plan), plan
    return by_index and "Sort" not in claimable


@pytest.mark.parametrize("limit", [1, 10])
@pytest.mark.parametrize("index", FREE_INDEXES.values(), ids=FREE_INDEXES)
def test_a_claim_uses_the_index(database: Database, index: str, limit: int) -> None:
    """The index of the free rows serves the claim, partial or plain."""
    engine, _, jobs = made(database, index)
    plan = plan_of_claim(engine, jobs, limit)
    assert reads_in_order(plan), plan


@pytest.mark.parametrize("limit", [1, 10])
def test_a_nullable_flag_of_failure_uses_its_index(database: Database, limit: int) -> None:
    """A flag that means failed and may be NULL is asked for in the index's own words."""
    engine, table, _ = made(database, NOT_FAILED)
    jobs = JobTable(
        table,
        state="processing",
        failed={"has_error": True},
        order="created_at",
        token="claim_token",
    )
    plan = plan_of_claim(engine, jobs, limit)
    assert reads_in_order(plan), plan


@pytest.mark.parametrize("limit", [1, 10])
def test_a_nullable_state_uses_its_index(database: Database, limit: int) -> None:
    """Nor is a state that may be NULL asked for otherwise, where NULL is free."""
    engine, table, _ = made(database, "(created_at) WHERE processing IS NOT TRUE", nullable=True)
    jobs = JobTable(
        table, state="processing", null_is_free=True, order="created_at", token="claim_token"
    )
    plan = plan_of_claim(engine, jobs, limit)
    assert reads_in_order(plan), plan


@pytest.mark.parametrize("index", ["partial", "partial, negated"])
def test_is_false_does_not(database: Database, index: str) -> None:
    """The twin: `.is_(False)` reads the whole table; only the plain index would serve it."""
    engine, table, _ = made(database, FREE_INDEXES[index])
    assert reads_in_order(plan_of(engine, table, table.c.processing == sa.false()))
    assert not reads_in_order(plan_of(engine, table, table.c.processing.is_(False)))


@pytest.mark.parametrize("words", ["NOT has_error", "has_error = false", "has_error IS NOT true"])
def test_an_index_in_other_words_does_not_serve(database: Database, words: str) -> None:
    """The twin: an index with `NOT has_error` is none for `has_error IS NOT TRUE`."""
    engine, table, _ = made(database, f"(created_at) WHERE {words}")
    served = words == "has_error IS NOT true"
    assert reads_in_order(plan_of(engine, table, table.c.has_error.is_not(True))) is served
