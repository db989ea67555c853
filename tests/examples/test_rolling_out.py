"""The guide to rolling out, step by step, on a table that is in use."""

import re
import textwrap
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Boolean, Column, DateTime, Integer, String

from atomic_claim import Claim, claim_jobs, complete_jobs
from tests.databases import Database
from tests.guides import GUIDES, blocks
from tests.jobs import ids, taken

LEASE = timedelta(minutes=5)
LONG_AGO = datetime(2024, 1, 1)  # noqa: DTZ001 - the columns are without a zone


def statements_of(heading: str) -> list[str]:
    """Return the SQL statements that the guide shows below a heading."""
    _, _, chapter = GUIDES["rolling_out"].partition(heading)
    found = re.search(r"```sql\n(.*?)```", chapter, re.DOTALL)
    assert found is not None
    return [each.strip() for each in textwrap.dedent(found[1]).split(";") if each.strip()]


def run(engine: sa.Engine, *statements: str) -> None:
    """Run statements as a console would."""
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


@pytest.fixture
def engine(database: Database) -> sa.Engine:
    """Create a table from before leases: rows 1 and 2 run, 3 to 5 are free."""
    engine = database.engine()
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        Column("id", Integer, primary_key=True),
        Column("processing", Boolean, nullable=False, default=False),
        Column("completed_at", DateTime),
        Column("name", String(20)),
        Column("updated_at", DateTime),
    )
    table.create(engine)
    with engine.begin() as connection:
        values: list[dict[str, Any]] = [
            {"id": number, "processing": number < 3, "updated_at": LONG_AGO}
            for number in range(1, 6)
        ]
        connection.execute(table.insert(), values)
    run(engine, *statements_of("## 1. Add the columns"))
    return engine


def reflected(engine: sa.Engine) -> sa.Table:
    """Reflect the table from the database."""
    return sa.Table("jobs", sa.MetaData(), autoload_with=engine)


def test_the_columns_are_read_by_their_names(engine: sa.Engine) -> None:
    """After the migration a lease needs no declaration, and old running rows never expire."""
    table = reflected(engine)
    claim = claim_jobs(engine, table, 10, lease=LEASE)
    assert ids(claim) == [3, 4, 5]
    assert [job.attempts for job in claim] == [1, 1, 1]
    assert complete_jobs(engine, claim) == 3
    assert claim_jobs(engine, table, 10, lease=LEASE) == []


def test_old_code_goes_on(engine: sa.Engine) -> None:
    """Code that does not know the columns inserts and claims as before."""
    run(
        engine,
        "INSERT INTO jobs (id, processing) VALUES (6, FALSE)",
        "UPDATE jobs SET processing = TRUE WHERE id = 3",
    )
    assert ids(claim_jobs(engine, reflected(engine), 10, lease=LEASE)) == [4, 5, 6]


def test_stuck_rows_come_back_after_an_age(engine: sa.Engine) -> None:
    """Rows that run without a lease are free again if one says after how long."""
    run(engine, "UPDATE jobs SET updated_at = '2999-01-01 00:00:00' WHERE id = 2")
    found = {"jobs": reflected(engine)}
    (block,) = blocks("rolling_out", "python")
    exec(block, found)  # noqa: S102 - the guides are ours
    claim: Claim[Any] = claim_jobs(engine, found["declared"], 10, lease=LEASE)
    assert ids(claim) == [1, 3, 4, 5]


def test_going_back(engine: sa.Engine) -> None:
    """Rows leased by dead workers are free again for code without leases, and no other rows."""
    table = reflected(engine)
    claim = claim_jobs(engine, table, 3, lease=LEASE)
    complete_jobs(engine, claim[:1])
    run(engine, *statements_of("## How to go back"))
    assert taken(engine, table) == [1, 2]
    with engine.connect() as connection:
        free = sa.select(table.c.id).where(
            table.c.processing == sa.false(), table.c.completed_at.is_(None)
        )
        assert sorted(connection.scalars(free)) == [4, 5]
