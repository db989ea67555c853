"""Classes that map less, or more, than the table of a claim; and keys that do not find rows."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, Integer, String, Table
from sqlalchemy.dialects import postgresql

from atomic_claim import JobTable, claim_jobs, extend_jobs
from tests.databases import Database
from tests.jobs import BINDS, START, bound, fill, ids, job_table

once = pytest.mark.databases("sqlite")


def token_table(*more: Any) -> Table:
    """Build a job table with a token and an end."""
    return job_table(Column("claim_token", String(32)), Column("done", Integer), *more)


ROLES: dict[str, Any] = {"state": "processing", "token": "claim_token", "done": {"done": 1}}


# --- names and types


@pytest.mark.parametrize("kind", BINDS)
def test_columns_called_like_the_library(database: Database, kind: str) -> None:
    """Columns that were added for it may have its name."""
    engine = database.engine()
    names = {role: f"atomic_claim_{role}" for role in ("token", "lease", "worker", "attempts")}
    table = job_table(
        Column(names["token"], String(32)),
        Column(names["lease"], sa.DateTime),
        Column(names["worker"], String(20)),
        Column(names["attempts"], Integer, default=0),
        *(Column(f"atomic_claim_{name}", Integer) for name in ("least", "instant", "keys")),
    )
    fill(engine, table, 3)
    jobs = JobTable(table, state="processing", naive_times="utc", **names)
    lease = START.replace(year=2025) - START
    with bound(engine, kind) as bind:
        claim = claim_jobs(bind, jobs, 2, lease=lease, worker="ann")
        assert extend_jobs(bind, claim) == 2
        assert [(job.id, job.atomic_claim_worker) for job in claim] == [(1, "ann"), (2, "ann")]
        if kind in {"connection", "session"}:
            bind.commit()
    with engine.connect() as connection:
        ours = [table.c[f"atomic_claim_{name}"] for name in ("least", "instant", "keys")]
        assert set(connection.execute(sa.select(*ours))) == {(None, None, None)}


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("varying", [False, True])
def test_states_of_bits(database: Database, varying: bool) -> None:
    """PostgreSQL's BIT and VARBIT hold texts of digits."""
    engine = database.engine()
    table = job_table(Column("bits", postgresql.BIT(1, varying=varying), nullable=False))
    fill(engine, table, 2, bits="0")
    jobs = JobTable(table, state="bits", free="0", claimed="1", released="0")
    assert [job.bits for job in claim_jobs(engine, jobs, 5)] == ["1", "1"]
    assert ids(claim_jobs(engine, jobs, 5)) == []


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("name", ["claim_nearest", "claim_taken", "claim_all", "held", "branch_1"])
def test_tables_called_like_parts_of_the_statement(database: Database, name: str) -> None:
    """The statement of a claim with leases has more of them."""
    engine = database.engine()
    table = job_table(
        Column("claim_token", String(32)), Column("lease_until", sa.DateTime), name=name
    )
    fill(engine, table, 3)
    jobs = JobTable(
        table, state="processing", token="claim_token", lease="lease_until", naive_times="utc"
    )
    lease = START.replace(year=2025) - START
    assert ids(claim_jobs(engine, jobs, 2, lease=lease)) == [1, 2]
    assert ids(claim_jobs(engine, jobs, 2, lease=lease)) == [3]
