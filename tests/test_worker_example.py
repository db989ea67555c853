"""The worker's loop of the examples, run as a user runs it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from examples.worker import add, jobs
from tests.databases import Database

WORKER = Path(__file__).parent.parent / "examples" / "worker.py"
ASYNC = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+asyncmy",
    "mariadb": "mariadb+asyncmy",
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
    drivername = ASYNC[database.name] if on_loop else database.url.drivername
    url = database.url.set(drivername=drivername).render_as_string(hide_password=False)
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
