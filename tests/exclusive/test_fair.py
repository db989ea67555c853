"""Fair shares: claims take turns by a key, whatever waits behind one of them."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from itertools import cycle
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from atomic_claim import (
    ClaimError,
    JobTable,
    PatchError,
    aio,
    claim_jobs,
    claim_statement,
    complete_jobs,
    lock_reads,
)
from atomic_claim.claim import dequeue_jobs
from atomic_claim.cli.indexes import NeededIndex, needed_indexes
from atomic_claim.cli.plans import unserved
from atomic_claim.cli.sql import sequences
from atomic_claim.cli.texts import dialect_of
from atomic_claim.plan import ClaimRequest, build_plan
from tests.databases import Database
from tests.exclusive.test_exclusive import DRIVERS
from tests.jobs import ids, mapped

INNODB = ("mysql", "mariadb")
# SQLite has one writer: nobody claims beside an open claim.
SERVERS = pytest.mark.databases("postgresql", "mysql", "mariadb")
LEASE = timedelta(minutes=5)
FLOOD = 100_000
PRECISE = mysql.DATETIME(fsp=6)


def fair_table(*more: Any, timed: bool = True, **options: Any) -> JobTable:
    """Build a table of jobs whose claims take turns by their tenant."""
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("tenant_id", sa.Integer),
        sa.Column("customer_id", sa.Integer),
        sa.Column("queue", sa.String(20), nullable=False, server_default="mail"),
        sa.Column("state", sa.String(20), nullable=False, server_default="waiting"),
        sa.Column("due_at", sa.DateTime()),
        sa.Column("claimed_at", sa.DateTime().with_variant(PRECISE, "mysql", "mariadb")),
        sa.Column("lease_until", sa.DateTime()),
        sa.Column("token", sa.String(32)),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        *more,
    )
    claimed = {"state": "running"} | ({"claimed_at": sa.func.now()} if timed else {})
    named: dict[str, Any] = {
        "state": "state",
        "free": "waiting",
        "claimed": claimed,
        "done": "done",
        "failed": "failed",
        "due": "due_at",
        "order": "id",
        "lease": "lease_until",
        "token": "token",
        "naive_times": "utc",
        "fair_by": "tenant_id",
    }
    return JobTable(table, **named | options)


def filled(engine: sa.Engine, jobs: JobTable, tenants: list[int | None], first: int = 1) -> None:
    """Add jobs numbered from the first, each of its tenant, and the indexes of the migration."""
    if first == 1:
        jobs.table.metadata.create_all(engine)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for index in needed_indexes(jobs):
                connection.exec_driver_sql(index.create(engine.dialect))
    rows = [{"id": n, "tenant_id": tenant} for n, tenant in enumerate(tenants, first)]
    with engine.begin() as connection:
        for start in range(0, len(rows), 5000):
            connection.execute(jobs.table.insert(), rows[start : start + 5000])


TIMED = pytest.mark.parametrize("timed", [True, False], ids=["claim time", "in the process"])


def tenants_of(claim: Any) -> list[int | None]:
    """Return the tenants of claimed jobs, in their order."""
    return [job.tenant_id for job in claim]


@TIMED
def test_a_new_row_behind_a_flood(database: Database, timed: bool) -> None:
    """One row behind 100,000 of another tenant: claimed within a round, or in the next batch.

    Each of eight claimers may have one more claim under way.
    """
    jobs, engine = fair_table(timed=timed), database.engine()
    filled(engine, jobs, [1] * FLOOD)
    assert tenants_of(claim_jobs(engine, jobs, 10)) == [1] * 10
    assert tenants_of(claim_jobs(engine, jobs, 1)) == [1]
    filled(engine, jobs, [2], first=FLOOD + 1)
    assert ids(claim_jobs(engine, jobs, 1)) + ids(claim_jobs(engine, jobs, 1)) == [FLOOD + 1, 12]
    filled(engine, jobs, [2], first=FLOOD + 2)
    assert ids(claim_jobs(engine, jobs, 10)) == [FLOOD + 2, *range(13, 22)]
    engines = [database.engine() for _ in range(8)]
    found = beside(engines, jobs, 10, 200)
    filled(engine, jobs, [2], first=FLOOD + 3)
    one = beside(engines, jobs, 1, 20)
    assert FLOOD + 3 in one[:17]
    filled(engine, jobs, [2], first=FLOOD + 4)
    ten = beside(engines, jobs, 10, 200)
    assert FLOOD + 4 in ten[:81]
    found += one + ten
    assert len(set(found)) == len(found)


def beside(engines: Sequence[sa.Engine], jobs: JobTable, limit: int, rows: int) -> list[int]:
    """Claim this number of rows by all engines at once; return them in the order of the claims."""
    found: list[int] = []
    lock, start = threading.Lock(), threading.Barrier(len(engines))

    def work(engine: sa.Engine) -> None:
        start.wait()
        while len(found) < rows:
            claim = claim_jobs(engine, jobs, limit)
            with lock:
                found.extend(ids(claim))

    with ThreadPoolExecutor(len(engines)) as pool:
        list(pool.map(work, engines))
    return found


def in_turn(jobs: JobTable, rows: int, limit: int = 1, *engines: sa.Engine) -> list[int | None]:
    """Claim this number of rows by the engines in alternation, and return their tenants."""
    found: list[int | None] = []
    each = cycle(engines)
    while len(found) < rows and (claim := claim_jobs(next(each), jobs, limit)):
        found += tenants_of(claim)
    return found


@TIMED
def test_the_turn_goes_on(database: Database, timed: bool) -> None:
    """Each claim begins behind the last key, wraps around, and NULL is a key of its own."""
    jobs, engine = fair_table(timed=timed), database.engine()
    filled(engine, jobs, [3, 3, 3, 1, 1, None, None, 2, 2, 2, 2])
    assert in_turn(jobs, 11, 1, engine) == [1, 2, 3, None, 1, 2, 3, None, 2, 3, 2]
    filled(engine, jobs, [3, 3, 3, 1, 1, None, None, 2, 2, 2, 2], first=12)
    assert tenants_of(claim_jobs(engine, jobs, 3)) == [3, None, 1]
    assert tenants_of(claim_jobs(engine, jobs, 20)) == [2, 3, None, 1, 2, 3, 2, 2]


def shares(found: list[int | None], tenants: int) -> Iterator[tuple[int, int]]:
    """Yield the least and the largest share of a tenant in every run of consecutive rows."""
    for start in range(0, len(found) - tenants + 1, 10):
        counts = Counter(found[start : start + tenants])
        yield min(counts.get(n, 0) for n in range(tenants)), max(counts.values())


@pytest.mark.parametrize(("timed", "limit"), [(True, 1), (False, 10)])
def test_a_thousand_uneven_tenants(database: Database, timed: bool, limit: int) -> None:
    """In any 1,000 consecutive claimed rows each of 1,000 tenants has one.

    By the claim time, so do several processes whose claims follow each other.
    """
    jobs, engine = fair_table(timed=timed), database.engine()
    rows: list[int | None] = [n for n in range(1000) for _ in range(3 if n % 200 else 1000)]
    filled(engine, jobs, rows)
    engines = [database.engine() for _ in range(3)] if timed else [engine]
    found = in_turn(jobs, 1200 * limit if limit == 1 else 2500, limit, *engines)
    assert set(shares(found, 1000)) == {(1, 1)}


def test_one_claim_in_each_process(database: Database) -> None:
    """Where a claim writes its time, a process that makes one claim goes on behind the others."""
    jobs = fair_table()
    filled(database.engine(), jobs, [1, 1, 1, 2, 2, 3])
    assert [in_turn(jobs, 1, 1, database.engine()) for _ in range(6)] == [
        [1],
        [2],
        [3],
        [1],
        [2],
        [1],
    ]


@TIMED
def test_rows_that_are_deleted_when_they_end(database: Database, timed: bool) -> None:
    """An old row that still runs does not hold the turn, though it has the latest time."""
    jobs, engine = fair_table(timed=timed), database.engine()
    filled(engine, jobs, [1, 1, 2, 2, 3, 3, 4, 4])
    claim_jobs(engine, jobs, 1)
    found = []
    for _ in range(7):
        (job,) = claim_jobs(engine, jobs, 1)
        found.append(job.tenant_id)
        with engine.begin() as connection:
            connection.execute(sa.delete(jobs.table).where(jobs.table.c.id == job.id))
    assert found == [2, 3, 4, 1, 2, 3, 4]


@TIMED
def test_each_filter_has_its_turn(database: Database, timed: bool) -> None:
    """Two filters that are claimed in alternation both reach every key, also with moving values."""
    jobs, engine = fair_table(timed=timed), database.engine()
    filled(engine, jobs, [1, 2, 3, 4] * 6)
    with engine.begin() as connection:
        later = jobs.table.c.id > 12
        connection.execute(sa.update(jobs.table).where(later).values(queue="sms"))
    found: dict[str, list[int | None]] = {"mail": [], "sms": []}
    for _ in range(8):
        for queue in found:
            where = jobs.table.c.queue == queue
            found[queue] += tenants_of(claim_jobs(engine, jobs, 1, where=where))
    assert found == {"mail": [1, 2, 3, 4] * 2, "sms": found["sms"]}
    assert sorted(Counter(found["sms"]).values()) == [2, 2, 2, 2]
    moving = [
        *(tenants_of(claim_jobs(engine, jobs, 1, where=jobs.table.c.id > -n)) for n in range(4))
    ]
    assert sorted(moving) == [[1], [2], [3], [4]]


def test_one_row_at_a_time_of_each_tenant(database: Database) -> None:
    """With the same column for both, a turn passes over the tenants that have a running row."""
    jobs, engine = fair_table(exclusive_by="tenant_id"), database.engine()
    filled(engine, jobs, [1] * 300 + [2, 3, 2, None, None])
    assert tenants_of(claim_jobs(engine, jobs, 2)) == [1, 2]
    first = claim_jobs(engine, jobs, 10)
    assert ids(first) == [302, 304, 305]
    assert ids(claim_jobs(engine, jobs, 10)) == []
    complete_jobs(engine, first)
    assert ids(claim_jobs(engine, jobs, 10)) == []


def test_one_row_at_a_time_of_each_customer(database: Database) -> None:
    """A turn takes rows whose customers have room, though hundreds of a busy one come first."""
    jobs, engine = fair_table(exclusive_by="customer_id"), database.engine()
    filled(engine, jobs, [1] * 300 + [1, 2, 2, 1, 3])
    with engine.begin() as connection:
        table = jobs.table
        connection.execute(sa.update(table).where(table.c.id <= 300).values(customer_id=1))
        connection.execute(sa.update(table).where(table.c.id == 303).values(customer_id=1))
    assert ids(claim_jobs(engine, jobs, 3)) == [1, 302, 305]
    assert sorted(ids(claim_jobs(engine, jobs, 10))) == [301, 304]
    assert ids(claim_jobs(engine, jobs, 10)) == []


def test_a_lease_that_is_over(database: Database) -> None:
    """A row whose worker has died has its place in the turn, and a last attempt is alone."""
    jobs = fair_table(attempts="attempts", max_attempts=2)
    engine = database.engine()
    filled(engine, jobs, [1, 2, 2, 3, 3])
    assert ids(claim_jobs(engine, jobs, 3, lease=LEASE)) == [1, 2, 4]
    expire(engine, jobs, 2)
    assert ids(claim_jobs(engine, jobs, 1, lease=LEASE)) == [2]
    assert ids(claim_jobs(engine, jobs, 1, lease=LEASE)) == [5]
    expire(engine, jobs, 1)
    alone = claim_jobs(engine, jobs, 10, lease=LEASE)
    assert ids(alone) in ([1], [3])
    assert ids(claim_jobs(engine, jobs, 10, lease=LEASE)) == [4 - alone[0].id]


def expire(engine: sa.Engine, jobs: JobTable, number: int) -> None:
    """Let a row's lease run out."""
    past = jobs.now(jobs.lease, sa.literal(-60.0, sa.Float()))
    with engine.begin() as connection:
        connection.execute(
            sa.update(jobs.table).where(jobs.table.c.id == number).values(lease_until=past)
        )


def test_due_rows_filters_and_another_order(database: Database) -> None:
    """A turn takes what is due and asked for, in the order of the call within each tenant."""
    jobs, engine = fair_table(), database.engine()
    filled(engine, jobs, [1, 1, 1, 2, 2, 3])
    with engine.begin() as connection:
        later = jobs.now(jobs.due, sa.literal(600.0, sa.Float()))
        connection.execute(sa.update(jobs.table).where(jobs.table.c.id == 1).values(due_at=later))
    descending = jobs.table.c.id.desc()
    assert ids(claim_jobs(engine, jobs, 2, where=jobs.table.c.id != 6)) == [2, 4]
    assert ids(claim_jobs(engine, jobs, 9, order_by=descending)) == [6, 3, 5]
    assert ids(claim_jobs(engine, jobs, 9)) == []


@pytest.mark.databases("sqlite")
def test_an_order_that_cannot_be_read(database: Database) -> None:
    """A turn reads no terms of the order, so one bad value does not stop the queue."""
    jobs = fair_table(sa.Column("created_at", sa.DateTime()), timed=False, order="created_at")
    engine = database.engine()
    filled(engine, jobs, [1, 2, 3])
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET created_at = 'soon' WHERE id = 1")
    claims = [claim_jobs(engine, jobs, 1) for _ in range(4)]
    assert sorted(number for claim in claims for number in ids(claim)) == [2, 3]
    assert (1,) in [key for claim in claims for key in claim.unreadable]


def test_in_a_session(database: Database) -> None:
    """Entities come in the order of the turn; a rollback frees them, and the turn goes on."""
    job_table = fair_table()
    mapped_class = mapped(job_table.table)
    jobs, engine = fair_table_of(mapped_class), database.engine()
    filled(engine, job_table, [1, 1, 2, 3])
    with Session(engine) as session:
        assert ids(claim_jobs(session, jobs, 2)) == [1, 3]
        session.rollback()
        assert ids(claim_jobs(session, jobs, 2)) == [4, 1]
        session.commit()
    with Session(engine) as session:
        assert ids(dequeue_jobs(session, jobs, 5)) == [3, 2]
        session.commit()
    assert ids(claim_jobs(sessionmaker(engine), jobs, 5)) == []


def fair_table_of(entity: Any) -> JobTable:
    """Declare turns for a mapped class."""
    claimed = {"state": "running", "claimed_at": sa.func.now()}
    return JobTable(
        entity,
        state="state",
        free="waiting",
        claimed=claimed,
        token="token",
        naive_times="utc",
        fair_by="tenant_id",
    )


@SERVERS
def test_beside_an_open_claim(database: Database) -> None:
    """Rows that another transaction has locked are passed over, key by key and round by round."""
    jobs, engine = fair_table(), database.engine()
    filled(engine, jobs, [1] * 30 + [2] * 3 + [3])
    with engine.connect() as mine:
        assert ids(claim_jobs(mine, jobs, 3)) == [1, 31, 34]
        assert ids(claim_jobs(engine, jobs, 3)) == [2, 32, 3]
        assert len(claim_jobs(engine, jobs, 50)) == 28
        mine.rollback()
    assert sorted(ids(claim_jobs(engine, jobs, 50))) == [1, 31, 34]


def test_asyncio(database: Database) -> None:
    """The asynchronous twin takes turns, too."""
    jobs = fair_table()
    filled(database.engine(), jobs, [1, 1, 1, 2])

    async def claim() -> list[list[int]]:
        engine = create_async_engine(database.url.set(drivername=DRIVERS[database.name]))
        found = [ids(await aio.claim_jobs(engine, jobs, 1)) for _ in range(3)]
        await engine.dispose()
        return found

    assert asyncio.run(claim()) == [[1], [4], [2]]


KINDS: dict[str, tuple[Any, list[Any]]] = {
    "case": (sa.String(20), ["a", "b", "c"]),
    "uuid": (sa.Uuid(), [UUID(int=n * 2**100) for n in (1, 2, 3)]),
    "date": (sa.Date(), [date(2024, 1, n) for n in (1, 2, 3)]),
    "bytes": (sa.LargeBinary(16).with_variant(sa.VARBINARY(16), *INNODB), [b"a", b"\xff", b"b"]),
    "boolean": (sa.Boolean(), [False, True, None]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_keys(database: Database, kind: str) -> None:
    """Each tenant has its row before any has a second one, whatever tells them apart."""
    type_, values = KINDS[kind]
    jobs, engine = fair_table(sa.Column("k", type_), fair_by="k"), database.engine()
    filled(engine, jobs, [None] * 9)
    with engine.begin() as connection:
        for number in range(1, 10):
            same = jobs.table.c.id == number
            connection.execute(sa.update(jobs.table).where(same).values(k=values[number % 3]))
    found = [ids(claim_jobs(engine, jobs, 1))[0] for _ in range(4)] + ids(
        claim_jobs(engine, jobs, 9)
    )
    assert [sorted(n % 3 for n in found[at : at + 3]) for at in (0, 3, 6)] == [[0, 1, 2]] * 3


def test_each_database_has_its_turn(database: Database) -> None:
    """Two engines in one process do not share a position without a claim time."""
    jobs = fair_table(timed=False)
    filled(database.engine(), jobs, [1, 2, 3, 1, 2, 3])
    one, other = database.engine(), database.engine()
    found = [ids(claim_jobs(engine, jobs, 1))[0] for _ in range(3) for engine in (one, other)]
    assert found == [1, 4, 2, 5, 3, 6]


def test_the_doctor_names_the_indexes_that_lack(database: Database) -> None:
    """With the migration's indexes it has nothing to say; without them it names both."""
    jobs, engine = fair_table(), database.engine()
    filled(engine, jobs, [1, 2])
    needed = {each.reason: each for each in needed_indexes(jobs)}
    assert sorted(needed) == ["claimed", "expired", "fair"]
    with engine.connect() as connection:
        ask = ClaimRequest(10)
        assert unserved(connection, build_plan(jobs, ask, entities=False), ask) == []
        for reason in ("fair", "claimed"):
            connection.exec_driver_sql(drop_index(needed[reason], database))
        connection.commit()
        found = unserved(connection, build_plan(jobs, ask, entities=False), ask)
        assert sorted(each.reason for each in found) == ["claimed", "fair"]


def drop_index(needed: NeededIndex, database: Database) -> str:
    """Return the statement that drops an index within a transaction."""
    on = f" ON {needed.table.name}" if database.name in INNODB else ""
    return f"DROP INDEX {needed.name}{on}"


@pytest.mark.parametrize("dialect", ["postgresql", "mysql", "mariadb", "sqlite"])
@pytest.mark.parametrize("keys", [{}, {"exclusive_by": "customer_id"}])
def test_the_statements_to_read(dialect: str, keys: dict[str, str]) -> None:
    """The command sql shows the probes of a turn before the mark."""
    jobs = fair_table(**keys)
    shown = next(sequences(jobs, dialect_of(dialect), 10))
    texts = [step.sql for step in shown.steps]
    (behind,) = [text for text in texts if "tenant_id > :after" in text]
    assert ("LATERAL" in behind) is (dialect == "postgresql")
    assert any("claimed_at >" in text for text in texts)
    assert shown.transaction


def test_what_cannot_take_turns_refuses() -> None:
    """Each says what was found, and what to do."""
    with pytest.raises(ClaimError, match="claims take more than one statement: use claim_jobs"):
        claim_statement(fair_table())
    with pytest.raises(ClaimError, match="order is that of its comparisons"):
        fair_table(sa.Column("k", sa.Enum("a", "b", name="k")), fair_by="k")
    with pytest.raises(PatchError, match="claim_reads"):
        lock_reads(f"{__name__}:ids", fair_table())
    with pytest.raises(ClaimError, match="state and fair_by are one column"):
        fair_table(fair_by="state")


def test_inference_takes_it_as_an_override() -> None:
    """Names alone declare no turns."""
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("processing", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("tenant_id", sa.Integer),
    )
    assert JobTable.infer(table).fair_by is None
    assert JobTable.infer(table, fair_by="tenant_id").fair_by is table.c.tenant_id
