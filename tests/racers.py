"""Claim functions, good and bad, and the tables that they are raced on."""

import enum
import fcntl
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ForeignKey, String
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from atomic_claim import JobTable, aio, claim_jobs
from tests.jobs import job_table


class Base(DeclarativeBase):
    """Declarative base of all tables."""


class State(enum.Enum):
    """The states of a letter."""

    DONE = "d"
    RUNNING = "r"
    WAITING = "w"


class Country(Base):
    """Country of an account."""

    __tablename__ = "countries"
    code: Mapped[str] = mapped_column(String(2), primary_key=True)


class Account(Base):
    """Account of a letter; each letter needs its own."""

    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    country: Mapped[str] = mapped_column(ForeignKey("countries.code"))
    name: Mapped[str] = mapped_column(String(6), unique=True)


class Letter(Base):
    """A table that takes not just any row."""

    __tablename__ = "letters"
    __table_args__ = (sa.UniqueConstraint("kind", "number"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id"), unique=True)
    reply_to: Mapped[int | None] = mapped_column(ForeignKey("letters.id"))
    state: Mapped[State]
    kind: Mapped[str] = mapped_column(sa.Enum("postcard", "parcel", name="letter_kind"))
    number: Mapped[int]
    code: Mapped[str] = mapped_column(String(4), unique=True)
    ref: Mapped[uuid.UUID]
    body: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    price: Mapped[float]
    urgent: Mapped[bool | None]
    order: Mapped[str] = mapped_column(String(3))
    stamped: Mapped[int] = mapped_column(default=7)
    created_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True))
    run_at: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))
    finished_at: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))


def legacy(session: Session, limit: int) -> Sequence[Letter]:
    """Find, then mark."""
    free = sa.select(Letter).where(
        Letter.state == State.WAITING,
        Letter.run_at <= sa.func.now(),
        Letter.urgent == sa.false(),
    )
    found = session.scalars(free.order_by(Letter.created_at, Letter.id).limit(limit)).all()
    for letter in found:
        letter.state = State.RUNNING
    session.commit()
    return found


jobs = job_table(
    sa.Column("claim_token", String(32)),
    sa.Column("lease_until", sa.DateTime(timezone=True)),
)
leased = JobTable(
    jobs, state="processing", token="claim_token", lease="lease_until", order=jobs.c.created_at
)
unread = sa.Table(
    "unread",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("status", String(20), nullable=False),
    sa.Column("created_at", sa.DateTime, nullable=False),
)
checked = job_table(
    sa.Column("size", sa.Integer, sa.CheckConstraint("size BETWEEN 3 AND 9"), nullable=False),
    name="checked",
)


def cured(connection: sa.Connection, n: int = 10) -> list[int]:
    """Keys, claimed in a transaction that it does not commit."""
    return [job.id for job in claim_jobs(connection, jobs, n)]


def with_lease(engine: sa.Engine, limit: int) -> Any:
    """Rows that come back."""
    return claim_jobs(engine, leased, limit, lease=timedelta(seconds=1))


def find_and_mark(connection: sa.Connection, limit: int = 10) -> list[dict[str, Any]]:
    """Find, then mark, as dictionaries; the commit is left to the caller."""
    free = sa.select(jobs).where(jobs.c.processing == sa.false())
    found = connection.execute(free.order_by(jobs.c.id).limit(limit)).mappings().all()
    for row in found:
        connection.execute(jobs.update().where(jobs.c.id == row["id"]).values(processing=True))
    return [dict(row) for row in found]


started: list[int] = []


def late(connection: sa.Connection, worker: str) -> Any:
    """Find, then mark; the second worker takes longer to find its first jobs."""
    if worker == "race-2" and not started:
        started.append(1)
        time.sleep(0.4)
    return find_and_mark(connection)


def greedy(engine: sa.Engine, limit: int) -> Any:
    """One more than was asked for."""
    return claim_jobs(engine, jobs, limit + 1)


def forgetful(engine: sa.Engine) -> Any:
    """Claims two, and returns one."""
    return next(iter(claim_jobs(engine, jobs, 2)), None)


def one_by_one(make_session: sessionmaker[Session]) -> int:
    """Claim one job and return its key; raise if there is none."""
    with make_session.begin() as session:
        (job,) = claim_jobs(session, jobs, 1)
        return int(job.id)


def endless(connection: sa.Connection, limit: int) -> Any:
    """Return free jobs without marking them."""
    return connection.execute(sa.select(jobs.c.id).limit(limit)).scalars()


def never_ending(connection: sa.Connection) -> Iterator[Any]:
    """Yield the keys of jobs without end."""
    while True:
        yield from connection.execute(sa.select(jobs.c.id).limit(1)).scalars()


def blocked(engine: sa.Engine) -> None:
    """Lock the rows in one worker and never release them; record the process ids."""
    _record_processes()
    with engine.begin() as connection:
        connection.execute(jobs.update().values(processing=True))
        threading.Event().wait()


def hanging(engine: sa.Engine, limit: int) -> None:  # noqa: ARG001 - as claims are given
    """Never end; record the process ids."""
    _record_processes()
    threading.Event().wait()


def _record_processes() -> None:
    note = os.environ.get("RACERS_FOLDER")
    if note is not None:
        (Path(note) / f"{os.getpid()}-{os.getppid()}").touch()


def waiting_for_locks(connection: sa.Connection, limit: int = 5) -> Any:
    """Wait for locks of other workers, and hold them for a while."""
    free = sa.select(jobs.c.id).where(jobs.c.processing == sa.false())
    found = connection.execute(free.order_by(jobs.c.id).limit(limit).with_for_update()).scalars()
    keys = found.all()
    nap = "pg_sleep(0.03)" if connection.dialect.name == "postgresql" else "sleep(0.03)"
    connection.execute(sa.text(f"SELECT {nap}"))
    connection.execute(jobs.update().where(jobs.c.id.in_(keys)).values(processing=True))
    return keys


def with_file_lock(connection: sa.Connection) -> Any:
    """Has only one worker at a time find and mark, by a lock that no database knows of."""
    with Path(os.environ["RACERS_FOLDER"], "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = find_and_mark(connection)
        connection.commit()
        return found


def failing(connection: sa.Connection) -> None:
    """Asks for a column that is not there."""
    connection.exec_driver_sql("SELECT nonsuch FROM jobs")


def broken() -> None:
    """Has a bug."""
    raise TypeError("what a pity")


def telling() -> None:
    """Says where it works, password included."""
    raise ValueError(os.environ["DATABASE_URL"])


def leaving() -> None:
    """End the process."""
    raise SystemExit(7)


def blind(connection: sa.Connection) -> Any:
    """Find no jobs."""
    return connection.execute(sa.select(jobs.c.id).where(jobs.c.note == "nonsuch")).scalars()


def mute(engine: sa.Engine) -> Any:
    """Claim jobs, but return objects that are not jobs."""
    return [object() for _ in claim_jobs(engine, jobs, 5)]


def mistaken(engine: sa.Engine) -> Any:
    """Claim jobs, but return strings that are not keys."""
    return [f"job {job.id}" for job in claim_jobs(engine, jobs, 5)]


async def by_coroutine(session: AsyncSession, limit: int) -> Any:
    """Claim in the session that it is given."""
    return await aio.claim_jobs(session, jobs, limit)


async def by_generator(engine, n):  # type: ignore[no-untyped-def]
    """Yield jobs one by one, and say nothing of what is wanted."""
    for job in await aio.claim_jobs(engine, jobs, n):
        yield job


async def by_connection(connection: AsyncConnection) -> Any:
    """Leave the commit to the race."""
    return await aio.claim_jobs(connection, jobs, 3)


async def legacy_by_coroutine(sessions: async_sessionmaker[AsyncSession], limit: int) -> Any:
    """Find, then mark."""
    async with sessions() as session:
        free = sa.select(jobs).where(jobs.c.processing == sa.false()).limit(limit)
        found = (await session.execute(free)).all()
        taken = jobs.c.id.in_([job.id for job in found])
        await session.execute(jobs.update().where(taken).values(processing=True))
        await session.commit()
    return found


def strange(session: Session, tenant: str) -> Any:
    """Wants what only its author knows."""
    assert tenant == "north"
    return claim_jobs(session, jobs, 5)


def for_the_north(target: Any, session: Session) -> Any:
    """Call a function that needs a tenant."""
    return target(session, "north")


def of_its_own() -> Any:
    """Has an engine of its own, by the variable that many applications read."""
    return claim_jobs(sa.create_engine(os.environ["DATABASE_URL"]), jobs, 10)


def elsewhere() -> Any:
    """Has an engine of its own, whatever anybody says."""
    return claim_jobs(sa.create_engine(os.environ["RACERS_ELSEWHERE"]), jobs, 10)


class Repository:
    """A class whose method claims."""

    def __init__(self, db: Session, batch: int = 10) -> None:
        self.db = db
        self.batch = batch

    def take(self) -> Any:
        """Claim a batch."""
        return claim_jobs(self.db, jobs, self.batch)


def sized(number: int) -> dict[str, Any]:
    """Return the values that a row of the checked table needs."""
    return {"size": 3 + number % 7}


def all_sized(count: int) -> list[dict[str, Any]]:
    """Return the values of all rows of the checked table in one list."""
    return [{"size": 3 + number % 7} for number in range(count)]


def claim_checked(engine: sa.Engine, limit: int) -> Any:
    """Claims of the checked table."""
    return claim_jobs(engine, checked, limit)


only_elsewhere = sa.Table(
    "only_elsewhere",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tags", sa.ARRAY(sa.Integer)),
)
