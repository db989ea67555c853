"""Conflicts, lost connections and open transactions, driver by driver."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, String
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import sessionmaker

from atomic_claim import ClaimConflict, JobTable, aio, claim_jobs, complete_jobs
from atomic_claim.backends.drivers import in_transaction
from tests.databases import Database
from tests.jobs import fill, hurried, ids, job_table, taken

POSTGRESQL = ("psycopg", "psycopg2", "pg8000")
INNODB = ("pymysql", "mysqlconnector")
LOOP = {"postgresql": ("asyncpg", "psycopg"), "mysql": ("asyncmy",), "mariadb": ("asyncmy",)}

SERVERS = pytest.mark.databases("postgresql", "mysql", "mariadb")


def drivers_of(database: Database) -> tuple[str, ...]:
    """Return the synchronous drivers of a database."""
    return POSTGRESQL if database.name == "postgresql" else INNODB


def by_driver(database: Database, driver: str, **options: Any) -> sa.Engine:
    """Create an engine with a driver."""
    return database.engine(drivername=f"{database.name}+{driver}", **options)


def filled(database: Database) -> JobTable:
    """Create ten free jobs in a table with a token."""
    table = job_table(Column("claim_token", String(32)), Column("done_at", sa.DateTime))
    table.metadata.drop_all(database.engine())
    fill(database.engine(), table, 10)
    return JobTable(table, state="processing", token="claim_token", done={"done_at": sa.func.now()})


@SERVERS
def test_claim_and_complete(database: Database) -> None:
    """Each driver claims and completes, by each kind of transaction."""
    for driver in drivers_of(database):
        check_claim_and_complete(database, driver)


def check_claim_and_complete(database: Database, driver: str) -> None:
    """Check one driver."""
    engine, jobs = by_driver(database, driver), filled(database)
    first = claim_jobs(engine, jobs, 2)
    second = claim_jobs(sessionmaker(engine), jobs, 2)
    with engine.begin() as connection:
        third = claim_jobs(connection, jobs, 2)
    assert [ids(first), ids(second), ids(third)] == [[1, 2], [3, 4], [5, 6]]
    assert complete_jobs(engine, first) == 2
    automatic = by_driver(database, driver, isolation_level="AUTOCOMMIT")
    assert ids(claim_jobs(sessionmaker(automatic), jobs, 2)) == [7, 8]


@SERVERS
def test_an_open_transaction_is_seen(database: Database) -> None:
    """The driver tells whether a transaction is open on its connection."""
    for driver in drivers_of(database):
        check_an_open_transaction_is_seen(database, driver)


def check_an_open_transaction_is_seen(database: Database, driver: str) -> None:
    """Check one driver."""
    engine, jobs = by_driver(database, driver), filled(database)
    with engine.connect() as connection:
        assert not in_transaction(connection.connection.driver_connection)
        connection.execute(sa.update(jobs.table).values(note="x"))
        assert in_transaction(connection.connection.driver_connection)
        connection.rollback()
        assert not in_transaction(connection.connection.driver_connection)


@SERVERS
def test_a_conflict(database: Database) -> None:
    """A serialization failure, or a lock that is waited for in vain, is a `ClaimConflict`."""
    for driver in drivers_of(database):
        check_a_conflict(database, driver)


def check_a_conflict(database: Database, driver: str) -> None:
    """Check one driver."""
    engine, jobs = by_driver(database, driver), filled(database)
    innodb = database.name != "postgresql"
    level = "READ COMMITTED" if innodb else "SERIALIZABLE"
    with (
        engine.connect().execution_options(isolation_level=level) as mine,
        engine.connect() as other,
    ):
        if innodb:
            mine.execute(sa.text("SET SESSION innodb_lock_wait_timeout = 1"))
        mine.execute(sa.select(jobs.table)).all()
        other.execute(sa.update(jobs.table).values(note="x"))
        if not innodb:
            other.commit()
        if innodb:
            held = claim_jobs(database.engine(), JobTable(jobs.table, state="processing"), 1)
            assert held == []
            with pytest.raises(ClaimConflict):
                complete_jobs(mine, _of_others(jobs))
        else:
            with pytest.raises(ClaimConflict):
                claim_jobs(mine, jobs, 2)
        other.rollback()


def _of_others(jobs: JobTable) -> Any:
    """Return a claim of a row that is locked."""
    from atomic_claim.claim import Claim  # noqa: PLC0415 - used here alone

    return Claim(((1,),), table=jobs, keys=((1,),), token="x" * 32)


@SERVERS
def test_a_lost_connection(database: Database) -> None:
    """Whichever message finds the connection closed, the claim is made once."""
    for driver in drivers_of(database):
        check_a_lost_connection(database, driver)


def check_a_lost_connection(database: Database, driver: str) -> None:
    """Check one driver."""
    engine, jobs = by_driver(database, driver, pool_size=1), filled(database)
    admin = database.engine(isolation_level="AUTOCOMMIT")
    asks = {"postgresql": "pg_backend_pid()"}.get(database.name, "connection_id()")
    ends = {"postgresql": "SELECT pg_terminate_backend(%s)"}.get(database.name, "KILL %s")
    for number in range(3):
        with engine.connect() as connection:
            process = connection.scalar(sa.text(f"SELECT {asks}"))
        with admin.connect() as connection:
            connection.exec_driver_sql(ends % int(process))
        with hurried():
            assert len(claim_jobs(engine, jobs, 2)) == 2
        assert len(taken(database.engine(), jobs.table)) == 2 * (number + 1)


@SERVERS
def test_beside_an_event_loop(database: Database) -> None:
    """The asynchronous drivers claim, see a conflict, and survive a lost connection."""
    for driver in LOOP[database.name]:
        check_beside_an_event_loop(database, driver)


def check_beside_an_event_loop(database: Database, driver: str) -> None:
    """Check one driver."""
    jobs, admin = filled(database), database.engine(isolation_level="AUTOCOMMIT")
    postgresql = database.name == "postgresql"

    async def run() -> None:
        url = database.url.set(drivername=f"{database.name}+{driver}")
        engine = create_async_engine(url, pool_size=1, max_overflow=1)
        try:
            assert len(await aio.claim_jobs(engine, jobs, 2)) == 2
            async with engine.connect() as connection:
                asks = "pg_backend_pid()" if postgresql else "connection_id()"
                process = await connection.scalar(sa.text(f"SELECT {asks}"))
            with admin.connect() as other:
                ends = "SELECT pg_terminate_backend(%s)" if postgresql else "KILL %s"
                other.exec_driver_sql(ends % int(process))
            assert len(await aio.claim_jobs(engine, jobs, 2)) == 2
            if postgresql:
                async with engine.connect() as connection:
                    await connection.execution_options(isolation_level="SERIALIZABLE")
                    await connection.execute(sa.select(jobs.table))
                    with database.engine().begin() as other:
                        other.execute(sa.update(jobs.table).values(note="x"))
                    with pytest.raises(ClaimConflict):
                        await aio.claim_jobs(connection, jobs, 2)
        finally:
            await engine.dispose()

    asyncio.run(run())
    assert len(taken(database.engine(), jobs.table)) == 4
