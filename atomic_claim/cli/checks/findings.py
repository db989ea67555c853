"""The inputs of a check, and the findings that it yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Dialect, Table, text

from atomic_claim.backends.drivers import product_of
from atomic_claim.cli.texts import dialect_of, literal_text
from atomic_claim.job_table import JobTable


class Level(StrEnum):
    """The severity of a finding: only a problem makes the command fail."""

    FINE = "fine"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: what was looked at.
        level: how much it matters.
        found: what is the case.
        why: why that matters.
        fix: what to do about it, in words.
        sql: the SQL to run, one statement each.
    """

    check: str
    level: Level
    found: str
    why: str = ""
    fix: str = ""
    sql: tuple[str, ...] = ()


@dataclass(frozen=True)
class Patient:
    """The table that is looked at, and where.

    Attributes:
        connection: a connection that only reads.
        table: the table, as the claim knows it.
        stuck_after: how long a job may run without a lease.
        transaction_after: how long a transaction may be open.
        spec: how ``--table`` named it.
    """

    connection: Connection
    table: Table
    stuck_after: timedelta
    transaction_after: timedelta
    spec: str = ""

    @property
    def product(self) -> str:
        """``postgresql``, ``mysql``, ``mariadb`` or ``sqlite``."""
        return product_of(self.connection.dialect)

    @property
    def dialect(self) -> Dialect:
        """A dialect for text that people read."""
        return dialect_of(self.product)

    @property
    def is_partitioned(self) -> bool:
        """True if PostgreSQL has the table in partitions, each with indexes of its own."""
        asked = text("SELECT relkind = 'p' FROM pg_class WHERE oid = to_regclass(:name)")
        return self.product == "postgresql" and bool(
            self.connection.scalar(asked, {"name": self.name})
        )

    @property
    def name(self) -> str:
        """The table's name, quoted for SQL."""
        return self.dialect.identifier_preparer.format_table(self.table)

    def quoted(self, name: str) -> str:
        """Quote another name for SQL."""
        return self.dialect.identifier_preparer.quote(name)

    def text(self, clause: ColumnElement[Any]) -> str:
        """Compile an expression on the table's columns to SQL with literal values."""
        return literal_text(clause, self.dialect)


@dataclass(frozen=True, kw_only=True)
class Reading(Patient):
    """A table whose columns are understood.

    Attributes:
        job_table: what its columns mean.
    """

    job_table: JobTable

    @property
    def written(self) -> list[Column[Any]]:
        """The columns that a claim or an end writes."""
        own = self.job_table
        marks = (own.claimed, own.released, own.done, own.failed)
        roles = (own.state, own.worker, own.token, own.lease, own.attempts)
        given = (*(column for mark in marks for column in mark), *roles, *own.stamps)
        return list(dict.fromkeys(column for column in given if column is not None))


JobCheck = Callable[[Reading], Iterator[Finding]]


def count(number: int, noun: str = "row") -> str:
    """Format a number with its noun in the singular or plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def age(seconds: float) -> str:
    """Format a time span in its largest unit."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            return count(int(seconds // size), unit)
    return count(max(0, int(seconds)), "second")


def listed(names: Sequence[str]) -> str:
    """Names for people, the first few of many."""
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5:,} more" if len(names) > 5 else shown  # noqa: PLR2004
