"""The table that a command works on: ``MODULE:NAME``, its name in the database, or a patch's."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from atomic_claim.errors import ClaimError
from atomic_claim.job_table import JobTable, job_table_of
from atomic_claim.patch.file import find_file, read_file
from atomic_claim.testing.database import CommandError, connected, one_line, parse_url
from atomic_claim.testing.names import load_table

from .flags import naming_flags

TableOption = Annotated[
    str | None,
    typer.Option(
        "--table",
        metavar="MODULE:NAME|NAME",
        help="The job table: a Table, a mapped class or a JobTable of a module, which may lie in "
        "the current directory; or its name in the database of --url, with a dot behind its "
        "schema. Left out, the one that the patches of the nearest pyproject.toml name.",
    ),
]


def chosen(spec: str | None) -> str:
    """Return ``--table``, or the one table that the patches in a pyproject.toml name.

    Raises:
        CommandError: it was left out, and there is not exactly one.
    """
    if spec is not None:
        return spec
    try:
        path = find_file(Path.cwd())
        entries = [] if path is None else read_file(path)
    except ClaimError as error:
        raise CommandError(one_line(error)) from None
    found = (each.options.get("table") for each in entries)
    names = sorted({name for name in found if isinstance(name, str)})
    if len(names) != 1:
        said = f"{path} names {', '.join(names)}" if names else "no pyproject.toml names one"
        raise CommandError(f"which table? Give --table MODULE:NAME or NAME; {said}")
    return names[0]


def load_job_table(spec: str | None, url: str | None) -> tuple[Any, JobTable]:
    """Load what ``--table`` names; return it and its ``JobTable``.

    Raises:
        CommandError: it cannot be imported or reflected, is no table, or cannot be read with
            certainty.
    """
    spec = chosen(spec)
    with ExitStack() as stack:
        stack.enter_context(naming_flags())
        engine = None
        if ":" not in spec and url is not None:
            engine = stack.enter_context(connected(parse_url(url)))
        found = load_table(spec, engine)
    try:
        return found, job_table_of(found)
    except ClaimError as error:
        raise CommandError(f"--table {spec}: {error}") from None
