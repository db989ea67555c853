"""One backend a database: what it runs, and what is asked of its driver.

A backend is loaded, and with it what its dialect knows of the constructs, when it is first asked
for: nobody needs them all.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler

from atomic_claim.errors import UnsupportedDialect
from atomic_claim.sql_elements import DatabaseTime
from atomic_claim.statement import ClaimStatement

from .base import CHUNK, Backend, Find, KeyedRows, Transaction, chunks, load
from .direct import Failed, is_watched, learned_of

__all__ = [
    "BACKENDS",
    "CHUNK",
    "Backend",
    "Failed",
    "Find",
    "KeyedRows",
    "Transaction",
    "backend_for",
    "chunks",
    "is_watched",
    "learned_of",
    "load",
]

BACKENDS: dict[str, Backend] = {}
"""Those that were asked for, by the name of the dialect."""


def backend_for(dialect: Dialect) -> Backend:
    """Return the backend for a dialect, or raise ``UnsupportedDialect``."""
    if (backend := BACKENDS.get(dialect.name)) is None:
        backend = _loaded(dialect.name)
    if backend is None:
        raise UnsupportedDialect(
            f"an atomic claim is not known for {dialect.name!r}; known are PostgreSQL (also "
            "CockroachDB and YugabyteDB by their own dialects), MySQL, MariaDB and SQLite"
        )
    backend.check(dialect)
    return backend


def _loaded(name: str) -> Backend | None:
    """Load and register the backend for a dialect's name, or return None if there is none."""
    found: Backend
    match name:
        case "postgresql" | "cockroachdb" | "yugabytedb":
            from .postgresql import PostgreSQL  # noqa: PLC0415 - see above

            found = PostgreSQL()
        case "sqlite":
            from .sqlite import SQLite  # noqa: PLC0415 - see above

            found = SQLite()
        case "mysql" | "mariadb":
            from .mysql import MySQL  # noqa: PLC0415 - see above

            found = MySQL()
        case _:
            return None
    BACKENDS.update(dict.fromkeys(found.names, found))
    return found


# What follows is called for dialects whose backend is not loaded, since that registers its own.


@compiles(ClaimStatement)
def _claim(element: ClaimStatement, compiler: SQLCompiler, **kw: Any) -> str:
    backend_for(compiler.dialect)
    return compiler.process(element, **kw)


@compiles(DatabaseTime)
def _now(element: DatabaseTime, compiler: SQLCompiler, **kw: Any) -> str:
    name = compiler.dialect.name
    if name == "default":
        # str() of a clause, for a person to read.
        return "CURRENT_TIMESTAMP"
    if _loaded(name) is None:
        raise UnsupportedDialect(f"the clock of {name!r} is not known to atomic_claim")
    return compiler.process(element, **kw)
