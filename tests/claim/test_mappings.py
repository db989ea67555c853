"""Classes that map less, or more, than the table of a claim; and keys that do not find rows."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, Integer, String, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session, registry

from atomic_claim import ClaimError, JobTable, claim_jobs, complete_jobs, extend_jobs
from tests.databases import Database
from tests.jobs import BINDS, START, bound, fill, ids, job_table, rows

once = pytest.mark.databases("sqlite")


def token_table(*more: Any) -> Table:
    """Build a job table with a token and an end."""
    return job_table(Column("claim_token", String(32)), Column("done", Integer), *more)


ROLES: dict[str, Any] = {"state": "processing", "token": "claim_token", "done": {"done": 1}}


# --- what a class leaves out


@pytest.mark.parametrize("kind", ["session", "sessionmaker"])
def test_columns_that_a_class_leaves_out(database: Database, kind: str) -> None:
    """A role may have a column that the mapped class excludes; its jobs are claimed and ended."""
    engine, table = database.engine(), token_table()
    fill(engine, table, 3)
    job = registry().map_imperatively(
        type("Job", (), {}), table, exclude_properties=["claim_token", "done", "processing"]
    )
    jobs = JobTable(job.class_, **ROLES)
    with bound(engine, kind) as bind:
        claim = claim_jobs(bind, jobs, 2)
        assert complete_jobs(bind, claim) == 2
        if kind == "session":
            bind.commit()
    assert claim.keys == ((1,), (2,))
    assert ids(claim_jobs(engine, jobs, 5)) == [3]


def test_what_an_update_sets_by_itself_is_read_again(database: Database) -> None:
    """After an end by Session, an entity has what the database or ``onupdate`` made of it."""
    engine = database.engine()
    table = token_table(
        Column("ends", Integer, sa.Computed("done * 2", persisted=True)),
        Column("touched", Integer, onupdate=7),
    )
    fill(engine, table, 1)
    job = registry().map_imperatively(type("Job", (), {}), table)
    with Session(engine) as session:
        claim = claim_jobs(session, JobTable(job.class_, **ROLES))
        session.execute(table.update().values(touched=0))
        session.refresh(claim[0])
        complete_jobs(session, claim)
        assert (claim[0].done, claim[0].ends, claim[0].touched) == (1, 2, 7)


# --- savepoints


def test_entities_after_a_rollback_to_a_savepoint(database: Database) -> None:
    """They are as the row is then, with their version, and can be changed and flushed."""
    engine, table = database.engine(), token_table(Column("version", Integer, nullable=False))
    fill(engine, table, 1, version=1)
    job = registry().map_imperatively(type("Job", (), {}), table, version_id_col=table.c.version)
    jobs = JobTable(job.class_, **ROLES)
    with Session(engine) as session:
        found = session.get(job.class_, 1)
        savepoint = session.begin_nested()
        [claimed] = claim_jobs(session, jobs)
        assert (claimed is found, found.processing, found.version) == (True, True, 2)
        savepoint.rollback()
        assert (found.processing, found.claim_token, found.version) == (False, None, 1)
        claim = claim_jobs(session, jobs)
        savepoint = session.begin_nested()
        complete_jobs(session, claim)
        assert (found.done, found.version) == (1, 3)
        savepoint.rollback()
        assert (found.done, found.version) == (None, 2)
        found.note = "flushed"
        session.commit()
        assert (found.note, found.version) == ("flushed", 3)


# --- triggers


@pytest.mark.parametrize("kind", BINDS)
@pytest.mark.parametrize("name", ["attached.jobs", "JOBS"])
@once
def test_a_veto_by_a_trigger_elsewhere(database: Database, name: str, kind: str) -> None:
    """A trigger of an attached database, or under a name in other letters, is looked for too."""
    engine = database.engine()

    @sa.event.listens_for(engine, "connect")
    def attach(connection: Any, _: object) -> None:
        connection.execute(f"ATTACH '{database.url.database}.other' AS attached")

    schema, _, bare = name.rpartition(".")
    table = job_table(name=bare, schema=schema or None)
    where = schema or "main"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TABLE {where}.jobs (id INTEGER PRIMARY KEY, processing, created_at, note)"
        )
        connection.exec_driver_sql(
            f"CREATE TRIGGER {where}.veto BEFORE UPDATE ON jobs BEGIN SELECT RAISE(IGNORE); END"
        )
        connection.execute(table.insert(), rows(2))
    for limit in (1, 5):
        with bound(engine, kind) as bind, pytest.raises(ClaimError, match="look for a trigger"):
            claim_jobs(bind, table, limit)


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
