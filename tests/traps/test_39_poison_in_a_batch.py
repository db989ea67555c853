"""Trap 39: a job that kills its worker does not cost its neighbours in the batch their attempts.

A row whose lease ran out is claimed alone once its next attempt is the last: so the killer is the
only row that is still running when it dies for the last time.
"""

import multiprocessing
import os
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, String
from sqlalchemy.pool import NullPool

from atomic_claim import JobTable, claim_jobs, complete_jobs, predicates, sweep_jobs
from tests.databases import Database
from tests.jobs import BINDS, OWN, bound, ids, job_table, mapped, rows

LEASE = timedelta(minutes=5)
MOST, KILLER, JOBS = 5, 3, 10
# A new process has nothing of the tests' own connections.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.worker", "psycopg", "pymysql"])


def declared(*, most: Any = MOST, **more: Any) -> JobTable:
    """Jobs with a lease and a limited number of attempts."""
    table = job_table(
        Column("claim_token", String(32)),
        Column("lease_until", DateTime),
        Column("attempts", Integer, nullable=False, server_default="0"),
        Column("customer", Integer),
        Column("failed_at", DateTime),
        Column("done_at", DateTime),
    )
    return of_table(table, most=most, **more)


def of_table(table: Any, *, most: Any = MOST, **more: Any) -> JobTable:
    """Declare the roles of the columns of :func:`declared`."""
    return JobTable(
        table,
        state="processing",
        token="claim_token",
        lease="lease_until",
        attempts="attempts",
        max_attempts=most,
        order="created_at",
        done={"processing": False, "done_at": sa.func.now()},
        failed={"processing": False, "failed_at": sa.func.now()},
        naive_times="utc",
        **more,
    )


def filled(engine: sa.Engine, jobs: JobTable, given: list[dict[str, Any]]) -> None:
    """Create the table with rows in claim order; `dead` rows run with a lease that is over."""
    jobs.table.metadata.create_all(engine)
    some = rows(len(given))
    past = jobs.now(jobs.lease, sa.literal(-3600.0, sa.Float()))
    with engine.begin() as connection:
        for row, values in zip(some, given, strict=True):
            dead = values.pop("dead", False)
            connection.execute(jobs.table.insert(), [row | values])
            if dead:
                one = jobs.table.update().where(jobs.table.c.id == row["id"])
                connection.execute(one.values(processing=True, lease_until=past))


def free(**values: Any) -> dict[str, Any]:
    """Return a row that is free."""
    return values


def dead(attempts: int, **values: Any) -> dict[str, Any]:
    """Return a row whose worker has died."""
    return {"dead": True, "attempts": attempts, **values}


def work_and_die(url: sa.URL) -> None:
    """Claim ten jobs at a time and complete them one by one; one of them ends the process."""
    engine, jobs = sa.create_engine(url, poolclass=NullPool), declared()
    while claim := claim_jobs(engine, jobs, JOBS, lease=LEASE):
        for place, job in enumerate(claim):
            if job.id == KILLER:
                os._exit(9)
            complete_jobs(engine, claim[place : place + 1])


def crashes(database: Database, engine: sa.Engine, jobs: JobTable) -> int:
    """Start workers, each when the leases of the one before have run out; count those that die."""
    past = jobs.now(jobs.lease, sa.literal(-3600.0, sa.Float()))
    died = 0
    while True:
        worker = context.Process(target=work_and_die, args=(database.url,))
        worker.start()
        worker.join()
        if worker.exitcode == 0:
            return died
        assert worker.exitcode == 9
        died += 1
        with engine.begin() as connection:
            running = jobs.table.update().where(jobs.table.c.processing == sa.true())
            connection.execute(running.values(lease_until=past))


def ended(engine: sa.Engine, jobs: JobTable) -> tuple[list[int], list[int]]:
    """Return the ids of the jobs that are done and of those that have failed."""
    table = jobs.table
    with engine.connect() as connection:
        done = connection.scalars(sa.select(table.c.id).where(table.c.done_at.is_not(None)))
        failed = connection.scalars(sa.select(table.c.id).where(table.c.failed_at.is_not(None)))
        return sorted(done), sorted(failed)


@pytest.mark.once
def test_nine_are_done_and_one_has_failed(database: Database) -> None:
    """Of a batch of ten only the job that ends its process five times fails."""
    engine, jobs = database.engine(poolclass=NullPool), declared()
    filled(engine, jobs, [free() for _ in range(JOBS)])
    assert crashes(database, engine, jobs) == MOST
    assert sweep_jobs(engine, jobs) == 1
    done, failed = ended(engine, jobs)
    assert failed == [KILLER]
    assert done == [number for number in range(1, JOBS + 1) if number != KILLER]


@pytest.mark.once
def test_together_the_neighbours_fail(database: Database) -> None:
    """The twin: claimed with its neighbours each time, the killer takes them along."""
    engine, jobs = database.engine(poolclass=NullPool), declared()
    filled(engine, jobs, [free() for _ in range(JOBS)])
    past = jobs.now(jobs.lease, sa.literal(-3600.0, sa.Float()))
    claims = declared(most=None)
    for _ in range(MOST):
        claim = claim_jobs(engine, claims, JOBS, lease=LEASE)
        assert KILLER in ids(claim)
        for place, job in enumerate(claim):
            if job.id == KILLER:
                break
            complete_jobs(engine, claim[place : place + 1])
        with engine.begin() as connection:
            running = jobs.table.update().where(jobs.table.c.processing == sa.true())
            connection.execute(running.values(lease_until=past))
    assert sweep_jobs(engine, jobs) == JOBS - KILLER + 1


@pytest.mark.parametrize("keys", [None, "customer"], ids=["plain", "keys"])
@pytest.mark.parametrize("kind", BINDS)
def test_a_claim_of_a_last_attempt(database: Database, kind: str, keys: str | None) -> None:
    """It is claimed alone if it comes first, and waits for a claim of its own if it does not."""
    if keys and kind in {"connection", "session"} and database.name in {"mysql", "mariadb"}:
        kind = OWN[kind == "session"]
    given = [dead(4), free(), dead(4), dead(1), free(attempts=4), dead(4)]
    customers = [{"customer": number, **row} for number, row in enumerate(given)]
    engine, jobs = database.engine(), declared(exclusive_by=keys)
    filled(engine, jobs, customers)
    if kind.startswith("session"):
        jobs = of_table(mapped(jobs.table), exclusive_by=keys)
    found = []
    for _ in range(5):
        with bound(engine, kind) as bind:
            found.append(ids(claim_jobs(bind, jobs, 10, lease=LEASE)))
            if kind in {"connection", "session"}:
                bind.commit()
    assert found == [[1], [2, 4, 5], [3], [6], []]


@pytest.mark.parametrize("keys", [None, "customer"], ids=["plain", "keys"])
def test_at_most_the_limit(database: Database, keys: str | None) -> None:
    """A row that waits for a claim of its own costs the others no order and no row."""
    given = [free(), dead(4), free(), free(), dead(4), free()]
    engine, jobs = database.engine(), declared(exclusive_by=keys)
    filled(engine, jobs, [{"customer": number, **row} for number, row in enumerate(given)])
    found = []
    while claim := claim_jobs(engine, jobs, 2, lease=LEASE):
        found.append(ids(claim))
    assert found == [[1, 3], [2], [4, 6], [5]]


@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_a_row_held_elsewhere(database: Database) -> None:
    """While another transaction holds the first row, a claim goes on with the next, and no more."""
    engine, jobs = database.engine(), declared()
    filled(engine, jobs, [dead(4), dead(4), free(), free()])
    with engine.connect() as first, engine.connect() as second:
        assert ids(claim_jobs(first, jobs, 10, lease=LEASE)) == [1]
        assert ids(claim_jobs(second, jobs, 10, lease=LEASE)) == [2]
        assert ids(claim_jobs(engine, jobs, 10, lease=LEASE)) == [3, 4]


def test_what_has_no_last_attempt(database: Database) -> None:
    """Where attempts are not limited, rows whose leases are over come back together."""
    engine, jobs = database.engine(), declared(most=None)
    filled(engine, jobs, [dead(4), free(), dead(9)])
    assert ids(claim_jobs(engine, jobs, 10, lease=LEASE)) == [1, 2, 3]
    assert predicates.is_last_chance(jobs) is None
