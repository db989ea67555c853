"""The table of a patch: found now or at the first call, with or without a state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sqlalchemy import Table, true
from sqlalchemy import inspect as sa_inspect

from atomic_claim.errors import AmbiguousTable, PatchError
from atomic_claim.inference import read_columns
from atomic_claim.job_table import JobTable

from .calls import Call, Options, referred
from .main_module import is_main, loaded_module

T = TypeVar("T")


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
    kept = {
        role: getattr(job_table, role)
        for role in (
            "withdrawn",
            "due",
            "order",
            "worker",
            "token",
            "lease",
            "attempts",
            "max_attempts",
            "error",
            "stamps",
            "naive_times",
            "text_times",
        )
    }
    table = job_table.entity or job_table.table
    return JobTable(table, state=job_table.lease, done=job_table.claimed, **kept)


def _table_of(table: Any) -> Table:
    found: Any = table if isinstance(table, Table) else sa_inspect(table).local_table
    assert isinstance(found, Table)
    return found


@dataclass(frozen=True)
class TableReference:
    """A table that is named, since what defines it may not be there yet.

    Attributes:
        name: ``"module:Name"``.
        options: the arguments of the ``JobTable``, if it needs one.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def is_defined(self) -> bool:
        """Check whether the table can be had now, without waiting for an import to go on."""
        module_name, _, path = self.name.partition(":")
        found: Any = loaded_module(module_name)
        if found is None:
            return referred(self.name) is not None
        spec = getattr(found, "__spec__", None)
        is_loading = is_main(module_name) or getattr(spec, "_initializing", False)
        for part in path.split("."):
            if is_loading and not hasattr(found, part):
                return False
            found = getattr(found, part, found)
        return referred(self.name) is not None

    def resolve(self) -> Any:
        """Return the table, or its ``JobTable``.

        Raises:
            PatchError: there is nothing of that name.
            ClaimError: the options do not fit the table.
        """
        table = referred(self.name)
        if table is None:
            raise PatchError(
                f"table={self.name!r} is None: what sets it has not run; call it before the "
                "patched function"
            )
        if not self.options:
            return table
        if not isinstance(table, (type, Table)):
            raise PatchError(
                f"table={self.name!r} is {table!r}; expected a Table or a mapped class where its "
                "columns are named beside it"
            )
        options = dict(self.options)
        if isinstance(options.get("order"), (str, list)):
            options["order"] = order_of(table, options["order"])
        return JobTable.infer(table, **options)


class Tables(Generic[T]):
    """The table of each call of a patched function.

    Args:
        given: a table, the name of one, a path from a parameter, or a callable.
        options: reads the options of the patch.
        make: makes of a table what the patch needs, and raises if it does not fit.
    """

    def __init__(self, given: Any, options: Options, make: Callable[[Any], T]) -> None:
        if isinstance(given, str) and ":" in given:
            given = TableReference(given)
        self.reading = options.reading("table", given, lambda each: isinstance(each, type))
        self._options = options
        self._make = make
        self._made: dict[Any, T] = {}
        self._lock = threading.RLock()
        if self.reading.constant and not (
            isinstance(given, TableReference) and not given.is_defined
        ):
            self._of(given)

    def of(self, call: Call) -> T:
        """Return what was made of the table of a call."""
        return self._of(self.reading.read(call), call)

    def _of(self, given: Any, call: Call | None = None) -> T:
        with self._lock:
            if given in self._made:
                return self._made[given]
            found = given.resolve() if isinstance(given, TableReference) else given
            if not callable(found) or isinstance(found, type):
                return self._made.setdefault(given, self._make(found))
            if call is None or found is given:
                raise PatchError(
                    f"table={self.reading.given!r} of {self._options.target} gives {found!r}; "
                    "expected a Table, a mapped class or a JobTable"
                )
            return self._of(self._options.reading("table", found).read(call))


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
