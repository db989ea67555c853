"""The table of a patch: found now or at the first call, with or without a state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Table, TableClause, func, true
from sqlalchemy import inspect as sa_inspect
from sqlalchemy import table as sql_table
from sqlalchemy.exc import NoSuchTableError
from sqlalchemy.orm import Session, sessionmaker

from atomic_claim.errors import AmbiguousTable, PatchError
from atomic_claim.inference import read_columns
from atomic_claim.job_table import JobTable
from atomic_claim.references import reflected
from atomic_claim.state_values import UNSET

from .calls import Call, Options, referred
from .main_module import is_main, loaded_module


def stateless(table: Any) -> JobTable:
    """Create a ``JobTable`` for jobs that a claim deletes.

    What can be read of its columns (when a job is due, what comes first, and even a state) holds.

    Raises:
        AmbiguousTable: a column could be a state, and cannot be read with certainty.
    """
    if isinstance(table, JobTable):
        return table
    try:
        return JobTable.infer(table)
    except AmbiguousTable:
        own = _table_of(table)
        names = {column: frozenset([column.name]) for column in own.columns}
        reading = read_columns(own, names, ordered=True)
        if len(reading.problems) > 1 or "state" in reading.arguments:
            raise
        found = reading.arguments
        return keyed(table, **{role: found[role] for role in ("due", "order") if role in found})


def keyed(table: Any, **known: Any) -> JobTable:
    """Create a ``JobTable`` for which every row is free, even a claimed one."""
    if isinstance(table, JobTable):
        table = table.entity or table.table
    key = next(iter(_table_of(table).primary_key.columns), None)
    return JobTable(table, free=true(), claimed={} if key is None else {key: key}, **known)


def leased_only(job_table: JobTable) -> JobTable:
    """Return a ``JobTable`` whose claims write only the lease; the state marks finished jobs."""
    if job_table.exclusive_by is not None:
        raise PatchError(
            f"{job_table!r} has exclusive keys, and a find under a lease frees a row's key as soon "
            "as the legacy mark is written: leave out exclusive_by, or claim in place of the find"
        )
    table = job_table.entity or job_table.table
    unset: dict[str, Any] = dict.fromkeys(("free", "claimed", "failed", "released"), UNSET)
    unset |= {"null_is_free": False, "unleased": None}
    state, done = job_table.lease, job_table.claimed
    return replace(job_table, table=table, state=state, done=done, **unset)


def _table_of(table: Any) -> Table:
    found: Any = table if isinstance(table, Table) else sa_inspect(table).local_table
    assert isinstance(found, Table)
    return found


@dataclass(frozen=True)
class TableReference:
    """A table that is named, since what defines it may not be there yet.

    Attributes:
        name: ``"module:Name"``, or the table's name in the database, ``"jobs"`` or
            ``"schema.jobs"``.
    """

    name: str

    @property
    def clause(self) -> TableClause | None:
        """The table's name as SQL, or None if a module defines it."""
        schema, _, name = self.name.rpartition(".")
        return None if ":" in self.name else sql_table(name, schema=schema or None)

    @property
    def is_defined(self) -> bool:
        """Check whether there is a table now, without a call and before an import goes on."""
        if self.clause is not None:
            return False
        module_name = self.name.partition(":")[0]
        module = loaded_module(module_name)
        try:
            found = referred(self.name)
            return found is not None and not _gives_tables(found)
        except PatchError:
            spec = getattr(module, "__spec__", None)
            if is_main(module_name) or getattr(spec, "_initializing", False):
                return False
            raise

    def resolve(self, bind: Any) -> Any:
        """Return what is named; reflect it if the database alone knows it.

        Raises:
            PatchError: there is nothing of that name.
        """
        clause = self.clause
        table = referred(self.name) if clause is None else _reflected(clause, bind)
        if table is None:
            raise PatchError(
                f"table={self.name!r} is None: what sets it has not run; call it before the "
                "patched function"
            )
        return table


def _gives_tables(found: Any) -> bool:
    return callable(found) and not isinstance(found, type)


def declared(table: Any, arguments: Mapping[str, Any]) -> Any:
    """Return the ``JobTable`` of a table whose columns are named beside it, if any are.

    Raises:
        ClaimError: the arguments do not fit the table.
    """
    if not arguments:
        return table
    if not isinstance(table, (type, Table)):
        raise PatchError(
            f"table is {table!r}; expected a Table or a mapped class where its columns are named "
            "beside it"
        )
    options = {role: _clocks(each) for role, each in arguments.items()}
    if isinstance(options.get("order"), (str, list)):
        options["order"] = order_of(table, options["order"])
    return JobTable.infer(table, **options)


def _reflected(clause: TableClause, bind: Any) -> Table:
    """Reflect a table, and leave the bind without a transaction if it has none."""
    if isinstance(bind, sessionmaker):
        with bind() as session:
            return _reflected(clause, session)
    if isinstance(bind, Session):
        begun = bind.in_transaction()
        bind = bind.connection({"clause": clause}) if begun else bind.get_bind(clause=clause)
    is_idle = isinstance(bind, Connection) and not bind.in_transaction()
    try:
        return reflected(clause.name, clause.schema, bind, resolve_fks=False)
    except NoSuchTableError:
        raise PatchError(
            f"table={clause.fullname!r} is neither a parameter of the function nor a table in the "
            f"database {bind.engine.url.database!r}: write the table's name there, or "
            "'package.models:Job' for one that a module defines"
        ) from None
    finally:
        if is_idle:
            bind.rollback()


class Tables:
    """The table of each call of a patched function.

    Args:
        given: a table, the name of one, a path from a parameter, a callable, or a dictionary of
            the arguments of :meth:`JobTable.infer`.
        options: reads the options of the patch.
        make: makes of a table the ``JobTable`` of the patch, and raises if it does not fit.
    """

    def __init__(self, given: Any, options: Options, make: Callable[[Any], JobTable]) -> None:
        self._arguments: dict[str, Any] = {}
        if isinstance(given, Mapping):
            self._arguments = dict(given)
            given = self._arguments.pop("table", None)
        if isinstance(given, str) and options.parts(given) is None:
            given = TableReference(given)
        self.reading = options.reading("table", given, lambda each: isinstance(each, type))
        self._options = options
        self._make = make
        self._made: dict[Any, JobTable] = {}
        self._lock = threading.RLock()
        if self.reading.constant and not (
            isinstance(given, TableReference) and not given.is_defined
        ):
            self._of(given)

    def named(self, call: Call) -> TableClause:
        """Return the table of a call, by its name alone if it has to be reflected."""
        given = self.reading.read(call)
        given = TableReference(given) if isinstance(given, str) else given
        clause = given.clause if isinstance(given, TableReference) else None
        return self._of(given, call).table if clause is None else clause

    def of(self, call: Call, bind: Any) -> JobTable:
        """Return the ``JobTable`` of a call, whose bind a table is reflected from."""
        return self._of(self.reading.read(call), call, bind)

    def _of(self, given: Any, call: Call | None = None, bind: Any = None) -> JobTable:
        given = TableReference(given) if isinstance(given, str) else given
        if given in self._made:
            return self._made[given]
        # Not under the lock: a thread that waits for it may have the last connection of a pool.
        found = given.resolve(bind) if isinstance(given, TableReference) else given
        if _gives_tables(found):
            if call is None or found is given:
                raise PatchError(
                    f"table={self.reading.given!r} of {self._options.target} gives {found!r}; "
                    "expected a Table, a mapped class or a JobTable"
                )
            return self._of(self._options.reading("table", found).read(call), call, bind)
        with self._lock:
            if given not in self._made:
                self._made[given] = self._make(declared(found, self._arguments))
            return self._made[given]


def _clocks(value: Any) -> Any:
    """Replace each ``"now()"`` by the database's clock."""
    if isinstance(value, Mapping):
        return {name: _clocks(each) for name, each in value.items()}
    return func.now() if value == "now()" else value


def order_of(table: Any, names: str | list[str]) -> list[Any]:
    """Columns by name, with ``-`` before them for descending."""
    columns = _table_of(table).columns
    found = []
    for name in [names] if isinstance(names, str) else names:
        column = columns.get(name.lstrip("-"))
        if column is None:
            raise PatchError(
                f"order={name!r}: {_table_of(table).fullname!r} has {', '.join(columns.keys())}"
            )
        found.append(column.desc() if name.startswith("-") else column)
    return found
