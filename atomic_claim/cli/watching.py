"""``atomic-claim doctor --watch``: the queue as it moves."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice

import typer
from sqlalchemy import ColumnElement, Engine, and_, case, false, func, not_, select

from atomic_claim import predicates
from atomic_claim.job_table import JobTable
from atomic_claim.testing.database import CommandError
from atomic_claim.testing.names import TableName

from .checks.columns import read
from .checks.findings import Reading, age
from .checks.rows import dated_by, is_marked, seconds_since_oldest
from .examination import read_without_locks, reading, target

HEADINGS = ("time", "waiting", "later", "running", "oldest waiting", "claims/s")


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


def watch(
    engine: Engine, spec: TableName, interval: float, number: int | None, *, as_json: bool
) -> None:
    """Show the queue again and again, until the number of looks or Ctrl-C.

    Args:
        engine: a database that answers.
        spec: as for ``examine``.
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
        seen = looks(Reading(connection, table, own, own, job_table=job_table), interval)
        try:
            _show(islice(seen, number), as_json=as_json)
        except KeyboardInterrupt:
            # That is how one stops watching.
            return


def looks(claim: Reading, interval: float = 0) -> Iterator[Look]:
    """One look at the table after the other, at an interval in seconds."""
    job_table, connection = claim.job_table, claim.connection
    waiting = predicates.claimable(job_table)
    free, idle = _sure(predicates.is_free(job_table)), not_(_sure(waiting))
    counters: list[ColumnElement[int]] = [
        _number(waiting),
        _number(and_(free, idle)),
        _number(and_(_sure(is_marked(job_table)), idle)),
        _claims(job_table),
    ]
    since = dated_by(job_table)
    statement = select(*counters).select_from(job_table.table)
    before: tuple[int, float] | None = None
    while True:
        numbers = [int(value or 0) for value in connection.execute(statement).one()]
        now = time.monotonic()
        rate = None
        if before is not None:
            rate = max(0, numbers[3] - before[0]) / max(now - before[1], 1e-3)
        before = numbers[3], now
        oldest = None if since is None else seconds_since_oldest(claim, since, waiting)
        # Else the next look would see the same.
        connection.rollback()
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        yield Look(at, numbers[0], numbers[1], numbers[2], oldest, rate)
        time.sleep(interval)


def _sure(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return func.coalesce(condition, false())


def _number(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.sum(case((condition, 1), else_=0))


def _claims(job_table: JobTable) -> ColumnElement[int]:
    """Build the sum that each claim increments: the attempts, else the rows that are not free."""
    if job_table.attempts is not None:
        return func.sum(func.coalesce(job_table.attempts, 0))
    return _number(not_(_sure(predicates.is_free(job_table))))


def _show(seen: Iterable[Look], *, as_json: bool) -> None:
    if not as_json:
        typer.echo(_aligned(HEADINGS))
    for look in seen:
        typer.echo(json.dumps(asdict(look)) if as_json else _aligned(look.cells))


def _aligned(cells: Iterable[str]) -> str:
    return "  ".join(
        cell.rjust(max(8, len(heading))) for cell, heading in zip(cells, HEADINGS, strict=True)
    )
