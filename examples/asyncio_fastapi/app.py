"""A FastAPI application and its worker, on one table of PostgreSQL."""

import asyncio
import enum
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from typing import Any

from fastapi import FastAPI, HTTPException
from sqlalchemy import DateTime, Index, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from atomic_claim import Claim, ClaimLost, JobTable, aio

ENGINE = create_async_engine(os.environ["DATABASE_URL"])
SESSIONS = async_sessionmaker(ENGINE, expire_on_commit=False)
WORKER = f"{socket.gethostname()}:{os.getpid()}"
LEASE = timedelta(minutes=1)
LIMIT = 10
logger = logging.getLogger(__name__)


class Base(DeclarativeBase):
    """The models, whose times have a zone."""

    type_annotation_map = {datetime: DateTime(timezone=True)}  # noqa: RUF012 - SQLAlchemy's way


class Status(enum.Enum):
    """The states of a job."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Job(Base):
    """A mail to send."""

    __tablename__ = "jobs"
    __table_args__ = (  # as `atomic-claim migration` prints them
        Index(
            "jobs_claim_free",
            "created_at",
            "attempts",
            postgresql_where=text("status = 'WAITING'"),
        ),
        Index(
            "jobs_claim_expired",
            "lease_until",
            "attempts",
            postgresql_where=text("status = 'RUNNING'"),
        ),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    status: Mapped[Status] = mapped_column(default=Status.WAITING)
    payload: Mapped[dict[str, Any]] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    run_at: Mapped[datetime | None]
    worker: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    claim_token: Mapped[str | None]
    attempts: Mapped[int] = mapped_column(default=0)
    last_error: Mapped[str | None]


JOBS = JobTable(
    Job,
    state="status",
    free=Status.WAITING,
    claimed=Status.RUNNING,
    done=Status.DONE,
    failed=Status.FAILED,
    due="run_at",
    order="created_at",
    worker="worker",
    lease="lease_until",
    token="claim_token",  # noqa: S106 - a column's name
    attempts="attempts",
    max_attempts=5,
    error="last_error",
)


async def send(job: Job) -> None:
    """Do the work of one job; if it raises, the job is tried again later."""
    print("mail to", job.payload["to"], flush=True)


async def run(claim: Claim[Job], job: Job) -> None:
    """Run one job and end it."""
    try:
        try:
            await send(job)
        except Exception as error:  # noqa: BLE001 - a job may raise anything
            await aio.fail_jobs(SESSIONS, claim, [job], retry=True, error=error)
        else:
            await aio.complete_jobs(SESSIONS, claim, [job])
    except ClaimLost:
        logger.exception("another worker has job %s", job.id)


async def work(stopped: asyncio.Event) -> None:
    """Claim and run jobs until `stopped` is set; those in hand are finished."""
    while not stopped.is_set():
        try:
            claim = await aio.claim_jobs(SESSIONS, JOBS, LIMIT, lease=LEASE, worker=WORKER)
            if claim:
                async with aio.keep_claims(SESSIONS, claim):
                    await asyncio.gather(*(run(claim, job) for job in claim))
                continue
            await aio.sweep_jobs(SESSIONS, JOBS)
        except (SQLAlchemyError, OSError, ClaimLost):
            logger.exception("no jobs can be claimed now; trying again")
        with suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), timeout=1)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Create the table, and run the worker beside the application."""
    async with ENGINE.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    stopped = asyncio.Event()
    worker = asyncio.create_task(work(stopped))
    yield
    stopped.set()
    await worker
    await ENGINE.dispose()


app = FastAPI(lifespan=lifespan)


@app.post("/jobs", status_code=202)
async def add(payload: dict[str, Any]) -> uuid.UUID:
    """Add a job."""
    async with SESSIONS.begin() as session:
        job = Job(payload=payload)
        session.add(job)
    return job.id


@app.get("/jobs/{key}")
async def show(key: uuid.UUID) -> dict[str, Any]:
    """Tell what became of a job."""
    async with SESSIONS() as session:
        if (job := await session.get(Job, key)) is None:
            raise HTTPException(404)
    return {"status": job.status, "attempts": job.attempts, "last_error": job.last_error}
