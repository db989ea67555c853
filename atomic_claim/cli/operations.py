"""The steps of a migration: SQL for each database, and the SQL that undoes it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import DateTime, Dialect, Integer, String, Table
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

from atomic_claim.inference import TOKEN_LENGTH
from atomic_claim.job_table import JobTable
from atomic_claim.testing.database import CommandError

from .checks.catalog import reason
from .indexes import INNODB, NeededIndex, needed_indexes
from .texts import dialect_of


@dataclass(frozen=True)
class AddedColumn:
    """A nullable column: no database rewrites the table for it, and no old code misses it.

    Attributes:
        role: what it means to a claim.
        name: its name, which is read as its meaning.
        comment: its purpose, in one line.
        type_: its type.
        source: the type as a model declares it.
    """

    role: str
    name: str
    comment: str
    type_: TypeEngine[Any]
    source: str


COLUMNS = (
    AddedColumn(
        "lease",
        "lease_until",
        "Until when a claim holds: a dead worker's row comes back.",
        # A TIMESTAMP of MySQL's is a point in time; with six digits, as PostgreSQL's, not rounded.
        DateTime(timezone=True).with_variant(mysql.TIMESTAMP(fsp=6), *INNODB),
        'sa.DateTime(timezone=True).with_variant(mysql.TIMESTAMP(fsp=6), "mysql", "mariadb")',
    ),
    AddedColumn(
        "token",
        "claim_token",
        "Whose claim it is: a late worker cannot overwrite its successor's result.",
        String(TOKEN_LENGTH),
        f"sa.String({TOKEN_LENGTH})",
    ),
    AddedColumn("attempts", "attempts", "How often a row was claimed.", Integer(), "sa.Integer()"),
)
ROLES = [column.role for column in COLUMNS]


@dataclass(frozen=True)
class Step:
    """One step of a migration.

    Attributes:
        comment: what it is for, in one line.
        up: the statements by the database's name; none where it is not needed.
        down: those that undo them.
        alone: the databases on which they cannot be part of a transaction.
        made: the column or the index that it adds, which the model has to declare.
    """

    comment: str
    up: Mapping[str, Sequence[str]]
    down: Mapping[str, Sequence[str]]
    alone: Collection[str] = ()
    made: AddedColumn | NeededIndex | None = None

    @property
    def undone(self) -> Step:
        """The step that undoes this one."""
        comment = f"Undo: {self.comment[0].lower()}{self.comment[1:]}"
        return Step(comment, self.down, self.up, self.alone)


def operations(job_table: JobTable, add: Collection[str], names: Sequence[str]) -> list[Step]:
    """Return the columns, then the indexes, that prepare a table for its claims.

    Args:
        job_table: what the columns mean.
        add: the columns to add: of ``lease``, ``token`` and ``attempts``.
        names: the databases that are meant.

    Raises:
        CommandError: a column's name is taken, or an index cannot be created.
    """
    columns = list(_columns(job_table, add))
    lease = next((column.name for column in columns if column.role == "lease"), None)
    found = [_add_column(job_table, column, names) for column in columns]
    found += [_add_index(needed, names) for needed in needed_indexes(job_table, lease=lease)]
    return [step for step in found if step.up]


def _columns(job_table: JobTable, add: Collection[str]) -> Iterator[AddedColumn]:
    table = job_table.table
    for column in COLUMNS:
        role, name = column.role, column.name
        if role not in add:
            continue
        if (known := getattr(job_table, role)) is not None:
            raise CommandError(
                f"--add {role}: {table.fullname} has it already, as {known.name!r}; leave it out"
            )
        if name in (each.name for each in table.columns):
            raise CommandError(
                f"--add {role}: {table.fullname} has a column {name!r} that is not known "
                f"to be its {role}: say so with JobTable({role}={name!r})"
            )
        yield column


def _add_column(job_table: JobTable, column: AddedColumn, names: Sequence[str]) -> Step:
    up, down = {}, {}
    for name in names:
        dialect = dialect_of(name)
        table = dialect.identifier_preparer.format_table(job_table.table)
        up[name] = [added_column(job_table.table, column.name, column.type_, dialect)]
        down[name] = [f"ALTER TABLE {table} DROP COLUMN {column.name}"]
    return Step(column.comment, up, down, made=column)


def added_column(table: Table, name: str, type_: TypeEngine[Any], dialect: Dialect) -> str:
    """Render the statement that adds a nullable column."""
    preparer, said = dialect.identifier_preparer, dialect.type_compiler_instance.process(type_)
    # MySQL's first TIMESTAMP may else be NOT NULL (explicit_defaults_for_timestamp).
    null = " NULL" if dialect.name in INNODB else ""
    column = f"{preparer.quote(name)} {said}{null}"
    return f"ALTER TABLE {preparer.format_table(table)} ADD COLUMN {column}"


def _add_index(needed: NeededIndex, names: Sequence[str]) -> Step:
    up, down = {}, {}
    for name in names:
        dialect = dialect_of(name)
        if needed.is_declared(dialect):
            continue
        if (refusal := needed.refusal(dialect)) is None:
            up[name], down[name] = [needed.create(dialect)], [needed.drop(dialect)]
        elif len(names) == 1:
            raise CommandError(refusal)
    alone = () if needed.is_partitioned else ("postgresql",)
    return Step(reason(needed.reason)["serves"], up, down, alone, needed)
