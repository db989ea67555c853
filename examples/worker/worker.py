"""A worker's loop around the claim: a recipe to copy, not a framework.

It claims with a lease, keeps the leases while it works, completes each job as it is done, waits
longer and longer while there is nothing to do (on PostgreSQL until a NOTIFY wakes it), and on
SIGTERM or SIGINT finishes the job in hand and releases the rest.

    python examples/worker/worker.py postgresql+psycopg://user@host/database
    python examples/worker/worker.py --async sqlite+aiosqlite:///jobs.sqlite

What it runs is `run_job`; everything else is meant to be kept.
"""

import argparse
import asyncio
import os
import random
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from atomic_claim import (
    ClaimLost,
    JobTable,
    aio,
    claim_jobs,
    complete_jobs,
    fail_jobs,
    keep_claims,
    release_jobs,
    sweep_jobs,
)

LEASE = timedelta(minutes=1)
BATCH = 10
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
CHANNEL = "jobs"
WORKER = f"{socket.gethostname()}:{os.getpid()}"

metadata = sa.MetaData()
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("payload", sa.String(200)),
    sa.Column("processing", sa.Boolean, nullable=False, default=False),
    sa.Column("created_at", sa.DateTime, nullable=False, server_default=sa.func.now()),
    sa.Column("run_at", sa.DateTime),
    sa.Column("completed_at", sa.DateTime),
    sa.Column("failed_at", sa.DateTime),
    sa.Column("worker", sa.String(100)),
    sa.Column("lease_until", sa.DateTime),
    sa.Column("claim_token", sa.String(32)),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("last_error", sa.Text),
    sa.Index("jobs_free", "processing", "created_at"),
    sa.Index("jobs_expired", "processing", "lease_until"),
)
job_table = JobTable(
    jobs,
    state="processing",
    done={"completed_at": sa.func.now()},
    failed={"failed_at": sa.func.now()},
    due="run_at",
    order="created_at",
    worker="worker",
    lease="lease_until",
    token="claim_token",  # noqa: S106 - a column's name
    attempts="attempts",
    max_attempts=5,
    error="last_error",
    naive_times="utc",
)


def run_job(job: Any) -> None:
    """Do the work of one job; whatever it raises has the job tried again later."""
    print(f"{WORKER} runs job {job.id}: {job.payload}", flush=True)


def next_pause(pause: float) -> float:
    """Twice the pause, up to a limit, with jitter so that idle workers do not ask in step."""
    return min(LONGEST_PAUSE, pause * 2) * random.uniform(0.8, 1.2)  # noqa: S311 - no secret


def work(engine: sa.Engine, stopped: threading.Event, wait: Callable[[float], None]) -> None:
    """Claim and run jobs until `stopped` is set; `wait` sleeps, or is woken earlier."""
    pause = FIRST_PAUSE
    while not stopped.is_set():
        claim = claim_jobs(engine, job_table, BATCH, lease=LEASE, worker=WORKER)
        if not claim:
            # Jobs that killed their workers as often as is allowed are marked as failed.
            sweep_jobs(engine, job_table)
            wait(pause)
            pause = next_pause(pause)
            continue
        pause = FIRST_PAUSE
        with keep_claims(engine, claim) as keeper:
            for place, job in enumerate(claim):
                if stopped.is_set():
                    with suppress(ClaimLost):
                        release_jobs(engine, claim[place:])
                    break
                if (job.id,) in keeper.lost:
                    continue
                try:
                    try:
                        run_job(job)
                    except Exception as error:  # noqa: BLE001 - a job may raise anything
                        fail_jobs(engine, claim, [job], retry=True, error=error)
                    else:
                        complete_jobs(engine, claim, [job])
                except ClaimLost as lost:
                    print(f"{WORKER}: {lost}", flush=True)


@contextmanager
def waker(engine: sa.Engine, stopped: threading.Event) -> Iterator[Callable[[float], None]]:
    """Something to wait with: on PostgreSQL for a NOTIFY, elsewhere for the time to pass."""
    if engine.dialect.name != "postgresql":
        yield stopped.wait
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"LISTEN {CHANNEL}")
        driver: Any = connection.connection.driver_connection

        def wait(seconds: float) -> None:
            # A SIGTERM is seen at the end of the wait, which is short.
            for _ in driver.notifies(timeout=seconds, stop_after=1):
                break

        yield wait


def add(engine: sa.Engine, payload: str) -> None:
    """Insert a job and wake the workers when the insert is committed."""
    with engine.begin() as connection:
        connection.execute(jobs.insert().values(payload=payload))
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(f"NOTIFY {CHANNEL}")


def main(url: str) -> None:
    """Work until SIGTERM or SIGINT."""
    stopped = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    engine = sa.create_engine(url)
    with waker(engine, stopped) as wait:
        work(engine, stopped, wait)
    engine.dispose()


async def work_async(
    engine: AsyncEngine, stopped: asyncio.Event, wait: Callable[[float], Awaitable[None]]
) -> None:
    """Run the same loop with asyncio; the jobs of one batch run one after another."""
    pause = FIRST_PAUSE
    while not stopped.is_set():
        claim = await aio.claim_jobs(engine, job_table, BATCH, lease=LEASE, worker=WORKER)
        if not claim:
            await aio.sweep_jobs(engine, job_table)
            await wait(pause)
            pause = next_pause(pause)
            continue
        pause = FIRST_PAUSE
        async with aio.keep_claims(engine, claim) as keeper:
            for place, job in enumerate(claim):
                if stopped.is_set():
                    with suppress(ClaimLost):
                        await aio.release_jobs(engine, claim[place:])
                    break
                if (job.id,) in keeper.lost:
                    continue
                try:
                    try:
                        await asyncio.to_thread(run_job, job)
                    except Exception as error:  # noqa: BLE001 - a job may raise anything
                        await aio.fail_jobs(engine, claim, [job], retry=True, error=error)
                    else:
                        await aio.complete_jobs(engine, claim, [job])
                except ClaimLost as lost:
                    print(f"{WORKER}: {lost}", flush=True)


@asynccontextmanager
async def async_waker(
    engine: AsyncEngine, stopped: asyncio.Event
) -> AsyncIterator[Callable[[float], Awaitable[None]]]:
    """Something to wait with: until a NOTIFY on PostgreSQL, until it is time to stop elsewhere."""
    woken = asyncio.Event()

    async def wait(seconds: float) -> None:
        ends = [asyncio.create_task(event.wait()) for event in (stopped, woken)]
        await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        woken.clear()

    if engine.dialect.name != "postgresql":
        yield wait
        return
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        driver: Any = (await connection.get_raw_connection()).driver_connection
        if engine.dialect.driver == "asyncpg":

            def wake(*_: Any) -> None:
                woken.set()

            await driver.add_listener(CHANNEL, wake)
            yield wait
            await driver.remove_listener(CHANNEL, wake)
            return
        await connection.exec_driver_sql(f"LISTEN {CHANNEL}")

        async def listen() -> None:
            async for _ in driver.notifies():
                woken.set()

        listening = asyncio.create_task(listen())
        yield wait
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening


async def main_async(url: str) -> None:
    """Work until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    engine = create_async_engine(url)
    async with async_waker(engine, stopped) as wait:
        await work_async(engine, stopped, wait)
    await engine.dispose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Work through the jobs of a database.")
    parser.add_argument("url", help="the database, as an SQLAlchemy URL")
    parser.add_argument("--async", action="store_true", dest="on_loop", help="run on asyncio")
    given = parser.parse_args()
    if given.on_loop:
        asyncio.run(main_async(given.url))
    else:
        main(given.url)
