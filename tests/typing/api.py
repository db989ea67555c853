"""Uses of the public names as a type checker sees them; nothing here is ever run.

A line that must be refused is ignored by its error's name: were it accepted, mypy would complain
of an ignore that is not needed.
"""

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, assert_type

import sqlalchemy as sa
from sqlalchemy import Column, Connection, Engine, Table
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)

import atomic_claim
from atomic_claim import (
    AmbiguousTable,
    Claim,
    ClaimConflict,
    ClaimError,
    ClaimLost,
    ClaimStatement,
    JobTable,
    Patch,
    PatchError,
    UnsupportedDialect,
    aio,
    claim_jobs,
    claim_reads,
    claim_statement,
    claims,
    complete_jobs,
    extend_jobs,
    fail_jobs,
    keep_claims,
    lock_reads,
    patch_claims,
    release_jobs,
    sweep_jobs,
)
from atomic_claim.files import (
    ClaimedFile,
    claim_files,
    complete_files,
    fail_files,
    put_file,
    recover_files,
    release_files,
    touch_worker,
)
from atomic_claim.testing import Race, race


class Base(DeclarativeBase):
    """The mapping."""


class Job(Base):
    """A job."""

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    processing: Mapped[bool] = mapped_column(default=False)
    queue: Mapped[str]


jobs = Table("jobs", sa.MetaData(), Column("id", sa.Integer, primary_key=True))
minutes = timedelta(minutes=5)


def entities(
    session: Session, scoped: scoped_session[Session], maker: sessionmaker[Session]
) -> None:
    """By whatever makes sessions a mapped class gives its entities."""
    assert_type(claim_jobs(session, Job), Claim[Job])
    assert_type(claim_jobs(scoped, Job, 10), Claim[Job])
    assert_type(claim_jobs(maker, Job, limit=10), Claim[Job])
    claim = claim_jobs(
        session,
        Job,
        10,
        where=[Job.queue == "mail", Job.id > 3],
        order_by=Job.id.desc(),
        values={Job.queue: "post", "processing": True},
        worker="alice",
        lease=minutes,
    )
    assert_type(claim, Claim[Job])
    for job in claim:
        assert_type(job, Job)
        assert_type(job.queue, str)


def parts(claim: Claim[Job]) -> None:
    """Use a claim as a sequence of its jobs, and a slice of it as a claim."""
    assert_type(claim[0], Job)
    assert_type(claim[1:], Claim[Job])
    assert_type(claim[::2][0], Job)
    as_sequence: Sequence[Job] = claim
    assert_type(claim.table, JobTable)
    assert_type(claim.keys, tuple[tuple[Any, ...], ...])
    assert_type(claim.token, str | None)
    assert_type(claim.worker, str | None)
    assert_type(claim.lease, timedelta | None)
    assert_type(claim.ticket(as_sequence[0]), dict[str, Any])
    assert_type(json.dumps(claim.ticket(claim[0])), str)


def rows(
    engine: Engine, connection: Connection, session: Session, maker: sessionmaker[Session]
) -> None:
    """Claim rows, whose columns are unknown, by a table, an engine or a connection."""
    assert_type(claim_jobs(engine, jobs), Claim[Any])
    assert_type(claim_jobs(connection, jobs, 3), Claim[Any])
    assert_type(claim_jobs(session, jobs), Claim[Any])
    assert_type(claim_jobs(maker, jobs), Claim[Any])
    assert_type(claim_jobs(engine, Job), Claim[Any])
    assert_type(claim_jobs(engine, JobTable(jobs, state="processing")), Claim[Any])
    assert_type(claim_jobs(session, JobTable.infer(Job)), Claim[Any])


def declarations() -> None:
    """Declare a `JobTable` by names, columns, attributes and expressions."""
    declared = JobTable(
        Job,
        state=Job.processing,
        free=False,
        claimed={Job.processing: True, "claimed_at": sa.func.now()},
        done={"done_at": sa.func.now()},
        failed=True,
        withdrawn={"cancelled": True},
        released={"processing": False},
        due="run_at",
        order=[jobs.c.priority.desc(), "created_at"],
        worker="worker",
        token=jobs.c.claim_token,
        lease="lease_until",
        attempts="attempts",
        max_attempts=3,
        error="last_error",
        stamps=("updated_at",),
        naive_times="utc",
        text_times="%Y-%m-%dT%H:%M:%fZ",
        null_is_free=True,
        unleased=timedelta(hours=1),
    )
    assert_type(declared, JobTable)
    assert_type(JobTable.infer(jobs), JobTable)


def statements(session: Session) -> None:
    """Execute the construct like any other."""
    statement = claim_statement(Job, 10, where=Job.queue == "mail", worker="alice", lease=minutes)
    assert_type(statement, ClaimStatement)
    session.scalars(statement).all()
    session.execute(claim_statement(jobs)).all()


def endings(engine: Engine, session: Session, claim: Claim[Job]) -> None:
    """End a claim, a slice of it or that of a ticket in the four ways."""
    ticket = claim.ticket(claim[0])
    assert_type(complete_jobs(engine, claim), int)
    assert_type(complete_jobs(session, claim[:2], unfenced=True), int)
    assert_type(complete_jobs(engine, Claim.from_ticket(jobs, ticket)), int)
    assert_type(complete_jobs(session, claim, [claim[0], claim[1]]), int)
    assert_type(fail_jobs(session, claim, retry=True, error=ValueError("no")), int)
    assert_type(fail_jobs(session, claim, claim[:1], retry=minutes, error="no"), int)
    assert_type(release_jobs(session, claim, (job for job in claim)), int)
    assert_type(extend_jobs(engine, claim, lease=minutes), int)
    assert_type(sweep_jobs(engine, Job), int)
    with keep_claims(engine, claim, every=minutes, on_lost=print) as keeper:
        keeper.check()
        assert_type(keeper.lost, tuple[tuple[Any, ...], ...])


def errors(engine: Engine) -> None:
    """One class catches all errors; a lost claim knows its keys."""
    try:
        claim_jobs(engine, Job)
    except ClaimLost as lost:
        assert_type(lost.keys, tuple[tuple[Any, ...], ...])
    except (AmbiguousTable, ClaimConflict, PatchError, UnsupportedDialect) as error:
        as_claim_error: ClaimError = error
        raise as_claim_error from None


@claims(Job, session="session", limit="limit", lease=minutes)
def decorated(session: Session, limit: int = 5) -> list[Job]:
    """Return jobs; the decorator keeps the function's type."""
    return list(session.scalars(sa.select(Job).limit(limit)))


def a_name_that_is_none() -> None:
    """Look up an unknown name, which is a type error although names are loaded lazily."""
    atomic_claim.patch_claim  # type: ignore[attr-defined]  # noqa: B018


def patches(session: Session, maker: sessionmaker[Session]) -> None:
    """Every kind of patch is a `Patch`, and a context manager."""
    assert_type(decorated(session), list[Job])
    patch = patch_claims(
        "legacy.jobs:Repository.claim",
        Job,
        session=maker,
        limit=lambda call: call["limit"],
        where=Job.queue == "mail",
        order_by="-id",
        values={"queue": "post"},
        worker="alice",
        returns="id",
        empty=LookupError,
        when="not id",
        commit=True,
    )
    assert_type(patch, Patch)
    assert_type(patch.calls, int)
    assert_type(patch.claimed, int)
    assert_type(patch.passed_through, int)
    patch.undo()
    with lock_reads(decorated, jobs) as locked:
        assert_type(locked, Patch)
    with claim_reads(decorated, Job, lease=minutes, worker="alice", at_most_once=True) as claimed:
        assert_type(claimed, Patch)


async def asynchronous(
    session: AsyncSession,
    scoped: async_scoped_session[AsyncSession],
    maker: async_sessionmaker[AsyncSession],
    engine: AsyncEngine,
    connection: AsyncConnection,
) -> None:
    """Call the asynchronous functions with the asynchronous binds."""
    assert_type(await aio.claim_jobs(session, Job, 3, where=Job.queue == "mail"), Claim[Job])
    assert_type(await aio.claim_jobs(scoped, Job), Claim[Job])
    assert_type(await aio.claim_jobs(maker, Job), Claim[Job])
    assert_type(await aio.claim_jobs(connection, jobs), Claim[Any])
    claim = await aio.claim_jobs(engine, jobs, worker="alice", lease=minutes)
    assert_type(claim, Claim[Any])
    assert_type(await aio.complete_jobs(session, claim), int)
    assert_type(await aio.fail_jobs(session, claim[:1], retry=minutes), int)
    assert_type(await aio.release_jobs(engine, claim), int)
    assert_type(await aio.extend_jobs(engine, claim), int)
    assert_type(await aio.sweep_jobs(engine, Job), int)
    assert_type(await aio.requeue_jobs(engine, Job, limit=3), int)
    async with aio.keep_claims(engine, claim) as keeper:
        keeper.check()


def directory(file: ClaimedFile) -> None:
    """Call the functions of directory queues with paths and strings, one file or several."""
    found = claim_files(3, waiting="waiting", processing=Path("processing"), worker="w1", key=len)
    assert_type(found, list[ClaimedFile])
    assert_type(put_file(Path("waiting"), "a", b"x"), Path)
    assert_type(complete_files(found), int)
    assert_type(complete_files(file, done="done"), int)
    assert_type(release_files(found[:1]), int)
    assert_type(fail_files(file, ValueError("no"), retry=True), int)
    assert_type(fail_files(file, "no", retry=True, max_attempts=3), int)
    recovered = recover_files(
        waiting="waiting", processing="processing", older_than=minutes, max_attempts=3, worker="w1"
    )
    assert_type(recovered, list[Path])
    recover_files(waiting=Path("waiting"), processing=Path("processing"), older_than=0.5)
    touch_worker("processing")
    assert_type(file.read_bytes(), bytes)
    claim_files("3", waiting="waiting", processing="processing")  # type: ignore[arg-type]
    complete_files("processing/w1/a")  # type: ignore[arg-type]


def proof() -> None:
    """Run a race by names or by objects; its figures are numbers."""
    found = race("app.jobs:claim", table="app.models:Job", url="sqlite:///jobs.db", limit=5)
    assert_type(found, Race)
    assert_type(found.duplicates, int)
    assert_type(found.p99, float)
    assert_type(found.blocked, float | None)
    assert_type(race(proof, table=Job, patches=Path("pyproject.toml")).exact, bool)
    race("app.jobs:claim")  # type: ignore[call-arg]
    race("app.jobs:claim", table=jobs)  # type: ignore[arg-type]
    found.killed = 3  # type: ignore[misc]


async def refused(engine: Engine, session: AsyncSession, claim: Claim[Job]) -> None:
    """Make the errors that a type checker finds before the program runs."""
    claim_jobs(engine, Job, "3")  # type: ignore[call-overload]
    claim_jobs(engine, Job, lease=5)  # type: ignore[call-overload]
    claim_jobs(engine, Job, 3, Job.id > 3)  # type: ignore[call-overload]
    claim_jobs("sqlite://", Job)  # type: ignore[call-overload]
    claim_jobs(session, Job)  # type: ignore[call-overload]
    await aio.claim_jobs(engine, Job)  # type: ignore[call-overload]
    claim_statement(Job, "3")  # type: ignore[arg-type]
    complete_jobs(engine, [claim[0]])  # type: ignore[arg-type]
    extend_jobs(engine, claim, lease=5)  # type: ignore[arg-type]
    JobTable(Job, naive_times="local")  # type: ignore[arg-type]
    with keep_claims(session, claim):  # type: ignore[arg-type]
        pass
