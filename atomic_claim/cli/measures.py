"""Measures of the work of several workers on the same jobs: a column a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from atomic_claim.testing.results import Counted

from .options import console

MILLISECONDS = 1000


def extra_runs(found: Counted) -> int:
    """Count the runs beyond each job's first."""
    return found.claimed - len(found.times)


def _alarming(count: int) -> str:
    return f"[{'red' if count else 'green'}]{count:,}[/]"


# Those of a race are asked of a race alone; None stands for what was not measured.
MEASURES: dict[str, Callable[[Any], str | None]] = {
    "jobs": lambda found: f"{found.jobs:,}",
    "times claimed": lambda found: f"{found.claimed:,}",
    "duplicates": lambda found: _alarming(found.duplicates),
    "extra runs": lambda found: _alarming(extra_runs(found)),
    "lost": lambda found: _alarming(found.lost),
    "over the limit": lambda found: None if found.limit is None else _alarming(found.over_limit),
    "workers killed": lambda race: f"{race.killed:,}" if race.killed else None,
    "stuck": lambda race: _alarming(race.stuck) if race.killed else None,
    "seconds": lambda found: f"{found.seconds:,.2f}",
    "seconds blocked": lambda race: None if race.blocked is None else f"{race.blocked:,.2f}",
    "claims per second": lambda found: f"{found.claims_per_second:,.0f}",
    "p50 of a claim (ms)": lambda race: f"{race.p50 * MILLISECONDS:,.1f}",
    "p99 of a claim (ms)": lambda race: f"{race.p99 * MILLISECONDS:,.1f}",
}


def report(
    title: str,
    runs: Sequence[Counted],
    names: Iterable[str],
    verdicts: Iterable[str],
    *,
    figures: Mapping[str, Any] | None,
    svg: Path | None,
) -> None:
    """Draw the runs, if that was asked for, and print their figures or else their table.

    Args:
        title: where they ran.
        runs: the runs.
        names: the measures of the table; those that no run has are left out.
        verdicts: what follows from each run.
        figures: what is printed as JSON in place of the table.
        svg: the file of the picture.
    """
    if svg is not None:
        # Matplotlib takes half a second to import, and is an extra.
        from .picture import draw  # noqa: PLC0415

        draw(svg, title, runs)
    if figures is not None:
        typer.echo(json.dumps(figures, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(no_wrap=True)
    for run in runs:
        # Names are long, and a pair of them is to fit beside each other.
        table.add_column(escape(run.name).replace(":", ":\n"), justify="right", overflow="fold")
    for name in names:
        cells = [MEASURES[name](run) for run in runs]
        if any(cell is not None for cell in cells):
            table.add_row(name, *(cell or "-" for cell in cells))
    screen = console()
    screen.print(f"{title}: {runs[0].workload}", soft_wrap=True)
    screen.print(table)
    for verdict in verdicts:
        screen.print(verdict, soft_wrap=True, markup=False)
