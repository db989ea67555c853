"""Facts that depend on the DBAPI driver, in one table for each."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Dialect
from sqlalchemy.exc import DBAPIError

IDLE = 0
NOT_SUPPORTED = "0A000"
SERVER_STATUS_IN_TRANS = 1

Tells = tuple[str, str, Callable[[Any], Any], Callable[[Any], Any]]


def _tells(drivers: str, name: str, is_open: Callable[[Any], Any]) -> Tells:
    """Return the drivers, an attribute of their connections, what it leads to, and the test."""
    return drivers, name.partition(".")[0], operator.attrgetter(name), is_open


IN_TRANSACTION: tuple[Tells, ...] = (
    _tells("psycopg", "pgconn.transaction_status", partial(operator.ne, IDLE)),
    _tells("asyncpg", "is_in_transaction", bool),
    _tells("pg8000", "_transaction_status", partial(operator.ne, b"I")),
    # mysqlclient has a method of the name "info".
    _tells("psycopg2", "get_transaction_status", partial(operator.ne, IDLE)),
    _tells("sqlite3, aiosqlite, mysql-connector", "in_transaction", bool),
    _tells(
        "PyMySQL, asyncmy, aiomysql, mariadbconnector",
        "server_status",
        partial(operator.and_, SERVER_STATUS_IN_TRANS),
    ),
)
"""Drivers, what their connections tell of a transaction, and whether one is open by that."""

CODES: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("psycopg, asyncpg", lambda error: getattr(error, "sqlstate", None)),
    ("psycopg2", lambda error: getattr(error, "pgcode", None)),
    ("mysql-connector", lambda error: getattr(error, "errno", None)),
    # The low byte is the primary result code: https://www.sqlite.org/rescode.html
    ("sqlite3, aiosqlite", lambda error: getattr(error, "sqlite_errorcode", 0) & 0xFF or None),
    ("pg8000", lambda error: error.args[0].get("C") if isinstance(error.args[0], dict) else None),
    ("PyMySQL, mysqlclient, asyncmy, aiomysql", lambda error: error.args[0]),
)
"""Drivers, and the server's code of an error: a SQLSTATE of PostgreSQL, or else a number."""


AUTOCOMMIT = frozenset({"asyncpg", "pg8000", "psycopg", "psycopg2"})
"""SQLAlchemy's names of drivers known in AUTOCOMMIT; any other one runs BEGIN … COMMIT only."""


def product_of(dialect: Dialect) -> str:
    """Return ``postgresql``, ``mysql``, ``mariadb`` or ``sqlite``, whatever the URL says."""
    return "mariadb" if getattr(dialect, "is_mariadb", False) else dialect.name


def in_transaction(driver: Any) -> bool | None:
    """Return True if a transaction is open on a driver's connection; None if it does not tell."""
    for _, attribute, ask, is_open in IN_TRANSACTION:
        if hasattr(driver, attribute):
            found = ask(driver)
            return bool(is_open(found() if callable(found) else found))
    return None


def code_of(error: DBAPIError, type_: type) -> Any:
    """Return the server's code of an error, of this type, or None if there is none."""
    found = error.orig
    if found is None or not found.args:
        return None
    codes = (ask(found) for _, ask in CODES)
    return next((code for code in codes if isinstance(code, type_)), None)


def is_lost(error: BaseException) -> bool:
    """Return True if the connection was lost; SQLAlchemy does not know mysql-connector's text."""
    lost: bool = getattr(error, "connection_invalidated", False)
    return lost or "MySQL Connection not available" in str(getattr(error, "orig", error))


def has_lost(error: BaseException, dialect: Dialect, driver: Any) -> bool:
    """Check whether a lost connection caused an error, which a listener may have replaced.

    Args:
        error: the error.
        dialect: the one of the connection.
        driver: the DBAPI connection.
    """
    cause: Any = error
    while (cause := cause.__cause__) is not None:
        if isinstance(cause, dialect.loaded_dbapi.Error):
            return dialect.is_disconnect(cause, driver, None)
    return False


def is_stale(error: DBAPIError) -> bool:
    """Return True if a driver has sent a prepared statement that PostgreSQL has outdated."""
    return code_of(error, str) == NOT_SUPPORTED and "cached" in str(error.orig)


def outages(dialect: Dialect) -> tuple[type[Exception], ...]:
    """Return the exceptions that are raised when the database cannot be reached."""
    # SQLAlchemy may not wrap asyncpg's refusals to connect.
    driver: Any = getattr(dialect.dbapi, "asyncpg", None)
    others = () if driver is None else (driver.PostgresError, driver.InterfaceError)
    return (DBAPIError, OSError, *others)
