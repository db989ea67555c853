"""``atomic-claim race``: whether a claim function hands jobs out twice, on the user's own table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from atomic_claim.testing.racing import JOBS, PATIENCE, TIMEOUT, WORKERS
from atomic_claim.testing.racing import race as held
from atomic_claim.testing.results import Race

from .drawing import SvgOption, check_picture
from .measures import MEASURES, MILLISECONDS, report
from .options import Flag, JobsOption, JsonOption, Seconds, UrlOption, WorkersOption, end, typed
from .progress import with_progress
from .targets import TableOption, chosen

# Not those that a demo alone has.
NAMES = [name for name in MEASURES if name not in {"extra runs", "seconds"}]

FAULTS = {
    "duplicates": "{0:,} of {1:,} jobs were handed out more than once",
    "lost": "{0:,} of {1:,} were never handed out",
    "over_limit": "{0:,} were handed out beyond the limit of a call",
    "stuck": "{0:,} are stuck with the workers that were killed",
    "endless": "and it went on handing them out until it was stopped",
}

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="The function that claims, as MODULE:FUNCTION or MODULE:CLASS.METHOD; the module "
        "may lie in the current directory.",
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="The most jobs that one call may hand out; passed to a target that takes a limit "
        "(default: 10).",
    ),
]
FactoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="Makes rows where the table's constraints need more than its types say: "
        "called with a row's number, it returns a dictionary of columns or a mapped object.",
    ),
]
CallOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="Called in place of TARGET, which is passed as its parameter 'target': for "
        "targets whose arguments or results are not understood.",
    ),
]
PatchesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Make the patches of this TOML file first, such as pyproject.toml; with "
        "--compare, for OTHER alone.",
    ),
]
CompareOption = Annotated[
    str | None,
    typer.Option(
        metavar="OTHER",
        help="Race a second target afterwards, and show both; it may be the same one, patched.",
    ),
]
KillOption = Annotated[
    bool,
    Flag("--kill", help="Kill half of the workers once they have jobs, and see who gets those."),
]
PatienceOption = Annotated[
    float,
    Seconds(help="With --kill: for how long the others go on asking; more than the lease."),
]
ExistingOption = Annotated[
    bool,
    Flag(
        "--use-existing-table",
        help="Use existing tables. The rows of the race are deleted again, but the "
        "target may also claim other rows.",
    ),
]
TimeoutOption = Annotated[float, Seconds(min=0.1, help="The most time for one target.")]


def race(
    context: typer.Context,
    *,
    target: TargetArgument,
    table: TableOption = None,
    workers: WorkersOption = WORKERS,
    jobs: JobsOption = JOBS,
    limit: LimitOption = None,
    factory: FactoryOption = None,
    call: CallOption = None,
    patches: PatchesOption = None,
    compare: CompareOption = None,
    kill: KillOption = False,
    patience: PatienceOption = PATIENCE,
    use_existing_table: ExistingOption = False,
    timeout: TimeoutOption = TIMEOUT,
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
    check_picture(svg)
    # For what the user's modules do when they are imported.
    os.environ |= {"DATABASE_URL": str(url)} if typed(context, "url") else {}
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

    races = with_progress(targets, jobs, run)
    figures = _figures(races) if as_json else None
    report(races[0].database, races, NAMES, map(_verdict, races), figures=figures, svg=svg)
    end(is_well=all(each.exact for each in races))


def _verdict(race: Race) -> str:
    if race.exact:
        return f"{race.name}: every job was handed out exactly once."
    numbers = {name: int(getattr(race, name)) for name in FAULTS}
    found = [FAULTS[name].format(number, race.jobs) for name, number in numbers.items() if number]
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
