"""The worker's loop of the examples, run as a user runs it."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from examples.worker.worker import add, async_waker, jobs, waker
from tests.databases import Database
from tests.jobs import in_thread

pytestmark = pytest.mark.once

WORKER = Path(__file__).parent.parent.parent / "examples" / "worker" / "worker.py"
DRIVERS = {
    "sqlite": ["sqlite", "sqlite+aiosqlite"],
    "postgresql": ["postgresql+psycopg", "postgresql+asyncpg"],
    "mysql": ["mysql+pymysql", "mysql+asyncmy"],
    "mariadb": ["mariadb+pymysql", "mariadb+asyncmy"],
}
PATIENCE = 60


def done(engine: sa.Engine) -> int:
    """How many jobs are completed."""
    with engine.connect() as connection:
        query = sa.select(sa.func.count()).where(jobs.c.completed_at.is_not(None))
        return int(connection.scalar(query) or 0)


@pytest.mark.parametrize("on_loop", [False, True], ids=["sync", "async"])
def test_the_worker_works_and_stops(database: Database, on_loop: bool) -> None:
    """It runs what is there and what comes later, and ends at SIGTERM with nothing in hand."""
    engine = database.engine()
    jobs.metadata.create_all(engine)
    for number in range(5):
        add(engine, f"mail {number}")
    url = database.url.set(drivername=DRIVERS[database.name][on_loop]).render_as_string(
        hide_password=False
    )
    command = [sys.executable, str(WORKER), url, *(["--async"] if on_loop else [])]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + PATIENCE
        for wanted in (5, 6):
            while done(engine) < wanted:
                assert time.monotonic() < deadline
                assert worker.poll() is None
                time.sleep(0.05)
            add(engine, "one more")
        worker.send_signal(signal.SIGTERM)
        output, _ = worker.communicate(timeout=PATIENCE)
    finally:
        worker.kill()
        worker.wait()
    assert worker.returncode == 0
    assert output.count("runs job") in {6, 7}
    with engine.connect() as connection:
        held = connection.scalar(sa.select(sa.func.count()).where(jobs.c.processing == sa.true()))
    assert held == 0


def notified(engine: sa.Engine) -> None:
    """Add a job once a worker listens."""
    listening = sa.text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
    with engine.connect() as connection:
        while not connection.scalar(listening):
            connection.rollback()
    add(engine, "now")


@pytest.mark.databases("postgresql")
def test_a_notify_ends_the_wait(database: Database) -> None:
    """A producer's commit wakes a worker that would otherwise wait for an hour."""
    engine = database.engine()
    jobs.metadata.create_all(engine)
    with waker(engine, threading.Event()) as wait, in_thread(lambda: notified(engine)):
        wait(3600)


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_notify_ends_the_wait_on_a_loop(database: Database, driver: str) -> None:
    """The same on an event loop, which goes on meanwhile."""
    producer = database.engine()
    jobs.metadata.create_all(producer)

    async def listen() -> None:
        engine = create_async_engine(database.url.set(drivername=f"postgresql+{driver}"))
        async with async_waker(engine, asyncio.Event()) as wait:
            adding = asyncio.create_task(asyncio.to_thread(notified, producer))
            await wait(3600)
            await adding
        await engine.dispose()

    asyncio.run(listen())
