"""Legacy job code as it is found in applications: none of it is safe for two workers.

Everything finds first and marks then. The comment above each function names its shape.
"""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Query, Session, mapped_column, sessionmaker


class Base(DeclarativeBase):
    """The application's tables."""


class Job(Base):
    """A job with a state."""

    __tablename__ = "jobs"
    __table_args__ = (sa.Index("jobs_state", "state", "place"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    queue: Mapped[str] = mapped_column(sa.String(20), default="default")
    state: Mapped[str] = mapped_column(sa.String(10), default="waiting")
    place: Mapped[int]
    owner: Mapped[str | None] = mapped_column(sa.String(20))
    lease_until: Mapped[Any] = mapped_column(sa.DateTime, nullable=True)
    claim_token: Mapped[str | None] = mapped_column(sa.String(32))


class Event(Base):
    """An event of an outbox; nothing says who is at it."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True)
    topic: Mapped[str] = mapped_column(sa.String(20), default="orders")
    published: Mapped[bool] = mapped_column(default=False)


class Mail(Base):
    """A mail to be sent, with the two columns that a lease needs."""

    __tablename__ = "mails"

    id: Mapped[int] = mapped_column(primary_key=True)
    address: Mapped[str] = mapped_column(sa.String(50), default="somebody")
    sent: Mapped[bool] = mapped_column(default=False)
    lease_until: Mapped[Any] = mapped_column(sa.DateTime, nullable=True)
    claim_token: Mapped[str | None] = mapped_column(sa.String(32))


class Message(Base):
    """A message of a queue from which what is taken is deleted."""

    __tablename__ = "messages"

    id: Mapped[int] = mapped_column(primary_key=True)
    payload: Mapped[str] = mapped_column(sa.String(50))


class Run(Base):
    """A delivery by a relay, recorded in a separate transaction."""

    __tablename__ = "runs"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


class Empty(Exception):
    """There is nothing to do."""


class Work:
    """The work: it writes down what it did, and may be killed before it has."""

    path: Path = Path(os.devnull)
    dies_at: int | None = None

    @classmethod
    def risk(cls) -> None:
        """Die, if it is time to."""
        if cls.dies_at is not None:
            cls.dies_at -= 1
            if cls.dies_at < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    @classmethod
    def run(cls, number: int) -> None:
        """Do a job."""
        cls.risk()
        with cls.path.open("a", encoding="ascii") as record:
            record.write(f"{number}\n")


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function properly, with `functools.wraps`, and count its calls."""

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        inner.calls += 1  # type: ignore[attr-defined]
        return function(*args, **kwargs)

    inner.calls = 0  # type: ignore[attr-defined]
    return inner


def careless(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function without `functools.wraps`."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


# A: one entity or None.
def claim_next(session: Session) -> Job | None:
    """Mark the next job and commit."""
    job = session.query(Job).filter(Job.state == "waiting").order_by(Job.place).first()
    if job is None:
        return None
    job.state = "running"
    session.commit()
    return job


# B: one payload, or an exception.
class Channel:
    """A queue as a message library has it."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def _get(self, queue: str) -> dict[str, Any]:
        job = (
            self.session.query(Job)
            .filter(Job.state == "waiting", Job.queue == queue)
            .order_by(Job.place)
            .first()
        )
        try:
            if job is None:
                raise Empty
            job.state = "running"
            return {"id": job.id, "queue": job.queue}
        finally:
            self.session.commit()


# C: a batch, by a repository with decorators.
class Repository:
    """A repository as services have it."""

    batch_size = 10

    def __init__(self, session: Session, name: str = "somebody") -> None:
        self.session = session
        self.name = name

    @logged
    @careless
    def claim_batch(self, limit: int = 5, *, queue: str | None = None) -> list[Job]:
        """Up to `limit` jobs."""
        query = sa.select(Job).where(Job.state == "waiting")
        if queue is not None:
            query = query.where(Job.queue == queue)
        jobs = list(self.session.scalars(query.order_by(Job.place).limit(limit)))
        for job in jobs:
            job.state = "running"
            job.owner = self.name
        self.session.commit()
        return jobs

    @classmethod
    def claim_ids(cls, maker: sessionmaker[Session]) -> list[int]:
        """Claim a batch of the class's size in a new session and return the ids."""
        with maker() as session, session.begin():
            query = sa.select(Job).where(Job.state == "waiting").order_by(Job.place)
            jobs = session.scalars(query.limit(cls.batch_size)).all()
            for job in jobs:
                job.state = "running"
            return [job.id for job in jobs]

    @staticmethod
    def claim_rows(engine: sa.Engine, count: int) -> list[Any]:
        """Rows by Core, in two statements."""
        table = Job.__table__
        with engine.begin() as connection:
            query = sa.select(table).where(table.c.state == "waiting").order_by(table.c.place)
            rows = connection.execute(query.limit(count)).all()
            keys = [row.id for row in rows]
            mark = sa.update(table).where(table.c.id.in_(keys))
            connection.execute(mark.values(state="running"))
        return list(rows)


# D: the find and the mark are two calls.
class Store:
    """A job store as schedulers have it."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def get_due_jobs(self) -> Query[Job]:
        """Return a query for the jobs to run; it is executed when the caller iterates."""
        return self.session.query(Job).filter(Job.state == "waiting").order_by(Job.place)

    def update_job(self, job: Job) -> None:
        """Mark a job, some time later."""
        job.state = "running"
        self.session.commit()


# E: finds, works and marks in one transaction.
def relay(session: Session, batch: int = 10) -> int:
    """Publish events."""
    events = (
        session.query(Event)
        .filter(Event.published.is_(False))
        .order_by(Event.id)
        .limit(batch)
        .all()
    )
    for event in events:
        Work.risk()
        session.add(Run(number=event.id))
        event.published = True
    session.commit()
    return len(events)


# E, by Core.
def relay_rows(engine: sa.Engine, batch: int = 10) -> int:
    """Publish events, in a connection's transaction."""
    table = Event.__table__
    with engine.begin() as connection:
        query = sa.select(table.c.id).where(table.c.published == sa.false())
        keys = connection.scalars(query.order_by(table.c.id).limit(batch)).all()
        for key in keys:
            Work.risk()
            connection.execute(sa.insert(Run).values(number=key))
        mark = sa.update(table).where(table.c.id == sa.bindparam("key"))
        if keys:
            connection.execute(mark.values(published=True), [{"key": key} for key in keys])
    return len(keys)


# F: loads all, commits row by row.
def send_all(session: Session) -> int:
    """Send all mails."""
    mails = session.query(Mail).filter_by(sent=False).order_by(Mail.id).all()
    for mail in mails:
        Work.run(mail.id)
        mail.sent = True
        session.commit()
    return len(mails)


# F, with an intermediate state and a batch.
def work_all(session: Session, batch: int = 50) -> int:
    """Work on a batch of jobs one by one."""
    query = sa.select(Job).where(Job.state == "waiting", Job.queue == "default")
    jobs = session.scalars(query.order_by(Job.place).limit(batch)).all()
    for job in jobs:
        Work.run(job.id)
        job.state = "done"
        session.commit()
    return len(jobs)


# G: takes by deleting.
def pop(session: Session) -> str:
    """Remove the next message and return its payload."""
    message = session.query(Message).order_by(Message.id).first()
    if message is None:
        raise Empty
    payload = message.payload
    session.delete(message)
    session.commit()
    return payload


# The same, as coroutines.
async def claim_next_async(session: AsyncSession) -> Job | None:
    """Mark the next job, commit and refresh it (shape A)."""
    query = sa.select(Job).where(Job.state == "waiting").order_by(Job.place).limit(1)
    job = (await session.execute(query)).scalar_one_or_none()
    if job is None:
        return None
    job.state = "running"
    await session.commit()
    await session.refresh(job)
    return job


class AsyncRepository:
    """A repository of coroutines."""

    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def get(self, queue: str) -> int:
        """B: one id, or an exception."""
        query = sa.select(Job).where(Job.state == "waiting", Job.queue == queue)
        job = await self.session.scalar(query.order_by(Job.place).limit(1))
        if job is None:
            raise Empty
        job.state = "running"
        found = job.id
        await self.session.commit()
        return found

    async def claim_batch(self, limit: int) -> list[Job]:
        """C: a batch."""
        query = sa.select(Job).where(Job.state == "waiting").order_by(Job.place).limit(limit)
        jobs = list((await self.session.scalars(query)).all())
        for job in jobs:
            job.state = "running"
        await self.session.commit()
        return jobs

    async def get_due_jobs(self) -> list[Job]:
        """D: the jobs to run; the caller marks them."""
        query = sa.select(Job).where(Job.state == "waiting").order_by(Job.place)
        return list((await self.session.scalars(query)).all())


async def relay_async(session: AsyncSession, batch: int = 10) -> int:
    """E: publish events."""
    async with session.begin():
        query = sa.select(Event).where(Event.published.is_(False)).order_by(Event.id).limit(batch)
        events = (await session.scalars(query)).all()
        for event in events:
            Work.risk()
            session.add(Run(number=event.id))
            event.published = True
    return len(events)


async def send_all_async(session: AsyncSession) -> int:
    """F: send all mails."""
    query = sa.select(Mail).where(Mail.sent.is_(False)).order_by(Mail.id)
    mails = (await session.scalars(query)).all()
    for mail in mails:
        Work.run(mail.id)
        mail.sent = True
        await session.commit()
    return len(mails)


async def pop_async(engine: AsyncEngine) -> str:
    """G: the next message's payload, by Core."""
    table = Message.__table__
    async with engine.begin() as connection:
        row = (await connection.execute(sa.select(table).order_by(table.c.id).limit(1))).first()
        if row is None:
            raise Empty
        await connection.execute(sa.delete(table).where(table.c.id == row.id))
    return str(row.payload)
