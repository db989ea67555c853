"""Fair shares: claims take turns by a key, whatever waits behind one of them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from atomic_claim import JobTable, claim_jobs
from atomic_claim.cli.indexes import needed_indexes
from tests.databases import Database
from tests.jobs import ids

LEASE = timedelta(minutes=5)
FLOOD = 100_000
PRECISE = mysql.DATETIME(fsp=6)


def fair_table(*more: Any, timed: bool = True, **options: Any) -> JobTable:
    """Build a table of jobs whose claims take turns by their tenant."""
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("tenant_id", sa.Integer),
        sa.Column("customer_id", sa.Integer),
        sa.Column("queue", sa.String(20), nullable=False, server_default="mail"),
        sa.Column("state", sa.String(20), nullable=False, server_default="waiting"),
        sa.Column("due_at", sa.DateTime()),
        sa.Column("claimed_at", sa.DateTime().with_variant(PRECISE, "mysql", "mariadb")),
        sa.Column("lease_until", sa.DateTime()),
        sa.Column("token", sa.String(32)),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        *more,
    )
    claimed = {"state": "running"} | ({"claimed_at": sa.func.now()} if timed else {})
    named: dict[str, Any] = {
        "state": "state",
        "free": "waiting",
        "claimed": claimed,
        "done": "done",
        "failed": "failed",
        "due": "due_at",
        "order": "id",
        "lease": "lease_until",
        "token": "token",
        "naive_times": "utc",
        "fair_by": "tenant_id",
    }
    return JobTable(table, **named | options)


def filled(engine: sa.Engine, jobs: JobTable, tenants: list[int | None], first: int = 1) -> None:
    """Add jobs numbered from the first, each of its tenant, and the indexes of the migration."""
    if first == 1:
        jobs.table.metadata.create_all(engine)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for index in needed_indexes(jobs):
                connection.exec_driver_sql(index.create(engine.dialect))
    rows = [{"id": n, "tenant_id": tenant} for n, tenant in enumerate(tenants, first)]
    with engine.begin() as connection:
        for start in range(0, len(rows), 5000):
            connection.execute(jobs.table.insert(), rows[start : start + 5000])


TIMED = pytest.mark.parametrize("timed", [True, False], ids=["claim time", "in the process"])


def tenants_of(claim: Any) -> list[int | None]:
    """Return the tenants of claimed jobs, in their order."""
    return [job.tenant_id for job in claim]


@TIMED
def test_a_new_row_behind_a_flood(database: Database, timed: bool) -> None:
    """One row behind 100,000 of another tenant: claimed within a round, or in the next batch."""
    jobs, engine = fair_table(timed=timed), database.engine()
    filled(engine, jobs, [1] * FLOOD)
    assert tenants_of(claim_jobs(engine, jobs, 10)) == [1] * 10
    assert tenants_of(claim_jobs(engine, jobs, 1)) == [1]
    filled(engine, jobs, [2], first=FLOOD + 1)
    assert ids(claim_jobs(engine, jobs, 1)) + ids(claim_jobs(engine, jobs, 1)) == [FLOOD + 1, 12]
    filled(engine, jobs, [2], first=FLOOD + 2)
    assert ids(claim_jobs(engine, jobs, 10)) == [FLOOD + 2, *range(13, 22)]


def in_turn(engine: sa.Engine, jobs: JobTable, rows: int, limit: int = 1) -> list[int | None]:
    """Claim this number of rows, and return their tenants."""
    found: list[int | None] = []
    while len(found) < rows and (claim := claim_jobs(engine, jobs, limit)):
        found += tenants_of(claim)
    return found


@TIMED
def test_the_turn_goes_on(database: Database, timed: bool) -> None:
    """Each claim begins behind the last key, wraps around, and NULL is a key of its own."""
    jobs, engine = fair_table(timed=timed), database.engine()
    filled(engine, jobs, [3, 3, 3, 1, 1, None, None, 2, 2, 2, 2])
    assert in_turn(engine, jobs, 11) == [1, 2, 3, None, 1, 2, 3, None, 2, 3, 2]
    filled(engine, jobs, [3, 3, 3, 1, 1, None, None, 2, 2, 2, 2], first=12)
    assert tenants_of(claim_jobs(engine, jobs, 3)) == [3, None, 1]
    assert tenants_of(claim_jobs(engine, jobs, 20)) == [2, 3, None, 1, 2, 3, 2, 2]


def shares(found: list[int | None], tenants: int) -> Iterator[tuple[int, int]]:
    """Yield the least and the largest share of a tenant in every run of consecutive rows."""
    for start in range(0, len(found) - tenants + 1, 10):
        counts = Counter(found[start : start + tenants])
        yield min(counts.get(n, 0) for n in range(tenants)), max(counts.values())


@pytest.mark.parametrize(("timed", "limit"), [(True, 1), (False, 10)])
def test_a_thousand_uneven_tenants(database: Database, timed: bool, limit: int) -> None:
    """In any 1,000 consecutive claimed rows each of 1,000 tenants has one, or two at most."""
    jobs, engine = fair_table(timed=timed), database.engine()
    rows: list[int | None] = [n for n in range(1000) for _ in range(3 if n % 200 else 1000)]
    filled(engine, jobs, rows)
    found = in_turn(engine, jobs, 1200 * limit if limit == 1 else 2500, limit)
    assert set(shares(found, 1000)) == {(1, 1)}


def beside(claimers: int, engine: sa.Engine, jobs: JobTable, limit: int, rows: int) -> list[Any]:
    """Let several claimers take this number of rows; return them in the order of the claims."""
    found: list[tuple[float, Any]] = []
    lock, start = threading.Lock(), threading.Barrier(claimers)

    def work() -> None:
        start.wait()
        while len(found) < rows:
            claim = claim_jobs(engine, jobs, limit)
            with lock:
                found.extend(claim)

    with ThreadPoolExecutor(claimers) as pool:
        for each in [pool.submit(work) for _ in range(claimers)]:
            each.result()
    return found


@TIMED
def test_eight_claimers(database: Database, timed: bool) -> None:
    """A new row behind a flood is claimed soon by one of eight claimers, and no row twice."""
    jobs, engine = fair_table(timed=timed), database.engine(pool_size=8)
    filled(engine, jobs, [1] * 5000)
    first = ids(beside(8, engine, jobs, 10, 200))
    filled(engine, jobs, [2], first=5001)
    # Each claimer may have one row more under way.
    found = ids(beside(8, engine, jobs, 1, 20))
    assert 5001 in found[:17]
    filled(engine, jobs, [2], first=5002)
    batches = ids(beside(8, engine, jobs, 10, 200))
    assert 5002 in batches[:81]
    every = first + found + batches
    assert len(set(every)) == len(every)


def test_one_claim_in_each_process(database: Database) -> None:
    """Where a claim writes its time, a process that makes one claim goes on behind the others."""
    jobs = fair_table()
    filled(database.engine(), jobs, [1, 1, 1, 2, 2, 3])
    assert [in_turn(database.engine(), jobs, 1) for _ in range(6)] == [[1], [2], [3], [1], [2], [1]]


@TIMED
def test_rows_that_are_deleted_when_they_end(database: Database, timed: bool) -> None:
    """An old row that still runs does not hold the turn, though it has the latest time."""
    jobs, engine = fair_table(timed=timed), database.engine()
    filled(engine, jobs, [1, 1, 2, 2, 3, 3, 4, 4])
    claim_jobs(engine, jobs, 1)
    found = []
    for _ in range(7):
        (job,) = claim_jobs(engine, jobs, 1)
        found.append(job.tenant_id)
        with engine.begin() as connection:
            connection.execute(sa.delete(jobs.table).where(jobs.table.c.id == job.id))
    assert found == [2, 3, 4, 1, 2, 3, 4]


@TIMED
def test_each_filter_has_its_turn(database: Database, timed: bool) -> None:
    """Two filters that are claimed in alternation both reach every key, also with moving values."""
    jobs, engine = fair_table(timed=timed), database.engine()
    filled(engine, jobs, [1, 2, 3, 4] * 6)
    with engine.begin() as connection:
        later = jobs.table.c.id > 12
        connection.execute(sa.update(jobs.table).where(later).values(queue="sms"))
    found: dict[str, list[int | None]] = {"mail": [], "sms": []}
    for _ in range(8):
        for queue in found:
            where = jobs.table.c.queue == queue
            found[queue] += tenants_of(claim_jobs(engine, jobs, 1, where=where))
    assert found == {"mail": [1, 2, 3, 4] * 2, "sms": found["sms"]}
    assert sorted(Counter(found["sms"]).values()) == [2, 2, 2, 2]
    moving = [
        *(tenants_of(claim_jobs(engine, jobs, 1, where=jobs.table.c.id > -n)) for n in range(4))
    ]
    assert sorted(moving) == [[1], [2], [3], [4]]
