"""Trap 42: a workflow that claims one row step by step spends its attempts on success."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, MetaData, String, Table

from atomic_claim import ClaimLost, JobTable, claim_jobs, complete_jobs, fail_jobs, sweep_jobs
from tests.databases import Database

PARSED: Any = {"stage": "parsed", "attempts": 0}
TABLE = Table(
    "jobs",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("stage", String(20), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("run_at", DateTime),
    Column("claim_token", String(32)),
)


def step(free: str, claimed: str, done: Any) -> JobTable:
    """Declare one step of the workflow, which has two attempts."""
    return JobTable(
        TABLE,
        state="stage",
        free=free,
        claimed=claimed,
        done=done,
        failed="failed",
        attempts="attempts",
        max_attempts=2,
        due="run_at",
        token="claim_token",
        order="id",
        naive_times="utc",
    )


SEND = step("parsed", "sending", "sent")


def parsed(database: Database, done: Any) -> tuple[sa.Engine, JobTable]:
    """Create a job whose first step took two attempts."""
    engine, parse = database.engine(), step("new", "parsing", done)
    TABLE.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(TABLE.insert().values(id=1, stage="new", attempts=0))
    fail_jobs(engine, claim_jobs(engine, parse), retry=True)
    with engine.begin() as connection:
        connection.execute(TABLE.update().values(run_at=None))
    complete_jobs(engine, claim_jobs(engine, parse))
    return engine, parse


def row(engine: sa.Engine) -> tuple[str, int]:
    """Return the job's stage and attempts."""
    with engine.connect() as connection:
        stage, attempts = connection.execute(sa.select(TABLE.c.stage, TABLE.c.attempts)).one()
        return stage, attempts


def test_the_next_step_has_all_its_attempts(database: Database) -> None:
    """The mark resets them: the row has ended for the first step, and is free for the second."""
    engine, parse = parsed(database, PARSED)
    assert row(engine) == ("parsed", 0)
    assert (len(claim_jobs(engine, parse)), sweep_jobs(engine, parse)) == (0, 0)
    first = claim_jobs(engine, SEND)
    fail_jobs(engine, first, retry=True)
    assert row(engine) == ("parsed", 1)
    # Neither free nor spent for the first step, though it bears its mark no more.
    assert (len(claim_jobs(engine, parse)), sweep_jobs(engine, parse)) == (0, 0)
    with engine.begin() as connection:
        connection.execute(TABLE.update().values(run_at=None))
    second = claim_jobs(engine, SEND)
    with pytest.raises(ClaimLost):
        complete_jobs(engine, first)
    assert complete_jobs(engine, second) == 1
    assert row(engine) == ("sent", 2)
    assert len(claim_jobs(engine, SEND)) == 0


def test_a_step_that_does_not_reset_them(database: Database) -> None:
    """The twin: nothing is left for the second step, which a sweep then fails."""
    engine, _ = parsed(database, "parsed")
    assert row(engine) == ("parsed", 2)
    assert len(claim_jobs(engine, SEND)) == 0
    assert sweep_jobs(engine, SEND) == 1
    assert row(engine) == ("failed", 2)
