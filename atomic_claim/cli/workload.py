"""The same jobs done by two loops, each in several processes, and what the work itself recorded.

Nothing here needs Typer or Rich: worker processes import this module.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import (
    URL,
    Boolean,
    Column,
    DateTime,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    false,
    select,
    update,
)
from sqlalchemy.exc import OperationalError

from atomic_claim.claim import claim_jobs
from atomic_claim.testing.database import make_engine
from atomic_claim.testing.harness import Send, Work, run_workers
from atomic_claim.testing.results import Call, Counted, Key
from atomic_claim.testing.tables import filled

# How often a loop looks again after a database error before it gives up.
TRIES = 20
# So much work a job is: a few tenths of a millisecond.
ROUNDS = 500
# How long the workers may take, in seconds: a slow network is no fault, a worker that hangs is one.
TIMEOUT = 60.0
SECONDS_A_JOB = 1.0


@dataclass(frozen=True)
class Workload:
    """The numbers of jobs and workers, and of jobs that a worker takes at a time."""

    workers: int
    jobs: int
    limit: int


def job_table(name: str) -> Table:
    """Define the demo's job table as an application would."""
    return Table(
        name,
        MetaData(),
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("subject", String(100), nullable=False),
        Column("processing", Boolean, nullable=False),
        Column("created_at", DateTime, nullable=False),
        Index(f"{name}_free", "processing", "created_at"),
    )


RunJob = Callable[[Any], None]
Loop = Callable[[Engine, Table, int, RunJob], None]


def legacy_loop(engine: Engine, jobs: Table, limit: int, run: RunJob) -> None:
    """Find free jobs, then mark them one by one, as job queues are often written.

    Like ``updateJobs`` of Payload CMS 3.80 (packages/drizzle/src/updateJobs.ts): between the
    SELECT and the UPDATE, and until that is committed, every other worker finds the same jobs.
    """
    failures = 0
    while True:
        try:
            found = _find(engine, jobs, limit)
            _mark(engine, jobs, found)
        except OperationalError:
            # "database is locked", or a deadlock: rolled back, so the jobs are still free.
            failures += 1
            if failures == TRIES:
                raise
            continue
        failures = 0
        if not found:
            return
        for job in found:
            run(job)


def _find(engine: Engine, jobs: Table, limit: int) -> Sequence[Any]:
    free = select(jobs).where(jobs.c.processing == false())
    with engine.connect() as connection:
        return connection.execute(free.order_by(jobs.c.created_at).limit(limit)).all()


def _mark(engine: Engine, jobs: Table, found: Sequence[Any]) -> None:
    with engine.begin() as connection:
        for job in found:
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(processing=True))


def claim_loop(engine: Engine, jobs: Table, limit: int, run: RunJob) -> None:
    """Claim free jobs until there are none."""
    while claim := claim_jobs(engine, jobs, limit):
        for job in claim:
            run(job)


HALVES: dict[str, Loop] = {"legacy loop": legacy_loop, "claim_jobs": claim_loop}
Progress = Callable[[int], None]


def run_half(name: str, engine: Engine, workload: Workload, progress: Progress) -> Counted:
    """Run one loop in as many processes as there are workers, on a table of its own.

    Args:
        name: which loop, of ``HALVES``.
        engine: the database.
        workload: how much, and by how many.
        progress: told every few milliseconds how many jobs were run.

    Raises:
        CommandError: the table could not be made, or a worker could not work.
    """
    table = job_table(f"atomic_claim_demo_{secrets.token_hex(6)}")
    url = engine.url
    with filled(engine, table, workload.jobs, factory=_mail, existing=False) as keys:
        task = LoopTask(HALVES[name], partial(_table, url, table.name), workload.limit)
        return run_loop(name, task, workload, keys, progress=progress, url=url)


def _mail(number: int) -> dict[str, Any]:
    return {"subject": f"Mail {number}"}


@contextmanager
def _table(url: URL, name: str) -> Iterator[tuple[Engine, Table]]:
    """Connect a worker, and yield what a loop is given."""
    engine = make_engine(url)
    try:
        engine.connect().close()
        yield engine, job_table(name)
    finally:
        engine.dispose()


@dataclass(frozen=True)
class LoopTask:
    """A loop over a queue, in which every run of a job is recorded.

    Attributes:
        loop: it is given what ``opened`` yields, the limit, and a function that runs a job.
        opened: gives a worker its access to the queue.
        limit: how many jobs a worker takes at a time.
    """

    loop: Callable[..., None]
    opened: Callable[[], AbstractContextManager[tuple[Any, ...]]]
    limit: int

    @contextmanager
    def begun(self, worker: int) -> Iterator[Work]:
        """Connect once, then yield the function that does the work."""
        with self.opened() as queue:

            def work(send: Send) -> None:
                def run(job: Any) -> None:
                    begin = time.perf_counter()
                    hashlib.pbkdf2_hmac("sha256", job.subject.encode(), b"atomic_claim", ROUNDS)
                    send(Call(worker, begin, time.perf_counter(), ((str(job.id),),)))

                self.loop(*queue, self.limit, run)

            yield work


def run_loop(
    name: str,
    task: LoopTask,
    workload: Workload,
    keys: frozenset[Key],
    *,
    progress: Progress,
    url: URL | None = None,
) -> Counted:
    """Run the task in as many processes as there are workers, and count the runs.

    Raises:
        CommandError: a worker could not work.
    """
    calls: list[Call] = []
    done: set[Key] = set()

    def receive(_: int, call: Call) -> bool:
        calls.append(call)
        done.update(call.keys)
        return False

    def tick() -> bool:
        progress(len(done))
        return False

    start, _ = run_workers(
        task.begun,
        workload.workers,
        seconds=TIMEOUT + SECONDS_A_JOB * workload.jobs,
        receive=receive,
        tick=tick,
        url=url,
    )
    return Counted(
        name=name,
        workers=workload.workers,
        keys=keys,
        limit=workload.limit,
        calls=[call.since(start) for call in calls],
    )
