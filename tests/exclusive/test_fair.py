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

from atomic_claim import JobTable, claim_jobs, complete_jobs
from atomic_claim.cli.indexes import needed_indexes
from tests.databases import Database
from tests.jobs import ids

LEASE = timedelta(minutes=5)
FLOOD = 100_000


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
        sa.Column("claimed_at", sa.DateTime()),
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


def filled(
    engine: sa.Engine, jobs: JobTable, tenants: list[int | None], first: int = 1
) -> None:
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
    """Claim so many rows, and return their tenants."""
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
