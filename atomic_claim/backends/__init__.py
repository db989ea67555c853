"""One backend for each database, registered by the name of its SQLAlchemy dialect.

A backend is loaded when it is first asked for, and with it what its dialect compiles. Another
package can add one: an entry point of the group ``atomic_claim.backends`` whose name is that of
the dialect, and whose object is a :class:`Backend`.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ClauseElement

from atomic_claim.errors import UnsupportedDialect
from atomic_claim.references import resolve
from atomic_claim.sql_elements import DatabaseTime, RandomFraction
from atomic_claim.statement import ClaimStatement

from .base import CHUNK, Backend, Find, Transaction, read_back
from .reading import KeyedRows

__all__ = [
    "BACKENDS",
    "CHUNK",
    "Backend",
    "Find",
    "KeyedRows",
    "Transaction",
    "backend_for",
    "read_back",
]

GROUP = "atomic_claim.backends"
BUILT_IN = {
    "postgresql": "atomic_claim.backends.postgresql:PostgreSQL",
    "cockroachdb": "atomic_claim.backends.postgresql:PostgreSQL",
    "yugabytedb": "atomic_claim.backends.postgresql:PostgreSQL",
    "mysql": "atomic_claim.backends.mysql:MySQL",
    "mariadb": "atomic_claim.backends.mysql:MySQL",
    "sqlite": "atomic_claim.backends.sqlite:SQLite",
}
BACKENDS: dict[str, Backend] = {}
"""The backends that were asked for, by the name of the dialect."""
_checked: WeakKeyDictionary[Dialect, Backend] = WeakKeyDictionary()


def backend_for(dialect: Dialect) -> Backend:
    """Return the backend of a dialect.

    Raises:
        UnsupportedDialect: there is none, or the server is too old.
    """
    if (known := _checked.get(dialect)) is not None:
        return known
    backend = BACKENDS.get(dialect.name) or _loaded(dialect.name)
    if backend is None:
        raise UnsupportedDialect(
            f"no backend claims rows on {dialect.name!r}; expected PostgreSQL (CockroachDB and "
            "YugabyteDB by their own dialects), MySQL, MariaDB or SQLite, or a package that adds "
            "one by an entry point of the group atomic_claim.backends"
        )
    backend.check(dialect)
    # A dialect that never connected knows no version yet.
    if dialect.server_version_info is not None:
        _checked[dialect] = backend
    return backend


def _loaded(name: str) -> Backend | None:
    """Load and register the backend of a dialect, or return None if there is none."""
    if (path := BUILT_IN.get(name)) is not None:
        backend_type = resolve(path)
    else:
        found = tuple(entry_points(group=GROUP, name=name))
        if not found:
            return None
        backend_type = found[0].load()
    backend: Backend = backend_type()
    BACKENDS.update(dict.fromkeys(backend.names, backend))
    return backend


@compiles(ClaimStatement)
@compiles(DatabaseTime)
@compiles(RandomFraction)
def _compile(element: ClauseElement, compiler: SQLCompiler, **kw: Any) -> str:
    if compiler.dialect.name == "default" and not isinstance(element, ClaimStatement):
        # str() of a clause, for a person to read.
        return "CURRENT_TIMESTAMP" if isinstance(element, DatabaseTime) else Backend.random
    backend = backend_for(compiler.dialect)
    if isinstance(element, ClaimStatement):
        return backend.compile_claim(element, compiler, **kw)
    if isinstance(element, DatabaseTime):
        return backend.compile_time(element, compiler, **kw)
    return backend.random
