"""Tables in which no column says that a job is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table, true
from sqlalchemy import inspect as sa_inspect

from atomic_claim.errors import AmbiguousTable, PatchError
from atomic_claim.inference import read_columns
from atomic_claim.job_table import JobTable
from atomic_claim.references import resolve

from .main_module import loaded_module


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
        reading = read_columns(own, {column: frozenset([column.name]) for column in own.columns})
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


@dataclass(frozen=True, eq=False)
class Later:
    """A table that is named, since what defines it may not be imported yet.

    Attributes:
        name: ``"module:Name"``.
        options: the arguments of the ``JobTable``, if it needs one.
    """

    name: str
    options: Mapping[str, Any] | None = None


def table_of(given: Any) -> Any:
    """Resolve a table that is given by itself or by name.

    Raises:
        PatchError: there is nothing of that name.
        ClaimError: the options do not fit the table.
    """
    if isinstance(given, str) and ":" in given:
        given = Later(given)
    if not isinstance(given, Later):
        return given
    table = referred(given.name)
    if not given.options:
        return table
    options = dict(given.options)
    if isinstance(options.get("order"), (str, list)):
        options["order"] = order_of(table, options["order"])
    return JobTable(table, **options)


def referred(name: str) -> Any:
    """Return the object that ``"module:name"`` names; import the module if necessary.

    Raises:
        PatchError: there is nothing of that name.
    """
    module_name, _, path = name.partition(":")
    loaded = loaded_module(module_name)
    try:
        return resolve(name if loaded is None else f"{loaded.__name__}:{path}")
    except ImportError as error:
        raise PatchError(f"{name!r} cannot be imported: {error}") from error
    except (AttributeError, ValueError) as error:
        raise PatchError(f"{name!r} does not exist: {error}") from error


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
