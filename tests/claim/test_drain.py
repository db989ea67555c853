"""Eight processes drain a queue while producers insert; what ran is recorded by the work itself."""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from atomic_claim import Claim, ClaimConflict, claim_jobs
from tests.databases import Database
from tests.jobs import START, in_thread

# The statements decide which worker gets a job; tests that run on both versions read them.
pytestmark = pytest.mark.once

WORKERS = 8
# By the limit of a claim: one job each makes the most claims that can meet.
JOBS = {1: 480, 50: 1200}
BATCH = 50
PATIENCE = 120


class Base(DeclarativeBase):
    """The tables of this file."""


class Job(Base):
    """A job as Payload has it: running while `processing`, over once `completed_at` is set."""

    __tablename__ = "jobs"
    __table_args__ = (sa.Index("jobs_free", "processing", "completed_at", "created_at"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    processing: Mapped[bool] = mapped_column(default=False)
    completed_at: Mapped[datetime | None]
    created_at: Mapped[datetime]


jobs = cast("sa.Table", Job.__table__)


@dataclass(frozen=True)
class Drain:
    """Instructions for every worker, and the folder in which it records the jobs it ran."""

    url: str
    folder: Path
    by: str
    limit: int


@dataclass
class Signals:
    """Signals between the workers and the test."""

    start: Barrier
    first_claimed: Barrier
    produced: Event


def connect(url: str | sa.URL) -> sa.Engine:
    """Create an engine without TLS or fsync, and with a long busy timeout on SQLite."""
    options = {"ssl_disabled": True} if "pymysql" in str(url) else {}
    engine = sa.create_engine(url, connect_args=options)
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def prepare(connection: Any, _: object) -> None:
            connection.execute("PRAGMA busy_timeout = 60000")
            connection.execute("PRAGMA synchronous = OFF")

    return engine


def set_signals(signals: Signals) -> None:
    """Keep what came with the process's start; it cannot be sent later."""
    global SIGNALS  # noqa: PLW0603
    SIGNALS = signals


SIGNALS: Signals


def find_then_update(connection: sa.Connection, limit: int) -> list[Any]:
    """Look for free jobs, then mark them, as hand-written loops do."""
    query = sa.select(jobs).where(jobs.c.processing == sa.false(), jobs.c.completed_at.is_(None))
    found = connection.execute(query.order_by(jobs.c.created_at).limit(limit)).all()
    connection.commit()
    marked = jobs.update().where(jobs.c.id.in_([job.id for job in found]))
    connection.execute(marked.values(processing=True))
    connection.commit()
    return list(found)


def claimer(order: Drain, engine: sa.Engine) -> Callable[[], list[Any]]:
    """Return a worker's claim function; with a session it commits or rolls back itself."""
    if order.by == "find, then update":
        connection = engine.connect()
        return lambda: find_then_update(connection, order.limit)
    if order.by == "engine":
        return lambda: claim_jobs(engine, jobs, order.limit)
    session = Session(engine)

    def claim() -> Claim[Job]:
        while True:
            try:
                claimed = claim_jobs(session, Job, order.limit)
            except ClaimConflict:
                session.rollback()
            else:
                session.expire_on_commit = False
                session.commit()
                return claimed

    return claim


def work(order: Drain, number: int) -> list[int]:
    """Claim, run and complete until the producers are done and the queue is empty.

    Returns:
        How many jobs each claim gave.
    """
    engine = connect(order.url)
    claim = claimer(order, engine)
    sizes: list[int] = []
    ran: list[int] = []
    with (
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as completing,
        (order.folder / f"{number}").open("a", buffering=1, encoding="ascii") as record,
    ):
        SIGNALS.start.wait(PATIENCE)
        while True:
            over = SIGNALS.produced.is_set()
            claimed = claim()
            if not sizes:
                SIGNALS.first_claimed.wait(PATIENCE)
            sizes += [len(claimed)] if claimed else []
            record.writelines(f"{job.id}\n" for job in claimed)
            ran += [job.id for job in claimed]
            if len(ran) >= BATCH or not claimed:
                complete(completing, ran)
                ran.clear()
            if over and not claimed:
                break
    engine.dispose()
    return sizes


def complete(connection: sa.Connection, keys: list[int]) -> None:
    """End jobs as Payload does: no longer running, and with a time of their end."""
    completed = jobs.update().where(jobs.c.id.in_(keys))
    for name in ("mysql", "mariadb"):
        completed = completed.with_hint("FORCE INDEX (PRIMARY)", dialect_name=name)
    connection.execute(completed.values(processing=False, completed_at=START))


def produce(engine: sa.Engine, first: int, count: int) -> None:
    """Insert jobs in small transactions."""
    for start in range(first, first + count, BATCH):
        batch = [
            {"id": number, "processing": False, "created_at": START + timedelta(seconds=number)}
            for number in range(start, min(start + BATCH, first + count))
        ]
        with engine.begin() as connection:
            connection.execute(jobs.insert(), batch)


@dataclass
class Team:
    """Eight processes, started once for all tests of this file."""

    pool: ProcessPoolExecutor
    signals: Signals

    def drain(self, order: Drain, count: int) -> tuple[list[int], list[list[int]]]:
        """Have a fresh queue of `count` jobs drained while most of them are still produced.

        Returns:
            The id of every run, and the sizes of each worker's claims.
        """
        engine = connect(order.url)
        Base.metadata.drop_all(engine)
        Base.metadata.create_all(engine)
        # Each worker's first claim has to be full, whoever comes first.
        at_first = WORKERS * order.limit
        produce(engine, 1, at_first)
        self.signals.produced.clear()
        order.folder.mkdir()
        working = [self.pool.submit(work, order, number) for number in range(WORKERS)]
        half = (count - at_first) // 2
        with (
            in_thread(partial(produce, engine, at_first + 1, half)) as one,
            in_thread(partial(produce, engine, at_first + 1 + half, half)) as other,
        ):
            pass
        self.signals.produced.set()
        one.result()
        other.result()
        sizes = [worker.result() for worker in working]
        with engine.connect() as connection:
            left = connection.scalar(
                sa.select(sa.func.count()).select_from(jobs).where(jobs.c.completed_at.is_(None))
            )
        engine.dispose()
        assert left == 0
        records = [path.read_text(encoding="ascii") for path in order.folder.iterdir()]
        return [int(line) for record in records for line in record.split()], sizes


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """Yield the worker processes; each runs one drain at a time, as all wait for each other."""
    context = multiprocessing.get_context("spawn")
    signals = Signals(context.Barrier(WORKERS), context.Barrier(WORKERS), context.Event())
    with ProcessPoolExecutor(
        WORKERS, mp_context=context, initializer=set_signals, initargs=(signals,)
    ) as pool:
        yield Team(pool, signals)


@pytest.mark.parametrize("limit", [1, 50])
@pytest.mark.parametrize("by", ["engine", "session"])
def test_every_job_runs_once(
    database: Database, team: Team, tmp_path: Path, by: str, limit: int
) -> None:
    """Eight workers run each of the jobs exactly once, and every one of them claims."""
    ran, sizes = team.drain(Drain(url_of(database), tmp_path / "runs", by, limit), JOBS[limit])
    assert {job: times for job, times in Counter(ran).items() if times > 1} == {}
    assert sorted(ran) == list(range(1, JOBS[limit] + 1))
    assert max(size for worker in sizes for size in worker) <= limit
    assert [worker[0] for worker in sizes] == [limit] * WORKERS


def test_find_then_update_runs_jobs_again(database: Database, team: Team, tmp_path: Path) -> None:
    """The twin: drained the same way by the loop that most people write, jobs run several times."""
    for attempt in range(5):
        order = Drain(url_of(database), tmp_path / f"runs {attempt}", "find, then update", 1)
        ran, _ = team.drain(order, 200)
        if len(ran) > len(set(ran)):
            break
    else:
        pytest.fail("five drains without a job that ran twice")


def url_of(database: Database) -> str:
    """Return the database's URL for another process; set SQLite to WAL mode."""
    if database.name == "sqlite":
        with database.engine().connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    return database.url.render_as_string(hide_password=False)
