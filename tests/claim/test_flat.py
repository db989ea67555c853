"""Rows that are not due cost a claim next to nothing, however many of them come first."""

import datetime as dt
import re
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, Integer, String

from atomic_claim import JobTable, claim_jobs
from atomic_claim.plan import MARGIN, ClaimRequest, build_plan
from tests.benchmarks.ground import add_indexes
from tests.conftest import fresh_database
from tests.counting import PRECISE
from tests.databases import NAMES, Database
from tests.traps.test_09_or import DEPTHS, NUMBERS, plan_of

NOT_DUE, RIPE, BEHIND = 40_000, 100, 2_000
# Rows that are read, or SQLite's steps, to find the first one, whatever stands before it.
MOST = 10_000
ORDERS = {"creation": ("place",), "priority": ("priority", "place"), "time": ("run_at", "place")}
ROWS = """
    SELECT i, 'waiting', i, i / 100,
        CASE WHEN i <= :not_due THEN :never WHEN i <= :due THEN :past END
    FROM
"""


def declared(*, nullable: bool, order: str) -> JobTable:
    """Declare a table of jobs with a due column."""
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        Column("id", Integer, primary_key=True),
        Column("state", String(20), nullable=False),
        Column("place", Integer, nullable=False),
        Column("priority", Integer, nullable=False),
        Column("run_at", PRECISE, nullable=nullable),
        Column("attempts", Integer),
        Column("claim_token", String(32)),
        Column("lease_until", PRECISE),
    )
    return JobTable(
        table,
        state="state",
        free="waiting",
        claimed="running",
        done="done",
        due="run_at",
        order=[table.c[name] for name in ORDERS[order]],
        attempts="attempts",
        max_attempts=5,
        token="claim_token",
        lease="lease_until",
        naive_times="utc",
    )


def fill(engine: sa.Engine, jobs: JobTable) -> None:
    """Create the table again: rows that are not due, and behind them rows that are."""
    jobs.table.drop(engine, checkfirst=True)
    jobs.table.create(engine)
    nullable = jobs.table.c.run_at.nullable
    values = {
        "rows": NOT_DUE + RIPE + nullable * BEHIND,
        "not_due": NOT_DUE,
        "due": NOT_DUE + RIPE,
        "never": "2999-01-01 00:00:00.000000",
        "past": "2024-01-01 00:00:00.000000",
    }
    columns = "(id, state, place, priority, run_at)"
    insert = f"INSERT INTO jobs {columns} {NUMBERS.format(select=ROWS)}"
    if engine.dialect.name == "postgresql":
        rows = re.sub(r"(:never|:past)", r"CAST(\1 AS timestamp)", ROWS)
        insert = f"INSERT INTO jobs {columns} {rows} generate_series(1, :rows) AS i"
    with engine.begin() as connection:
        if (depth := DEPTHS.get(engine.dialect.name)) is not None:
            connection.execute(sa.text(f"SET SESSION {depth} = 1000000"))
        connection.execute(sa.text(insert), values)
    add_indexes(engine, jobs)


@pytest.fixture(scope="module", params=NAMES)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[sa.Engine]:
    """Yield an engine for an empty database of each kind."""
    with fresh_database(request.param, request.config, tmp_path_factory) as database:
        yield database.engine()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("nullable", [True, False])
def test_rows_that_are_not_due_are_not_read(
    engine: sa.Engine, order: str, *, nullable: bool
) -> None:
    """Of the rows before those that are due, a claim reads no more than of any others."""
    jobs = declared(nullable=nullable, order=order)
    fill(engine, jobs)
    for limit in (1, 50):
        plan = plan_of(engine, limit, lambda bind, limit=limit: claim_jobs(bind, jobs, limit))
        assert plan.effort < MOST + 500 * limit


@pytest.mark.once
def test_a_search_without_some_rows_keeps_its_steps() -> None:
    """Rows that a claim passes over are left out of every step of the search."""
    jobs = declared(nullable=True, order="creation")
    plan = build_plan(jobs, ClaimRequest(1), entities=False).passing_over([(7,)])
    for step in plan.candidates.steps():
        assert "NOT IN" in str(step.select())


def test_free_rows_behind_the_first_look_come_before_expired_ones(database: Database) -> None:
    """The order holds, however many rows that are not due come first."""
    jobs, engine = declared(nullable=True, order="creation"), database.engine()
    jobs.table.create(engine)
    never, past = dt.datetime(2999, 1, 1), dt.datetime(2024, 1, 1)  # noqa: DTZ001 - as stored
    base = {"state": "waiting", "priority": 0, "run_at": None, "attempts": 0}
    base |= {"claim_token": None, "lease_until": None}
    rows = [base | {"id": n, "place": n, "run_at": never} for n in range(1, 3 * MARGIN)]
    first = len(rows) + 1
    rows.append(base | {"id": first, "place": first, "run_at": past})
    rows.append(base | {"id": first + 1, "place": first + 1})
    over = {"state": "running", "claim_token": "gone", "lease_until": past, "attempts": 1}
    rows.append(base | over | {"id": first + 2, "place": first + 2})
    rows.append(base | over | {"id": first + 3, "place": 0})
    with engine.begin() as connection:
        connection.execute(jobs.table.insert(), rows)
    hour = dt.timedelta(hours=1)
    assert [job.id for job in claim_jobs(engine, jobs, 2, lease=hour)] == [first + 3, first]
    assert [job.id for job in claim_jobs(engine, jobs, 2, lease=hour)] == [first + 1, first + 2]
    assert list(claim_jobs(engine, jobs, 2, lease=hour)) == []
