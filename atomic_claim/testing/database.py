"""The database of a race: its URL, its driver, and its errors."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from atomic_claim.backends import backend_for
from atomic_claim.backends.drivers import product_of
from atomic_claim.errors import ClaimError, UnsupportedDialect

# Other drivers of a database than SQLAlchemy's default, the best first.
DRIVERS = {"postgresql": ("psycopg", "psycopg2"), "mysql": ("pymysql", "mysqldb")}
ASYNC_DRIVERS = {
    "postgresql": ("psycopg", "asyncpg"),
    "mysql": ("asyncmy", "aiomysql"),
    "sqlite": ("aiosqlite",),
}
# Some drivers would wait for minutes for a host that does not answer.
TIMEOUT = 10
TIMEOUT_ARGUMENTS = {
    **dict.fromkeys(("psycopg", "psycopg2", "pymysql", "mysqldb"), "connect_timeout"),
    "mysqlconnector": "connection_timeout",
}
SECRET_OPTION = re.compile("pass|pwd|secret|token|key", re.IGNORECASE)
# A shorter password is replaced only where it stands alone; else its gaps would spell it.
SUBSTRING = 4


class CommandError(Exception):
    """A command cannot do what it was asked for; the message is one line."""


def parse_url(given: str | URL) -> URL:
    """Parse the URL, with a driver that is installed.

    ``postgres://`` is understood, an asynchronous driver is replaced, and where the URL names no
    driver and SQLAlchemy's default is missing, another is taken.

    Raises:
        CommandError: it is no URL, or its database or driver cannot be used.
    """
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        raise CommandError(
            "the URL cannot be read (it is not shown, since it may hold a password); expected "
            "one such as postgresql://user:password@host:5432/database, special characters in a "
            "password written as %40"
        ) from None
    backend, plus, driver = url.drivername.partition("+")
    if backend == "postgres":
        url = url.set(drivername=f"postgresql{plus}{driver}")
    if "@" in (url.host or "") or (url.password is not None and "@" in (url.database or "")):
        raise CommandError("the URL has one '@' too many: write an '@' in a password as %40")
    return _with_driver(url)


def _with_driver(url: URL) -> URL:
    try:
        dialect = url.get_dialect()
        backend_for(dialect())
        if dialect.is_async:
            url = url.set(drivername=url.get_backend_name())
        others = () if "+" in url.drivername else DRIVERS.get(family(url), ())
        return _installed([url, *_by_driver(url, others)])
    except NoSuchModuleError:
        raise CommandError(
            f"SQLAlchemy knows no {url.drivername!r}; expected a URL that begins with "
            "postgresql://, mysql://, mariadb:// or sqlite:///"
        ) from None
    except UnsupportedDialect as error:
        raise CommandError(one_line(error)) from None
    except ImportError as error:
        extra, cure = family(url), ""
        if extra in DRIVERS:
            cure = f": pip install 'atomic-claim[{extra}]'"
            if "+" in url.drivername:
                cure += f", and write {url.get_backend_name()}+{DRIVERS[extra][0]}://"
        raise CommandError(
            f"the driver of {url.drivername}:// is not installed ({one_line(error)}){cure}"
        ) from None


def asynchronous(url: URL) -> URL:
    """Return the same database's URL with an asynchronous driver that is installed.

    Raises:
        CommandError: there is none.
    """
    names = ASYNC_DRIVERS[family(url)]
    try:
        return _installed(_by_driver(url, names))
    except ImportError as error:
        raise CommandError(
            f"an asynchronous function needs an asynchronous driver for {url.get_backend_name()} "
            f"({one_line(error)}): install {' or '.join(names)}"
        ) from None


def _installed(candidates: Sequence[URL]) -> URL:
    """Return the first URL whose driver is installed.

    Raises:
        ImportError: there is none; the error is that of the first.
    """
    missing: list[ImportError] = []
    for candidate in candidates:
        try:
            candidate.get_dialect().import_dbapi()
        except ImportError as error:
            missing.append(error)
        else:
            return candidate
    raise missing[0]


def _by_driver(url: URL, names: Sequence[str]) -> list[URL]:
    return [url.set(drivername=f"{url.get_backend_name()}+{name}") for name in names]


@contextmanager
def chosen(given: str | URL | None) -> Iterator[URL]:
    """Yield the URL of the given database, or of a new one in a temporary file.

    Raises:
        CommandError: it is no URL, or its database or driver cannot be used.
    """
    if given is not None:
        yield parse_url(given)
        return
    with tempfile.TemporaryDirectory(prefix="atomic-claim-") as folder:
        (path := Path(folder) / "jobs.sqlite").touch()
        yield URL.create("sqlite", database=str(path))


def family(url: URL) -> str:
    """Return the database's name as drivers know it: MariaDB's are those of MySQL."""
    name = url.get_backend_name()
    return "mysql" if name == "mariadb" else name


def masked(url: URL) -> str:
    """Render the URL without its password and options."""
    return url.set(query={}).render_as_string(hide_password=True)


def make_engine(url: URL) -> Engine:
    """Create an engine with a connect timeout for hosts that do not answer."""
    name = TIMEOUT_ARGUMENTS.get(url.get_driver_name())
    arguments = {name: TIMEOUT} if name is not None and name not in url.query else {}
    return create_engine(url, connect_args=arguments)


@contextmanager
def connected(url: URL) -> Iterator[Engine]:
    """Yield an engine whose server responds and is known to claim atomically.

    Raises:
        CommandError: there is no such server or database, or it is too old.
    """
    _check_name(url)
    try:
        engine = make_engine(url)
        with engine.connect() as connection:
            backend_for(connection.dialect)
    except UnsupportedDialect as error:
        raise CommandError(one_line(error)) from None
    # Drivers complain of options that they do not know by TypeError and ValueError.
    except (SQLAlchemyError, TypeError, ValueError, OSError) as error:
        raise complaint(f"cannot connect to {masked(url)}", error, url) from None
    try:
        yield engine
    finally:
        engine.dispose()


def _check_name(url: URL) -> None:
    """Refuse a URL without a database, and what SQLite would make up in its place."""
    if family(url) == "mysql" and not url.database:
        backend = url.get_backend_name()
        raise CommandError(f"{masked(url)} names no database: write {backend}://user@host/database")
    if family(url) != "sqlite":
        return
    name = url.database or ":memory:"
    if ":memory:" in name or url.query.get("mode") == "memory":
        raise CommandError(
            "a SQLite database in memory belongs to one process, and the workers are several: "
            "name a file, sqlite:///jobs.db"
        )
    if not name.startswith("file:") and not Path(name).is_file():
        raise CommandError(f"there is no SQLite database {name!r}: check the path in the URL")


def complaint(what: str, error: BaseException, url: URL) -> CommandError:
    """Return a one-line error that says what failed and why, without the URL's secrets."""
    return CommandError(without_secrets(f"{what}: {one_line(error)}", url))


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, for a driver's error the driver's message."""
    found: Any = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    # PostgreSQL's drivers add the line of the statement, and MySQL's give a number before the text.
    said = getattr(getattr(found, "diag", None), "message_primary", None)
    if len(found.args) > 1 and isinstance(found.args[0], int):
        said = found.args[1]
    text = " ".join(str(said or found).split())
    if isinstance(error, SQLAlchemyError | ClaimError):
        text = text.partition(" (Background on this error at")[0]
    return text or type(found).__name__


def without_secrets(text: str, url: URL) -> str:
    """Replace the URL's secrets in the text by ***, in every form in which they occur."""
    for secret in sorted(set(_secrets(url)), key=len, reverse=True):
        pattern = re.escape(secret)
        if len(secret) < SUBSTRING:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        text = re.sub(pattern, "***", text)
    return text


def _secrets(url: URL) -> Iterator[str]:
    given = [str(url.password or "")]
    for name, values in url.normalized_query.items():
        given += values if SECRET_OPTION.search(name) else ()
    for secret in filter(None, given):
        yield from (secret, quote(secret), quote(secret, safe=""), quote_plus(secret))
        yield repr(secret)[1:-1]


def server_title(connection: Connection) -> str:
    """Return the database's product and version, such as ``PostgreSQL 15.20``."""
    dialect = connection.dialect
    name = product_of(dialect)
    product, *_ = backend_for(dialect).required.get(name, (name,))
    # What comes after the third number is the packager's.
    version = ".".join(str(part) for part in (dialect.server_version_info or ())[:3])
    return f"{product} {version}".strip()
