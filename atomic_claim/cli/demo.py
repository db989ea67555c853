"""``atomic-claim demo``: the problem and its cure, on a real database."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from atomic_claim.testing.database import CommandError, chosen, connected, masked, server_title
from atomic_claim.testing.results import Counted

from .drawing import SvgOption, check_picture, draw_picture
from .file_workload import FILE_HALVES, run_file_half
from .options import FAILED, Flag, JsonOption, UrlOption, console, plain_ending
from .progress import with_progress
from .workload import HALVES, Progress, Workload, run_half

FILES = "Directory queue"
COLUMNS = (
    "jobs",
    "times\nclaimed",
    "duplicates",
    "extra\nruns",
    "lost",
    "seconds",
    "claims\nper second",
)


def demo(
    context: typer.Context,
    *,
    workers: Annotated[int, typer.Option(min=1, help="How many worker processes run at once.")] = 4,
    jobs: Annotated[int, typer.Option(min=1, help="How many jobs there are to do.")] = 1000,
    limit: Annotated[int, typer.Option(min=1, help="How many jobs a worker takes at a time.")] = 10,
    url: UrlOption = None,
    files: Annotated[
        bool,
        Flag(
            "--files",
            help="Compare on a directory queue, a file a job, in place of a table: a legacy "
            "read-write-unlink loop and claim_files. No database is asked, whatever the "
            "environment says.",
        ),
    ] = False,
    svg: SvgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the same jobs by a legacy find-then-update loop and by claim_jobs, and compare.

    Each half fills a table of its own and starts several worker processes on it: the first
    looks for free jobs and then marks them, as most job queues are written; the second calls
    claim_jobs. The work itself records which jobs were run. Without --url (or one of its
    environment variables) the tables are in a temporary SQLite file; with it they are in that
    database, under names of their own, and are dropped again. With --files each half fills a
    temporary folder.

    The exit code is 0 if the claim had every job run exactly once, 1 if not, and 2 if the demo
    could not run.
    """
    with plain_ending():
        if svg is not None:
            check_picture(svg)
        workload = Workload(workers, jobs, limit)
        source = context.get_parameter_source("url")
        if files and source is not None and source.name == "COMMANDLINE":
            raise CommandError("--files needs no database: leave out --url, or --files")
        title, shown, halves = (_on_files if files else _on_tables)(url, workload)
        if svg is not None:
            draw_picture(svg, title, halves)
        if as_json:
            typer.echo(json.dumps(_figures(title, shown, halves), indent=2))
        else:
            console().print(_table(title, halves))
        if not halves[-1].exact:
            raise typer.Exit(FAILED)


Outcome = tuple[str, str | None, list[Counted]]


def _on_tables(url: str | None, workload: Workload) -> Outcome:
    """Run the demo on a table; return the database's title, its masked URL and the halves."""
    names = list(HALVES)
    with chosen(url) as address, connected(address) as engine:
        with engine.connect() as connection:
            title = server_title(connection)

        def run(place: int, told: Progress) -> Counted:
            return run_half(names[place], engine, workload, told)

        halves = with_progress(names, workload.jobs, run)
        return title, None if url is None else masked(address), halves


def _on_files(_: str | None, workload: Workload) -> Outcome:
    """Run the demo on a directory queue; return its title, None for the URL, and the halves."""
    names = list(FILE_HALVES)

    def run(place: int, told: Progress) -> Counted:
        return run_file_half(names[place], workload, told)

    return FILES, None, with_progress(names, workload.jobs, run)


def _table(title: str, halves: Sequence[Counted]) -> Table:
    table = Table(
        title=f"{title}: {halves[0].workload}",
        title_justify="left",
        caption="\n".join(_verdict(half) for half in halves),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column(no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for half in halves:
        table.add_row(
            half.name,
            f"{half.jobs:,}",
            f"{half.claimed:,}",
            _alarming(half.duplicates),
            _alarming(_extra_runs(half)),
            _alarming(half.lost),
            f"{half.seconds:,.2f}",
            f"{half.claims_per_second:,.0f}",
        )
    return table


def _extra_runs(half: Counted) -> int:
    """Count the runs beyond each job's first."""
    return half.claimed - len(half.times)


def _alarming(count: int) -> str:
    return f"[{'red' if count else 'green'}]{count:,}[/]"


def _verdict(half: Counted) -> str:
    if half.exact:
        return f"{half.name}: every job ran exactly once."
    return f"{half.name}: {half.duplicates:,} of {half.jobs:,} jobs ran more than once" + (
        f", {half.lost:,} never." if half.lost else "."
    )


def _figures(title: str, url: str | None, halves: Sequence[Counted]) -> dict[str, Any]:
    first = halves[0]
    return {
        "database": title,
        "url": url,
        "workers": first.workers,
        "jobs": first.jobs,
        "limit": first.limit,
        "halves": {half.name.replace(" ", "_"): _half(half) for half in halves},
        "exact": halves[-1].exact,
    }


def _half(half: Counted) -> dict[str, Any]:
    by_worker = Counter(call.worker for call in half.calls)
    return {
        "jobs": half.jobs,
        "times_claimed": half.claimed,
        "duplicates": half.duplicates,
        "extra_runs": _extra_runs(half),
        "lost": half.lost,
        "seconds": round(half.seconds, 6),
        "claims_per_second": round(half.claims_per_second, 1),
        "claimed_by_worker": [by_worker[worker] for worker in range(half.workers)],
    }
