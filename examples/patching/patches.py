"""Legacy code of eight kinds, and the declarations that make it safe; nothing of it is edited.

    python examples/patching/patches.py postgresql+psycopg://user@host/database
    python examples/patching/patches.py sqlite:///jobs.sqlite

Each kind is a pair of functions: what the application has, and what patches it.
"""

import argparse
import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
import sqlmodel
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from atomic_claim import JobTable, Patch, claim_reads, lock_reads, patch_claims


class Base(DeclarativeBase):
    """The application's tables."""


class Job(Base):
    """A job as Payload keeps it."""

    __tablename__ = "payload_jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    queue: Mapped[str] = mapped_column(sa.String(20), default="default")
    processing: Mapped[bool] = mapped_column(default=False)
    completed_at: Mapped[datetime | None]
    has_error: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(server_default=sa.func.now())


class Event(Base):
    """An event of an outbox."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str] = mapped_column(sa.String(50))
    published_at: Mapped[datetime | None]


class Mail(Base):
    """A mail to be sent, with the two columns of a lease added."""

    __tablename__ = "mails"

    id: Mapped[int] = mapped_column(primary_key=True)
    sent: Mapped[bool] = mapped_column(default=False)
    lease_until: Mapped[datetime | None]
    claim_token: Mapped[str | None] = mapped_column(sa.String(32))


# 1. A Payload-style function: it finds and updates in a loop, serves plain updates by id as well,
#    and has an adapter behind which it may be replaced.


def update_jobs(
    db: Session,
    *,
    id: int | None = None,  # noqa: A002 - the application's name
    data: Mapping[str, Any],
    limit: int = 0,
    where: Mapping[str, Any] | None = None,
    sort: str = "created_at",
    returning: bool = True,
) -> list[Job] | None:
    """Update one job by its id, or the first ones that a filter finds."""
    query = sa.select(Job)
    if id is not None:
        query = query.where(Job.id == id)
    for name, condition in (where or {}).items():
        query = query.where(getattr(Job, name) == condition["equals"])
    column = getattr(Job, sort.lstrip("-"))
    query = query.order_by(column.desc() if sort.startswith("-") else column)
    jobs = list(db.scalars(query.limit(limit) if limit else query))
    for job in jobs:
        for name, value in data.items():
            setattr(job, name, value)
    db.commit()
    return jobs if returning else None


def run_jobs(db: Session, limit: int = 10) -> list[int]:
    """Its caller: claims, works, and completes each job by its id."""
    where = {"processing": {"equals": False}, "queue": {"equals": "default"}}
    jobs = update_jobs(db, data={"processing": True}, limit=limit, where=where) or []
    for job in jobs:
        update_jobs(db, id=job.id, data={"processing": False, "completed_at": datetime(2024, 1, 1)})  # noqa: DTZ001
    return [job.id for job in jobs]


def patch_payload() -> Patch:
    """Patch the calls without an id; a call with one goes to the original."""
    return patch_claims(
        update_jobs,
        Job,
        session="db",
        when=lambda call: call.id is None,
        where="where",
        order_by="sort",
        values="data",
        limit=lambda call: call.limit or None,
        returns=lambda jobs, call: jobs if call.returning else None,
        commit=True,
    )


# 2. A worker of a Flask application.

flask_db = SQLAlchemy()


class FlaskJob(flask_db.Model):  # type: ignore[name-defined,misc]
    """A job of the Flask application."""

    __tablename__ = "flask_jobs"

    id = flask_db.Column(flask_db.Integer, primary_key=True)
    processing = flask_db.Column(flask_db.Boolean, nullable=False, default=False)


def next_flask_job() -> Any:
    """Claim the next job with the application's own session."""
    job = FlaskJob.query.filter_by(processing=False).order_by(FlaskJob.id).first()
    if job is not None:
        job.processing = True
        flask_db.session.commit()
    return job


def patch_flask() -> Patch:
    """Patch with the extension's session, in which the function commits."""
    return patch_claims(next_flask_job, FlaskJob, session=flask_db.session, commit=True)


# 3. A worker with SQLModel.


class Task(sqlmodel.SQLModel, table=True):
    """A task."""

    __tablename__ = "tasks"

    id: int | None = sqlmodel.Field(default=None, primary_key=True)
    status: str = sqlmodel.Field(default="pending", max_length=10)


def take_task(session: sqlmodel.Session) -> int | None:
    """Claim the next task and return its id."""
    task = session.exec(sqlmodel.select(Task).where(Task.status == "pending")).first()
    if task is None:
        return None
    task.status = "running"
    session.add(task)
    session.commit()
    return task.id


tasks = JobTable(Task, state="status", free="pending", claimed="running", done="done")


def patch_sqlmodel() -> Patch:
    """Patch a function that returns the id."""
    return patch_claims(take_task, tasks, returns="id", commit=True)


# 4. A repository of the 1.x days, whose Query the caller reads, and marks later.


class Jobs:
    """A store of jobs."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.batch = 2

    def due(self) -> Any:
        """Return a query for the jobs to run; it is executed when the caller iterates."""
        return self.session.query(Job).filter_by(processing=False).limit(self.batch)

    def mark(self, job: Job) -> None:
        """Mark a job as running."""
        job.processing = True
        self.session.commit()


def patch_query() -> Patch:
    """Patch the find, which claims and commits; the later mark writes the same values again."""
    return patch_claims(Jobs.due, Job, session="self.session", limit="self.batch", commit=True)


# 5. A coroutine.


async def claim_async(session: AsyncSession, limit: int) -> list[Job]:
    """Claim a batch of jobs."""
    query = sa.select(Job).where(Job.processing.is_(False)).order_by(Job.id).limit(limit)
    jobs = list((await session.scalars(query)).all())
    for job in jobs:
        job.processing = True
    await session.commit()
    return jobs


def patch_async() -> Patch:
    """Patch a coroutine function, which remains one."""
    return patch_claims(claim_async, Job, limit="limit", commit=True)


# 6. An outbox relay: finds, works and marks in one transaction, and has no claimed state.


def relay(session: Session, publish: Callable[[str], Any]) -> int:
    """Publish what is not yet published."""
    query = sa.select(Event).where(Event.published_at.is_(None)).order_by(Event.id).limit(10)
    events = session.scalars(query).all()
    for event in events:
        publish(event.body)
        event.published_at = datetime(2024, 1, 1)  # noqa: DTZ001 - the column is without a zone
    session.commit()
    return len(events)


def patch_relay() -> Patch:
    """Lock the rows of the relay's SELECT; the relay runs as it is."""
    return lock_reads(relay, Event)


# 7. A mail queue: loads all, and commits mail by mail.


def send_all(session: Session, send: Callable[[int], Any]) -> int:
    """Send all mails."""
    mails = session.query(Mail).filter_by(sent=False).all()
    for mail in mails:
        send(mail.id)
        mail.sent = True
        session.commit()
    return len(mails)


mail_table = JobTable(
    Mail,
    state="sent",
    lease="lease_until",
    token="claim_token",  # noqa: S106 - a column's name
    naive_times="utc",
)


def patch_mails() -> Patch:
    """Claim the mails that the function reads; the function runs as it is."""
    return claim_reads(send_all, mail_table, lease=timedelta(minutes=5))


# 8. A function that other modules have imported long before: their names are patched, too.


def claim_early(session: Session) -> Job | None:
    """Claim the next job."""
    job = session.query(Job).filter(Job.processing.is_(False)).order_by(Job.id).first()
    if job is not None:
        job.processing = True
        session.commit()
    return job


imported_early = claim_early


def patch_early() -> Patch:
    """One line for all of its names."""
    return patch_claims("examples.patching.patches:claim_early", Job, commit=True)


def main(url: str) -> None:
    """Show each of them once, in tables that are dropped again."""
    engine = sa.create_engine(url)
    try:
        for number, example in enumerate(EXAMPLES, 1):
            print(f"{number}. {example.__name__}: {example(engine)}")
    finally:
        Base.metadata.drop_all(engine)
        sqlmodel.SQLModel.metadata.drop_all(engine, tables=[Task.__table__])  # type: ignore[attr-defined]
        engine.dispose()


def fill(engine: sa.Engine, table: Any, count: int, **values: Any) -> None:
    """Recreate a table with rows to be done."""
    table.metadata.drop_all(engine, tables=[table])
    table.metadata.create_all(engine, tables=[table])
    with engine.begin() as connection:
        rows = [{"id": number, **values} for number in range(1, count + 1)]
        connection.execute(table.insert(), rows)


def ids(jobs: Any) -> list[int]:
    """Return the ids of the jobs."""
    return [job.id for job in jobs]


def both(patch: Callable[[], AbstractContextManager[Patch]], call: Callable[[], Any]) -> Any:
    """Call a patched function three times; return the results and the number of claimed jobs."""
    with patch() as patched:
        return [call(), call(), call()], patched.claimed


def payload(engine: sa.Engine) -> Any:
    """Two batches and an empty one; each job is completed by its id."""
    fill(engine, Job.__table__, 3)
    with Session(engine) as session:
        return both(patch_payload, lambda: run_jobs(session, 2))


def flask(engine: sa.Engine) -> Any:
    """Jobs by the application's session."""
    application = Flask("legacy")
    application.config["SQLALCHEMY_DATABASE_URI"] = engine.url
    flask_db.init_app(application)
    with application.app_context():
        fill(engine, FlaskJob.__table__, 2, processing=False)
        # Called by its name: what was handed out before the patch would be the original.
        found = both(patch_flask, lambda: next_flask_job())  # noqa: PLW0108
        keys = [None if job is None else job.id for job in found[0]]
        flask_db.session.remove()
        flask_db.drop_all()
        flask_db.engine.dispose()
    return keys, found[1]


def sqlmodel_tasks(engine: sa.Engine) -> Any:
    """Ids of tasks."""
    fill(engine, Task.__table__, 2, status="pending")  # type: ignore[attr-defined]
    with sqlmodel.Session(engine) as session:
        return both(patch_sqlmodel, lambda: take_task(session))


def query(engine: sa.Engine) -> Any:
    """Run the example of a Query that becomes a list."""
    fill(engine, Job.__table__, 3)
    with Session(engine) as session:
        jobs = Jobs(session)

        def take() -> list[int]:
            found = list(jobs.due())
            for job in found:
                jobs.mark(job)
            return ids(found)

        return both(patch_query, take)


def on_loop(engine: sa.Engine) -> Any:
    """Batches of a coroutine."""
    fill(engine, Job.__table__, 3)
    names = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}

    async def take() -> Any:
        url = engine.url.set(drivername=names[engine.dialect.name])
        async_engine = create_async_engine(url)
        async with AsyncSession(async_engine) as session:
            with patch_async() as patch:
                found = [ids(await claim_async(session, 2)) for _ in range(3)]
        await async_engine.dispose()
        return found, patch.claimed

    return asyncio.run(take())


def outbox(engine: sa.Engine) -> Any:
    """Events, published once."""
    fill(engine, Event.__table__, 12, body="hello")
    published: list[str] = []
    with Session(engine) as session:
        found = both(patch_relay, lambda: relay(session, published.append))
    return *found, len(published)


def mail_queue(engine: sa.Engine) -> Any:
    """Mails, sent once."""
    fill(engine, Mail.__table__, 4)
    sent: list[int] = []
    with Session(engine) as session:
        found = both(patch_mails, lambda: send_all(session, sent.append))
    return *found, sent


def early(engine: sa.Engine) -> Any:
    """Run the example of a name that was bound before the patch."""
    fill(engine, Job.__table__, 2)
    with Session(engine) as session:
        found = both(patch_early, lambda: imported_early(session))
        return [None if job is None else job.id for job in found[0]], found[1]


EXAMPLES: tuple[Callable[[sa.Engine], Any], ...] = (
    payload,
    flask,
    sqlmodel_tasks,
    query,
    on_loop,
    outbox,
    mail_queue,
    early,
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Legacy functions, patched.")
    parser.add_argument("url", help="the database, as an SQLAlchemy URL")
    main(parser.parse_args().url)
