"""Workers that are killed and paused: what they held comes back, and comes to an end once."""

import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.context import ForkServerProcess

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from atomic_claim import claim_jobs, complete_jobs
from tests.counting import completions, make_counted, undone
from tests.databases import Database
from tests.jobs import ids
from tests.waiting import wait_until
from tests.worker import complete_when_told, drain

# A worker that is killed or stopped calls nothing of SQLAlchemy: one version is enough.
pytestmark = pytest.mark.once

WORKERS, JOBS = 6, 1000
LEASE = timedelta(seconds=2)
# How many jobs are completed between two kills.
BETWEEN_KILLS = 40

# A new process is there at once, and has nothing of the tests' own connections.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.worker", "psycopg", "pymysql"])


@contextmanager
def processes() -> Iterator[list[ForkServerProcess]]:
    """Collect worker processes, which end with the block."""
    running: list[ForkServerProcess] = []
    try:
        yield running
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.join()
            process.close()


def test_killed_workers_lose_nothing(database: Database) -> None:
    """While one worker after the other is killed, every job is completed exactly once."""
    engine = database.engine(poolclass=NullPool)
    jobs = make_counted(engine, JOBS)
    chance = random.Random(20240101)
    kills = 0
    with processes() as workers:
        names = iter(range(1_000_000))

        def start() -> None:
            worker = context.Process(target=drain, args=(database.url, f"w{next(names)}", LEASE))
            worker.start()
            workers.append(worker)

        def at_most(left: int) -> bool:
            return undone(engine, jobs) <= left

        for _ in range(WORKERS):
            start()
        for left in range(JOBS - BETWEEN_KILLS, 0, -BETWEEN_KILLS):
            wait_until(partial(at_most, left), seconds=120)
            victim = chance.choice(workers)
            victim.kill()
            victim.join()
            kills += victim.exitcode == -signal.SIGKILL
            assert victim.exitcode in {0, -signal.SIGKILL}
            workers.remove(victim)
            victim.close()
            start()
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0] * WORKERS
    done = completions(engine)
    assert sorted(number for number, _ in done) == list(range(1, JOBS + 1))
    with engine.connect() as connection:
        tokens = connection.execute(sa.select(jobs.table.c.id, jobs.table.c.claim_token))
        assert sorted(done) == sorted(map(tuple, tokens))
        attempts = jobs.table.c.attempts
        again = connection.execute(sa.select(sa.func.count()).where(attempts > 1)).scalar_one()
    # Enough have been killed in the middle of their work for this to mean something.
    assert kills >= 10
    assert again >= 5


@pytest.mark.parametrize("keeping", [False, True], ids=["alone", "with a heartbeat"])
def test_a_paused_worker_is_refused(database: Database, keeping: bool) -> None:
    """A worker that slept through its lease learns of it, and its completion changes nothing."""
    engine = database.engine(poolclass=NullPool)
    jobs = make_counted(engine, 2)
    ours, its = context.Pipe()

    def heard() -> object:
        assert ours.poll(60), "the worker says nothing"
        return ours.recv()

    with processes() as workers:
        arguments = (database.url, timedelta(seconds=2 if keeping else 1), its)
        worker = context.Process(
            target=complete_when_told, args=arguments, kwargs={"keeping": keeping}
        )
        worker.start()
        workers.append(worker)
        token = heard()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        successor = wait_until(lambda: claim_jobs(engine, jobs, 2, lease=timedelta(minutes=5)))
        assert ids(successor) == [1, 2]
        assert successor.token != token
        ours.send("complete")
        os.kill(worker.pid, signal.SIGCONT)
        assert heard() == (((1,), (2,)) if keeping else ())
        assert heard() == ((1,), (2,))
        worker.join(60)
        assert worker.exitcode == 0
    assert undone(engine, jobs) == 2
    assert complete_jobs(engine, successor) == 2
    assert completions(engine) == [(1, successor.token), (2, successor.token)]
