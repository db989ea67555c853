"""Trap 15: `@compiles` goes by the dialect's name, and a name says nothing of the server."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Index
from sqlalchemy.dialects import mssql, mysql, oracle, postgresql, sqlite
from sqlalchemy.exc import CompileError
from sqlalchemy.orm import Session

from atomic_claim import ClaimError, UnsupportedDialect, claim_jobs, claim_statement
from tests.databases import Database
from tests.jobs import BINDS, START, bound, fill, ids, job_table, mapped, rows, taken

Version = tuple[int, ...]

BOTH_NAMES = ["mysql+pymysql", "mariadb+pymysql"]
# The last that is refused and the first that is not; the product as the message names it.
PRODUCTS = {
    "sqlite": "SQLite",
    "postgresql": "PostgreSQL",
    "mysql": "MySQL",
    "mariadb": "MariaDB",
}
TOO_OLD: dict[str, list[Version]] = {
    "sqlite": [(3, 34, 1)],
    "postgresql": [(9, 4), (9, 4, 26)],
    "mysql": [(5, 7, 44), (8, 0, 0)],
    "mariadb": [(10, 5, 9), (5, 5, 68)],
}
OLD_ENOUGH: dict[str, Version] = {
    "sqlite": (3, 35, 0),
    "postgresql": (9, 5),
    "mysql": (8, 0, 1),
    "mariadb": (10, 6, 0),
}


def dotted(version: Version) -> str:
    """Format a version with dots."""
    return ".".join(map(str, version))


def of_version(database: Database, version: Version, **options: Any) -> sa.Engine:
    """Create an engine whose dialect sees this server version from the first connection on."""
    engine = database.engine(**options)

    @sa.event.listens_for(engine, "connect")
    def _(*_: object) -> None:
        engine.dialect.server_version_info = version

    return engine


def sent_by(engine: sa.Engine) -> list[str]:
    """Return a list that collects the statements sent to the database."""
    statements: list[str] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def _(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    return statements


@pytest.mark.parametrize("drivername", BOTH_NAMES)
@pytest.mark.databases("mariadb")
def test_a_mariadb_server_by_either_name(database: Database, drivername: str) -> None:
    """By `mysql://` or `mariadb://`, others get full claims and a producer's INSERT passes."""
    engine = database.engine(drivername=drivername, isolation_level="REPEATABLE READ")
    table = job_table(Index("jobs_state", "processing", "created_at"))
    fill(engine, table, 980, processing=True)
    fill(engine, table, 20, first=981)
    with engine.connect() as connection:
        connection.execute(sa.text("ANALYZE TABLE jobs"))
    assert (engine.dialect.name, engine.dialect.is_mariadb) == (
        drivername[: -len("+pymysql")],
        True,
    )
    sent = sent_by(engine)
    with engine.begin() as a, engine.begin() as b, engine.begin() as producer:
        assert ids(claim_jobs(a, table, 5)) == [981, 982, 983, 984, 985]
        assert ids(claim_jobs(b, table, 5)) == [986, 987, 988, 989, 990]
        producer.execute(sa.text("SET innodb_lock_wait_timeout = 1"))
        producer.execute(table.insert(), rows(1, first=1001)[0] | {"created_at": START})
    locking = [
        statement for statement in sent if "FOR UPDATE" in statement or "jobs SET" in statement
    ]
    assert locking
    assert all("FORCE INDEX (PRIMARY)" in statement for statement in locking)


def test_old_servers_are_refused(database: Database) -> None:
    """The error names the version and what it takes, before anything is sent."""
    table = job_table()
    fill(database.engine(), table, 3)
    product, least = PRODUCTS[database.name], dotted(OLD_ENOUGH[database.name]).removesuffix(".0")
    for version in TOO_OLD[database.name]:
        engine = of_version(database, version)
        sent = sent_by(engine)
        for kind in BINDS:
            with bound(engine, kind) as bind, pytest.raises(UnsupportedDialect) as raised:
                claim_jobs(bind, table, 1)
            assert f"{product} {dotted(version)} cannot" in str(raised.value)
            assert f"came with {product} {least}; upgrade the server" in str(raised.value)
        assert sent == []
    assert taken(database.engine(), table) == []


def test_old_servers_are_refused_at_the_first_connection(database: Database) -> None:
    """An engine that has not connected yet, and so lacks the version, refuses an old server too."""
    for kind in BINDS:
        engine = of_version(database, TOO_OLD[database.name][0])
        with bound(engine, kind) as bind, pytest.raises(UnsupportedDialect, match="upgrade"):
            claim_jobs(bind, job_table(), 1)


def test_the_oldest_that_can_are_taken(database: Database) -> None:
    """The first version that has what a claim needs is not refused."""
    table = job_table()
    fill(database.engine(), table, 8)
    engine = of_version(database, OLD_ENOUGH[database.name])
    for kind in BINDS:
        with bound(engine, kind) as bind:
            assert len(claim_jobs(bind, table, 2)) == 2


@pytest.mark.databases("mariadb")
def test_an_old_mariadb_is_refused_by_the_name_of_mysql(database: Database) -> None:
    """MariaDB 10.5 by a `mysql://` URL is not taken for a MySQL later than 8."""
    table = job_table()
    fill(database.engine(), table, 3)
    engine = of_version(database, (10, 5, 9), drivername="mysql+pymysql")
    with pytest.raises(UnsupportedDialect, match=r"MariaDB 10\.5\.9 cannot"):
        claim_jobs(engine, table, 1)
    assert taken(database.engine(), table) == []


@pytest.mark.parametrize("version", ["10.11.19-MariaDB", "5.5.5-10.11.19-MariaDB"])
@pytest.mark.databases("mariadb")
def test_the_prefix_of_replication_is_no_version(database: Database, version: str) -> None:
    """A MariaDB that says `5.5.5-` before its version, for old replicas' sake, is not refused."""
    table = job_table()
    fill(database.engine(), table, 3)
    engine = database.engine()

    @sa.event.listens_for(engine, "connect")
    def _(*_: object) -> None:
        engine.dialect._parse_server_version(version)

    assert ids(claim_jobs(engine, table, 1)) == [1]


class AbsentDriver:
    """A driver stub with the attributes that a dialect reads before it connects."""

    paramstyle = "pyformat"
    version = __version__ = "99.0"
    Error = Exception

    def __getattr__(self, name: str) -> type:
        return type(name, (), {})

    def connect(self, *_: object, **__: object) -> None:
        """Fail the test."""
        pytest.fail("a claim on an unknown dialect got as far as connecting")


@pytest.mark.parametrize("url", ["mssql+pymssql://", "oracle+oracledb://"])
@pytest.mark.parametrize("kind", ["session", "engine", "sessionmaker"])
def test_unknown_dialects_are_refused(url: str, kind: str) -> None:
    """A claim on SQL Server or Oracle is refused by name before anything is connected to."""
    engine = sa.create_engine(url, module=AbsentDriver())
    with bound(engine, kind) as bind, pytest.raises(UnsupportedDialect) as raised:
        claim_jobs(bind, job_table(), 1)
    assert f"no backend claims rows on {engine.dialect.name!r}" in str(raised.value)
    assert "PostgreSQL" in str(raised.value)


@pytest.mark.parametrize("dialect", [mssql.dialect(), oracle.dialect()], ids=lambda d: d.name)
def test_unknown_dialects_do_not_compile(dialect: sa.Dialect) -> None:
    """The construct raises SQLAlchemy's own `CompileError`, which is a `ClaimError` too."""
    with pytest.raises(CompileError, match=f"no backend claims rows on '{dialect.name}'") as raised:
        claim_statement(job_table(), 1).compile(dialect=dialect)
    assert isinstance(raised.value, ClaimError)


def speaking_postgresql(name: str) -> sa.Dialect:
    """Create a dialect that extends PostgreSQL's, as compatible databases do."""
    made = type(
        name, (postgresql.base.PGDialect,), {"name": name, "supports_statement_cache": True}
    )
    dialect: sa.Dialect = made()
    return dialect


DIALECTS = {
    "postgresql": (postgresql.dialect(), "FOR NO KEY UPDATE SKIP LOCKED"),
    "cockroachdb": (speaking_postgresql("cockroachdb"), "FOR NO KEY UPDATE SKIP LOCKED"),
    "yugabytedb": (speaking_postgresql("yugabytedb"), "FOR NO KEY UPDATE SKIP LOCKED"),
    "mysql": (mysql.dialect(), "FOR UPDATE SKIP LOCKED"),
    "mariadb": (sa.make_url("mariadb+pymysql://").get_dialect()(), "FOR UPDATE SKIP LOCKED"),
    "sqlite": (sqlite.dialect(), "RETURNING id"),
}


@pytest.mark.parametrize("limit", [1, 5])
@pytest.mark.parametrize("name", DIALECTS)
def test_the_construct_compiles(name: str, limit: int) -> None:
    """`claim_statement` has a text on every supported dialect, with nothing lost from it."""
    dialect, words = DIALECTS[name]
    assert dialect.name == name
    text = str(
        claim_statement(job_table(), limit).compile(
            dialect=dialect, compile_kwargs={"literal_binds": True}
        )
    )
    assert words in text
    assert "UPDATE jobs" in text
    assert "ORDER BY jobs.created_at" in text
    assert f"LIMIT {limit}" in text


@pytest.mark.databases("mysql", "mariadb")
def test_the_construct_is_not_executed_where_it_cannot_return(database: Database) -> None:
    """MySQL and MariaDB, by either name, refuse it and name `claim_jobs`; nothing is written."""
    table = job_table()
    fill(database.engine(), table, 3)
    for drivername in BOTH_NAMES if database.name == "mariadb" else BOTH_NAMES[:1]:
        engine = database.engine(drivername=drivername)
        sent = sent_by(engine)
        with engine.begin() as connection, Session(engine) as session:
            for execute, what in (
                (connection.execute, table),
                (session.execute, table),
                (session.scalars, mapped(table)),
            ):
                statement = claim_statement(what, 2)
                assert "SKIP LOCKED" in str(statement.compile(engine))
                with pytest.raises(UnsupportedDialect, match=r"cannot return .* use claim_jobs\("):
                    execute(statement)
            session.commit()
        assert sent == []
    assert taken(database.engine(), table) == []


@pytest.mark.databases("sqlite", "postgresql")
def test_the_construct_is_not_executed_on_old_servers(database: Database) -> None:
    """Executed as it is, it is refused where the version is too old."""
    table = job_table()
    fill(database.engine(), table, 3)
    engine = of_version(database, TOO_OLD[database.name][0])
    with engine.begin() as connection, pytest.raises(UnsupportedDialect, match="upgrade"):
        connection.execute(claim_statement(table, 2))
    assert taken(database.engine(), table) == []


def test_sqlalchemy_asks_no_version(database: Database) -> None:
    """The twin: SKIP LOCKED is dropped on SQLite, and sent to servers that lack it."""
    query = sa.select(job_table().c.id).with_for_update(skip_locked=True)
    for version in TOO_OLD[database.name]:
        engine = of_version(database, version)
        with engine.connect():
            assert engine.dialect.server_version_info == version
        words = "" if database.name == "sqlite" else "FOR UPDATE SKIP LOCKED"
        assert str(query.compile(engine)).endswith(words)
        assert ("LOCKED" in str(query.compile(engine))) == (database.name != "sqlite")


@pytest.mark.databases("mariadb")
def test_a_hook_for_mariadb_misses_the_other_name(database: Database) -> None:
    """The twin: what is compiled for "mariadb" alone does not reach the same server by `mysql://`."""

    class Marked(sa.ColumnElement[Any]):
        inherit_cache = True

    sa.ext.compiler.compiles(Marked)(lambda *_, **__: "'other'")
    sa.ext.compiler.compiles(Marked, "mariadb")(lambda *_, **__: "'mariadb'")
    found = {}
    for drivername in BOTH_NAMES:
        with database.engine(drivername=drivername).connect() as connection:
            found[drivername] = (
                connection.dialect.is_mariadb,
                connection.scalar(sa.select(Marked())),
            )
    assert found == {"mysql+pymysql": (True, "other"), "mariadb+pymysql": (True, "mariadb")}
