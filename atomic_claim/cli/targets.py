"""What a command is pointed at: ``MODULE:NAME``, or a table by its name in the database."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from typing import Annotated, Any

import typer
from sqlalchemy import Connection, MetaData, Table
from sqlalchemy.exc import NoSuchTableError

from atomic_claim.columns import JobTable, job_table_of
from atomic_claim.errors import ClaimError

from .database import CommandError

TableOption = Annotated[
    str,
    typer.Option(
        "--table",
        metavar="MODULE:NAME",
        help="The job table: a Table, a mapped class or a JobTable of a module, which may lie in "
        "the current directory.",
    ),
]


def load(spec: str, option: str) -> Any:
    """What ``MODULE:NAME`` stands for; a module in the current directory is found too.

    Args:
        spec: the module and the name in it, which may have dots.
        option: where it was given, for the messages.

    Raises:
        CommandError: there is no such module or name, or the module cannot be imported.
    """
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise CommandError(
            f"{option} {spec}: expected MODULE:NAME, such as app.models:Job, where app/models.py "
            "lies in the current directory or is installed"
        )
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109 - sys.path holds strings
        sys.path.insert(0, here)
    found = _imported(module_name, f"{option} {spec}")
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise CommandError(
                f"{option} {spec}: the module {module_name!r} has no {name!r}"
            ) from None
    return found


def _imported(name: str, said: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        # A package that the user's module needs is another trouble.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise CommandError(
                f"{said}: there is no module {name!r}, in the current directory or installed"
            ) from None
        raise CommandError(f"{said}: {_where(error)}") from None
    # Whatever a module does when it is imported, its author reads one line of it.
    except Exception as error:  # noqa: BLE001
        raise CommandError(f"{said}: {_where(error)}") from None


def _where(error: Exception) -> str:
    """What went wrong, and in which line of the user's."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__} at {last.filename}:{last.lineno}: {said}"


def load_job_table(spec: str) -> JobTable:
    """The ``JobTable`` that ``--table MODULE:NAME`` stands for.

    Raises:
        CommandError: it cannot be imported, is no table, or cannot be read with certainty.
    """
    found = load(spec, "--table")
    try:
        return job_table_of(found)
    except ClaimError as error:
        raise CommandError(f"--table {spec}: {error}") from None


def reflect(connection: Connection, given: str) -> Table:
    """The table of this name, with what the database says of it.

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
