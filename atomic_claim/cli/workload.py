"""The same jobs done by two loops, each in several processes, and what the work itself recorded.

Nothing here needs Typer or Rich: worker processes import this module.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import secrets
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from ctypes import c_long
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from typing import Any, NamedTuple

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
    text,
    update,
)
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.schema import DropTable

from atomic_claim.claim import claim_jobs
from atomic_claim.errors import ClaimError
from atomic_claim.testing.database import CommandError, complaint, make_engine, masked, one_line
from atomic_claim.testing.interrupts import deferred, not_inherited
from atomic_claim.testing.tables import LOCK_TIMEOUTS

# How often a loop looks again after a database error before it gives up.
TRIES = 20
# So much work a job is: a few tenths of a millisecond.
ROUNDS = 500
FILL = 10_000

_processes = multiprocessing.get_context("spawn")


class Run(NamedTuple):
    """One run of a job, as the work recorded it.

    Attributes:
        job: the job's primary key.
        worker: which process ran it, from 0.
        begin: when, in seconds from the start of all workers.
        end: until when.
    """

    job: Any
    worker: int
    begin: float
    end: float


@dataclass(frozen=True)
class Workload:
    """How much there is to do, and by how many; a limit of 0 is none."""

    workers: int
    jobs: int
    limit: int

    def __str__(self) -> str:
        limit = f", limit {self.limit:,}" if self.limit else ""
        return f"{_count(self.jobs, 'job')}, {_count(self.workers, 'worker')}{limit}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


@dataclass(frozen=True)
class Half:
    """The runs of one of the two loops, counted from the record of the work."""

    name: str
    workload: Workload
    runs: Sequence[Run] = field(repr=False)

    @cached_property
    def _times(self) -> Counter[Any]:
        return Counter(run.job for run in self.runs)

    @cached_property
    def doubled(self) -> frozenset[Any]:
        """The jobs that were run more than once."""
        return frozenset(job for job, times in self._times.items() if times > 1)

    @property
    def extra_runs(self) -> int:
        """How many runs there were beyond each job's first."""
        return len(self.runs) - len(self._times)

    @property
    def lost(self) -> int:
        """How many jobs were never run."""
        return self.workload.jobs - len(self._times)

    @property
    def seconds(self) -> float:
        """From the start of all workers to the end of the last run."""
        return max((run.end for run in self.runs), default=0.0)

    @property
    def claims_per_second(self) -> float:
        """How many jobs were handed to a worker in a second, the repeated ones included."""
        return len(self.runs) / self.seconds if self.seconds else 0.0

    @property
    def exact(self) -> bool:
        """Check whether every job was run exactly once."""
        return not self.doubled and not self.lost


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


def run_half(name: str, url: URL, workload: Workload, progress: Callable[[int], None]) -> Half:
    """Run one loop in as many processes as there are workers, on a table of its own.

    Args:
        name: which loop, of ``HALVES``.
        url: the database.
        workload: how much, and by how many.
        progress: told again and again how far down the queue the workers are, in jobs.

    Raises:
        CommandError: the table could not be made, or a worker could not work.
    """
    with _filled_table(url, workload.jobs) as jobs:
        duty = TableDuty(workload.limit, HALVES[name], url, jobs.name)
        runs = race(duty, workload, progress)
    return Half(name, workload, runs)


@contextmanager
def _filled_table(url: URL, count: int) -> Iterator[Table]:
    """Yield a table of jobs, and always drop it afterwards."""
    jobs = job_table(f"atomic_claim_demo_{secrets.token_hex(6)}")
    engine = make_engine(url)
    made = False
    try:
        with deferred():
            _make(engine, jobs)
            made = True
        _fill(engine, jobs, count)
        yield jobs
    finally:
        if made:
            with deferred():
                _drop(engine, jobs)
        engine.dispose()


def _make(engine: Engine, jobs: Table) -> None:
    try:
        with engine.begin() as connection:
            jobs.create(connection)
    except SQLAlchemyError as error:
        # On MySQL and MariaDB the table stays if only its index could not be made.
        with suppress(SQLAlchemyError), engine.begin() as connection:
            connection.execute(DropTable(jobs, if_exists=True))
        what = f"cannot make a job table in {masked(engine.url)}"
        raise complaint(what, error, engine.url) from None


def _fill(engine: Engine, jobs: Table, count: int) -> None:
    begin = datetime.now(UTC).replace(tzinfo=None, microsecond=0) - timedelta(seconds=count)
    try:
        with engine.begin() as connection:
            for start in range(0, count, FILL):
                rows = [
                    {
                        "id": place + 1,
                        "subject": f"Mail {place + 1} of {count}",
                        "processing": False,
                        "created_at": begin + timedelta(seconds=place),
                    }
                    for place in range(start, min(start + FILL, count))
                ]
                connection.execute(jobs.insert(), rows)
    except SQLAlchemyError as error:
        what = f"cannot fill the table {jobs.name} in {masked(engine.url)}"
        raise complaint(what, error, engine.url) from None


def _drop(engine: Engine, jobs: Table) -> None:
    before = sys.exception()
    try:
        with engine.begin() as connection:
            if (statement := LOCK_TIMEOUTS.get(engine.dialect.name)) is not None:
                connection.execute(text(statement))
            connection.execute(DropTable(jobs, if_exists=True))
    except SQLAlchemyError as error:
        what = f"cannot drop the table {jobs.name} in {masked(engine.url)} (drop it yourself)"
        found = complaint(what, error, engine.url)
        if isinstance(before, CommandError):
            found = CommandError(f"{before}; then: {found}")
        raise found from None


@dataclass(frozen=True)
class Duty(ABC):
    """The task of every worker process, sent to it by the parent.

    Attributes:
        limit: how many jobs a worker takes at a time.
    """

    limit: int

    @abstractmethod
    def begun(self) -> AbstractContextManager[Callable[[RunJob], None]]:
        """Whatever has to be ready before the work, and then the work, given what runs a job."""

    @abstractmethod
    def complaint(self, what: str, error: BaseException) -> CommandError:
        """Return a one-line error that says what failed and why, without secrets."""


@dataclass(frozen=True)
class TableDuty(Duty):
    """Jobs in a table, done by one of the loops."""

    loop: Loop
    url: URL
    table: str

    @contextmanager
    def begun(self) -> Iterator[Callable[[RunJob], None]]:
        """Connect once, then yield the function that does the work."""
        engine = make_engine(self.url)
        try:
            engine.connect().close()
            yield lambda run: self.loop(engine, job_table(self.table), self.limit, run)
        finally:
            engine.dispose()

    def complaint(self, what: str, error: BaseException) -> CommandError:
        """Without the URL's password."""
        return complaint(what, error, self.url)


def race(duty: Duty, workload: Workload, progress: Callable[[int], None]) -> list[Run]:
    """Do a duty in as many processes as there are workers, and collect what the work recorded.

    Raises:
        CommandError: a worker could not work.
    """
    # Every worker writes a place of its own, so that nobody waits for anybody.
    reached = _processes.RawArray(c_long, workload.workers)

    def tell() -> None:
        progress(max(reached))

    pipes: dict[Pipe, int] = {}
    team = []
    try:
        with not_inherited():
            for worker in range(workload.workers):
                pipe, theirs = _processes.Pipe()
                pipes[pipe] = worker
                arguments = (worker, duty, theirs, reached)
                process = _processes.Process(target=_work, args=arguments, daemon=True)
                process.start()
                team.append(process)
                theirs.close()
        _answers(pipes, duty, tell)
        # All have connected. Unlike a Barrier, this does not wait for one that failed to.
        start = time.perf_counter()
        for pipe in pipes:
            pipe.send(None)
        records = _answers(pipes, duty, tell)
    finally:
        with deferred():
            for process in team:
                process.kill()
            for process in team:
                process.join()
    return [
        Run(job, pipes[pipe], begin - start, end - start)
        for pipe, record in records.items()
        for job, begin, end in record
    ]


def _answers(pipes: dict[Pipe, int], duty: Duty, tell: Callable[[], None]) -> dict[Pipe, Any]:
    """Return the next answer of every worker."""
    answers: dict[Pipe, Any] = {}
    while missing := [pipe for pipe in pipes if pipe not in answers]:
        for pipe in wait(missing, timeout=0.1):
            assert isinstance(pipe, Pipe)
            try:
                answer = pipe.recv()
            except EOFError:
                raise CommandError(f"worker {pipes[pipe] + 1} ended before its time") from None
            if isinstance(answer, Failure):
                what = f"worker {pipes[pipe] + 1} failed"
                raise duty.complaint(what, RuntimeError(answer.text))
            answers[pipe] = answer
        tell()
    return answers


class Failure(NamedTuple):
    """The answer of a worker that failed."""

    text: str


def _work(worker: int, duty: Duty, pipe: Pipe, reached: Any) -> None:
    """Run a worker process: connect, wait for the start, work and send the record."""
    # perf_counter is the same clock in all processes (docs.python.org/3/library/time.html).
    record: list[tuple[int, float, float]] = []

    def run(job: Any) -> None:
        begin = time.perf_counter()
        hashlib.pbkdf2_hmac("sha256", job.subject.encode(), b"atomic_claim", ROUNDS)
        record.append((job.id, begin, time.perf_counter()))
        reached[worker] = job.id

    # The other end is closed when the command has been killed.
    with suppress(EOFError, BrokenPipeError):
        try:
            with duty.begun() as work:
                pipe.send(None)
                pipe.recv()
                work(run)
        except (SQLAlchemyError, ClaimError) as error:
            pipe.send(Failure(one_line(error)))
        else:
            pipe.send(record)
