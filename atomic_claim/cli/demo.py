"""``atomic-claim demo``: the problem and its cure, on a real database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import typer

from atomic_claim.testing.database import CommandError
from atomic_claim.testing.results import Counted, Race

from .drawing import SvgOption, check_picture
from .file_workload import FILE_HALVES, run_file_half
from .measures import extra_runs, report
from .options import Flag, JobsOption, JsonOption, UrlOption, WorkersOption, end, typed
from .progress import with_progress
from .workload import HALVES, Workload, run_half

FILES = "Directory queue"
NAMES = (
    "jobs",
    "times claimed",
    "duplicates",
    "extra runs",
    "lost",
    "seconds",
    "claims per second",
)

LimitOption = Annotated[int, typer.Option(min=1, help="The limit of a claim.")]
FilesOption = Annotated[
    bool,
    Flag(
        "--files",
        help="Compare on a directory queue, with a file for each job: a legacy "
        "read-write-unlink loop and claim_files. No database is used.",
    ),
]


def demo(
    context: typer.Context,
    *,
    workers: WorkersOption = 4,
    jobs: JobsOption = 1000,
    limit: LimitOption = 10,
    url: UrlOption = None,
    files: FilesOption = False,
    svg: SvgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the same jobs by a legacy find-then-update loop and by claim_jobs, and compare.

    Each half fills a table of its own and starts several worker processes on it: the first
    looks for free jobs and then marks them, as most job queues are written; the second calls
    claim_jobs. What the workers ran is recorded and counted. Without --url (or one of its
    environment variables) the tables are in a temporary SQLite file; with it they are in that
    database, under names of their own, and are dropped again. With --files each half fills a
    temporary folder.

    The exit code is 0 if the claim had every job run exactly once, 1 if not, and 2 if the demo
    could not run.
    """
    check_picture(svg)
    workload = Workload(workers, jobs, limit)
    if files and typed(context, "url"):
        raise CommandError("--files needs no database: leave out --url, or --files")
    run = run_file_half if files else partial(run_half, url=url)
    names = list(FILE_HALVES if files else HALVES)
    halves = with_progress(names, jobs, lambda place, told: run(names[place], workload, told))
    first = halves[0]
    # A folder has no address.
    title, shown = (first.database, first.url) if isinstance(first, Race) else (FILES, None)
    figures = _figures(title, shown, halves) if as_json else None
    report(title, halves, NAMES, map(_verdict, halves), figures=figures, svg=svg)
    end(is_well=halves[-1].exact)


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
    by_worker = Counter(call.worker for call in half.calls for _ in call.keys)
    return {
        "jobs": half.jobs,
        "times_claimed": half.claimed,
        "duplicates": half.duplicates,
        "extra_runs": extra_runs(half),
        "lost": half.lost,
        "seconds": round(half.seconds, 6),
        "claims_per_second": round(half.claims_per_second, 1),
        "claimed_by_worker": [by_worker[worker] for worker in range(half.workers)],
    }
