"""One strategy a database: what it runs, and what is asked of its driver."""

from __future__ import annotations

from sqlalchemy import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler

from atomic_claim.errors import UnsupportedDialect
from atomic_claim.statement import ClaimStatement

from .base import CHUNK, Find, Found, Strategy, Work, chunks, load
from .direct import Failed, is_watched, learned_of
from .mysql import MySQL
from .postgresql import PostgreSQL
from .sqlite import SQLite

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

STRATEGIES: dict[str, Strategy] = {
    name: strategy for strategy in (PostgreSQL(), SQLite(), MySQL()) for name in strategy.names
}


def strategy_for(dialect: Dialect) -> Strategy:
    """The strategy of a dialect, or ``UnsupportedDialect``."""
    if (strategy := STRATEGIES.get(dialect.name)) is None:
        raise UnsupportedDialect(_refusal(dialect.name))
    strategy.check(dialect)
    return strategy


@compiles(ClaimStatement)
def _refuse(element: ClaimStatement, compiler: SQLCompiler, **kw: object) -> str:
    raise UnsupportedDialect(_refusal(compiler.dialect.name))


def _refusal(name: str) -> str:
    return (
        f"an atomic claim is not known for {name!r}; known are PostgreSQL (also CockroachDB and "
        "YugabyteDB by their own dialects), MySQL, MariaDB and SQLite"
    )
