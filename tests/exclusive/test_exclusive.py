"""Exclusive keys: two workers never run two rows of one key, step by step and in a drain."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, registry

from atomic_claim import (
    ClaimConflict,
    ClaimError,
    ClaimLost,
    JobTable,
    PatchError,
    UnsupportedDialect,
    aio,
    claim_jobs,
    claim_statement,
    complete_jobs,
    execution,
    extend_jobs,
    fail_jobs,
    keep_claims,
    lock_reads,
    release_jobs,
)
from atomic_claim.backends import named_lock
from atomic_claim.claim import dequeue_jobs
from atomic_claim.cli.indexes import needed_indexes
from atomic_claim.cli.plans import unserved
from atomic_claim.cli.texts import dialect_of
from atomic_claim.plan import ClaimRequest, build_plan
from tests.benchmarks import ground
from tests.databases import Database
from tests.ending.test_lease import PAST
from tests.exclusive import exclusive_rounds
from tests.jobs import ids, in_thread
from tests.stepping import commit_after, stopped

LEASE = timedelta(minutes=5)
# SQLite has one writer: nobody claims beside an open claim.
SERVERS = pytest.mark.databases("postgresql", "mysql", "mariadb")
INNODB = pytest.mark.databases("mysql", "mariadb")
# On the others the lock has to outlast the transaction.
CALLERS = pytest.mark.databases("sqlite", "postgresql")


def keyed_table(kind: type[JobTable] = JobTable, /, **options: Any) -> JobTable:
    """Build a table of jobs that run one at a time for each customer."""
    table = sa.Table(
        options.pop("name", "jobs"),
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("customer_id", sa.Integer),
        sa.Column("state", sa.String(20), nullable=False, server_default="waiting"),
        sa.Column("lease_until", sa.DateTime()),
        sa.Column("token", sa.String(32)),
        sa.Column("note", sa.String(20)),
        sa.Index("jobs_keys", "state", "customer_id", "id"),
        sa.Index("jobs_free", "state", "id"),
    )
    named: dict[str, Any] = {
        "state": "state",
        "free": "waiting",
        "claimed": "running",
        "done": "done",
        "failed": "failed",
        "order": "id",
        "lease": "lease_until",
        "token": "token",
        "naive_times": "utc",
        "exclusive_by": "customer_id",
    }
    return kind(table, **named | options)


def filled(database: Database, customers: list[int | None], **options: Any) -> JobTable:
    """Jobs numbered from 1, each for its customer."""
    jobs = keyed_table(**options)
    engine = database.engine()
    jobs.table.metadata.create_all(engine)
    with engine.begin() as connection:
        rows = [{"id": n, "customer_id": c} for n, c in enumerate(customers, 1)]
        for start in range(0, len(rows), 1000):
            connection.execute(jobs.table.insert(), rows[start : start + 1000])
    return jobs


def quick(database: Database) -> sa.Engine:
    """Create an engine that does not wait for the lock on SQLite."""
    return database.engine(
        **({"connect_args": {"timeout": 0}} if database.name == "sqlite" else {})
    )


def expire(engine: sa.Engine, jobs: JobTable, number: int) -> None:
    """Let a row's lease run out."""
    past = jobs.now(jobs.lease, sa.literal(PAST.total_seconds(), sa.Float()))
    with engine.begin() as connection:
        connection.execute(
            sa.update(jobs.table).where(jobs.table.c.id == number).values(lease_until=past)
        )


@contextmanager
def transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Yield a connection whose transaction is rolled back unless the test ends it."""
    connection = engine.connect()
    try:
        yield connection
    finally:
        connection.close()


def claimed_beside(database: Database, engine: sa.Engine, jobs: JobTable, limit: int) -> list[int]:
    """Claim as another worker beside an open transaction that has written; none on SQLite."""
    if database.name != "sqlite":
        return ids(claim_jobs(engine, jobs, limit))
    with pytest.raises(ClaimConflict), engine.connect() as connection:
        claim_jobs(connection, jobs, limit)
    return []


@INNODB
def test_a_callers_transaction_is_refused(database: Database) -> None:
    """Neither a claim nor an extension has a place there, and nothing is written."""
    jobs = filled(database, [1])
    engine = database.engine()
    with Session(engine) as session, pytest.raises(ClaimError, match="Engine or the sessionmaker"):
        claim_jobs(session, jobs)
    with engine.connect() as mine, pytest.raises(ClaimError, match="until after the commit"):
        claim_jobs(mine, jobs)
    claim = claim_jobs(sa.orm.sessionmaker(engine), jobs, lease=LEASE)
    with engine.connect() as mine:
        with pytest.raises(ClaimError, match="until after the commit"):
            extend_jobs(mine, claim)
        complete_jobs(mine, claim)


@pytest.mark.parametrize("by", ["engine", "sessionmaker"])
def test_one_row_of_a_key_runs(database: Database, by: str) -> None:
    """The first of each key, in claim order, and the next one once it has ended; NULL is free."""
    check_turns(database, by)


@CALLERS
def test_one_row_of_a_key_runs_in_the_callers_transaction(database: Database) -> None:
    """The same, in a transaction that the caller begins and ends."""
    check_turns(database, "connection")


def check_turns(database: Database, by: str) -> None:
    """Claim and end rows, and compare which come next."""
    jobs = filled(database, [1, 1, None, 2, 1, None, 2])
    engine = database.engine()

    def claim(limit: int) -> Any:
        if by == "engine":
            return claim_jobs(engine, jobs, limit)
        if by == "sessionmaker":
            return claim_jobs(sa.orm.sessionmaker(engine), jobs, limit)
        with engine.begin() as connection:
            return claim_jobs(connection, jobs, limit)

    first = claim(10)
    assert ids(first) == [1, 3, 4, 6]
    assert ids(claim(10)) == []
    complete_jobs(engine, first[:1])
    second = claim(10)
    assert ids(second) == [2]
    fail_jobs(engine, first[2:3])
    assert ids(claim(10)) == [7]
    release_jobs(engine, second)
    assert ids(claim(1)) == [2]


def test_as_many_as_may_run(database: Database) -> None:
    """With max_per_key=3 no more than three of a key run, whatever the limits of the calls."""
    jobs = filled(database, [1] * 6 + [2] * 2, max_per_key=3)
    engine = database.engine()
    first = claim_jobs(engine, jobs, 2)
    assert ids(first) == [1, 2]
    assert ids(claim_jobs(engine, jobs, 10)) == [3, 7, 8]
    complete_jobs(engine, first)
    assert ids(claim_jobs(engine, jobs, 10)) == [4, 5]


def test_entities(database: Database) -> None:
    """A mapped class gives entities, attached and as they are now."""
    jobs = filled(database, [1, 1, 2])
    mapped = registry()

    class Job:
        id: int
        state: str

    mapped.map_imperatively(Job, jobs.table)
    of_class = keyed_table_of(Job)
    if database.name in {"mysql", "mariadb"}:
        found = claim_jobs(sa.orm.sessionmaker(database.engine()), of_class, 10)
    else:
        with Session(database.engine()) as session:
            found = claim_jobs(session, of_class, 10)
            assert all(job in session for job in found)
            session.commit()
            session.refresh(found[0])
            session.refresh(found[1])
    assert [(job.id, job.state) for job in found] == [(1, "running"), (3, "running")]
    mapped.dispose()


def keyed_table_of(entity: Any) -> JobTable:
    """Build the same declaration for a mapped class."""
    return JobTable(
        entity,
        state="state",
        free="waiting",
        claimed="running",
        done="done",
        order="id",
        lease="lease_until",
        token="token",
        naive_times="utc",
        exclusive_by="customer_id",
    )


def test_a_composite_primary_key(database: Database) -> None:
    """Rows with a key of two columns, and a key that is text and compared as the database does."""
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        sa.Column("tenant", sa.String(10), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("queue", sa.String(20)),
        sa.Column("processing", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("rank", sa.Integer),
    )
    jobs = JobTable(
        table, state="processing", order=table.c.rank.desc(), exclusive_by="queue", done={}
    )
    engine = database.engine()
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        rows = [("a", 1, "x", 1), ("a", 2, "X ", 5), ("b", 1, "x", 9), ("b", 2, "y", 2)]
        names = ("tenant", "number", "queue", "rank")
        connection.execute(table.insert(), [dict(zip(names, row, strict=True)) for row in rows])
    found = [tuple(job)[:2] for job in claim_jobs(engine, jobs, 10)]
    with engine.connect() as connection:
        queues = list(connection.scalars(sa.select(table.c.queue).where(table.c.processing)))
        distinct = sa.select(sa.func.count(table.c.queue.distinct())).where(table.c.processing)
        assert connection.scalar(distinct) == len(queues)
    assert found[0] == ("b", 1)


def test_rows_of_busy_keys_ahead(database: Database) -> None:
    """Thousands of rows of busy keys in front do not hide the others, claimed in their order."""
    customers: list[int | None] = [1] * 1500 + [2] * 1500 + [5, 4, 3, 4, None]
    jobs = filled(database, customers)
    engine = database.engine()
    assert ids(claim_jobs(engine, jobs, 1)) == [1]
    assert ids(claim_jobs(engine, jobs, 1)) == [1501]
    assert ids(claim_jobs(engine, jobs, 2)) == [3001, 3002]
    assert ids(claim_jobs(engine, jobs, 5)) == [3003, 3005]
    assert ids(claim_jobs(engine, jobs, 5)) == []


@INNODB
def test_a_busy_key_costs_a_step(database: Database) -> None:
    """However many rows of a busy key are ahead, with the migration's indexes as many are read.

    MySQL sorts some ten thousand rows rather than read the first ones by their index; no more.
    """
    found = [rows_read(database, ahead, most=2) for ahead in (2**16, 2**17)]
    assert abs(found[1] - found[0]) < 1000


def rows_read(database: Database, ahead: int, most: int) -> int:
    """Return how many rows a claim reads behind those of a busy key."""
    table = ground.job_table(keys=True).table
    declared: dict[str, Any] = {"exclusive_by": "customer_id", "max_per_key": most, "done": {}}
    jobs = JobTable(table, state="processing", order="created_at", **declared)
    engine = database.engine()
    table.create(engine)
    first = datetime(2024, 1, 1)  # noqa: DTZ001 - the column has no zone
    later = sa.text(
        f"INSERT INTO {table.name} (id, customer_id, created_at, processing) "
        "SELECT id + :n, customer_id, created_at + INTERVAL :n SECOND, processing FROM "
        f"{table.name}"
    )
    with engine.begin() as connection:
        connection.execute(table.insert(), {"id": 1, "customer_id": 1, "created_at": first})
        for doubled in range(ahead.bit_length() - 1):
            connection.execute(later, {"n": 2**doubled})
        rows = [
            {"id": ahead + n, "customer_id": 1000 + n // 2, "created_at": first + timedelta(300, n)}
            for n in range(1, 401)
        ]
        connection.execute(table.insert(), rows)
    ground.add_indexes(engine, jobs)
    counted = list[int]()

    @sa.event.listens_for(engine, "rollback")
    @sa.event.listens_for(engine, "commit")
    def count(connection: sa.Connection) -> None:
        counters = connection.execute(sa.text("SHOW SESSION STATUS LIKE 'Handler_read%'"))
        counted.append(sum(int(value) for _, value in counters))

    assert ids(claim_jobs(engine, jobs, most)) == list(range(1, most + 1))
    before = counted[-1]
    assert ids(claim_jobs(engine, jobs, 1)) == [ahead + 1]
    table.drop(engine)
    return counted[-1] - before


@pytest.mark.databases("postgresql")
def test_an_open_claim_holds_its_key(database: Database) -> None:
    """A key with an uncommitted claim gives no row; after a rollback it gives its first one."""
    jobs = filled(database, [1, 1, 2, 2, 3])
    engine = database.engine()
    with transaction(engine) as mine:
        assert ids(claim_jobs(mine, jobs, 1)) == [1]
        other = claim_jobs(engine, jobs, 1)
        assert ids(other) == [3]
        mine.rollback()
    assert ids(claim_jobs(engine, jobs, 1)) == [1]
    with transaction(engine) as mine:
        assert ids(claim_jobs(mine, jobs, 5)) == [5]
        assert ids(claim_jobs(engine, jobs, 5)) == []
        mine.commit()
    assert ids(claim_jobs(engine, jobs, 5)) == []


def test_the_holder_completes_but_has_not_committed(database: Database) -> None:
    """An end that may still be rolled back frees no key; one that is committed does."""
    jobs = filled(database, [1, 1])
    engine = database.engine()
    claim = claim_jobs(engine, jobs, 1)
    with transaction(engine) as holder:
        complete_jobs(holder, claim)
        assert claimed_beside(database, quick(database), jobs, 1) == []
        holder.rollback()
    assert ids(claim_jobs(engine, jobs, 1)) == []
    with transaction(engine) as holder:
        complete_jobs(holder, claim)
        holder.commit()
    assert ids(claim_jobs(engine, jobs, 1)) == [2]


@pytest.mark.databases("sqlite", "postgresql")
def test_complete_and_claim_the_next_in_one_transaction(database: Database) -> None:
    """A job that the caller's own transaction has ended or released no longer runs."""
    jobs = filled(database, [1, 1, 1, 2])
    engine = database.engine()
    with transaction(engine) as mine:
        first = claim_jobs(mine, jobs, 1)
        complete_jobs(mine, first)
        second = claim_jobs(mine, jobs, 1)
        assert ids(second) == [2]
        release_jobs(mine, second)
        assert ids(claim_jobs(mine, jobs, 5)) == [2, 4]
        mine.commit()
    assert ids(claim_jobs(engine, jobs, 5)) == []


@contextmanager
def held_up(
    database: Database, jobs: JobTable, found: list[list[int]], by: str = "engine"
) -> Iterator[None]:
    """Hold up a claim of one job after its snapshot until the block ends."""
    engine = database.engine()
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "CREATE FUNCTION held_up() RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$ BEGIN "
                "PERFORM pg_advisory_lock_shared(42); PERFORM pg_advisory_unlock_shared(42); "
                "RETURN true; END $$"
            )
        )

    def claim() -> None:
        waits = sa.func.held_up(type_=sa.Boolean())
        if by == "engine":
            found.append(ids(claim_jobs(engine, jobs, 1, where=waits)))
            return
        with engine.begin() as connection:
            found.append(ids(claim_jobs(connection, jobs, 1, where=waits)))

    thread = threading.Thread(target=claim)
    with engine.connect() as gate:
        gate.execute(sa.text("SELECT pg_advisory_lock(42)"))
        thread.start()
        database.wait_until_blocked()
        yield
        gate.execute(sa.text("SELECT pg_advisory_unlock(42)"))
    thread.join()


def running(engine: sa.Engine, jobs: JobTable) -> list[int]:
    """Return the ids of the running rows."""
    with engine.connect() as connection:
        query = sa.select(jobs.table.c.id).where(jobs.table.c.state == "running")
        return sorted(connection.scalars(query))


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("by", ["engine", "connection"])
def test_the_holder_completes_between_snapshot_and_lock(database: Database, by: str) -> None:
    """The other was done before this one had the lock: it gets what else it has found."""
    jobs = filled(database, [1, 1, 2])
    engine = database.engine()
    found = list[list[int]]()
    with held_up(database, jobs, found, by):
        complete_jobs(engine, claim_jobs(engine, jobs, 1))
    assert found == [[3]]
    assert ids(claim_jobs(engine, jobs, 5)) == [2]


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("by", ["engine", "connection"])
def test_both_see_no_running_row_and_different_heads(database: Database, by: str) -> None:
    """A row that comes earlier in the order is inserted and claimed after the other's snapshot."""
    jobs = filled(database, [1, 1, 2])
    engine = database.engine()
    found = list[list[int]]()
    with held_up(database, jobs, found, by):
        insert_and_claim_an_earlier_row(engine, jobs)
    assert found == [[3]]
    assert running(engine, jobs) == [0, 3]


def insert_and_claim_an_earlier_row(engine: sa.Engine, jobs: JobTable) -> None:
    """Row 0 of the first key."""
    with engine.begin() as connection:
        connection.execute(jobs.table.insert().values(id=0, customer_id=1))
    assert ids(claim_jobs(engine, jobs, 1)) == [0]


def test_an_expired_lease_frees_the_key(database: Database) -> None:
    """The crashed holder's row comes first again, and the holder cannot prolong its lease."""
    jobs = filled(database, [1, 1, 2])
    engine = database.engine()
    late = claim_jobs(engine, jobs, 1, lease=LEASE)
    expire(engine, jobs, 1)
    with pytest.raises(ClaimLost):
        extend_jobs(engine, late)
    again = claim_jobs(engine, jobs, 1, lease=LEASE)
    assert ids(again) == [1]
    assert extend_jobs(engine, again) == 1
    assert ids(claim_jobs(engine, jobs, 5, lease=LEASE)) == [3]


def test_a_spent_row_with_an_expired_lease_holds_nobody_up(database: Database) -> None:
    """A row whose attempts are spent does not count as running once its lease is over."""
    jobs = filled(database, [1, 1])
    counted = keyed_table(attempts=None)
    engine = database.engine()
    claim_jobs(engine, jobs, 1, lease=LEASE)
    expire(engine, jobs, 1)
    with engine.begin() as connection:
        connection.execute(sa.update(jobs.table).where(jobs.table.c.id == 1).values(note="poison"))
    healthy = counted.table.c.note.is_(None)
    assert ids(claim_jobs(engine, counted, 1, where=healthy)) == [2]


def test_the_heartbeat_of_an_exclusive_claim(database: Database) -> None:
    """A kept claim holds its key while the block runs."""
    jobs = filled(database, [1, 1])
    engine = database.engine()
    claim = claim_jobs(engine, jobs, 1, lease=LEASE)
    with keep_claims(engine, claim, every=timedelta(milliseconds=50)):
        assert ids(claim_jobs(engine, jobs, 1)) == []
    complete_jobs(engine, claim)
    assert ids(claim_jobs(engine, jobs, 1)) == [2]


@pytest.mark.databases("postgresql")
def test_many_held_keys_ahead(database: Database) -> None:
    """Another's open transaction holds all the first keys: the claim is full nevertheless."""
    jobs = filled(database, list(range(1, 301)))
    engine = database.engine()
    with transaction(engine) as mine:
        assert len(claim_jobs(mine, jobs, 150)) == 150
        assert ids(claim_jobs(engine, jobs, 5)) == [151, 152, 153, 154, 155]
        with engine.begin() as producer:
            producer.execute(jobs.table.insert().values(id=1000, customer_id=1))
        mine.rollback()


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("by", ["engine", "connection"])
def test_old_snapshots_are_refused(database: Database, level: str, by: str) -> None:
    """Where the look cannot see the latest, the claim says so and writes nothing."""
    jobs = filled(database, [1, 1])
    engine = database.engine(isolation_level=level)
    with transaction(engine) as mine, pytest.raises(ClaimError, match="READ COMMITTED"):
        claim_jobs(engine if by == "engine" else mine, jobs)
    assert ids(claim_jobs(database.engine(), jobs)) == [1]


@SERVERS
def test_autocommit_is_refused(database: Database) -> None:
    """Locks that are gone at once protect nothing; a transaction of the call's own is one."""
    jobs = filled(database, [1, 1])
    engine = database.engine(isolation_level="AUTOCOMMIT")
    refusal = "AUTOCOMMIT|own: pass the Engine"
    with engine.connect() as connection, pytest.raises(ClaimError, match=refusal):
        claim_jobs(connection, jobs)
    claim = claim_jobs(engine, jobs, lease=LEASE)
    assert ids(claim) == [1]
    with engine.connect() as connection, pytest.raises(ClaimError, match=refusal):
        extend_jobs(connection, claim)
    assert extend_jobs(engine, claim) == 1


DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "mysql": "mysql+asyncmy",
    "mariadb": "mariadb+asyncmy",
}


def test_asyncio(database: Database) -> None:
    """The same beside an event loop."""
    check_turns_on_a_loop(database, "engine")


@CALLERS
def test_asyncio_in_the_callers_transaction(database: Database) -> None:
    """And in a session's transaction."""
    check_turns_on_a_loop(database, "session")


def check_turns_on_a_loop(database: Database, by: str) -> None:
    """Claim by an asynchronous bind."""
    jobs = filled(database, [1, 1, 2])

    async def claim() -> list[list[int]]:
        engine = create_async_engine(database.url.set(drivername=DRIVERS[database.name]))
        found = []
        for _ in range(2):
            if by == "engine":
                found.append(ids(await aio.claim_jobs(engine, jobs, 5, lease=LEASE)))
                continue
            async with AsyncSession(engine) as session:
                claimed = await aio.claim_jobs(session, jobs, 5, lease=LEASE)
                await aio.extend_jobs(session, claimed)
                found.append(ids(claimed))
                await session.commit()
        await engine.dispose()
        return found

    assert asyncio.run(claim()) == [[1, 3], []]


@pytest.mark.parametrize("dialect", ["postgresql", "mysql", "mariadb", "sqlite"])
def test_the_indexes_that_it_wants(dialect: str) -> None:
    """One of the free rows by key and order, one of the running rows by key."""
    found = {each.reason: each for each in needed_indexes(keyed_table())}
    definition = found["keys"].definition(dialect_of(dialect))
    assert "customer_id, id" in definition
    assert "customer_id" in found["running"].definition(dialect_of(dialect))


def test_the_doctor_names_the_index_that_lacks(database: Database) -> None:
    """With the migration's indexes it has nothing to say; without one it names that one."""
    jobs = filled(database, [1, 2])
    engine = database.engine()
    needed = sorted(needed_indexes(jobs), key=lambda each: each.reason == "keys")
    with engine.connect() as connection:
        for name in ("jobs_keys", "jobs_free"):
            on = " ON jobs" if database.name in {"mysql", "mariadb"} else ""
            connection.execute(sa.text(f"DROP INDEX {name}{on}"))
        for each in needed[:-1]:
            definition = each.definition(engine.dialect)
            connection.exec_driver_sql(f"CREATE INDEX {each.name} {definition}")
        connection.commit()
        ask = ClaimRequest(10)
        found = unserved(connection, build_plan(jobs, ask, entities=False), ask)
        assert [each.reason for each in found] == ["keys"]
        last = needed[-1]
        connection.exec_driver_sql(f"CREATE INDEX {last.name} {last.definition(engine.dialect)}")
        connection.commit()
        assert unserved(connection, build_plan(jobs, ask, entities=False), ask) == []


def test_what_has_no_exclusive_keys_refuses() -> None:
    """Calls that cannot respect the keys say what does."""
    jobs = keyed_table()
    with pytest.raises(ClaimError, match="claim_jobs"):
        claim_statement(jobs)
    with pytest.raises(ClaimError, match="claim_jobs"):
        dequeue_jobs(sa.create_engine("sqlite://"), jobs)
    with pytest.raises(ClaimError, match="customer_id"):
        claim_jobs(sa.create_engine("sqlite://"), jobs, values={"customer_id": 5})
    with pytest.raises(PatchError, match="claim_reads"):
        lock_reads(f"{__name__}:ids", jobs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_per_key": 0}, "max_per_key is 0"),
        ({"max_per_key": True}, "max_per_key is True"),
        ({"exclusive_by": None, "max_per_key": 2}, "max_per_key needs exclusive_by"),
        ({"exclusive_by": "lease_until"}, "expected an integer"),
        ({"exclusive_by": "state"}, "state and exclusive_by are one column"),
        ({"exclusive_by": "customer"}, "exclusive_by=customer is not a column"),
    ],
)
def test_declarations_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    """Each says what was found and what was expected."""
    with pytest.raises(ClaimError, match=message):
        keyed_table(**options)


@pytest.mark.databases("postgresql")
def test_a_look_in_the_statement_that_locks_is_too_old(database: Database) -> None:
    """The trap: it waits for the key's lock, and then looks by the snapshot from before."""
    filled(database, [1, 1])
    engine = database.engine()
    naive = sa.text(
        "UPDATE jobs SET state = 'running' WHERE id = 2 AND state = 'waiting' AND "
        "(SELECT pg_advisory_xact_lock(1)) IS NOT NULL AND "
        "NOT EXISTS (SELECT FROM jobs j WHERE j.customer_id = 1 AND j.state = 'running')"
    )

    def second() -> int:
        with engine.begin() as connection:
            return connection.execute(naive).rowcount

    with engine.connect() as first:
        first.execute(sa.text("SELECT pg_advisory_xact_lock(1)"))
        first.execute(sa.text("UPDATE jobs SET state = 'running' WHERE id = 1"))
        with in_thread(second) as counted:
            database.wait_until_blocked()
            first.commit()
    assert counted.result() == 1


KEYS_LIKE: dict[str, tuple[Any, list[Any]]] = {
    "integer": (sa.BigInteger, [2**62, 2**62, -1]),
    "case": (sa.String(20), ["a", "A", "b"]),
    "trailing blanks": (sa.String(20), ["a", "a ", "b"]),
    "accents": (sa.String(20), ["e", "é", "b"]),
    "long": (sa.String(600), ["x" * 600, "x" * 600, "x" * 599]),
    "char": (sa.CHAR(5), ["a", "a", "b"]),
    "uuid": (sa.Uuid, [UUID(int=7), UUID(int=7), UUID(int=8)]),
    "binary": (sa.LargeBinary(16), [b"\0a", b"\0a", b"\0b"]),
    "enum": (sa.Enum("red", "green", name="color"), ["red", "red", "green"]),
    "date": (sa.Date, [date(2024, 2, 29), date(2024, 2, 29), date(2024, 3, 1)]),
    "boolean": (sa.Boolean, [True, True, False]),
}


@pytest.mark.parametrize("kind", KEYS_LIKE)
def test_what_the_database_compares_as_equal(database: Database, kind: str) -> None:
    """Is one key, behind a thousand rows of a busy key, too."""
    type_, values = KEYS_LIKE[kind]
    if kind == "binary" and database.name in {"mysql", "mariadb"}:
        type_ = mysql.BINARY(16)
        values = [value.ljust(16, b"x") for value in values]
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("key", type_),
        sa.Column("processing", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    jobs = JobTable(table, state="processing", done={}, order="id", exclusive_by="key")
    engine = database.engine()
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        rows = [{"id": n, "key": value} for n, value in enumerate(values, 1)]
        connection.execute(table.insert(), rows)
        second = sa.select(table.c.id).where(table.c.id == 2)
        beside = table.alias("beside")
        equal = second.join(beside, sa.and_(beside.c.id == 1, beside.c.key == table.c.key))
        is_one = connection.scalar(equal) is not None
        busy = [{"id": n, "key": values[0]} for n in range(10, 300)]
        connection.execute(table.insert(), busy)
    assert ids(claim_jobs(engine, jobs, 1)) == [1]
    with stopped(
        engine, lambda: ids(claim_jobs(engine, jobs, 5)), lambda said: said == "COMMIT"
    ) as step:
        assert step.go() == ([3] if is_one else [2, 3])
    assert ids(claim_jobs(database.engine(), jobs, 5)) == []


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("kind", ["case", "accents"])
def test_a_lock_of_equal_keys(database: Database, kind: str) -> None:
    """Keys that a collation compares as equal share the lock, not only the look."""
    engine = database.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE COLLATION lax (provider = icu, locale = 'und-u-ks-level1', "
            "deterministic = false)"
        )
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("key", sa.Text(collation="lax")),
        sa.Column("processing", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    jobs = JobTable(table, state="processing", done={}, order="id", exclusive_by="key")
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        rows = [{"id": n, "key": key} for n, key in enumerate(KEYS_LIKE[kind][1], 1)]
        connection.execute(table.insert(), rows)
    with transaction(engine) as mine:
        assert ids(claim_jobs(mine, jobs, 1)) == [1]
        assert ids(claim_jobs(engine, jobs, 5)) == [3]


@pytest.mark.databases("postgresql")
def test_a_date_is_one_key_in_every_session(database: Database) -> None:
    """However a session writes dates."""
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("day", sa.Date),
        sa.Column("processing", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    jobs = JobTable(table, state="processing", done={}, order="id", exclusive_by="day")
    engine = database.engine()
    german = database.engine(connect_args={"options": "-c DateStyle=German"})
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), [{"day": date(2024, 2, 3)} for _ in range(2)])
    with transaction(engine) as mine:
        assert ids(claim_jobs(mine, jobs, 1)) == [1]
        assert ids(claim_jobs(german, jobs, 1, where=table.c.id == 2)) == []


def test_many_expired_rows_of_a_busy_key(database: Database) -> None:
    """Behind them, those of another key are found."""
    jobs = filled(database, [1] * 301 + [2])
    engine = database.engine()
    past = jobs.now(jobs.lease, sa.literal(-3600, sa.Float()))
    later = jobs.now(jobs.lease, sa.literal(-60, sa.Float()))
    with engine.begin() as connection:
        for lease, rows in ((past, jobs.table.c.id < 301), (later, jobs.table.c.id == 302)):
            connection.execute(
                sa.update(jobs.table).where(rows).values(state="running", lease_until=lease)
            )
        connection.execute(
            sa.update(jobs.table).where(jobs.table.c.id == 301).values(state="running")
        )
    assert ids(claim_jobs(engine, jobs, 5, lease=LEASE)) == [302]


def test_an_expired_row_behind_free_rows(database: Database) -> None:
    """It comes after the free rows that stand behind those of a busy key."""
    jobs = filled(database, [1] * 200 + [2, 3])
    engine = database.engine()
    assert ids(claim_jobs(engine, jobs, 1)) == [1]
    claim = claim_jobs(engine, jobs, 1, where=jobs.table.c.id == 202, lease=LEASE)
    expire(engine, jobs, claim[0].id)
    assert ids(claim_jobs(engine, jobs, 1, lease=LEASE)) == [201]
    assert ids(claim_jobs(engine, jobs, 1, lease=LEASE)) == [202]


def test_ties_of_a_composite_key_behind_a_busy_key(database: Database) -> None:
    """The parts of a primary key are those of one row, whatever index each is read by."""
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        sa.Column("a", sa.Integer, primary_key=True),
        sa.Column("b", sa.Integer, primary_key=True),
        sa.Column("state", sa.String(20), nullable=False, server_default="waiting"),
        sa.Column("customer_id", sa.Integer),
        sa.Column("rank", sa.Integer),
        sa.Index("jobs_keys", "state", "customer_id", "rank"),
        sa.Index("jobs_parts", "state", "customer_id", "rank", "b"),
    )
    declared: dict[str, Any] = {"free": "waiting", "claimed": "running", "done": "done"}
    jobs = JobTable(table, state="state", order="rank", exclusive_by="customer_id", **declared)
    engine = database.engine()
    table.create(engine)
    with engine.begin() as connection:
        rows = [{"a": n, "b": -n, "customer_id": 1, "rank": 0} for n in range(300)]
        rows += [{"a": 1000 + n, "b": 50 - n, "customer_id": 2, "rank": 1} for n in range(9)]
        connection.execute(table.insert(), rows)
    assert [job.customer_id for job in claim_jobs(engine, jobs, 1)] == [1]
    assert [job.customer_id for job in claim_jobs(engine, jobs, 1)] == [2]
    assert list(claim_jobs(engine, jobs, 1)) == []


class Strict(sa.TypeDecorator[UUID]):
    """A UUID as bytes, which is never NULL."""

    impl = sa.LargeBinary(16)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        """Write its bytes."""
        del dialect
        return value.bytes

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        """Read its bytes."""
        del dialect
        return UUID(bytes=bytes(value))


@pytest.mark.parametrize("name", ["jobs", "a%b", "a%(x)s", "a:b"])
def test_an_empty_queue_and_odd_names(database: Database, name: str) -> None:
    """No type has to read what is not there, and no name is taken apart."""
    table = sa.Table(
        name,
        sa.MetaData(),
        sa.Column("id", Strict),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("customer_id", sa.Integer),
        sa.Column("processing", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    waits = sa.table("waits", sa.column("number"))
    free = sa.and_(
        table.c.processing.is_(sa.false()),
        ~sa.exists().where(waits.c.number == table.c.number),
    )
    jobs = JobTable(
        table,
        state="processing",
        free=free,
        claimed=True,
        done={},
        order="number",
        exclusive_by="customer_id",
    )
    engine = database.engine()
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE waits (number INTEGER)"))
    assert list(claim_jobs(engine, jobs, 5)) == []
    with engine.begin() as connection:
        rows = [
            {"id": UUID(int=n), "number": n, "customer_id": int(n > 150)} for n in range(1, 152)
        ]
        connection.execute(table.insert(), rows)
    assert [job.number for job in claim_jobs(engine, jobs, 1)] == [1]
    assert [job.id for job in claim_jobs(engine, jobs, 1)] == [UUID(int=151)]


@pytest.mark.databases("postgresql")
def test_a_view_whose_name_differs_in_case(database: Database) -> None:
    """It is another relation."""
    jobs = filled(database, [1], name="Jobs")
    with database.engine().begin() as connection:
        connection.execute(sa.text("CREATE VIEW jobs AS SELECT 1 AS one"))
    assert ids(claim_jobs(database.engine(), jobs, 1)) == [1]


@pytest.mark.databases("postgresql")
def test_a_partition_shares_the_locks_of_its_root(database: Database) -> None:
    """A worker of one partition excludes those of the whole table."""
    engine = database.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE jobs (id integer, part integer, customer_id integer, "
            "processing boolean NOT NULL DEFAULT false, PRIMARY KEY (id, part)) "
            "PARTITION BY LIST (part)"
        )
        for part in (1, 2):
            connection.exec_driver_sql(
                f"CREATE TABLE jobs_{part} PARTITION OF jobs FOR VALUES IN ({part})"
            )
        connection.exec_driver_sql(
            "INSERT INTO jobs (id, part, customer_id) VALUES (1, 1, 5), (2, 2, 5), (3, 2, 6)"
        )
    declared = {
        name: JobTable(
            sa.Table(name, sa.MetaData(), autoload_with=engine),
            state="processing",
            done={},
            order="id",
            exclusive_by="customer_id",
        )
        for name in ("jobs", "jobs_1")
    }
    with transaction(engine) as mine:
        assert ids(claim_jobs(mine, declared["jobs_1"], 5)) == [1]
        assert ids(claim_jobs(engine, declared["jobs"], 5)) == [3]


def test_a_view_is_refused(database: Database) -> None:
    """Its keys would be locked in its own name, and not in that of the table."""
    filled(database, [1, 1])
    engine = database.engine()
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE VIEW waiting_jobs AS SELECT * FROM jobs"))
    view = keyed_table(name="waiting_jobs")
    with pytest.raises(ClaimError, match="'waiting_jobs' is a view"):
        claim_jobs(engine, view)


@pytest.mark.parametrize(
    "name", ["claim_keys", "claim_first", "claim_given", "claim_numbered", "claimed", "branches"]
)
@pytest.mark.parametrize("most", [1, 2])
def test_a_table_that_is_called_like_an_alias(database: Database, name: str, most: int) -> None:
    """No name within the statements is the table's own."""
    jobs = filled(database, [1] * 200 + [2], name=name, max_per_key=most)
    engine = database.engine()
    assert ids(claim_jobs(engine, jobs, 1)) == [1]
    assert ids(claim_jobs(engine, jobs, 2)) == ([201] if most == 1 else [2, 201])


def test_one_declaration_on_several_databases(database: Database, tmp_path: Path) -> None:
    """The statements of one database are not used on another."""
    jobs = filled(database, [1, 1, 2])
    other = sa.create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    jobs.table.metadata.create_all(other)
    with other.begin() as connection:
        connection.execute(jobs.table.insert(), [{"customer_id": 1} for _ in range(5)])
    for _ in range(2):
        assert ids(claim_jobs(database.engine(), jobs, 5)) in ([1, 3], [])
        assert ids(claim_jobs(other, jobs, 5)) in ([1], [])
    other.dispose()


@INNODB
def test_a_holder_that_is_awake_is_waited_for(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that gets no lock names the holder, and writes nothing."""
    jobs = filled(database, [1])
    monkeypatch.setattr(named_lock, "PATIENCE", 0)
    monkeypatch.setattr(named_lock, "end", lambda *_: False)
    monkeypatch.setattr(execution, "TRIES", 1)
    engine, others = database.engine(), database.engine()
    with others.connect() as other, named_lock.named_lock(other, jobs.table):
        holder = other.connection.driver_connection.thread_id()  # type: ignore[union-attr]
        with pytest.raises(ClaimConflict, match=rf"connection {holder}\b.* KILL {holder}"):
            claim_jobs(engine, jobs)
    assert ids(claim_jobs(engine, jobs)) == [1]


@INNODB
def test_a_holder_that_is_asleep_is_ended(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that has stopped between two statements keeps no other from the table."""
    jobs = filled(database, [1])
    monkeypatch.setattr(named_lock, "PATIENCE", 0)
    engine, others = database.engine(), database.engine()
    call = lambda: ids(claim_jobs(others, jobs, lease=LEASE))  # noqa: E731 - a call
    with stopped(others, call, commit_after("UPDATE jobs")) as holder:
        assert ids(claim_jobs(engine, jobs, lease=LEASE)) == [1]
        # Its connection was ended, so it tries again, and finds nothing.
        assert holder.go() == []


@INNODB
@pytest.mark.parametrize(
    "said", [("wsrep_on", "ON"), ("group_replication_single_primary_mode", "OFF")]
)
def test_a_cluster_of_several_writers_is_refused(
    database: Database, said: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the server says that it is one of several, whose locks are its own."""
    jobs = filled(database, [1])
    name, value = said
    asked = dict.fromkeys((True, False), f"SELECT '{name}', '{value}'")
    with monkeypatch.context() as cluster:
        cluster.setattr(named_lock, "CLUSTER", asked)
        with pytest.raises(ClaimError, match=f"{name}={value}"):
            claim_jobs(database.engine(), jobs)
    assert ids(claim_jobs(database.engine(), jobs)) == [1]


@INNODB
def test_a_session_that_chooses_another_connection(database: Database) -> None:
    """It is given the one that holds the lock."""
    jobs = filled(database, [1, 2])
    engine = database.engine()

    class Routed(Session):
        def get_bind(self, *_: Any, **__: Any) -> Any:
            return engine

    assert ids(claim_jobs(sa.orm.sessionmaker(class_=Routed), jobs)) == [1]
    assert ids(claim_jobs(sa.orm.sessionmaker(binds={jobs.table: engine}), jobs)) == [2]


@INNODB
def test_a_listener_that_reads_first(database: Database) -> None:
    """A transaction that has begun keeps its isolation level, so the claim is refused."""
    jobs = filled(database, [1])
    engine = database.engine()

    @sa.event.listens_for(engine, "begin")
    def read(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT count(*) FROM jobs")

    with pytest.raises(ClaimError, match="a listener to the engine's begin ran"):
        claim_jobs(engine, jobs)


def test_databases_whose_advisory_locks_do_nothing() -> None:
    """CockroachDB has the functions, and they lock nothing."""
    from sqlalchemy.dialects import postgresql  # noqa: PLC0415

    from atomic_claim.backends import advisory  # noqa: PLC0415

    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    dialect.name = "cockroachdb"
    with pytest.raises(UnsupportedDialect, match="advisory locks"):
        advisory.require_locks(dialect)


CUSTOMERS = 50
JOBS = 300
WORKERS = 8


@dataclass
class Audit:
    """A table in which the workers of a drain record their runs, in order."""

    table: sa.Table

    def intervals(self, engine: sa.Engine) -> list[tuple[int, int, int]]:
        """Key, start and end of every run, by the numbers of their records."""
        with engine.connect() as connection:
            rows = connection.execute(sa.select(self.table).order_by(self.table.c.number)).all()
        begun = dict[int, tuple[int, int]]()
        found = []
        for row in rows:
            if row.begins:
                assert row.job not in begun, f"job {row.job} ran twice"
                begun[row.job] = row.customer, row.number
            else:
                found.append((*begun[row.job], row.number))
        return found


@pytest.mark.once
@pytest.mark.parametrize("most", [1, 3])
def test_drain(database: Database, most: int) -> None:
    """Eight workers, fifty keys of very uneven size, one of them held all the while."""
    # The first key has a third of all rows, the last ones a few each.
    customers = [
        min(int(CUSTOMERS * ((n * 7919 % JOBS) / JOBS) ** 3), CUSTOMERS - 1) for n in range(JOBS)
    ]
    jobs = filled(database, [*customers], max_per_key=most)
    engine = database.engine(pool_size=WORKERS + 1)
    if database.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def forget_the_disk(driver: Any, _: object) -> None:
            driver.execute("PRAGMA synchronous = OFF")

    audit = sa.Table(
        "audit",
        jobs.table.metadata,
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("job", sa.Integer, nullable=False),
        sa.Column("customer", sa.Integer, nullable=False),
        sa.Column("begins", sa.Boolean, nullable=False),
    )
    audit.create(engine)
    if most == 1:
        forbid_a_second_running(engine, database)
    held = claim_jobs(engine, jobs, most, where=jobs.table.c.customer_id == 7)
    assert len(held) == most
    errors = list[BaseException]()
    left = sa.select(sa.func.count()).where(
        jobs.table.c.state == "waiting", jobs.table.c.customer_id != 7
    )

    def record(claim: Any, *, begins: bool) -> None:
        with engine.begin() as connection:
            rows = [{"job": j.id, "customer": j.customer_id, "begins": begins} for j in claim]
            connection.execute(audit.insert(), rows)

    def work() -> None:
        try:
            while True:
                if claim := claim_jobs(engine, jobs, 4, lease=LEASE):
                    record(claim, begins=True)
                    record(claim, begins=False)
                    complete_jobs(engine, claim)
                    continue
                with engine.connect() as connection:
                    if not connection.scalar(left):
                        return
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    found = Audit(audit).intervals(engine)
    assert len(found) == sum(customer != 7 for customer in customers)
    at_once = exclusive_rounds.most_at_once(found)
    assert max(at_once.values()) <= most
    assert 7 not in at_once
    complete_jobs(engine, held)
    assert len(claim_jobs(engine, jobs, 5)) == min(most, customers.count(7) - most)
    if most == 1:
        assert_in_order(engine, audit)


def forbid_a_second_running(engine: sa.Engine, database: Database) -> None:
    """Have the database itself refuse a second running row of a key."""
    with engine.begin() as connection:
        if database.name in {"postgresql", "sqlite"}:
            where = "WHERE state = 'running'"
            connection.execute(sa.text(f"CREATE UNIQUE INDEX one ON jobs (customer_id) {where}"))
            return
        running = "CASE WHEN state = 'running' THEN customer_id END"
        connection.execute(sa.text(f"ALTER TABLE jobs ADD COLUMN runs INT AS ({running}) VIRTUAL"))
        connection.execute(sa.text("CREATE UNIQUE INDEX one ON jobs (runs)"))


def assert_in_order(engine: sa.Engine, audit: sa.Table) -> None:
    """Assert that the rows of each key began in the order of the claim."""
    begun = defaultdict[int, list[int]](list)
    with engine.connect() as connection:
        query = sa.select(audit.c.customer, audit.c.job).where(audit.c.begins)
        for customer, job in connection.execute(query.order_by(audit.c.number)):
            begun[customer].append(job)
    assert all(found == sorted(found) for found in begun.values())


@pytest.mark.once
def test_combinations(database: Database) -> None:
    """Any four parts meet in all ways, in threads; the module's command runs every combination."""
    engine = database.engine()
    with ThreadPoolExecutor(3) as executor:
        for combination in exclusive_rounds.HALF:
            found = exclusive_rounds.run_round(executor, engine, combination, rows=18, workers=3)
            assert found.most <= combination.most, combination
