"""Leases, fencing, and the four ways in which a claim ends."""

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Boolean, Column, DateTime, Integer, String, Text
from sqlalchemy.orm import Session, registry, sessionmaker

from atomic_claim import (
    Claim,
    ClaimError,
    ClaimLost,
    JobTable,
    claim_jobs,
    complete_jobs,
    extend_jobs,
    fail_jobs,
    release_jobs,
    sweep_jobs,
)
from tests.databases import Database
from tests.jobs import fill, ids, job_table, taken

LEASE = timedelta(minutes=5)
PAST = timedelta(hours=-1)


def leased_table() -> JobTable:
    """Build the usual job table with every column that the end of a claim can use."""
    table = job_table(
        Column("done_at", DateTime),
        Column("failed_at", DateTime),
        Column("run_at", DateTime),
        Column("worker", String(20)),
        Column("claim_token", String(32)),
        Column("lease_until", DateTime),
        Column("attempts", Integer, nullable=False, default=0),
        Column("last_error", Text),
    )
    return JobTable(
        table,
        state="processing",
        done={"done_at": sa.func.now()},
        failed={"failed_at": sa.func.now()},
        due="run_at",
        order="created_at",
        worker="worker",
        token="claim_token",
        lease="lease_until",
        attempts="attempts",
        max_attempts=3,
        error="last_error",
    )


def made(database: Database, count: int = 3) -> tuple[sa.Engine, JobTable]:
    """Create an engine and a table with `count` free jobs."""
    engine, jobs = database.engine(), leased_table()
    fill(engine, jobs.table, count)
    return engine, jobs


def row(engine: sa.Engine, jobs: JobTable, number: int) -> Any:
    """Return the committed state of a row."""
    with engine.connect() as connection:
        return connection.execute(sa.select(jobs.table).where(jobs.table.c.id == number)).one()


def expire(engine: sa.Engine, jobs: JobTable, *numbers: int) -> None:
    """Let the leases of these rows have run out an hour ago, by the database's own clock."""
    with engine.begin() as connection:
        past = jobs.now(jobs.lease, sa.literal(PAST.total_seconds(), sa.Float()))
        connection.execute(
            jobs.table.update().where(jobs.table.c.id.in_(numbers)).values(lease_until=past)
        )


def test_a_running_row_is_free_once_its_lease_is_over(database: Database) -> None:
    """A row is claimed again after its lease, with a new token, and not before."""
    engine, jobs = made(database, 2)
    first = claim_jobs(engine, jobs, 2, lease=LEASE, worker="w1")
    assert claim_jobs(engine, jobs, 2, lease=LEASE) == []
    expire(engine, jobs, 1)
    second = claim_jobs(engine, jobs, 2, lease=LEASE, worker="w2")
    assert ids(second) == [1]
    assert second.token != first.token
    assert (second[0].worker, second[0].attempts) == ("w2", 2)


def test_expired_and_free_rows_come_in_one_order(database: Database) -> None:
    """Expired rows take their place among the free ones, and the limit holds for both together."""
    engine, jobs = made(database, 6)
    claim_jobs(engine, jobs, 4, lease=LEASE)
    expire(engine, jobs, 2, 4)
    assert ids(claim_jobs(engine, jobs, 3, lease=LEASE)) == [2, 4, 5]
    assert ids(claim_jobs(engine, jobs, 3, lease=LEASE)) == [6]


def test_complete_marks_only_what_is_still_owned(database: Database) -> None:
    """A late worker's completion changes nothing of its successor's, and says so."""
    engine, jobs = made(database)
    late = claim_jobs(engine, jobs, 3, lease=LEASE)
    expire(engine, jobs, 2)
    claim_jobs(engine, jobs, 1, lease=LEASE, worker="successor")
    with pytest.raises(ClaimLost, match="1 of 3 jobs") as raised:
        complete_jobs(engine, late)
    assert raised.value.keys == ((2,),)
    assert row(engine, jobs, 1).done_at is not None
    assert row(engine, jobs, 3).done_at is not None
    successor = row(engine, jobs, 2)
    assert (successor.done_at, successor.worker) == (None, "successor")


def test_completed_rows_are_claimed_no_more(database: Database) -> None:
    """A completed row is neither running nor free, and a second completion is refused."""
    engine, jobs = made(database, 1)
    claim = claim_jobs(engine, jobs, lease=LEASE)
    assert complete_jobs(engine, claim) == 1
    assert claim_jobs(engine, jobs, 5) == []
    assert taken(engine, jobs.table) == []
    with pytest.raises(ClaimLost):
        complete_jobs(engine, claim)


def test_some_jobs_of_a_claim(database: Database) -> None:
    """Rows, keys, bare keys and slices say which of a claim's jobs are meant."""
    engine, jobs = made(database, 5)
    claim = claim_jobs(engine, jobs, 5, lease=LEASE)
    complete_jobs(engine, claim, [claim[0]])
    complete_jobs(engine, claim, [(2,)])
    complete_jobs(engine, claim, [3])
    complete_jobs(engine, claim[3:])
    assert [row(engine, jobs, n).done_at is not None for n in range(1, 6)] == [True] * 5
    with pytest.raises(ClaimError, match="not one of the claim's"):
        complete_jobs(engine, claim, [99])


def test_fail_for_good(database: Database) -> None:
    """A failed row keeps its error and is claimed no more."""
    engine, jobs = made(database, 1)
    fail_jobs(engine, claim_jobs(engine, jobs, lease=LEASE), error=ValueError("no such user"))
    failed = row(engine, jobs, 1)
    assert failed.failed_at is not None
    assert failed.last_error == "no such user"
    assert claim_jobs(engine, jobs) == []


def test_fail_and_retry(database: Database) -> None:
    """A retried row is free, due later, and has had its attempt."""
    engine, jobs = made(database, 1)
    claim = claim_jobs(engine, jobs, lease=LEASE)
    fail_jobs(engine, claim, retry=timedelta(hours=1), error="later")
    waiting = row(engine, jobs, 1)
    assert (waiting.processing, waiting.attempts, waiting.failed_at) == (False, 1, None)
    assert claim_jobs(engine, jobs) == []
    with engine.begin() as connection:
        connection.execute(jobs.table.update().values(run_at=None))
    again = claim_jobs(engine, jobs, lease=LEASE)
    fail_jobs(engine, again, retry=timedelta(0))
    assert ids(claim_jobs(engine, jobs, lease=LEASE)) == [1]


def test_retry_backs_off(database: Database) -> None:
    """The pause doubles with every attempt, within its jitter; the last attempt ends the job."""
    engine, jobs = made(database, 1)
    pauses = []
    for _ in range(2):
        with engine.begin() as connection:
            connection.execute(jobs.table.update().values(run_at=None))
        fail_jobs(engine, claim_jobs(engine, jobs, lease=LEASE), retry=True)
        with engine.connect() as connection:
            now = connection.scalar(sa.select(jobs.now(jobs.due)))
            pauses.append((row(engine, jobs, 1).run_at - _naive(now)).total_seconds())
    for pause, expected in zip(pauses, [10, 20], strict=True):
        assert expected * 0.5 - 2 < pause < expected * 1.5 + 2
    with engine.begin() as connection:
        connection.execute(jobs.table.update().values(run_at=None))
    assert fail_jobs(engine, claim_jobs(engine, jobs, lease=LEASE), retry=True, error="last") == 1
    ended = row(engine, jobs, 1)
    assert (ended.processing, ended.attempts, ended.last_error) == (False, 3, "last")
    assert ended.failed_at is not None


def test_every_row_draws_its_own_pause(database: Database) -> None:
    """The rows of one batch do not come back together."""
    engine, jobs = made(database, 9)
    fail_jobs(engine, claim_jobs(engine, jobs, 9, lease=LEASE), retry=True)
    assert len({row(engine, jobs, number).run_at for number in range(1, 10)}) > 1


def _naive(value: Any) -> Any:
    return value.replace(tzinfo=None) if getattr(value, "tzinfo", None) else value


def test_release_gives_the_attempt_back(database: Database) -> None:
    """A released row is as if it had not been claimed."""
    engine, jobs = made(database, 1)
    release_jobs(engine, claim_jobs(engine, jobs, lease=LEASE, worker="w1"))
    free = row(engine, jobs, 1)
    assert (free.processing, free.attempts, free.lease_until, free.worker) == (False, 0, None, None)
    assert ids(claim_jobs(engine, jobs)) == [1]


def test_extend(database: Database) -> None:
    """An extension counts from now, also for a row whose lease has run out."""
    engine, jobs = made(database, 1)
    claim = claim_jobs(engine, jobs, lease=LEASE)
    before = row(engine, jobs, 1).lease_until
    expire(engine, jobs, 1)
    assert extend_jobs(engine, claim) == 1
    assert row(engine, jobs, 1).lease_until >= before
    assert claim_jobs(engine, jobs) == []
    extend_jobs(engine, claim, lease=timedelta(hours=2))
    assert row(engine, jobs, 1).lease_until > before + timedelta(hours=1)


def test_spent_rows_are_swept(database: Database) -> None:
    """A row at its maximum is not claimed, fills no slot, and a sweep marks it failed."""
    engine, jobs = made(database, 3)
    with engine.begin() as connection:
        connection.execute(jobs.table.update().where(jobs.table.c.id == 1).values(attempts=3))
    assert ids(claim_jobs(engine, jobs, 1, lease=LEASE)) == [2]
    with engine.begin() as connection:
        connection.execute(jobs.table.update().where(jobs.table.c.id == 2).values(attempts=3))
    assert sweep_jobs(engine, jobs) == 1
    expire(engine, jobs, 2)
    assert sweep_jobs(engine, jobs) == 1
    assert sweep_jobs(engine, jobs) == 0
    assert row(engine, jobs, 2).last_error == "all attempts are spent"
    assert row(engine, jobs, 3).failed_at is None


def test_a_sweep_keeps_the_last_error_and_honours_unleased(database: Database) -> None:
    """An error that the row has says more; rows that run without a lease are swept by their age."""
    engine, jobs = made(database, 3)
    said = {"attempts": 3, "processing": True}
    with engine.begin() as connection:
        for number, more in ((1, {"last_error": "card declined"}), (2, {}), (3, {"attempts": 2})):
            this = jobs.table.c.id == number
            connection.execute(jobs.table.update().where(this).values(said | more))
    assert sweep_jobs(engine, jobs) == 0
    aged = JobTable(
        jobs.table,
        state="processing",
        failed={"failed_at": sa.func.now()},
        token="claim_token",
        lease="lease_until",
        attempts="attempts",
        max_attempts=3,
        error="last_error",
        stamps=["created_at"],
        unleased=timedelta(hours=1),
    )
    assert sweep_jobs(engine, aged) == 2
    errors = [row(engine, jobs, number).last_error for number in (1, 2, 3)]
    assert errors == ["card declined", "all attempts are spent", None]


def mapped(jobs: JobTable) -> tuple[type[Any], JobTable]:
    """Map a class to the table and declare its columns."""

    class Job:
        id: int

    registry().map_imperatively(Job, jobs.table)
    return Job, JobTable(
        Job,
        state="processing",
        done={"done_at": sa.func.now()},
        failed={"failed_at": sa.func.now()},
        order="created_at",
        token="claim_token",
        lease="lease_until",
    )


def test_an_expired_entity_does_not_pass_for_its_successor(database: Database) -> None:
    """The token is the claim's own: an entity reloaded after a commit holds the new owner's."""
    engine, jobs = made(database, 1)
    job_class, declared = mapped(jobs)
    with Session(engine) as session:
        claim = claim_jobs(session, declared, lease=LEASE)
        session.commit()
        expire(engine, jobs, 1)
        successor = claim_jobs(engine, jobs, lease=LEASE)
        assert isinstance(claim[0], job_class)
        assert claim[0].claim_token == successor.token
        with pytest.raises(ClaimLost):
            complete_jobs(session, claim, claim)


def test_by_session_it_is_the_callers_transaction(database: Database) -> None:
    """A completion by session is undone by a rollback and shows in the session's entities."""
    engine, jobs = made(database, 1)
    _, declared = mapped(jobs)
    with Session(engine) as session:
        claim = claim_jobs(session, declared, lease=LEASE)
        session.commit()
        complete_jobs(session, claim)
        assert claim[0].done_at is not None
        session.rollback()
        assert claim[0].done_at is None
        complete_jobs(session, claim)
        session.commit()
    assert row(engine, jobs, 1).done_at is not None
    assert complete_jobs(sessionmaker(engine), Claim(table=declared, token="x")) == 0


def test_without_a_token_one_has_to_agree(database: Database) -> None:
    """Tables without a token column need unfenced=True, and then only the state is compared."""
    engine = database.engine()
    table = job_table(Column("done_at", DateTime), Column("flag", Boolean))
    fill(engine, table, 1)
    claim = claim_jobs(engine, table)
    with pytest.raises(ClaimError, match="unfenced=True"):
        complete_jobs(engine, claim)
    assert complete_jobs(engine, claim, unfenced=True) == 1
    with pytest.raises(ClaimLost):
        complete_jobs(engine, claim, unfenced=True)


def test_rows_from_before_the_lease(database: Database) -> None:
    """A row that runs without a lease is never free, or free after the declared age."""
    engine, jobs = made(database, 2)
    with engine.begin() as connection:
        connection.execute(jobs.table.update().where(jobs.table.c.id == 1).values(processing=True))
    assert ids(claim_jobs(engine, jobs, 1, lease=LEASE)) == [2]
    aged = JobTable(
        jobs.table,
        state="processing",
        token="claim_token",
        lease="lease_until",
        stamps=["created_at"],
        unleased=timedelta(hours=1),
    )
    assert ids(claim_jobs(engine, aged, 5, lease=LEASE)) == [1]
