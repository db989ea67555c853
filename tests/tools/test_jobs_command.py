"""`atomic-claim jobs`: what it lists, and that it frees nothing but what is dead."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Boolean, Column, DateTime

from atomic_claim import claim_jobs, fail_jobs
from tests.commands import Command, address
from tests.databases import Database
from tests.jobs import ids, job_table
from tests.tools.test_doctor import filled
from tests.tools.test_faults import declared

pytestmark = pytest.mark.once

SPEC = "tests.tools.test_faults:declared"


def jobs(database: Database, *words: str, table: str = SPEC) -> tuple[str, ...]:
    """Return the words of the command on a table."""
    return ("jobs", "--url", address(database), "--table", table, *words)


@pytest.fixture
def engine(database: Database) -> sa.Engine:
    """Make a table of six jobs: one failed, one of a dead worker, one running, three free."""
    now = datetime.now(UTC).replace(tzinfo=None)
    due = now - timedelta(minutes=1)
    row = {"status": "waiting", "attempts": 0, "run_at": due, "lease_until": None}
    made = filled(database, declared.table, 6, **row)
    lease = timedelta(hours=1)
    first = claim_jobs(made, declared, 1, worker="ann", lease=lease)
    fail_jobs(made, first)
    claim_jobs(made, declared, 1, worker="bob", lease=lease)
    dead = declared.table.update().where(declared.table.c.id == 2)
    with made.begin() as connection:
        connection.execute(dead.values(lease_until=now - timedelta(days=1)))
    running = declared.table.update().where(declared.table.c.id == 3)
    with made.begin() as connection:
        later = now + timedelta(days=1)
        values = {"status": "running", "worker": "cat", "lease_until": later}
        connection.execute(running.values(claim_token="t" * 32, **values))
    return made


def listed(command: Command, words: tuple[str, ...]) -> tuple[int, list[Any]]:
    """Return the total and the ids of the jobs that the command lists."""
    ended = command(*words, "--json")
    assert (ended.code, ended.err) == (0, "")
    said = json.loads(ended.out)
    return said["total"], [each["id"] for each in said["jobs"]]


def test_what_is_listed(database: Database, command: Command, engine: sa.Engine) -> None:
    """The jobs of each kind, the first of them, and those with a value."""
    assert engine.dialect
    assert listed(command, jobs(database, "--failed")) == (1, [1])
    assert listed(command, jobs(database, "--stuck")) == (1, [2])
    assert listed(command, jobs(database, "--running")) == (2, [2, 3])
    assert listed(command, jobs(database, "--waiting")) == (4, [2, 4, 5, 6])
    assert listed(command, jobs(database, "--waiting", "--limit", "2")) == (4, [2, 4])
    assert listed(command, jobs(database, "--running", "--where", "worker=cat")) == (1, [3])
    assert listed(command, jobs(database, "--waiting", "--where", "id=5")) == (1, [5])
    assert listed(command, jobs(database, "--waiting", "--where", "worker=NULL")) == (3, [4, 5, 6])
    ended = command(*jobs(database, "--waiting", "--limit", "2"))
    assert ended.out.startswith("jobs: 4 waiting jobs\n")
    assert ended.out.endswith("2 more; see --limit\n")
    assert not [line for line in ended.out.splitlines() if line != line.rstrip()]


def test_the_dead_are_freed(database: Database, command: Command, engine: sa.Engine) -> None:
    """Only after their number and workers were shown; those that run are left alone."""
    said = command(*jobs(database, "--release-stuck")).refused()
    assert "1 stuck job would be freed (bob: 1): agree with --yes" in said
    assert listed(command, jobs(database, "--stuck")) == (1, [2])
    ended = command(*jobs(database, "--release-stuck", "--yes"))
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.endswith("released: 1 job\n")
    assert listed(command, jobs(database, "--stuck")) == (0, [])
    assert listed(command, jobs(database, "--running")) == (1, [3])
    lease = timedelta(hours=1)
    assert ids(claim_jobs(engine, declared, 9, lease=lease)) == [2, 4, 5, 6]


def test_the_failed_are_requeued(database: Database, command: Command, engine: sa.Engine) -> None:
    """Only those that were asked for, with their error; none that runs or is free."""
    said = command(*jobs(database, "--requeue")).refused()
    assert "1 failed job would be freed: agree with --yes" in said
    ended = command(*jobs(database, "--requeue", "--yes", "--where", "id=2"))
    assert ended.out == "jobs: 0 failed jobs\nrequeued: 0 jobs\n"
    ended = command(*jobs(database, "--requeue", "--yes", "--json"))
    assert (ended.code, ended.err) == (0, "")
    said = json.loads(ended.out)
    assert (said["total"], said["requeued"], said["jobs"][0]["id"]) == (1, 1, 1)
    assert listed(command, jobs(database, "--failed")) == (0, [])
    assert listed(command, jobs(database, "--running")) == (2, [2, 3])
    (job,) = claim_jobs(engine, declared, 1, lease=timedelta(hours=1))
    assert (job.id, job.attempts) == (1, 1)


@pytest.mark.databases("sqlite", "postgresql")
def test_what_nothing_tells_is_not_freed(database: Database, command: Command) -> None:
    """Without a lease or a time of the claim no row is taken from its worker."""
    table = job_table(Column("completed_at", DateTime), Column("has_error", Boolean))
    filled(database, table, 3, processing=True)
    said = command(*jobs(database, "--release-stuck", "--yes", table="jobs")).refused()
    assert "no column of jobs says when a job was claimed" in said
    assert listed(command, jobs(database, "--running", table="jobs")) == (3, [1, 2, 3])


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "which jobs?"),
        (("--failed", "--stuck"), "which jobs?"),
        (("--failed", "--release-stuck"), "which jobs?"),
        (("--stuck", "--requeue"), "which jobs?"),
        (("--requeue", "--release-stuck"), "which jobs?"),
        (("--failed", "--where", "nonsuch=1"), "expected COLUMN=VALUE with one of id"),
        (("--failed", "--where", "id=x"), "'x' is no value of INTEGER"),
    ],
)
def test_what_cannot_be_listed(
    database: Database, command: Command, words: tuple[str, ...], said: str
) -> None:
    """Whatever cannot be told is refused by one line."""
    filled(database, declared.table, 1, status="waiting", attempts=0, run_at=datetime.now(UTC))
    assert said in command(*jobs(database, *words)).refused()
