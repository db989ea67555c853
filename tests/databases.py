"""A fresh, empty database for one test, on each kind of server."""

import re
import sqlite3
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Final, Self
from uuid import uuid4

import sqlalchemy as sa
from pytest_postgresql.janitor import DatabaseJanitor
from sqlalchemy.exc import OperationalError

from tests.servers import DatabaseServer, MariaDB, MySQL, PostgreSQL

NO_SUCH_THREAD: Final = 1094


class Database(ABC):
    """An empty database of a test's own.

    Attributes:
        name: the kind: `sqlite`, `postgresql`, `mysql` or `mariadb`.
        url: its address, with the driver that the kind is tested with by default.
        server_version: the server's version as numbers, such as `(15, 19)`.
    """

    name: ClassVar[str]

    url: sa.URL
    server_version: tuple[int, ...]

    def __init__(self, url: sa.URL, version: str) -> None:
        self.url = url
        found = re.search(r"\d+(\.\d+)*", version)
        self.server_version = tuple(map(int, found[0].split("."))) if found else ()
        self._engines: list[sa.Engine] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._engines:
            engine.dispose()
        self.drop()

    def engine(
        self, *, drivername: str | None = None, url: sa.URL | None = None, **options: Any
    ) -> sa.Engine:
        """Make an engine that is disposed of when the test ends.

        Args:
            drivername: another driver than that of `url`, such as `postgresql+psycopg2`.
            url: another address than the database's own, such as one with another user.
            options: what `create_engine` takes.
        """
        url = url or self.url
        engine = sa.create_engine(url.set(drivername=drivername or url.drivername), **options)
        self._engines.append(engine)
        return engine

    def wait_until_blocked(self, n: int = 1, *, seconds: float = 20) -> None:
        """Ask the server until `n` connections to this database wait for a lock.

        Raises:
            TimeoutError: fewer did, up to the end.
        """
        deadline = time.monotonic() + seconds
        while (waiting := self.lock_waiters()) < n:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{waiting} connections wait for a lock after {seconds:g} s, expected {n}"
                )
            time.sleep(0.01)

    @abstractmethod
    def lock_waiters(self) -> int:
        """Count the connections to this database that wait for a lock, as the server sees them."""

    @abstractmethod
    def drop(self) -> None:
        """Remove the database, even while clients are connected to it."""


class SQLiteDatabase(Database):
    """A file."""

    name = "sqlite"

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{_fresh_name()}.sqlite"
        super().__init__(sa.URL.create("sqlite", database=str(self.path)), sqlite3.sqlite_version)

    def lock_waiters(self) -> int:
        """Not to be had: SQLite knows no other connection than its own."""
        raise NotImplementedError("SQLite cannot tell who waits for a lock")

    def drop(self) -> None:
        """Remove the file and what lies beside it."""
        for path in self.path.parent.glob(f"{self.path.name}*"):
            path.unlink()


class ServerDatabase(Database):
    """A database on a server.

    Raises:
        Unavailable: the server is not available.
    """

    # Asked with the database's name.
    waiters_query: ClassVar[str]

    def __init__(self, server: DatabaseServer) -> None:
        self._server = server
        super().__init__(server.admin.url.set(database=_fresh_name()), server.version)
        self.create()

    @abstractmethod
    def create(self) -> None:
        """Make the database."""

    def lock_waiters(self) -> int:
        """Count the connections to this database that wait for a lock, as the server sees them."""
        with self._server.admin.connect() as connection:
            query = sa.text(self.waiters_query)
            return int(connection.scalar(query, {"database": self.url.database}) or 0)


class PostgreSQLDatabase(ServerDatabase):
    """A database made and dropped by pytest-postgresql."""

    name = "postgresql"
    waiters_query = """
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = :database AND cardinality(pg_blocking_pids(pid)) > 0
    """

    @property
    def _janitor(self) -> DatabaseJanitor:
        return DatabaseJanitor(
            user=self.url.username or "",
            password=None if self.url.password is None else str(self.url.password),
            host=self.url.host or "",
            port=self.url.port or "",
            dbname=self.url.database or "",
            maintenance_dbname=self._server.admin.url.database or "postgres",
        )

    def create(self) -> None:
        """Make the database."""
        self._janitor.init()

    def drop(self) -> None:
        """Remove the database, even while clients are connected to it."""
        self._janitor.drop()


class InnoDBDatabase(ServerDatabase):
    """A schema on MySQL or MariaDB."""

    def create(self) -> None:
        """Make the database."""
        with self._server.admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {self.url.database}")

    def drop(self) -> None:
        """Remove the database, even while clients are connected to it."""
        with self._server.admin.connect() as connection:
            # Open transactions would keep the tables, for as long as a year.
            processes = connection.exec_driver_sql("SHOW PROCESSLIST").mappings().all()
            for process in processes:
                if process["db"] == self.url.database:
                    self._kill(connection, process["Id"])
            connection.exec_driver_sql("SET lock_wait_timeout = 30")
            connection.exec_driver_sql(f"DROP DATABASE {self.url.database}")

    @staticmethod
    def _kill(connection: sa.Connection, number: int) -> None:
        try:
            connection.exec_driver_sql(f"KILL {number}")
        except OperationalError as error:
            if error.orig is None or error.orig.args[0] != NO_SUCH_THREAD:
                raise


class MySQLDatabase(InnoDBDatabase):
    """A schema on MySQL."""

    name = "mysql"
    waiters_query = """
        SELECT count(*) FROM performance_schema.threads
        WHERE processlist_db = :database AND (
            processlist_state LIKE 'Waiting for % lock' OR processlist_state = 'User lock'
            OR thread_id IN (SELECT requesting_thread_id FROM performance_schema.data_lock_waits)
        )
    """


class MariaDBDatabase(InnoDBDatabase):
    """A schema on MariaDB."""

    name = "mariadb"
    # The InnoDB views are a copy, made anew only if nobody has read it for 0.1 s
    # (CACHE_MIN_IDLE_TIME_NS in trx0i_s.cc): whoever asks more often sees the old one for ever.
    _copy_age: ClassVar[float] = 0.11
    _last_read: ClassVar[float] = 0
    waiters_query = """
        SELECT count(*) FROM information_schema.processlist
        WHERE db = :database AND (
            (state LIKE 'Waiting for % lock' OR state = 'User lock')
            OR id IN (
                SELECT trx_mysql_thread_id FROM information_schema.innodb_trx
                WHERE trx_state = 'LOCK WAIT'
            )
        )
    """

    def lock_waiters(self) -> int:
        """Count the connections to this database that wait for a lock, as the server sees them."""
        if self._server.is_private:
            return self._counted_waiters()
        cls = type(self)
        time.sleep(max(0, cls._last_read + self._copy_age - time.monotonic()))
        try:
            return super().lock_waiters()
        finally:
            cls._last_read = time.monotonic()

    def _counted_waiters(self) -> int:
        """Count lock waiters on a private server, where InnoDB's own counter is current."""
        tables = """
            SELECT count(*) FROM information_schema.processlist
            WHERE db = :database AND (state LIKE 'Waiting for % lock' OR state = 'User lock')
        """
        counter = "SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'"
        with self._server.admin.connect() as connection:
            waiting = connection.scalar(sa.text(tables), {"database": self.url.database})
            return int(waiting or 0) + int(connection.exec_driver_sql(counter).one()[1])


def end_connection(admin: sa.Engine, driver: Any) -> None:
    """End the server's process of a driver connection by an engine in AUTOCOMMIT."""
    with admin.connect() as connection:
        if hasattr(driver, "thread_id"):
            connection.exec_driver_sql(f"KILL {driver.thread_id()}")
            return
        info = getattr(driver, "info", None)
        pid = info.backend_pid if info is not None else driver.get_server_pid()
        connection.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})


KINDS: Final[dict[str, tuple[type[DatabaseServer], type[ServerDatabase]]]] = {
    "postgresql": (PostgreSQL, PostgreSQLDatabase),
    "mysql": (MySQL, MySQLDatabase),
    "mariadb": (MariaDB, MariaDBDatabase),
}
NAMES: Final = ("sqlite", *KINDS)


def _fresh_name() -> str:
    return f"atomic_claim_{uuid4().hex[:12]}"
