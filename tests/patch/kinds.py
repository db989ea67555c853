"""Legacy code of less common kinds: generators, context managers, partial functions, properties.

All of it claims waiting jobs of `tests.patch.legacy`, and none of it is safe for two workers.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker

from tests.patch.legacy import Job, Mail, Work

WAITING = sa.select(Job).where(Job.state == "waiting").order_by(Job.place)


def find(session: Session) -> Job | None:
    """Find the next job."""
    return session.scalars(WAITING.limit(1)).first()


def save(session: Session, job: Job) -> None:
    """Mark the job and commit."""
    job.state = "running"
    session.commit()


def stream(session: Session) -> Iterator[Job]:
    """One job after another, each committed before it is yielded."""
    while (job := find(session)) is not None:
        job.state = "running"
        session.commit()
        yield job


def stream_batch(session: Session, size: int) -> Iterator[Job]:
    """Yield the jobs of a batch, each after its own commit."""
    for job in session.scalars(WAITING.limit(size)).all():
        job.state = "running"
        session.commit()
        yield job


def stream_pages(session: Session, size: int) -> Iterator[Job]:
    """All jobs, a page at a time."""
    while jobs := session.scalars(WAITING.limit(size)).all():
        for job in jobs:
            job.state = "running"
        session.commit()
        yield from jobs


def stream_whole(session: Session) -> Iterator[Job]:
    """One job after another, each marked as done once its consumer asks for the next."""
    while (job := find(session)) is not None:
        job.state = "running"
        session.commit()
        yield job
        job.state = "done"
        session.commit()


def stream_forever(session: Session) -> Iterator[Job]:
    """Yield jobs forever, and look again when none is waiting."""
    while True:
        job = find(session)
        if job is not None:
            save(session, job)
            yield job


@contextmanager
def next_job(session: Session) -> Iterator[Job | None]:
    """One job as a context."""
    job = find(session)
    if job is None:
        yield None
        return
    job.state = "running"
    session.commit()
    yield job


@contextmanager
def whole_job(session: Session) -> Iterator[Job | None]:
    """One job as a context that ends it."""
    job = find(session)
    yield job
    if job is not None:
        job.state = "done"
        session.commit()


@asynccontextmanager
async def whole_job_async(session: AsyncSession) -> AsyncIterator[Job | None]:
    """Yield one job and end it with the asynchronous context."""
    job = await session.scalar(WAITING.limit(1))
    yield job
    if job is not None:
        job.state = "done"
        await session.commit()


async def stream_async(session: AsyncSession) -> AsyncIterator[Job]:
    """One job after another."""
    while (job := await session.scalar(WAITING.limit(1))) is not None:
        job.state = "running"
        await session.commit()
        yield job


def claim_of(session: Session, queue: str) -> int | None:
    """Claim the next job of a queue and return its id."""
    job = session.scalars(WAITING.where(Job.queue == queue).limit(1)).first()
    if job is None:
        return None
    job.state = "running"
    session.commit()
    return job.id


claim_default = partial(claim_of, queue="default")


class Claimer:
    """An object that is called."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, session: Session) -> list[Job]:
        """Claim a batch."""
        jobs = list(session.scalars(WAITING.limit(self.size)))
        for job in jobs:
            job.state = "running"
        session.commit()
        return jobs


claimer = Claimer(3)


class AsyncClaimer:
    """An object whose call is a coroutine."""

    async def __call__(self, session: AsyncSession) -> Job | None:
        """Claim the next job."""
        job: Job | None = await session.scalar(WAITING.limit(1))
        if job is not None:
            job.state = "running"
            await session.commit()
        return job


async_claimer = AsyncClaimer()


@contextmanager
def transaction(session: Session) -> Iterator[None]:
    """Commit at the end of the block."""
    yield
    session.commit()


class Service:
    """A service whose methods help each other."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def _save(self, job: Job) -> None:
        job.state = "running"
        self._flush()

    def _flush(self) -> None:
        self.session.commit()

    def by_method(self) -> Job | None:
        """Claim a job; the commit is two method calls away."""
        job = find(self.session)
        if job is not None:
            self._save(job)
        return job

    def by_function(self) -> Job | None:
        """Claim a job; the commit is in a function that takes the session."""
        job = find(self.session)
        if job is not None:
            save(self.session, job)
        return job

    def by_context(self) -> Job | None:
        """Claim a job; the commit is in a context manager."""
        with transaction(self.session):
            job = find(self.session)
            if job is not None:
                job.state = "running"
        return job

    @property
    def upcoming(self) -> Job | None:
        """The next job."""
        job = find(self.session)
        if job is not None:
            save(self.session, job)
        return job

    @contextmanager
    def scope(self) -> Iterator[Session]:
        """Yield a new session that commits at the end of the block."""
        with sessionmaker(self.session.get_bind()).begin() as session:
            yield session

    def by_scope(self) -> int | None:
        """Claim a job and return its id; the commit is in a scope that is a method."""
        with self.scope() as session:
            job = find(session)
            if job is None:
                return None
            job.state = "running"
            return job.id


def work_if_free(session: Session, size: int) -> int:
    """F, which marks a row only if it is still free."""
    keys = session.scalars(WAITING.with_only_columns(Job.id).limit(size)).all()
    for key in keys:
        mark = sa.update(Job).where(Job.id == key, Job.state == "waiting").values(state="running")
        taken: Any = session.execute(mark)
        session.commit()
        if taken.rowcount == 0:
            continue
        Work.run(key)
        session.execute(sa.update(Job).where(Job.id == key).values(state="done"))
        session.commit()
    return len(keys)


def send_if_unsent(session: Session) -> int:
    """F, by Core, which marks before it sends."""
    table = Mail.__table__
    keys = session.scalars(sa.select(table.c.id).where(table.c.sent.is_(False))).all()
    for key in keys:
        mark = sa.update(table).where(table.c.id == key, table.c.sent.is_(False))
        taken: Any = session.connection().execute(mark.values(sent=True))
        session.commit()
        if taken.rowcount:
            Work.run(key)
    return len(keys)


def looks_again(session: Session) -> int:
    """F, which looks at the state of each row again, in Python."""
    jobs = session.scalars(WAITING).all()
    for job in jobs:
        if job.state == "waiting":
            job.state = "done"
            session.commit()
    return len(jobs)
