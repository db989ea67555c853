"""The commands, put together."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from . import demo, doctor, jobs, migration, race, run, sql
from .options import Flag

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    # Paragraphs are filled to the terminal's width.
    rich_markup_mode="markdown",
    # Typer's own tracebacks could show the values of variables, a URL with its password included.
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
# What follows the command's name is the command's, options included.
app.command("run", context_settings={"allow_interspersed_args": False})(run.run)
app.command("race")(race.race)
app.command("doctor")(doctor.doctor)
app.command("jobs")(jobs.jobs)
app.command("sql")(sql.sql)
app.command("migration")(migration.migration)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        found = version("atomic-claim")
    except PackageNotFoundError:
        found = "(not installed)"
    typer.echo(f"atomic-claim {found}")
    raise typer.Exit


@app.callback()
def atomic_claim(
    *,
    version: Annotated[
        bool,
        Flag("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Atomic claims of rows of existing job tables.

    A job that is free is handed to exactly one worker, on PostgreSQL, MySQL, MariaDB and SQLite.
    """
