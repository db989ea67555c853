"""The fixture `database`, what the report says of the servers, and what becomes of missing ones."""

import os
import platform
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
import sqlalchemy as sa

from tests.commands import VARIABLES, Command, Ended
from tests.databases import KINDS, NAMES, Database, SQLiteDatabase
from tests.processes import Workspace
from tests.servers import DatabaseServer, Unavailable

servers_key = pytest.StashKey[dict[str, DatabaseServer]]()
used_key = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Make room for the servers, which are stopped when pytest ends, interrupted or not."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # So it is for whoever was started in the background, and for all that they start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # PyMySQL reads the system's certificates at every connection, which takes 22 of 23 ms.
    os.environ["SSL_CERT_FILE"] = os.devnull
    config.stash[used_key] = {}
    workspace = Workspace()
    config.add_cleanup(workspace.close)
    config.stash[servers_key] = {name: server(workspace) for name, (server, _) in KINDS.items()}


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name every database and version that the tests would use, without starting any."""
    servers = config.stash[servers_key].values()
    return [
        f"SQLAlchemy {sa.__version__}, Python {platform.python_version()}",
        f"SQLite {sqlite3.sqlite_version}",
        *(server.describe() for server in servers),
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Note every server that the tests did use, by its own words."""
    servers = session.config.stash[servers_key].values()
    used = {server.title: server.version for server in servers if server.started}
    session.config.stash[used_key].update(used)
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["servers"] = used


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Hear from a process of pytest-xdist, which has servers of its own, what it used."""
    node.config.stash[used_key].update(getattr(node, "workeroutput", {}).get("servers", {}))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name the servers that were used."""
    if used := config.stash[used_key]:
        terminalreporter.section("servers")
    for title, version in sorted(used.items()):
        terminalreporter.write_line(f"{title}: {version}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once for each database, or for those that its marker names."""
    marker = metafunc.definition.get_closest_marker("databases")
    if unknown := set(marker.args if marker else ()) - set(NAMES):
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: no such database: {unknown}")
    if "database" in metafunc.fixturenames:
        metafunc.parametrize("database", marker.args if marker else NAMES, indirect=True)


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the test, except in CI, where every database has to be there."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def servers(request: pytest.FixtureRequest) -> dict[str, DatabaseServer]:
    """Return the servers of this run by name; each starts when its `admin` is first used."""
    return request.config.stash[servers_key]


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    """Room for servers of one test's own."""
    with Workspace() as workspace:
        yield workspace


@contextmanager
def fresh_database(
    name: str, config: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Database]:
    """Yield an empty database of a kind, or skip the test."""
    reason = ""
    try:
        made: Database
        if name == "sqlite":
            made = SQLiteDatabase(tmp_path_factory.mktemp("sqlite"))
        else:
            made = KINDS[name][1](config.stash[servers_key][name])
    except Unavailable as error:
        reason = str(error)
    if reason:
        skip_or_fail(reason)
    with made:
        yield made


@pytest.fixture
def database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Database]:
    """Yield an empty database; the test runs once for each kind."""
    with fresh_database(request.param, request.config, tmp_path_factory) as made:
        yield made


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs the command in this process: no URL, 80 columns, no colours."""
    from atomic_claim.cli import main  # noqa: PLC0415 - the library's own tests need no command

    for name in (*VARIABLES, "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        # Set first, so that it is undone if the command itself sets it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["atomic-claim", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return run
