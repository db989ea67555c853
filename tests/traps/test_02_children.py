"""Trap 2: FOR UPDATE starves jobs to which another transaction adds children."""

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, ForeignKey, Integer

from atomic_claim import claim_jobs
from tests.databases import Database
from tests.jobs import fill, ids, in_thread, job_table


def with_children(
    database: Database, *more: sa.Column[int]
) -> tuple[sa.Engine, sa.Table, sa.Table]:
    """Three jobs, and a table of steps that belong to jobs."""
    engine = database.engine()
    jobs = job_table(*more)
    steps = sa.Table(
        "steps",
        jobs.metadata,
        Column("id", Integer, primary_key=True),
        Column("job_id", ForeignKey(jobs.c.id), nullable=False),
    )
    fill(engine, jobs, 3)
    return engine, jobs, steps


@pytest.mark.databases("postgresql")
def test_a_job_that_gets_children_is_claimed(database: Database) -> None:
    """An open transaction that refers to a job does not hide it."""
    engine, jobs, steps = with_children(database)
    with engine.begin() as producer:
        producer.execute(steps.insert().values(id=1, job_id=1))
        assert ids(claim_jobs(engine, jobs, 2)) == [1, 2]


@pytest.mark.databases("postgresql")
def test_for_update_skips_it(database: Database) -> None:
    """The twin: FOR UPDATE conflicts with the foreign key's share lock and skips the job."""
    engine, jobs, steps = with_children(database)
    query = sa.select(jobs.c.id).order_by(jobs.c.id).limit(2).with_for_update(skip_locked=True)
    with engine.begin() as producer, engine.begin() as worker:
        producer.execute(steps.insert().values(id=1, job_id=1))
        assert list(worker.scalars(query)) == [2, 3]


@pytest.mark.databases("postgresql")
def test_a_claim_that_writes_a_key_skips_it(database: Database) -> None:
    """Values that change a unique column lock FOR UPDATE, and the claim does not wait."""
    engine, jobs, steps = with_children(database, Column("place", Integer, unique=True))
    with engine.begin() as producer:
        producer.execute(steps.insert().values(id=1, job_id=1))
        claimed = claim_jobs(engine, jobs, 1, values={"place": 1})
    assert ids(claimed) == [2]


@pytest.mark.databases("postgresql")
def test_no_key_update_would_wait_for_a_key(database: Database) -> None:
    """The twin: under FOR NO KEY UPDATE the UPDATE of the key waits for the producer."""
    engine, jobs, steps = with_children(database, Column("place", Integer, unique=True))
    lock = sa.select(jobs.c.id).where(jobs.c.id == 1)
    lock = lock.with_for_update(skip_locked=True, key_share=True)

    def claim() -> list[int]:
        with engine.begin() as worker:
            found = list(worker.scalars(lock))
            worker.execute(jobs.update().where(jobs.c.id == 1).values(id=99))
            return found

    with engine.connect() as producer:
        producer.execute(steps.insert().values(id=1, job_id=1))
        with in_thread(claim) as claiming:
            database.wait_until_blocked()
            producer.rollback()
    assert claiming.result() == [1]
