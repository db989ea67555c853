"""The asynchronous names, on the drivers that people use."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)

from atomic_claim import ClaimError, ClaimLost, aio
from tests.databases import Database
from tests.ending.test_lease import LEASE, expire, leased_table, mapped, row
from tests.jobs import fill, ids, taken

DRIVERS = {
    "sqlite": ["sqlite+aiosqlite"],
    "postgresql": ["postgresql+psycopg", "postgresql+asyncpg"],
    "mysql": ["mysql+asyncmy"],
    "mariadb": ["mariadb+asyncmy"],
}


def run(database: Database, work: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    """Run a coroutine with an engine of each of the database's drivers."""

    async def main(drivername: str) -> None:
        engine = create_async_engine(database.url.set(drivername=drivername))
        try:
            await work(engine)
        finally:
            await engine.dispose()

    for drivername in DRIVERS[database.name]:
        asyncio.run(main(drivername))


def test_the_life_of_a_job(database: Database) -> None:
    """Claim, extend, fail, release, complete and sweep by every kind of bind."""
    jobs = leased_table()
    job_class, declared = mapped(jobs)
    sync = database.engine()
    jobs.table.metadata.create_all(sync)

    async def work(engine: AsyncEngine) -> None:
        with sync.begin() as connection:
            connection.execute(jobs.table.delete())
        fill(sync, jobs.table, 8)
        claim = await aio.claim_jobs(engine, jobs, 2, lease=LEASE, worker="w1")
        assert ids(claim) == [1, 2]
        assert await aio.extend_jobs(engine, claim) == 2
        assert await aio.complete_jobs(engine, claim[:1]) == 1
        assert await aio.fail_jobs(engine, claim[1:], error="no") == 1
        async with engine.begin() as connection:
            claim = await aio.claim_jobs(connection, jobs, 1, lease=LEASE)
            assert await aio.release_jobs(connection, claim) == 1
        async with AsyncSession(engine) as session:
            entities = await aio.claim_jobs(session, declared, 2, lease=LEASE)
            assert [type(entity) for entity in entities] == [job_class] * 2
            await session.rollback()
        maker = async_sessionmaker(engine)
        entities = await aio.claim_jobs(maker, declared, 2, lease=LEASE)
        assert ids(entities) == [3, 4]
        scoped = async_scoped_session(maker, asyncio.current_task)
        assert await aio.complete_jobs(scoped, entities) == 2
        await scoped.commit()
        await scoped.remove()
        assert await aio.sweep_jobs(engine, jobs) == 0
        assert row(sync, jobs, 3).done_at is not None
        with pytest.raises(ClaimLost):
            await aio.complete_jobs(engine, entities)
        with pytest.raises(ClaimError, match="not an asynchronous bind"):
            await aio.claim_jobs(sync, jobs)  # type: ignore[arg-type]

    run(database, work)


def test_tasks_share_a_queue(database: Database) -> None:
    """Eight tasks on one engine run every job once."""
    jobs = leased_table()
    sync = database.engine()
    jobs.table.metadata.create_all(sync)

    async def work(engine: AsyncEngine) -> None:
        with sync.begin() as connection:
            connection.execute(jobs.table.delete())
        fill(sync, jobs.table, 100)
        ran: list[int] = []

        async def worker() -> None:
            while claim := await aio.claim_jobs(engine, jobs, 3):
                ran.extend(ids(claim))

        await asyncio.gather(*(worker() for _ in range(8)))
        assert sorted(ran) == list(range(1, 101))
        assert len(taken(sync, jobs.table)) == 100

    run(database, work)


def test_leases_are_kept(database: Database) -> None:
    """The block's leases are extended by a task, and a loss shows in the block."""
    jobs = leased_table()
    sync = database.engine()
    jobs.table.metadata.create_all(sync)

    async def work(engine: AsyncEngine) -> None:
        with sync.begin() as connection:
            connection.execute(jobs.table.delete())
        fill(sync, jobs.table, 2)
        claim = await aio.claim_jobs(engine, jobs, 2, lease=LEASE)
        before = row(sync, jobs, 1).lease_until
        lost: asyncio.Queue[Any] = asyncio.Queue()
        every = timedelta(milliseconds=20)
        async with aio.keep_claims(engine, claim, every=every, on_lost=lost.put_nowait) as keeper:
            while row(sync, jobs, 1).lease_until <= before:
                await asyncio.sleep(0.01)
            with sync.begin() as connection:
                connection.execute(
                    sa.update(jobs.table).where(jobs.table.c.id == 2).values(claim_token="other")
                )
            assert await asyncio.wait_for(lost.get(), 20) == ((2,),)
            assert keeper.lost == ((2,),)
            with pytest.raises(ClaimLost):
                keeper.check()
        expire(sync, jobs, 1, 2)

    run(database, work)
