"""Trap 19: a row that kills its workers is retired, and does not block other rows."""

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, String

from atomic_claim import JobTable, claim_jobs
from tests.databases import Database
from tests.jobs import BINDS, CALLERS, OWN, bound, ids, job_table, mapped, rows

LEASE = timedelta(minutes=5)

by_each_bind = pytest.mark.parametrize("kind", BINDS)
of_both_maxima = pytest.mark.parametrize("most", [3, "max_attempts"], ids=["int", "column"])


def made(database: Database, attempts: list[Any], **values: Any) -> tuple[sa.Engine, sa.Table]:
    """Jobs with the given numbers of attempts, of three each."""
    engine = database.engine()
    table = job_table(
        Column("claim_token", String(32)),
        Column("lease_until", DateTime),
        Column("attempts", Integer, nullable=False),
        Column("max_attempts", Integer),
    )
    table.metadata.create_all(engine)
    some = zip(rows(len(attempts), max_attempts=3, **values), attempts, strict=True)
    with engine.begin() as connection:
        connection.execute(table.insert(), [row | {"attempts": had} for row, had in some])
    return engine, table


def declared(table: Any, most: Any = 3, *, leased: bool = True) -> JobTable:
    """Declare the maximum of attempts, and a lease so that a dead worker's row comes back."""
    lease = {"token": "claim_token", "lease": "lease_until"} if leased else {}
    return JobTable(
        table,
        state="processing",
        order="created_at",
        attempts="attempts",
        max_attempts=most,
        **lease,
    )


def expire(engine: sa.Engine, jobs: JobTable) -> None:
    """Let every lease have run out an hour ago, by the database's own clock."""
    past = jobs.now(jobs.lease, sa.literal(-3600.0, sa.Float()))
    with engine.begin() as connection:
        running = jobs.table.c.processing == sa.true()
        connection.execute(jobs.table.update().where(running).values(lease_until=past))


def attempts(engine: sa.Engine, table: sa.Table) -> list[int]:
    """How many attempts the jobs have had, as everybody can see it."""
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(table.c.attempts).order_by(table.c.id)))


@by_each_bind
@of_both_maxima
def test_spent_rows_fill_no_slot(database: Database, kind: str, most: Any) -> None:
    """Rows at their maximum, or beyond, are not claimed, and the limit is filled by others."""
    engine, table = made(database, [3, 4, 3, 2, 0, 3, 0, 0])
    jobs = declared(mapped(table) if kind.startswith("session") else table, most)
    with bound(engine, kind) as bind:
        assert ids(claim_jobs(bind, jobs, 3)) == [4, 5, 7]
        assert ids(claim_jobs(bind, jobs, 3)) == [8]
        assert claim_jobs(bind, jobs, 3) == []


def test_a_maximum_of_each_rows_own(database: Database) -> None:
    """Where the maximum is a column, every row is held to its own."""
    engine, table = made(database, [1, 1, 1])
    with engine.begin() as connection:
        for number, most in enumerate([1, 2, 3], 1):
            one = table.update().where(table.c.id == number)
            connection.execute(one.values(max_attempts=most))
    assert ids(claim_jobs(engine, declared(table, "max_attempts"), 3)) == [2, 3]


def test_a_row_without_a_maximum_is_not_lost(database: Database) -> None:
    """Where the maximum is a column and NULL, nothing says that the row is spent."""
    engine, table = made(database, [0, 9])
    with engine.begin() as connection:
        connection.execute(table.update().values(max_attempts=None))
    assert ids(claim_jobs(engine, declared(table, "max_attempts"), 3)) == [1, 2]


@of_both_maxima
def test_spent_rows_with_an_expired_lease_fill_no_slot(database: Database, most: Any) -> None:
    """Nor are they claimed for the reason that their lease is over."""
    engine, table = made(database, [3, 3, 2, 0], processing=True)
    jobs = declared(table, most)
    expire(engine, jobs)
    assert ids(claim_jobs(engine, jobs, 1)) == [3]
    assert ids(claim_jobs(engine, jobs, 2)) == [4]


@pytest.mark.parametrize("kind", OWN)
@of_both_maxima
def test_a_killer_is_claimed_so_often_and_no_more(database: Database, kind: str, most: Any) -> None:
    """A row whose workers all die comes back until its attempts are spent; then others' turn."""
    engine, table = made(database, [0, 0])
    jobs = declared(mapped(table) if kind == "sessionmaker" else table, most)
    found = []
    with bound(engine, kind) as bind:
        for _ in range(8):
            # The worker dies: nothing of its comes after the claim.
            found += ids(claim_jobs(bind, jobs, 1, lease=LEASE))
            expire(engine, jobs)
    assert sorted(found) == [1, 1, 1, 2, 2, 2]
    assert attempts(engine, table) == [3, 3]


@pytest.mark.parametrize("kind", OWN)
def test_an_own_claim_keeps_its_attempt(database: Database, kind: str) -> None:
    """Claimed by engine or sessionmaker, the attempt is counted though the work is undone."""
    engine, table = made(database, [0])
    jobs = declared(mapped(table) if kind == "sessionmaker" else table)
    with bound(engine, kind) as bind:
        assert ids(claim_jobs(bind, jobs)) == [1]
    with engine.connect() as work:
        work.execute(table.update().values(note="half done"))
        work.rollback()
    assert attempts(engine, table) == [1]


@pytest.mark.parametrize("kind", CALLERS)
def test_a_rollback_undoes_the_attempt(database: Database, kind: str) -> None:
    """Claimed in the work's transaction, it is undone with the work, and the maximum never met."""
    engine, table = made(database, [0])
    jobs = declared(mapped(table) if kind == "session" else table, leased=False)
    with bound(engine, kind) as bind:
        for _ in range(5):
            [job] = claim_jobs(bind, jobs)
            assert (job.id, job.attempts) == (1, 1)
            bind.rollback()
    assert attempts(engine, table) == [0]


def test_without_a_maximum_it_is_claimed_for_ever(database: Database) -> None:
    """The twin: a row that kills its workers comes back each time, and is the only one to run."""
    engine, table = made(database, [0, 0])
    jobs = declared(table, None)
    found = []
    for _ in range(12):
        found += ids(claim_jobs(engine, jobs, 1, lease=LEASE))
        expire(engine, jobs)
    assert found == [1] * 12
    assert attempts(engine, table) == [12, 0]


def test_rows_put_aside_afterwards_fill_slots(database: Database) -> None:
    """The twin: a limit that counts spent rows too is used up by them, and no job runs."""
    engine, table = made(database, [3, 3, 3, 0])
    claimed = claim_jobs(engine, declared(table, None), 3)
    assert [job.id for job in claimed if job.attempts <= 3] == []
