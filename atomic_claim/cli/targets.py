"""The table that a command works on: ``MODULE:NAME``, or a table's name in the database."""

from __future__ import annotations

from typing import Annotated

import typer
from sqlalchemy import Connection, MetaData, Table
from sqlalchemy.exc import NoSuchTableError

from atomic_claim.errors import ClaimError
from atomic_claim.job_table import JobTable, job_table_of
from atomic_claim.testing.database import CommandError
from atomic_claim.testing.names import load

TableOption = Annotated[
    str,
    typer.Option(
        "--table",
        metavar="MODULE:NAME",
        help="The job table: a Table, a mapped class or a JobTable of a module, which may lie in "
        "the current directory.",
    ),
]


def load_job_table(spec: str) -> JobTable:
    """Load the ``JobTable`` given by ``--table MODULE:NAME``.

    Raises:
        CommandError: it cannot be imported, is no table, or cannot be read with certainty.
    """
    found = load(spec, "--table")
    try:
        return job_table_of(found)
    except ClaimError as error:
        raise CommandError(f"--table {spec}: {error}") from None


def reflect(connection: Connection, given: str) -> Table:
    """Reflect the table of this name from the database.

    Raises:
        CommandError: there is none.
    """
    schema, _, name = given.rpartition(".")
    try:
        return Table(name, MetaData(), schema=schema or None, autoload_with=connection)
    except NoSuchTableError:
        raise CommandError(
            f"--table {given}: the database has no such table; expected its name, or MODULE:NAME "
            "for a table that a module declares"
        ) from None
