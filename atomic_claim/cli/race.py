"""``atomic-claim race``: whether a claim function hands jobs out twice, on the user's own table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from atomic_claim.testing.racing import JOBS, PATIENCE, TIMEOUT, WORKERS
from atomic_claim.testing.racing import race as held
from atomic_claim.testing.results import Race

from .drawing import SvgOption, check_picture, draw_picture
from .flags import naming_flags
from .options import FAILED, Flag, JsonOption, UrlOption, console, plain_ending
from .progress import with_progress
from .targets import TableOption, chosen

MILLISECONDS = 1000


def race(
    context: typer.Context,
    *,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="The function that claims, as MODULE:FUNCTION or MODULE:CLASS.METHOD; the module "
            "may lie in the current directory.",
        ),
    ],
    table: TableOption = None,
    workers: Annotated[
        int, typer.Option(min=1, help="How many worker processes run at once.")
    ] = WORKERS,
    jobs: Annotated[int, typer.Option(min=1, help="How many jobs there are.")] = JOBS,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many jobs one call may hand out; a target that takes a limit is given it "
            "(10 if left out).",
        ),
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Gives rows where the table's constraints ask for more than can be read of them: "
            "called with a row's number, it returns a dictionary of columns or a mapped object.",
        ),
    ] = None,
    call: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Called in place of TARGET, which it is given as its parameter 'target': for "
            "targets whose arguments or results cannot be told.",
        ),
    ] = None,
    patches: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Make the patches of this TOML file first, such as pyproject.toml; with "
            "--compare, for OTHER alone.",
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="OTHER",
            help="Race a second target afterwards, and show both; it may be the same one, patched.",
        ),
    ] = None,
    kill: Annotated[
        bool,
        Flag(
            "--kill", help="Kill half of the workers once they have jobs, and look who gets those."
        ),
    ] = False,
    patience: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="With --kill, how long the others go on asking; longer than the lease.",
        ),
    ] = PATIENCE,
    use_existing_table: Annotated[
        bool,
        Flag(
            "--use-existing-table",
            help="Use tables that are there. The rows that were made are deleted again, but the "
            "target may claim others.",
        ),
    ] = False,
    timeout: Annotated[
        float,
        typer.Option(min=0.1, metavar="SECONDS", help="How long one target may take."),
    ] = TIMEOUT,
    url: UrlOption = None,
    svg: SvgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check whether a claim function hands out jobs twice.

    The table is made from its metadata, with the parents that its foreign keys need, filled with
    rows, and dropped at the end: in the database of --url (or one of its environment variables),
    else in a temporary SQLite file. Several worker processes call the function until nothing is
    left, and record what they were handed. Before the first write they wait for each other, so
    that a race shows at every run.

    The function is given a session, sessionmaker, engine, connection or limit, as the names and
    annotations of its parameters ask for; what it has of its own may take its URL from
    DATABASE_URL. It returns entities, rows, dictionaries or keys, one or several.

    The exit code is 0 if every job was handed out exactly once, 1 if one was handed out twice, was
    lost or is stuck, or a call gave more than the limit, and 2 if the race could not be held.
    """
    with plain_ending(), ExitStack() as stack:
        if svg is not None:
            check_picture(svg)
        source = context.get_parameter_source("url")
        if url is not None and source is not None and source.name == "COMMANDLINE":
            stack.enter_context(_variable("DATABASE_URL", url))
        spec = chosen(table)
        targets = [target] if compare is None else [target, compare]

        def run(place: int, told: Callable[[int], None]) -> Race:
            return held(
                targets[place],
                table=spec,
                url=url,
                workers=workers,
                jobs=jobs,
                limit=limit,
                factory=factory,
                call=call,
                patches=patches if place == len(targets) - 1 else None,
                kill=kill,
                patience=patience,
                use_existing_table=use_existing_table,
                timeout=timeout,
                progress=told,
            )

        with naming_flags():
            races = with_progress(targets, jobs, run)
        if svg is not None:
            draw_picture(svg, races[0].database, races)
        if as_json:
            typer.echo(json.dumps(_figures(races), indent=2))
        else:
            _show(console(), races)
        if not all(each.exact for each in races):
            raise typer.Exit(FAILED)


def _variable(name: str, value: str) -> ExitStack:
    """Set a variable for what the user's modules do when they are imported."""
    stack = ExitStack()
    before = os.environ.get(name)
    os.environ[name] = value
    if before is None:
        stack.callback(os.environ.pop, name, None)
    else:
        stack.callback(os.environ.__setitem__, name, before)
    return stack


def _show(screen: Console, races: Sequence[Race]) -> None:
    """Print the table, what it is of, and what follows from it."""
    screen.print(f"{races[0].database}: {races[0].workload}", soft_wrap=True, highlight=False)
    screen.print(_table(races))
    for each in races:
        screen.print(_verdict(each), soft_wrap=True, highlight=False, markup=False)


def _table(races: Sequence[Race]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(no_wrap=True)
    for each in races:
        # Names are long, and a pair of them is to fit beside each other.
        table.add_column(escape(each.name).replace(":", ":\n"), justify="right", overflow="fold")
    for name, show in ROWS:
        cells = [show(each) for each in races]
        if any(cell is not None for cell in cells):
            table.add_row(name, *(cell or "-" for cell in cells))
    return table


def _alarming(count: int) -> str:
    return f"[{'red' if count else 'green'}]{count:,}[/]"


ROWS: tuple[tuple[str, Callable[[Race], str | None]], ...] = (
    ("jobs", lambda race: f"{race.jobs:,}"),
    ("times claimed", lambda race: f"{race.claimed:,}"),
    ("duplicates", lambda race: _alarming(race.duplicates)),
    ("lost", lambda race: _alarming(race.lost)),
    ("over the limit", lambda race: None if race.limit is None else _alarming(race.over_limit)),
    ("workers killed", lambda race: f"{race.killed:,}" if race.killed else None),
    ("stuck", lambda race: _alarming(race.stuck) if race.killed else None),
    ("seconds blocked", lambda race: None if race.blocked is None else f"{race.blocked:,.2f}"),
    ("claims per second", lambda race: f"{race.claims_per_second:,.0f}"),
    ("p50 of a claim (ms)", lambda race: f"{race.p50 * MILLISECONDS:,.1f}"),
    ("p99 of a claim (ms)", lambda race: f"{race.p99 * MILLISECONDS:,.1f}"),
)


def _verdict(race: Race) -> str:
    if race.exact:
        return f"{race.name}: every job was handed out exactly once."
    found = []
    if race.duplicates:
        found.append(f"{race.duplicates:,} of {race.jobs:,} jobs were handed out more than once")
    if race.lost:
        found.append(f"{race.lost:,} of {race.jobs:,} were never handed out")
    if race.over_limit:
        found.append(f"{race.over_limit:,} were handed out beyond the limit of a call")
    if race.stuck:
        found.append(f"{race.stuck:,} are stuck with the workers that were killed")
    if race.endless:
        found.append("and it went on handing them out until it was stopped")
    said = f"{race.name}: {', '.join(found)}."
    if race.lost and race.last_error is not None:
        said += f" It raised {race.last_error}."
    return said


def _figures(races: Sequence[Race]) -> dict[str, Any]:
    first = races[0]
    return {
        "database": first.database,
        "url": first.url,
        "workers": first.workers,
        **_measured(first),
        "compare": _measured(races[1]) if len(races) > 1 else None,
    }


def _measured(race: Race) -> dict[str, Any]:
    return {
        "target": race.target,
        "patched": race.patched,
        "limit": race.limit,
        **race.counts,
        "killed": race.killed,
        "endless": race.endless,
        "conflicts": race.conflicts,
        "blocked_seconds": None if race.blocked is None else round(race.blocked, 6),
        "seconds": round(race.seconds, 6),
        "claims_per_second": round(race.claims_per_second, 1),
        "p50_ms": round(race.p50 * MILLISECONDS, 3),
        "p99_ms": round(race.p99 * MILLISECONDS, 3),
        "last_error": race.last_error,
        "exact": race.exact,
    }
