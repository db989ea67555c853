"""One strategy a database: what it runs, and what is asked of its driver.

A strategy is loaded, and with it what its dialect knows of the constructs, when it is first asked
for: nobody needs them all.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler

from atomic_claim.elements import DatabaseNow
from atomic_claim.errors import UnsupportedDialect
from atomic_claim.statement import ClaimStatement

from .base import CHUNK, Find, Found, Strategy, Work, chunks, load
from .direct import Failed, is_watched, learned_of

__all__ = [
    "CHUNK",
    "STRATEGIES",
    "Failed",
    "Find",
    "Found",
    "Strategy",
    "Work",
    "chunks",
    "is_watched",
    "learned_of",
    "load",
    "strategy_for",
]

STRATEGIES: dict[str, Strategy] = {}
"""Those that were asked for, by the name of the dialect."""


def strategy_for(dialect: Dialect) -> Strategy:
    """Return the strategy for a dialect, or raise ``UnsupportedDialect``."""
    if (strategy := STRATEGIES.get(dialect.name)) is None:
        strategy = _loaded(dialect.name)
    if strategy is None:
        raise UnsupportedDialect(
            f"an atomic claim is not known for {dialect.name!r}; known are PostgreSQL (also "
            "CockroachDB and YugabyteDB by their own dialects), MySQL, MariaDB and SQLite"
        )
    strategy.check(dialect)
    return strategy


def _loaded(name: str) -> Strategy | None:
    """Load and register the strategy for a dialect's name, or return None if there is none."""
    found: Strategy
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
    STRATEGIES.update(dict.fromkeys(found.names, found))
    return found


# What follows is called for dialects whose strategy is not loaded, since that registers its own.


@compiles(ClaimStatement)
def _claim(element: ClaimStatement, compiler: SQLCompiler, **kw: Any) -> str:
    strategy_for(compiler.dialect)
    return compiler.process(element, **kw)


@compiles(DatabaseNow)
def _now(element: DatabaseNow, compiler: SQLCompiler, **kw: Any) -> str:
    name = compiler.dialect.name
    if name == "default":
        # str() of a clause, for a person to read.
        return "CURRENT_TIMESTAMP"
    if _loaded(name) is None:
        raise UnsupportedDialect(f"the clock of {name!r} is not known to atomic_claim")
    return compiler.process(element, **kw)
