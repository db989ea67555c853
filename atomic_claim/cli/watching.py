"""``atomic-claim doctor --watch``: the queue as it moves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import count

import typer
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from sqlalchemy import Column, ColumnElement, Engine, and_, case, false, func, not_, select

from atomic_claim import predicates
from atomic_claim.job_table import JobTable
from atomic_claim.testing.database import CommandError

from .checks.columns import read
from .checks.findings import Patient, Reading, age
from .checks.rows import is_clock, is_marked, seconds_since_oldest
from .examination import read_without_locks, reading, target
from .options import console

HEADINGS = ("time", "waiting", "later", "running", "oldest waiting", "claims/s")
# The number of looks that stay on the screen.
SHOWN = 15


@dataclass(frozen=True)
class Look:
    """The queue at one time.

    Attributes:
        at: this machine's time, UTC.
        waiting: jobs that can be claimed now.
        later: jobs that are free and not yet due, or have spent their attempts.
        running: jobs that a worker has.
        oldest_waiting: for how many seconds the first of those that wait has been there.
        claims_per_second: since the look before, as far as the rows show it.
    """

    at: str
    waiting: int
    later: int
    running: int
    oldest_waiting: float | None
    claims_per_second: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """Return the displayed values of a row."""
        oldest = "-" if self.oldest_waiting is None else age(self.oldest_waiting)
        rate = "-" if self.claims_per_second is None else f"{self.claims_per_second:,.1f}"
        numbers = (f"{number:,}" for number in (self.waiting, self.later, self.running))
        return (self.at[11:19], *numbers, oldest, rate)


def watch(engine: Engine, spec: str, interval: float, number: int | None, *, as_json: bool) -> None:
    """Show the queue again and again, until the number of looks or Ctrl-C.

    Args:
        engine: a database that answers.
        spec: ``MODULE:NAME``, or the name of a table.
        interval: seconds between two looks.
        number: how many looks; None for no end.
        as_json: whether each look is a line of JSON.

    Raises:
        CommandError: there is no such table, or it cannot be read with certainty.
    """
    with reading(engine) as connection:
        given, table = target(connection, spec)
        job_table, meaning = read(given)
        if job_table is None:
            raise CommandError(f"--watch: {meaning.found}; {meaning.fix}")
        read_without_locks(connection)
        own = timedelta(0)
        seen = looks(Reading(Patient(connection, table, own, own), job_table))
        try:
            _show(paced(seen, interval, number), table.fullname, as_json=as_json)
        except KeyboardInterrupt:
            # That is how one stops watching.
            return


def paced(seen: Iterator[Look], interval: float, number: int | None) -> Iterator[Look]:
    """Yield a number of looks, or looks without end, at a fixed interval in seconds."""
    due = time.monotonic()
    for place in count() if number is None else range(number):
        if place:
            time.sleep(max(0, due - time.monotonic()))
        due = max(due, time.monotonic()) + interval
        yield next(seen)


def looks(claim: Reading) -> Iterator[Look]:
    """One look at the table after the other."""
    job_table, connection = claim.job_table, claim.patient.connection
    waiting = predicates.claimable(job_table)
    free, idle = _sure(predicates.is_free(job_table)), not_(_sure(waiting))
    counters: list[ColumnElement[int]] = [
        _number(waiting),
        _number(and_(free, idle)),
        _number(and_(_sure(is_marked(job_table)), idle)),
        _claims(job_table),
    ]
    since = next((t for t in (*job_table.order, job_table.due) if is_clock(job_table, t)), None)
    statement = select(*counters).select_from(job_table.table)
    before: tuple[int, float] | None = None
    while True:
        numbers = [int(value or 0) for value in connection.execute(statement).one()]
        now = time.monotonic()
        rate = None
        if before is not None:
            rate = max(0, numbers[3] - before[0]) / max(now - before[1], 1e-3)
        before = numbers[3], now
        oldest = None
        if isinstance(since, Column):
            oldest = seconds_since_oldest(claim, since, waiting)
        # Else the next look would see the same.
        connection.rollback()
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        yield Look(at, numbers[0], numbers[1], numbers[2], oldest, rate)


def _sure(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return func.coalesce(condition, false())


def _number(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.sum(case((condition, 1), else_=0))


def _claims(job_table: JobTable) -> ColumnElement[int]:
    """Build the sum that each claim increments: the attempts, else the rows that are not free."""
    if job_table.attempts is not None:
        return func.sum(func.coalesce(job_table.attempts, 0))
    return _number(not_(_sure(predicates.is_free(job_table))))


def _show(seen: Iterable[Look], title: str, *, as_json: bool) -> None:
    screen = console()
    if not as_json and screen.is_terminal:
        _show_live(screen, seen, title)
        return
    line: Callable[[Look], str] = _columns
    if as_json:
        line = _json
    else:
        typer.echo(_aligned(HEADINGS))
    for look in seen:
        typer.echo(line(look))


def _json(look: Look) -> str:
    return json.dumps(asdict(look))


def _columns(look: Look) -> str:
    return _aligned(look.cells)


def _aligned(cells: Iterable[str]) -> str:
    return "  ".join(
        cell.rjust(max(8, len(heading))) for cell, heading in zip(cells, HEADINGS, strict=True)
    )


def _show_live(screen: Console, seen: Iterable[Look], title: str) -> None:
    shown: list[Look] = []
    with Live(console=screen, auto_refresh=False) as live:
        for look in seen:
            shown = [*shown[1 - SHOWN :], look]
            table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
            for heading in HEADINGS:
                table.add_column(heading, justify="right")
            for each in shown:
                table.add_row(*each.cells)
            live.update(table, refresh=True)
