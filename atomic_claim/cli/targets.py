"""The table that a command works on: ``MODULE:NAME``, its name in the database, or a patch's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from atomic_claim.errors import ClaimError
from atomic_claim.job_table import JobTable, job_table_of
from atomic_claim.patch.file import find_file, read_file
from atomic_claim.testing.database import CommandError, connected, parse_url
from atomic_claim.testing.names import TableName, load_table

TableOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:NAME|NAME",
        help="The job table: a Table, a mapped class or a JobTable of a module, which may lie in "
        "the current directory; or its name in the database of --url, as SCHEMA.NAME if "
        "it has a schema. Default: the one in the patches of the nearest pyproject.toml.",
    ),
]


def chosen(spec: str | None) -> TableName:
    """Return ``--table``, or the one table that the patches in a pyproject.toml name.

    Raises:
        CommandError: it was left out, and there is not exactly one.
        PatchError: the file cannot be read.
    """
    if spec is not None:
        return spec
    path = find_file(Path.cwd())
    entries = [] if path is None else read_file(path)
    found: list[TableName] = []
    for each in entries:
        if (table := each.options.get("table")) is not None and table not in found:
            found.append(table)
    if len(found) != 1:
        names = ", ".join(map(str, found))
        said = f"{path} names {names}" if names else "no pyproject.toml names one"
        raise CommandError(f"which table? Give --table MODULE:NAME or NAME; {said}")
    return found[0]


def load_job_table(spec: str | None, url: str | None) -> tuple[Any, JobTable]:
    """Load what ``--table`` names; return it and its ``JobTable``.

    Raises:
        CommandError: it cannot be imported or reflected, is no table, or cannot be read with
            certainty.
    """
    wanted = chosen(spec)
    is_reflected = ":" not in name_of(wanted) and url is not None
    with connected(parse_url(str(url))) if is_reflected else nullcontext() as engine:
        try:
            found = load_table(wanted, engine)
            job_table = job_table_of(found)
        except ClaimError as error:
            raise CommandError(f"--table {name_of(wanted)}: {'; '.join(advice(error))}") from None
    # Of a declaration beside the name, what the name alone stands for.
    return found if isinstance(wanted, str) else job_table.entity or job_table.table, job_table


def name_of(spec: TableName) -> str:
    """Return the name of the table alone."""
    return spec if isinstance(spec, str) else str(spec["table"])


def advice(error: ClaimError) -> tuple[str, str]:
    """Return why a table cannot be claimed from as it is named, and what to give instead."""
    first, *lines = (line.strip() for line in str(error).splitlines())
    doubts = [line.removeprefix("in doubt: ") for line in lines if line.startswith("in doubt: ")]
    write = [line.removeprefix("write: ") for line in lines if line.startswith("write: ")]
    cure = f"give --table MODULE:NAME of a {write[0] if write else 'JobTable(...)'}"
    return "; ".join(doubts) or first, cure
