"""Tables in which no column says that a job is taken."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Table, true
from sqlalchemy import inspect as sa_inspect

from atomic_claim.columns import JobTable
from atomic_claim.conventions import read_columns
from atomic_claim.errors import AmbiguousTable


def stateless(table: Any) -> JobTable:
    """A ``JobTable`` of a table whose jobs are taken by deleting them.

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
    """A ``JobTable`` to which every row is free, whoever has it."""
    if isinstance(table, JobTable):
        table = table.entity or table.table
    key = next(iter(_table_of(table).primary_key.columns), None)
    return JobTable(table, free=true(), claimed={} if key is None else {key: key}, **known)


def leased_only(job_table: JobTable) -> JobTable:
    """The table such that a claim writes nothing but the lease, and the state says what is done."""
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
