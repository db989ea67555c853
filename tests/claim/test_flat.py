"""Rows that are not due cost a claim next to nothing, however many of them come first."""

import datetime as dt
import re
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, Integer, String

from atomic_claim import JobTable, claim_jobs
from atomic_claim.cli.indexes import needed_indexes
from atomic_claim.plan import MARGIN, ClaimRequest, build_plan
from tests.benchmarks.ground import add_indexes
from tests.conftest import fresh_database
from tests.counting import PRECISE
from tests.databases import NAMES, Database
from tests.traps.test_09_or import DEPTHS, NUMBERS, plan_of, statements

# Rows of each kind that come first, rows whose time has come, and rows without a time.
AHEAD, RIPE, BEHIND = 15_000, 200, 2_000
ORDERS = {"creation": ("place",), "priority": ("priority", "place"), "time": ("run_at", "place")}
# For each row, the first kind that its number is within.
ROWS = """
    SELECT i,
        CASE WHEN i <= :not_due THEN 'waiting' WHEN i <= :running THEN 'running'
            WHEN i <= :done THEN 'done' ELSE 'waiting' END,
        {place}, {place} / 100,
        CASE WHEN i <= :not_due THEN :never WHEN i <= :due THEN :past ELSE {without} END,
        CASE WHEN i > :done AND i <= :spent THEN 5 ELSE {fresh} END,
        CASE WHEN i > :not_due AND i <= :running THEN 'somebody' END,
        CASE WHEN i > :not_due AND i <= :running THEN :never END
    FROM
"""
COLUMNS = "(id, state, place, priority, run_at, attempts, claim_token, lease_until)"


def declared(*, nullable: bool, order: str, due: bool = True) -> JobTable:
    """Declare a table of jobs with attempts, and with a due column unless told otherwise."""
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        Column("id", Integer, primary_key=True),
        Column("state", String(20), nullable=False),
        Column("place", Integer, nullable=False),
        Column("priority", Integer, nullable=False),
        Column("run_at", PRECISE, nullable=nullable),
        Column("attempts", Integer, nullable=nullable),
        Column("claim_token", String(32)),
        Column("lease_until", PRECISE),
    )
    return JobTable(
        table,
        state="state",
        free="waiting",
        claimed="running",
        done="done",
        order=[table.c[name] for name in ORDERS[order]],
        attempts="attempts",
        max_attempts=5,
        token="claim_token",
        lease="lease_until",
        naive_times="utc",
        **({"due": "run_at"} if due else {}),
    )


def fill(engine: sa.Engine, jobs: JobTable, *, ahead: bool, not_due: int = AHEAD) -> None:
    """Create the table again, with the rows that are passed over before or behind the others."""
    jobs.table.drop(engine, checkfirst=True)
    jobs.table.create(engine)
    nullable = jobs.table.c.run_at.nullable
    names = ("not_due", "running", "done", "spent")
    places = {name: not_due + number * AHEAD for number, name in enumerate(names)}
    values = places | {
        "rows": places["spent"] + RIPE + nullable * BEHIND,
        "due": places["spent"] + RIPE,
        "never": "2999-01-01 00:00:00.000000",
        "past": "2024-01-01 00:00:00.000000",
    }
    without, fresh = ("NULL", "NULL") if nullable else (":past", "0")
    place = "i" if ahead else f"(CASE WHEN i <= :spent THEN i + {10 * AHEAD} ELSE i END)"
    text = ROWS.format(without=without, fresh=fresh, place=place)
    insert = f"INSERT INTO jobs {COLUMNS} {NUMBERS.format(select=text)}"
    if engine.dialect.name == "postgresql":
        rows = re.sub(r"(:never|:past)", r"CAST(\1 AS timestamp)", text)
        insert = f"INSERT INTO jobs {COLUMNS} {rows} generate_series(1, :rows) AS i"
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
@pytest.mark.parametrize("due", [True, False])
def test_rows_that_are_passed_over_are_not_read(
    engine: sa.Engine, order: str, *, nullable: bool, due: bool
) -> None:
    """However many rows not due, running, done and spent come first, a claim reads no more."""
    jobs = declared(nullable=nullable, order=order, due=due)
    efforts: dict[int, list[int]] = {}
    for ahead in (False, True):
        # Without a due column, a row is due whatever stands in that one.
        fill(engine, jobs, ahead=ahead, not_due=AHEAD * due)
        for limit in (1, 50):
            plan = plan_of(engine, limit, lambda bind, limit=limit: claim_jobs(bind, jobs, limit))
            assert not plan.sorts
            efforts.setdefault(limit, []).append(plan.effort)
    for alone, behind in efforts.values():
        assert behind < 3 * alone + 1_500


def test_without_its_index_they_are_read(engine: sa.Engine) -> None:
    """A table of an earlier version is claimed from as rightly, past all of these rows."""
    jobs = declared(nullable=True, order="creation")
    fill(engine, jobs, ahead=True)
    [due] = [index for index in needed_indexes(jobs) if index.reason == "due"]
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(due.drop(engine.dialect))
    plan = plan_of(engine, 1, lambda bind: claim_jobs(bind, jobs))
    assert plan.effort > AHEAD


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
    # A user may give a job one more attempt by a count below zero.
    rows.append(base | {"id": first + 1, "place": first + 1, "attempts": -1})
    over = {"state": "running", "claim_token": "gone", "lease_until": past, "attempts": 1}
    rows.append(base | over | {"id": first + 2, "place": first + 2})
    rows.append(base | over | {"id": first + 3, "place": 0})
    with engine.begin() as connection:
        connection.execute(jobs.table.insert(), rows)
    hour = dt.timedelta(hours=1)
    assert [job.id for job in claim_jobs(engine, jobs, 2, lease=hour)] == [first + 3, first]
    assert [job.id for job in claim_jobs(engine, jobs, 2, lease=hour)] == [first + 1, first + 2]
    assert list(claim_jobs(engine, jobs, 2, lease=hour)) == []


@pytest.mark.databases("mysql", "mariadb")
@pytest.mark.parametrize("step", [1, -1])
def test_rows_that_others_hold_cost_few_statements(database: Database, step: int) -> None:
    """A claim passes over rows that others hold, whether its order is that of the keys or not."""
    jobs, engine = declared(nullable=True, order="creation"), database.engine()
    jobs.table.create(engine)
    base = {"state": "waiting", "priority": 0, "run_at": None, "attempts": 0}
    with engine.begin() as connection:
        rows = [base | {"id": n, "place": step * n} for n in range(1, 301)]
        connection.execute(jobs.table.insert(), rows)
    hour = dt.timedelta(hours=1)
    with engine.connect() as holder:
        held = claim_jobs(holder, jobs, 64, lease=hour)
        with statements(engine) as seen:
            [job] = claim_jobs(engine, jobs, lease=hour)
        assert job.place == held[-1].place + 1
        assert len(seen) < 20
