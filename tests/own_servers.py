"""Servers of a test's own, which may be killed: what was committed outlives them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from tests.conftest import skip_or_fail
from tests.databases import KINDS, ServerDatabase
from tests.processes import Workspace
from tests.servers import DatabaseServer, MariaDB, MySQL, PostgreSQL, Programs, Unavailable


class DurablePostgreSQL(PostgreSQL):
    """PostgreSQL that has written what it says is committed, and that can prepare transactions."""

    OPTIONS: ClassVar[dict[str, str]] = PostgreSQL.OPTIONS | {
        "synchronous_commit": "on",
        "max_prepared_transactions": "4",
    }


class ReplicaOfPostgreSQL(DurablePostgreSQL):
    """A copy of a server that follows it, and takes no writes."""

    name = "replica"

    def __init__(self, workspace: Workspace, primary: sa.URL) -> None:
        super().__init__(workspace)
        self._primary = primary

    def _creating(self, programs: Programs, data: Path) -> list[str]:
        # It writes a file standby.signal, too.
        return [
            str(programs.folder / programs.server.replace("postgres", "pg_basebackup")),
            f"--pgdata={data}",
            f"--host={self._primary.host}",
            f"--port={self._primary.port}",
            f"--username={self._primary.username}",
            "--write-recovery-conf",
            "--checkpoint=fast",
            "--no-sync",
        ]


class DurableMySQL(MySQL):
    """MySQL that has written what it says is committed."""

    OPTIONS: ClassVar[list[str]] = [*MySQL.OPTIONS, "--innodb-flush-log-at-trx-commit=2"]


class DurableMariaDB(MariaDB):
    """MariaDB that has written what it says is committed."""

    OPTIONS: ClassVar[list[str]] = [*MariaDB.OPTIONS, "--innodb-flush-log-at-trx-commit=2"]


DURABLE: Final[dict[str, type[DatabaseServer]]] = {
    kind.name: kind for kind in (DurablePostgreSQL, DurableMySQL, DurableMariaDB)
}


class OwnServer:
    """A server that can be killed.

    Attributes:
        name: the kind: `postgresql`, `mysql` or `mariadb`.
    """

    def __init__(self, name: str, workspace: Workspace) -> None:
        self.name = name
        self._workspace = workspace
        self._server = DURABLE[name](workspace)
        self._admin = self._server.admin
        self._process = workspace._servers[-1]

    def database(self) -> ServerDatabase:
        """Create an empty database on this server."""
        return KINDS[self.name][1](self._server)

    def replica(self) -> sa.URL:
        """Start a server that follows this one of PostgreSQL's, and return its address."""
        return ReplicaOfPostgreSQL(self._workspace, self._admin.url).admin.url

    def stop(self) -> None:
        """End the server at once, as a crash would."""
        self._process.stop()

    def start(self) -> None:
        """Start the server again on what is left; it answers when this returns."""
        self._process.start()
        self._process.wait_until(self._answers)

    def backends(self, database: ServerDatabase) -> list[int]:
        """Return the server's ids of the connections to a database."""
        if self.name == "postgresql":
            query = "SELECT pid FROM pg_stat_activity WHERE datname = :name"
        else:
            query = "SELECT id FROM information_schema.processlist WHERE db = :name"
        with self._admin.connect() as connection:
            return list(connection.scalars(sa.text(query), {"name": database.url.database}))

    def end_backend(self, number: int) -> None:
        """End the server's side of a connection, and wait until it is gone."""
        if self.name == "postgresql":
            end = "SELECT pg_terminate_backend(:number, 10000)"
            left = "SELECT count(*) FROM pg_stat_activity WHERE pid = :number"
        else:
            end = "KILL :number"
            left = "SELECT count(*) FROM information_schema.processlist WHERE id = :number"
        with self._admin.connect() as connection:
            connection.execute(sa.text(end), {"number": number})
            while connection.scalar(sa.text(left), {"number": number}):
                pass

    def _answers(self) -> bool:
        try:
            with self._admin.connect():
                return True
        except DBAPIError:
            return False


@contextmanager
def own_server(name: str) -> Iterator[OwnServer]:
    """Yield a private server that runs until the block ends, or skip the test."""
    reason = ""
    with Workspace() as workspace, pytest.MonkeyPatch.context() as environment:
        # A server that somebody named in the environment is not ours to kill.
        environment.delenv(DURABLE[name].variable, raising=False)
        try:
            server = OwnServer(name, workspace)
        except Unavailable as error:
            reason = str(error)
        if reason:
            skip_or_fail(reason)
        yield server


def backend_of(driver: Any) -> int:
    """Return the server's id of a driver connection, without a query."""
    if hasattr(driver, "thread_id"):  # PyMySQL
        return int(driver.thread_id())
    return int(driver.info.backend_pid)
