"""Conflicts, lost connections and open transactions, driver by driver."""

import asyncio
import importlib.util
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, String
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import StaticPool

from atomic_claim import ClaimConflict, ClaimError, JobTable, aio, claim_jobs, complete_jobs
from atomic_claim.backends.drivers import in_transaction
from tests.databases import Database
from tests.jobs import fill, hurried, ids, job_table, taken

POSTGRESQL = ("psycopg", "psycopg2", "pg8000")
INNODB = ("pymysql", "mysqlconnector")
# Modules that need a C library, tested where they are installed.
COMPILED = {"mysqldb": "MySQLdb", "mariadbconnector": "mariadb"}
LOOP = {"postgresql": ("asyncpg", "psycopg"), "mysql": ("asyncmy",), "mariadb": ("asyncmy",)}

SERVERS = pytest.mark.databases("postgresql", "mysql", "mariadb")
# What tells the server's process of a connection, and ends it.
INNODB_PROCESS = ("connection_id()", "KILL %s")
PROCESSES = {
    "postgresql": ("pg_backend_pid()", "SELECT pg_terminate_backend(%s, 5000)"),
    "mysql": INNODB_PROCESS,
    "mariadb": INNODB_PROCESS,
}


def drivers_of(database: Database) -> tuple[str, ...]:
    """Return the synchronous drivers of a database."""
    if database.name == "postgresql":
        return POSTGRESQL
    named = COMPILED if database.name == "mariadb" else ("mysqldb",)
    installed = (name for name in named if importlib.util.find_spec(COMPILED[name]) is not None)
    return (*INNODB, *installed)


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
        if driver == "mysqldb":
            assert in_transaction(connection.connection.driver_connection) is None
            return
        assert not in_transaction(connection.connection.driver_connection)
        connection.execute(sa.update(jobs.table).values(note="x"))
        assert in_transaction(connection.connection.driver_connection)
        connection.rollback()
        assert not in_transaction(connection.connection.driver_connection)


@SERVERS
def test_the_one_connection_of_a_static_pool(database: Database) -> None:
    """A transaction that is open on it, or may be, is not committed."""
    for driver in drivers_of(database):
        check_the_one_connection_of_a_static_pool(database, driver)


def check_the_one_connection_of_a_static_pool(database: Database, driver: str) -> None:
    """Check one driver."""
    engine, jobs = by_driver(database, driver, poolclass=StaticPool), filled(database)
    with engine.connect() as connection:
        connection.execute(sa.update(jobs.table).values(note="x"))
        with pytest.raises(ClaimError, match="has one connection, and"):
            claim_jobs(engine, jobs, 2)
        connection.rollback()
    with database.engine().connect() as other:
        assert set(other.scalars(sa.select(jobs.table.c.note))) == {None}


@SERVERS
def test_a_driver_that_does_not_tell_of_transactions(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one connection of a pool is refused whether a transaction is open on it or not."""
    engine, jobs = (
        by_driver(database, drivers_of(database)[0], poolclass=StaticPool),
        filled(database),
    )
    monkeypatch.setattr("atomic_claim.backends.drivers.IN_TRANSACTION", ())
    with pytest.raises(ClaimError, match="does not tell if a transaction is open"):
        claim_jobs(engine, jobs, 2)
    assert taken(database.engine(), jobs.table) == []


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
    asks, ends = PROCESSES[database.name]
    for number in range(3):
        with engine.connect() as connection:
            process = connection.scalar(sa.text(f"SELECT {asks}"))
        with admin.connect() as connection:
            connection.exec_driver_sql(ends % int(process))
        with hurried():
            assert len(claim_jobs(engine, jobs, 2)) == 2
        assert len(taken(database.engine(), jobs.table)) == 2 * (number + 1)


@SERVERS
def test_a_connection_that_is_lost_between_two_statements(database: Database) -> None:
    """The jobs are completed once."""
    for driver in drivers_of(database):
        check_a_connection_that_is_lost_between_two_statements(database, driver)


def check_a_connection_that_is_lost_between_two_statements(database: Database, driver: str) -> None:
    """Check one driver."""
    engine, jobs = by_driver(database, driver), filled(database)
    admin = database.engine(isolation_level="AUTOCOMMIT")
    asks, ends = PROCESSES[database.name]
    claim, lost = claim_jobs(engine, jobs, 2), list[int]()

    def lose(connection: sa.Connection, *_: object) -> None:
        if not lost:
            lost.append(0)
            lost.append(connection.scalar(sa.text(f"SELECT {asks}")) or 0)
            with admin.connect() as other:
                other.exec_driver_sql(ends % lost[-1])

    sa.event.listen(engine, "after_cursor_execute", lose)
    with hurried():
        assert complete_jobs(engine, claim) == 2
    assert lost


@SERVERS
def test_a_connection_that_is_lost_on_its_way_back(database: Database) -> None:
    """Rows whose claim is committed are handed out, though the isolation level cannot be reset."""
    for driver in drivers_of(database):
        check_a_connection_that_is_lost_on_its_way_back(database, driver)


def check_a_connection_that_is_lost_on_its_way_back(database: Database, driver: str) -> None:
    """Check one driver."""
    engine, jobs = by_driver(database, driver, pool_reset_on_return=None), filled(database)
    admin = database.engine(isolation_level="AUTOCOMMIT")
    lost = []

    def lose(connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"SELECT {PROCESSES[database.name][0]}")
        lost.append(cursor.fetchone()[0])
        cursor.close()
        connection.rollback()
        with admin.connect() as other:
            other.exec_driver_sql(PROCESSES[database.name][1] % lost[-1])

    automatic = by_driver(database, driver, isolation_level="AUTOCOMMIT")
    commit = automatic.dialect.do_commit

    def lose_when_committed(connection: Any) -> None:
        commit(connection)
        lose(connection)

    automatic.dialect.do_commit = lose_when_committed  # type: ignore[method-assign]
    assert len(claim_jobs(sessionmaker(automatic), jobs, 2)) == 2
    sa.event.listen(engine, "reset", lose)
    committed = engine.execution_options(isolation_level="READ COMMITTED")
    assert len(claim_jobs(committed, jobs, 2)) == 2
    assert len(claim_jobs(sessionmaker(committed), jobs, 2)) == 2
    assert len(taken(database.engine(), jobs.table)) == 6
    assert len(lost) == 3


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
