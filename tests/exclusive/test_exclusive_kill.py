"""A worker with exclusive keys is killed or stopped: they come back with lease and lock."""

import multiprocessing
import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from atomic_claim import claim_jobs
from tests.databases import Database
from tests.exclusive.test_exclusive import filled, keyed_table
from tests.jobs import ids
from tests.waiting import wait_until

pytestmark = pytest.mark.once

LEASE = timedelta(seconds=1)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.exclusive.test_exclusive", "psycopg", "pymysql"])


def claim_and_fall(url: sa.URL, before: str, number: int) -> None:
    """Claim, and send this process a signal before a statement that contains `before`."""
    engine = sa.create_engine(url)

    @sa.event.listens_for(engine, "before_cursor_execute")
    def fall(_: object, __: object, statement: str, *___: object) -> None:
        if before in statement:
            os.kill(os.getpid(), number)

    claim_jobs(engine, keyed_table(), 5, lease=LEASE)
    os.kill(os.getpid(), number)


WHEN = pytest.mark.parametrize("before", ["UPDATE", "nothing: after the claim"])


@WHEN
def test_a_holder_is_killed(database: Database, before: str) -> None:
    """Within the claim, while it holds the lock of the keys, or after it, under its lease."""
    check_fall(database, before, signal.SIGKILL)


# On SQLite a process that has stopped keeps the lock of the file until it goes on.
@pytest.mark.databases("postgresql", "mysql", "mariadb")
@WHEN
def test_a_holder_stops(database: Database, before: str) -> None:
    """The server ends its connection, or its lease runs out."""
    check_fall(database, before, signal.SIGSTOP)


def check_fall(database: Database, before: str, number: signal.Signals) -> None:
    """Have a holder fall, and claim what it leaves."""
    jobs = filled(database, [1, 1, 2])
    engine = database.engine()
    holder = context.Process(target=claim_and_fall, args=(database.url, before, number))
    holder.start()
    try:
        assert holder.pid is not None
        if number == signal.SIGKILL:
            holder.join()
        else:
            wait_until(lambda: is_stopped(holder.pid))
        found = list[int]()

        def all_are_claimed() -> bool:
            found.extend(ids(claim_jobs(engine, jobs, 5, lease=timedelta(minutes=5))))
            return len(found) == 2

        wait_until(all_are_claimed)
        assert sorted(found) == [1, 3]
    finally:
        holder.kill()
        holder.join()
        holder.close()


def is_stopped(pid: int | None) -> bool:
    """Return True if the kernel says that a process has stopped."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    return stat.rpartition(")")[2].split()[0] == "T"
