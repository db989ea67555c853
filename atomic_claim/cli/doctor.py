"""``atomic-claim doctor``: whether a table, and the database it is in, are fit for claims."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atomic_claim.testing.database import CommandError

from . import watching
from .checks import trial
from .checks.findings import Finding, Level, count
from .examination import Examination, examine
from .options import Flag, Seconds, StuckAfterOption, UrlOption, console, end, is_unicode, server
from .targets import TableOption, chosen

MARKS = {
    Level.FINE: ("✓", "+", "green"),
    Level.NOTE: ("!", "!", "yellow"),
    Level.PROBLEM: ("✗", "x", "bold red"),
}


TransactionAfterOption = Annotated[
    float,
    Seconds(help="How long a transaction may be open before it is called old (all but SQLite)."),
]
TryOption = Annotated[
    bool,
    Flag(
        "--try",
        help="Claim and end one job in a transaction that is rolled back, to find constraints "
        "and triggers that refuse it. Triggers run, and the row is locked meanwhile.",
    ),
]
GuardedOption = Annotated[
    bool, Flag("--guarded", help="Check that the guard's triggers are there.")
]
AllOption = Annotated[bool, Flag("--all", help="Show the checks that passed, too.")]
WatchOption = Annotated[
    bool,
    Flag(
        "--watch",
        help="Show repeatedly, in place of the checks, how many jobs wait and run, how "
        "long the oldest has waited, and the claims per second, until Ctrl-C.",
    ),
]
IntervalOption = Annotated[float, Seconds(help="With --watch: the time between two lines.")]
CountOption = Annotated[
    int | None,
    typer.Option("--count", min=1, metavar="N", help="With --watch: end after N lines."),
]
FoundJsonOption = Annotated[
    bool, Flag("--json", help="Print the findings as JSON; with --watch one object a line.")
]


def doctor(
    *,
    table: TableOption = None,
    url: UrlOption = None,
    stuck_after: StuckAfterOption = 3600,
    transaction_after: TransactionAfterOption = 300,
    try_it: TryOption = False,
    guarded: GuardedOption = False,
    every: AllOption = False,
    watch: WatchOption = False,
    interval: IntervalOption = 2,
    looks: CountOption = None,
    as_json: FoundJsonOption = False,
) -> None:
    """Check whether jobs can be claimed from a table, and quickly.

    It only reads, and prints nothing if all is well. It explains the claim's own statement. Each
    finding has the reason why it matters and what to do, with the SQL to run: a problem (✗) should
    be cured, a note (!) is good to know.

    The exit code is 0 if there is no problem, 1 if there is one, and 2 if it could not look.
    """
    with server(url) as engine:
        spec = chosen(table)
        if watch:
            watching.watch(engine, spec, interval, looks, as_json=as_json)
            return
        if looks is not None:
            raise CommandError("--count is about --watch: add --watch, or leave it out")
        more = [*[trial.guarded] * guarded, *[trial.trial] * try_it]
        ages = timedelta(seconds=stuck_after), timedelta(seconds=transaction_after)
        found = examine(engine, spec, *ages, *more)
        if as_json:
            typer.echo(json.dumps(_plain(found), indent=2))
        elif found.ails or every:
            _show(console(), found)
        end(is_well=not found.number(Level.PROBLEM))


def _mark(level: Level) -> Text:
    sign, ascii_sign, style = MARKS[level]
    return Text(sign if is_unicode() else ascii_sign, style=style)


def _plain(found: Examination) -> dict[str, Any]:
    fine = [each for each in found.findings if each.level is Level.FINE]
    return {
        "server": found.server,
        "table": found.table,
        "healthy": not found.number(Level.PROBLEM),
        "statement": found.statement,
        "findings": [asdict(each) for each in found.ails],
        "passed": [{"check": each.check, "found": each.found} for each in fine],
    }


def _show(screen: Console, found: Examination) -> None:
    """Print a table of all checks, then the fixes, with one statement per line for copying."""
    numbers = [(found.number(Level.PROBLEM), "problem"), (found.number(Level.NOTE), "note")]
    said = ", ".join(count(number, noun) for number, noun in numbers if number) or "all is well"
    shown = Table(
        *("", "check", "found"),
        box=box.SIMPLE_HEAD,
        title=f"{found.server}: {found.table}: {said}",
        title_justify="left",
        title_style="bold",
    )
    for finding in found.findings:
        shown.add_row(_mark(finding.level), Text(finding.check), Text(finding.found))
    screen.print(shown)
    for finding in sorted(found.ails, key=lambda finding: finding.level is not Level.PROBLEM):
        _show_cure(screen, finding)


def _show_cure(screen: Console, finding: Finding) -> None:
    cure = Table.grid(padding=(0, 1))
    cure.add_column(min_width=4)
    cure.add_column()
    cure.add_row(Text("why", style="dim"), Text(finding.why))
    if finding.fix:
        cure.add_row(Text("fix", style="dim"), Text(finding.fix))
    screen.print(Text.assemble(_mark(finding.level), " ", (finding.check, "bold")))
    screen.print(cure)
    if finding.sql:
        screen.print()
    for statement in finding.sql:
        # Neither cut nor wrapped, whatever the width.
        screen.print(Text(f"{statement};"), soft_wrap=True)
    screen.print()
