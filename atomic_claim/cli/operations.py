"""The steps of a migration, each with the statements that undo it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import DateTime, Integer, String, Table
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

from atomic_claim.inference import TOKEN_LENGTH
from atomic_claim.job_table import JobTable
from atomic_claim.testing.database import CommandError

from .indexes import INNODB, NeededIndex, needed_indexes
from .texts import dialect_of

NAMES = {"lease": "lease_until", "token": "claim_token", "attempts": "attempts"}


class Operation(Protocol):
    """One step of a migration."""

    @property
    @abstractmethod
    def comment(self) -> str:
        """Return one line that states the purpose."""

    @abstractmethod
    def up(self, name: str) -> Sequence[str]:
        """Return the statements that apply the operation on a dialect, given by name."""

    @abstractmethod
    def down(self, name: str) -> Sequence[str]:
        """Return the statements that undo the operation."""

    @abstractmethod
    def is_alone(self, name: str) -> bool:
        """Check whether the statements cannot run in a transaction on this dialect."""


@dataclass(frozen=True)
class AddColumn:
    """A nullable column: no database rewrites the table for it, and no old code misses it."""

    table: Table
    role: str
    type_: TypeEngine[Any]
    source: str

    @property
    def name(self) -> str:
        """The column's name, which is read as its meaning."""
        return NAMES[self.role]

    @property
    def comment(self) -> str:
        """Return one line that states the column's purpose."""
        return {
            "lease": "Until when a claim holds: a dead worker's row comes back.",
            "token": "Whose claim it is: a late worker cannot overwrite its successor's result.",
            "attempts": "How often a row was claimed.",
        }[self.role]

    def up(self, name: str) -> Sequence[str]:
        """Return the statement that adds the column."""
        dialect = dialect_of(name)
        preparer = dialect.identifier_preparer
        type_ = dialect.type_compiler_instance.process(self.type_)
        # MySQL's first TIMESTAMP may else be NOT NULL (explicit_defaults_for_timestamp).
        null = " NULL" if name in INNODB else ""
        column = f"{preparer.quote(self.name)} {type_}{null}"
        return (f"ALTER TABLE {preparer.format_table(self.table)} ADD COLUMN {column}",)

    def down(self, name: str) -> Sequence[str]:
        """Return the statement that drops the column."""
        preparer = dialect_of(name).identifier_preparer
        table = preparer.format_table(self.table)
        return (f"ALTER TABLE {table} DROP COLUMN {preparer.quote(self.name)}",)

    def is_alone(self, name: str) -> bool:  # noqa: ARG002 - the same everywhere
        """Return False: the statement runs in the migration's transaction."""
        return False


@dataclass(frozen=True)
class Statements:
    """SQL that differs from database to database; none where it is not needed.

    Attributes:
        comment: what it is for, in one line.
        does: the statements by the dialect's name.
        undoes: those that undo them.
        alone: the dialects on which they cannot be part of a transaction.
        index: the index that they create, if they do.
    """

    comment: str
    does: Mapping[str, Sequence[str]]
    undoes: Mapping[str, Sequence[str]]
    alone: Collection[str] = ()
    index: NeededIndex | None = None

    def up(self, name: str) -> Sequence[str]:
        """Return the statements that apply the operation on this dialect."""
        return self.does.get(name, ())

    def down(self, name: str) -> Sequence[str]:
        """Return the statements that undo the operation."""
        return self.undoes.get(name, ())

    def is_alone(self, name: str) -> bool:
        """Check whether the statements cannot run in a transaction on this dialect."""
        return name in self.alone


def operations(
    job_table: JobTable, add: Collection[str], dialects: Sequence[str]
) -> list[Operation]:
    """Return the operations that prepare a table for its claims, in order of execution.

    This is the place for further steps: columns, then indexes, then whatever rests on both.

    Args:
        job_table: what the columns mean.
        add: the columns to add: of ``lease``, ``token`` and ``attempts``.
        dialects: the names of the databases that are meant.

    Raises:
        CommandError: a column's name is taken, or an index cannot be had.
    """
    columns = list(_columns(job_table, add))
    lease = next((column.name for column in columns if column.role == "lease"), None)
    found: list[Operation] = [*columns]
    for needed in needed_indexes(job_table, lease=lease):
        index = _index(needed, dialects)
        if index.does:
            found.append(index)
    return found


def _columns(job_table: JobTable, add: Collection[str]) -> Iterator[AddColumn]:
    table = job_table.table
    for role in (role for role in NAMES if role in add):
        if (known := getattr(job_table, role)) is not None:
            raise CommandError(
                f"--add {role}: {table.fullname} has it already, as {known.name!r}; leave it out"
            )
        if NAMES[role] in (column.name for column in table.columns):
            raise CommandError(
                f"--add {role}: {table.fullname} has a column {NAMES[role]!r} that is not known "
                f"to be its {role}: say so with JobTable({role}={NAMES[role]!r})"
            )
        yield AddColumn(table, role, *_TYPES[role])


# A TIMESTAMP of MySQL's is a point in time; with six digits, as PostgreSQL's, it is not rounded.
_TYPES: Mapping[str, tuple[TypeEngine[Any], str]] = {
    "lease": (
        DateTime(timezone=True).with_variant(mysql.TIMESTAMP(fsp=6), *INNODB),
        'sa.DateTime(timezone=True).with_variant(mysql.TIMESTAMP(fsp=6), "mysql", "mariadb")',
    ),
    "token": (String(TOKEN_LENGTH), f"sa.String({TOKEN_LENGTH})"),
    "attempts": (Integer(), "sa.Integer()"),
}
_SERVES = {
    "free": "Serves the search for free rows, in the order of the claim.",
    "expired": "Serves the search for rows whose lease has run out.",
    "unleased": "Serves the search for rows that have been running without a lease.",
    "keys": "Serves the search for the keys that have free rows, and for the first row of each.",
    "running": "Serves the look for rows that run with a key.",
}


def _index(needed: NeededIndex, names: Sequence[str]) -> Statements:
    does: dict[str, Sequence[str]] = {}
    undoes: dict[str, Sequence[str]] = {}
    for name in names:
        dialect = dialect_of(name)
        if needed.is_declared(dialect):
            continue
        if (refusal := needed.refusal(dialect)) is not None:
            if len(names) == 1:
                raise CommandError(refusal)
            continue
        does[name] = (create_index(needed, name),)
        undoes[name] = (needed.drop(dialect),)
    alone = () if needed.is_partitioned else ("postgresql",)
    return Statements(_SERVES[needed.reason], does, undoes, alone, needed)


def create_index(needed: NeededIndex, name: str) -> str:
    """Render the statement that creates an index on a dialect, given by name."""
    dialect = dialect_of(name)
    if name not in INNODB:
        return needed.create(dialect)
    table = dialect.identifier_preparer.format_table(needed.table)
    columns = needed.definition(dialect).removeprefix(f"ON {table} ")
    index = dialect.identifier_preparer.quote(needed.name)
    return f"ALTER TABLE {table} ADD INDEX {index} {columns}, ALGORITHM=INPLACE, LOCK=NONE"
