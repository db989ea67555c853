"""Claims by engine and sessionmaker: one statement where autocommit is safe, BEGIN where it is not.

What reaches the server is counted by what the driver's library hears from it (PostgreSQL) or by
SQLite itself, not by SQLAlchemy.
"""

import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import pq
from sqlalchemy import Column, String
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from atomic_claim import ClaimError, JobTable, claim_jobs, claim_statement, complete_jobs
from tests.databases import Database
from tests.jobs import OWN, bound, fill, ids, job_table, mapped, rows, taken

# Both turn an engine into what to claim by.
by_both = pytest.mark.parametrize("own", [lambda engine: engine, sessionmaker], ids=OWN)
Own = Callable[[sa.Engine], Any]
limited = pytest.mark.parametrize("limit", [1, 10])


@contextmanager
def commands(engine: sa.Engine) -> Iterator[list[str]]:
    """Record the first word of each command that the server runs on the sole connection."""
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
    found: list[str] = []
    if engine.dialect.name == "sqlite":
        driver.set_trace_callback(lambda sql: found.append(sql.split()[0]))
        yield found
        driver.set_trace_callback(None)
        return
    with tempfile.TemporaryFile("w+") as trace:
        driver.pgconn.trace(trace.fileno())
        driver.pgconn.set_trace_flags(pq.Trace.SUPPRESS_TIMESTAMPS)
        yield found
        driver.pgconn.untrace()
        trace.seek(0)
        found += re.findall(r'^B\t\d+\tCommandComplete\t "(\w+)', trace.read(), re.MULTILINE)


def with_token(database: Database, count: int = 200) -> tuple[sa.Engine, sa.Table]:
    """Create an engine, and free jobs in a table whose claims have a token."""
    engine, table = database.engine(), job_table(Column("claim_token", String(32)))
    fill(engine, table, count)
    return engine, table


@limited
@pytest.mark.databases("postgresql")
def test_a_claim_is_one_statement(database: Database, limit: int) -> None:
    """Ten claims are ten statements: no BEGIN, COMMIT or ROLLBACK stands beside them."""
    engine, table = with_token(database)
    claim_jobs(engine, table, limit)
    with commands(engine) as found:
        for _ in range(10):
            assert len(claim_jobs(engine, table, limit)) == limit
    assert found == ["SELECT"] * 10
    assert taken(engine, table) == list(range(1, 11 * limit + 1))


@pytest.mark.databases("postgresql")
def test_a_claim_is_one_statement_on_a_connection_of_many_uses(database: Database) -> None:
    """A connection that was in AUTOCOMMIT before costs no BEGIN afterwards."""
    engine, table = with_token(database, 4)
    claim_jobs(engine, table)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM")
    with commands(engine) as found:
        assert ids(claim_jobs(engine, table)) == [2]
    assert found == ["SELECT"]
    with commands(engine) as found, engine.begin() as connection:
        assert ids(claim_jobs(connection, table)) == [3]
    assert found == ["BEGIN", "SELECT", "COMMIT"]


def listening(engine: sa.Engine) -> sa.Engine:
    """Add a listener to the commits of an engine."""
    sa.event.listen(engine, "commit", lambda _: None)
    return engine


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("make", [listening, sessionmaker, lambda engine: engine])
@pytest.mark.databases("postgresql")
def test_other_claims_begin_and_commit(database: Database, make: Own, token: bool) -> None:
    """The twin: by sessionmaker, with a listener, or without a token BEGIN and COMMIT are sent."""
    engine, table = with_token(database, 4)
    jobs = JobTable(table, state="processing", token="claim_token" if token else None)
    bind = make(engine)
    claim_jobs(bind, jobs)
    with commands(engine) as found:
        claim_jobs(bind, jobs)
    if token and bind is engine and not engine.dispatch.commit:
        assert found == ["SELECT"]
    else:
        assert found == ["BEGIN", "SELECT", "COMMIT"]


@by_both
@pytest.mark.databases("sqlite", "postgresql")
def test_a_unique_index_over_running_rows(database: Database, own: Own) -> None:
    """A row that cannot be marked is passed over, told and logged; the queue goes on."""
    engine, table = database.engine(), job_table(Column("place", sa.Integer))
    fill(engine, table, 4)
    with engine.begin() as connection:
        connection.execute(
            table.update().values(place=sa.case((table.c.id < 3, 1), else_=table.c.id))
        )
        running = "processing" if database.name == "postgresql" else "processing = 1"
        connection.exec_driver_sql(f"CREATE UNIQUE INDEX one ON jobs (place) WHERE {running}")
    found = claim_jobs(own(engine), table, 3)
    assert ids(found) == [1, 3]
    assert found.unreadable == ((2,),)
    assert ids(claim_jobs(own(engine), table, 3)) == [4]
    assert taken(engine, table) == [1, 3, 4]


@by_both
@pytest.mark.databases("sqlite", "postgresql", "mysql", "mariadb")
def test_the_connection_is_given_back_as_it_was(database: Database, own: Own) -> None:
    """The next user of a claim's connection can roll back, after a success and a failure."""
    engine = database.engine(pool_size=1, max_overflow=0)
    table = job_table(Column("place", sa.Integer, unique=True))
    fill(engine, table, 4)
    found = claim_jobs(own(engine), table, 2, values={"place": 1})
    assert (ids(found), found.unreadable) == ([1], ((2,),))
    assert ids(claim_jobs(own(engine), table)) == [2]
    with engine.connect() as connection:
        connection.execute(table.update().values(processing=True))
        connection.rollback()
    assert taken(engine, table) == [1, 2]


@pytest.mark.databases("postgresql")
def test_psycopg_leaves_autocommit_again(database: Database) -> None:
    """The driver's setting is as before, also on an engine that was in AUTOCOMMIT."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 4)
    automatic = database.engine(isolation_level="AUTOCOMMIT")
    for each, expected in ((engine, False), (automatic, True)):
        assert len(claim_jobs(each, table)) == 1
        with each.connect() as connection:
            driver: Any = connection.connection.driver_connection
            assert driver.autocommit is expected


@pytest.mark.parametrize("level", ["", "IMMEDIATE", "EXCLUSIVE", None])
@pytest.mark.databases("sqlite")
def test_sqlite_keeps_its_way_to_begin(database: Database, level: str | None) -> None:
    """The isolation level given to sqlite3, which says how it begins, is as before."""
    engine, table = database.engine(connect_args={"isolation_level": level}), job_table()
    fill(engine, table, 4)
    assert ids(claim_jobs(engine, table)) == [1]
    assert ids(claim_jobs(sessionmaker(engine), table)) == [2]
    assert taken(database.engine(), table) == [1, 2]
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        assert driver.isolation_level == level


def begin_immediate(engine: sa.Engine) -> None:
    """SQLAlchemy's documented recipe for SQLite: sqlite3 begins nothing, SQLAlchemy does."""

    @sa.event.listens_for(engine, "connect")
    def leave_it(connection: Any, _: object) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


@by_both
@limited
@pytest.mark.databases("sqlite")
def test_a_listener_that_begins(database: Database, own: Own, limit: int) -> None:
    """Rows returned by an engine whose `begin` event sends BEGIN IMMEDIATE are persisted."""
    engine, table = database.engine(), job_table()
    begin_immediate(engine)
    fill(engine, table, 20)
    with commands(engine) as found:
        claimed = claim_jobs(own(engine), table, limit)
    assert taken(database.engine(), table) == ids(claimed) == list(range(1, limit + 1))
    assert found == ["BEGIN", "UPDATE", *["SELECT"] * (len(found) - 3), "COMMIT"]


@pytest.mark.databases("sqlite")
def test_a_listener_that_begins_defeats_autocommit(database: Database) -> None:
    """The twin: in SQLAlchemy's AUTOCOMMIT the row is returned, and rolled back with the BEGIN."""
    engine, table = database.engine(), job_table()
    begin_immediate(engine)
    fill(engine, table, 20)
    automatic = engine.execution_options(isolation_level="AUTOCOMMIT")
    with automatic.connect() as connection:
        assert len(connection.execute(claim_statement(table)).all()) == 1
    assert taken(database.engine(), table) == []


@contextmanager
def tenants(database: Database) -> Iterator[tuple[sa.URL, sa.Table]]:
    """Jobs of two tenants, and the address of a role that sees only those of its tenant."""
    role = f"tenant_{uuid4().hex[:12]}"
    table, admin = job_table(Column("tenant", String(10), nullable=False)), database.engine()
    fill(admin, table, 3, tenant="acme")
    fill(admin, table, 3, first=4, tenant="zeta")
    policy = "tenant = current_setting('app.tenant', true)"
    with admin.begin() as connection:
        for sql in (
            f"CREATE ROLE {role} LOGIN PASSWORD 'tenant'",
            f"GRANT SELECT, UPDATE ON jobs TO {role}",
            "ALTER TABLE jobs ENABLE ROW LEVEL SECURITY",
            f"CREATE POLICY tenants ON jobs TO {role} USING ({policy}) WITH CHECK ({policy})",
        ):
            connection.exec_driver_sql(sql)
    try:
        yield database.url.set(username=role, password="tenant"), table
    finally:
        with admin.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")


SET_TENANT = "SELECT set_config('app.tenant', 'zeta', true)"


@limited
@pytest.mark.databases("postgresql")
def test_row_level_security_set_at_begin(database: Database, limit: int) -> None:
    """A tenant that is set for the length of each transaction claims its own rows."""
    with tenants(database) as (url, table):
        engine = database.engine(url=url)

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql(SET_TENANT)

        assert ids(claim_jobs(engine, table, limit)) == [4, 5, 6][:limit]
        assert taken(database.engine(), table) == [4, 5, 6][:limit]


@limited
@pytest.mark.databases("postgresql")
def test_row_level_security_set_by_a_session(database: Database, limit: int) -> None:
    """Likewise where the sessionmaker's `after_begin` sets it, for rows and for entities."""
    with tenants(database) as (url, table):
        engine = database.engine(url=url)
        maker = sessionmaker(engine)

        @sa.event.listens_for(maker, "after_begin")
        def begin(_: Session, __: object, connection: sa.Connection) -> None:
            connection.exec_driver_sql(SET_TENANT)

        assert ids(claim_jobs(maker, mapped(table), limit)) == [4, 5, 6][:limit]
        assert taken(database.engine(), table) == [4, 5, 6][:limit]


@pytest.mark.databases("postgresql")
def test_row_level_security_is_gone_in_autocommit(database: Database) -> None:
    """The twin: in autocommit the setting ends with its own statement, and no row is visible."""
    with tenants(database) as (url, table):
        engine = database.engine(url=url, isolation_level="AUTOCOMMIT")

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql(SET_TENANT)

        with engine.connect() as connection:
            assert connection.execute(claim_statement(table, 10)).all() == []


LEVEL = sa.func.current_setting("transaction_isolation")


@by_both
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("level", ["SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED"])
@pytest.mark.databases("postgresql")
def test_the_engine_s_isolation_level(
    database: Database, own: Own, driver: str, level: str
) -> None:
    """The claim runs at the level that the engine asks for: the server stamps it into the row."""
    table = job_table()
    fill(database.engine(), table, 20)
    engine = database.engine(drivername=f"postgresql+{driver}", isolation_level=level)
    for limit in (1, 10):
        claimed = claim_jobs(own(engine), table, limit, values={"note": LEVEL})
        assert [job.note for job in claimed] == [level.lower()] * limit
    assert taken(database.engine(), table) == list(range(1, 12))


@pytest.mark.databases("postgresql")
def test_the_isolation_level_of_execution_options(database: Database) -> None:
    """A level given by `execution_options` holds likewise, and the engine beside it has its own."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 4)
    serializable = engine.execution_options(isolation_level="SERIALIZABLE")
    assert claim_jobs(serializable, table, values={"note": LEVEL})[0].note == "serializable"
    assert claim_jobs(engine, table, values={"note": LEVEL})[0].note == "read committed"


@by_both
@pytest.mark.databases("postgresql")
def test_the_isolation_level_of_the_driver(database: Database, own: Own) -> None:
    """A level that a `connect` listener sets on psycopg holds, as does the server's default."""
    _, table = with_token(database, 4)
    listening = database.engine()

    @sa.event.listens_for(listening, "connect")
    def connect(connection: Any, _: object) -> None:
        connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE

    options = {"options": r"-c default_transaction_isolation=repeatable\ read"}
    by_default = database.engine(connect_args=options)
    for each, level in ((listening, "serializable"), (by_default, "repeatable read")):
        claimed = claim_jobs(own(each), table, values={"note": LEVEL})
        assert claimed[0].note == level


@pytest.mark.databases("postgresql")
def test_the_isolation_level_is_lost_in_autocommit(database: Database) -> None:
    """The twin: in autocommit no BEGIN carries the level, and SERIALIZABLE is READ COMMITTED."""
    table = job_table()
    engine = database.engine(isolation_level="SERIALIZABLE")
    fill(engine, table, 2)
    automatic = engine.execution_options(isolation_level="AUTOCOMMIT")
    with automatic.connect() as connection:
        claimed = connection.execute(claim_statement(table, values={"note": LEVEL})).one()
    assert claimed.note == "read committed"


@pytest.mark.databases("postgresql")
def test_a_read_only_engine_fails(database: Database) -> None:
    """An engine that is read only does not become writable by autocommit."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 2)
    reader = engine.execution_options(postgresql_readonly=True)
    with pytest.raises(sa.exc.InternalError, match="read-only transaction"):
        claim_jobs(reader, table)
    assert taken(engine, table) == []


@by_both
@limited
@pytest.mark.skipif(
    not hasattr(sqlite3, "LEGACY_TRANSACTION_CONTROL"),
    reason="sqlite3.connect(autocommit=...) came with Python 3.12",
)
@pytest.mark.databases("sqlite")
def test_a_transaction_at_all_times(database: Database, own: Own, limit: int) -> None:
    """Claims through sqlite3's `autocommit=False`, which begins by itself, are persisted."""
    table = job_table()
    fill(database.engine(), table, 20)
    engine = database.engine(connect_args={"autocommit": False})
    claimed = claim_jobs(own(engine), table, limit)
    assert ids(claimed) == list(range(1, limit + 1))
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        assert driver.autocommit is False
    assert taken(database.engine(), table) == ids(claimed)


@pytest.mark.skipif(
    not hasattr(sqlite3, "LEGACY_TRANSACTION_CONTROL"),
    reason="sqlite3.connect(autocommit=...) came with Python 3.12",
)
@pytest.mark.databases("sqlite")
def test_a_transaction_at_all_times_defeats_autocommit(database: Database) -> None:
    """The twin: there an isolation level of None commits nothing, and the claim is rolled back."""
    table = job_table()
    fill(database.engine(), table, 2)
    engine = database.engine(connect_args={"autocommit": False})
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.isolation_level = None
        assert len(connection.execute(claim_statement(table)).all()) == 1
    assert taken(database.engine(), table) == []


POOLS = {
    "a StaticPool on a file": (StaticPool, True),
    "a StaticPool in memory": (StaticPool, False),
    "the pool of SQLite in memory": (SingletonThreadPool, False),
}


@by_both
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.databases("sqlite")
def test_a_pool_that_hands_out_the_caller_s_connection(
    database: Database, own: Own, pool: str
) -> None:
    """While the caller has a transaction open on the one connection, a claim of our own is refused.

    The caller's work is neither committed nor rolled back by that.
    """
    poolclass, in_file = POOLS[pool]
    url = database.url if in_file else sa.URL.create("sqlite")
    engine, table = database.engine(url=url, poolclass=poolclass), job_table()
    fill(engine, table, 2)
    with engine.connect() as connection:
        connection.execute(table.insert(), rows(1, first=3))
        with pytest.raises(ClaimError, match="has one connection, and a transaction is open"):
            claim_jobs(own(engine), table)
        kept = connection.execute(sa.select(table.c.id, table.c.processing)).all()
        assert kept == [(1, False), (2, False), (3, False)]
        connection.rollback()
        # Committed by anybody, it would have outlived the rollback.
        assert connection.scalars(sa.select(table.c.id)).all() == [1, 2]
    assert ids(claim_jobs(own(engine), table)) == [1]
    assert taken(engine, table) == [1]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.databases("sqlite")
def test_a_statement_commits_the_caller_s_work(database: Database, pool: str) -> None:
    """The twin: another user of the one connection commits what the first has not."""
    poolclass, in_file = POOLS[pool]
    url = database.url if in_file else sa.URL.create("sqlite")
    engine, table = database.engine(url=url, poolclass=poolclass), job_table()
    fill(engine, table, 2)
    with engine.connect() as connection:
        connection.execute(table.insert(), rows(1, first=3))
        with engine.begin() as other:
            other.execute(claim_statement(table))
        connection.rollback()
        assert connection.scalars(sa.select(table.c.id)).all() == [1, 2, 3]


@by_both
@pytest.mark.parametrize("token", [True, False])
@pytest.mark.databases("sqlite", "postgresql", "mysql", "mariadb")
def test_a_row_that_cannot_be_read_is_not_lost(
    database: Database, own: Own, token: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A row with a value that its type does not know is told and freed; the others are claimed."""
    kinds = sa.Enum("mail", "film", native_enum=False, length=10)
    attempts = Column("attempts", sa.Integer, nullable=False, server_default="0")
    table = job_table(Column("kind", kinds), attempts, Column("claim_token", String(32)))
    engine = database.engine()
    fill(engine, table, 4, kind="mail")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET kind = 'fax' WHERE id = 1")
    named = "claim_token" if token else None
    jobs = JobTable(table, state="processing", attempts="attempts", max_attempts=2, token=named)
    found = claim_jobs(own(engine), jobs, 2)
    assert (ids(found), found.unreadable) == ([2], ((1,),))
    assert "row (1,) of jobs cannot be read: LookupError" in caplog.text
    assert taken(engine, table) == [2]
    assert ids(claim_jobs(own(engine), jobs, 2)) == [3]
    # Its attempts are spent.
    found = claim_jobs(own(engine), jobs, 2)
    assert (ids(found), found.unreadable) == ([4], ())


@pytest.mark.parametrize("kind", ["connection", "session"])
@pytest.mark.parametrize("token", [True, False])
@pytest.mark.databases("sqlite", "postgresql", "mysql", "mariadb")
def test_a_row_that_cannot_be_read_in_the_caller_s_transaction(
    database: Database, kind: str, token: bool
) -> None:
    """It is freed by key and token, the transaction can be committed, and further values stay."""
    kinds = sa.Enum("mail", "film", native_enum=False, length=10)
    engine = database.engine()
    table = job_table(Column("kind", kinds), Column("claim_token", String(32)))
    fill(engine, table, 4, kind="mail")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET kind = 'fax' WHERE id = 1")
    jobs = JobTable(table, state="processing", token="claim_token" if token else None)
    with bound(engine, kind) as bind:
        found = claim_jobs(bind, jobs, 3, values={"note": "mine"})
        bind.commit()
    assert (ids(found), found.unreadable) == ([2, 3], ((1,),))
    assert taken(engine, table) == [2, 3]
    with engine.connect() as connection:
        written = sa.select(table.c.id).where(table.c.note == "mine").order_by(table.c.id)
        assert connection.scalars(written).all() == [1, 2, 3]


# PostgreSQL is not configured for it, and SQLite does not know it.
@pytest.mark.databases("mysql", "mariadb")
def test_a_commit_in_two_phases(database: Database) -> None:
    """A sessionmaker that prepares its commits claims by them."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 4)
    assert ids(claim_jobs(sessionmaker(engine, twophase=True), table, 2)) == [1, 2]
    assert taken(engine, table) == [1, 2]


def test_a_sessionmaker_without_autobegin(database: Database) -> None:
    """A session of our own is begun by us, if it does not begin by itself."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 4)
    assert ids(claim_jobs(sessionmaker(engine, autobegin=False), table, 2)) == [1, 2]
    assert taken(engine, table) == [1, 2]


# A transaction that a listener has begun.


def pings(connection: sa.Connection) -> None:
    """Execute a statement on each connection that an engine opens, as a pessimistic ping does."""
    connection.scalar(sa.select(1))


@by_both
def test_a_listener_that_has_begun(database: Database, own: Own) -> None:
    """Claims and completions are committed all the same."""
    engine, table = with_token(database, 4)
    sa.event.listen(engine, "engine_connect", pings)
    for token in (None, "claim_token"):
        jobs = JobTable(table, state="processing", token=token, done={"note": "done"})
        for _ in range(2):
            claim = claim_jobs(own(engine), jobs, 1)
            assert complete_jobs(own(engine), claim, unfenced=True) == 1
    with Session(database.engine()) as session:
        ended = sa.select(table.c.id).where(table.c.note == "done").order_by(table.c.id)
        assert session.scalars(ended).all() == [1, 2, 3, 4]


def test_a_session_does_not_end_what_was_begun(database: Database) -> None:
    """The trap: it joins the transaction, and its commit ends nothing."""
    engine, table = with_token(database, 1)
    with engine.connect() as connection:
        pings(connection)
        with Session(connection) as session:
            session.execute(sa.update(table).values(processing=True))
            session.commit()
    assert taken(engine, table) == []


@pytest.mark.parametrize("event", ["engine_connect", "checkout"])
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pg8000"])
@by_both
@pytest.mark.databases("postgresql")
def test_what_a_listener_has_set(database: Database, own: Own, driver: str, event: str) -> None:
    """It holds for each claim, the first of a connection too: nothing rolls it back before."""
    engine = database.engine(drivername=f"postgresql+{driver}")
    table = job_table(Column("claim_token", String(32)))
    fill(database.engine(), table, 3)
    elsewhere = table.to_metadata(sa.MetaData(), schema="elsewhere")
    with database.engine().begin() as connection:
        connection.execute(sa.schema.CreateSchema("elsewhere"))
        elsewhere.create(connection)
        connection.execute(elsewhere.insert(), rows(3, first=11))
    if event == "checkout":

        @sa.event.listens_for(engine, "checkout")
        def by_cursor(driver: Any, *_: Any) -> None:
            driver.cursor().execute("SET search_path TO elsewhere")
    else:

        @sa.event.listens_for(engine, "engine_connect")
        def by_connection(connection: sa.Connection) -> None:
            connection.exec_driver_sql("SET search_path TO elsewhere")

    assert [ids(claim_jobs(own(engine), table, 1)) for _ in range(3)] == [[11], [12], [13]]
    assert taken(database.engine(), table) == []
