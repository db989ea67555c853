"""The commands, put together."""

from __future__ import annotations

from importlib.metadata import Distribution
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from . import demo, doctor, jobs, migration, race, run, sql
from .options import Flag, plain_ending


class PlainHelp:
    """A command whose option --help is shown without a type, as the other flags are."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option, which typer would show with ``<bool>``."""
        option: Any = super().get_help_option(ctx)  # type: ignore[misc]
        option.metavar = ""
        return option


class PlainCommand(PlainHelp, TyperCommand):
    """A command."""


class PlainGroup(PlainHelp, TyperGroup):
    """The program."""


app = typer.Typer(
    cls=PlainGroup,
    no_args_is_help=True,
    add_completion=False,
    # Paragraphs are filled to the terminal's width.
    rich_markup_mode="markdown",
    # Typer's own tracebacks could show the values of variables, a URL with its password included.
    pretty_exceptions_enable=False,
)
# What follows the command's name is the command's, options included.
RUN = {"allow_interspersed_args": False}
for command in (
    demo.demo,
    run.run,
    race.race,
    doctor.doctor,
    jobs.jobs,
    sql.sql,
    migration.migration,
):
    settings = RUN if command is run.run else None
    add = app.command(command.__name__, cls=PlainCommand, context_settings=settings)
    add(plain_ending()(command))


def _show_version(wanted: bool) -> None:
    if wanted:
        found = next(iter(Distribution.discover(name="atomic-claim")), None)
        typer.echo(f"atomic-claim {'(not installed)' if found is None else found.version}")
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
