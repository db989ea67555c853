"""A queue that is used for minutes: the last one beside the first."""

import statistics
import time
from collections.abc import Iterator, Sequence

import sqlalchemy as sa

from tests.benchmarks.crew import Crew, Share, Task, errors
from tests.benchmarks.ground import Ground, Rows, fill, job_table
from tests.benchmarks.measuring import Line, percentile

FIGURE = "churn"
TABLE = "bench_churn"
LOOPS = "tests.benchmarks.loops"
MOST = 1.5
# So many seconds the producer pauses: the workers keep up.
PAUSE = 0.01
# The first and the last minute are looked at in slices.
SLICES = 6


def measure(
    ground: Ground, *, minutes: float = 10, rows: int = 100_000, batch: int = 20
) -> Iterator[list[Line]]:
    """Two workers claim and complete what a producer inserts, autovacuum as shipped.

    The first minute is the one after the first slice, in which the processes get warm.
    """
    for name in ground.kinds("postgresql"):
        engine, jobs = ground.engine(name), job_table(TABLE, lease=True)
        fill(engine, jobs, Rows(rows, 10))
        slice_ = min(60.0, minutes * 60 / 3) / SLICES
        slices = used(engine, TABLE, minutes=minutes, slice_=slice_, batch=batch, pause=PAUSE)
        yield [_line(name, slices, minutes)]


def used(
    engine: sa.Engine, table: str, *, minutes: float, slice_: float, batch: int, pause: float
) -> list[list[Share]]:
    """Let two workers claim and complete what a producer inserts.

    Args:
        engine: an engine of the database, whose URL the processes use.
        table: the table's name.
        minutes: how long, after one slice in which the processes get warm.
        slice_: the seconds of a slice.
        batch: the jobs of an insert, and of a claim at most.
        pause: the seconds between two inserts.

    Returns:
        the shares of each slice, the producer's first.
    """
    url = engine.url.render_as_string(hide_password=False)
    worker = Task(f"{LOOPS}:by_engine_and_complete", (url, batch, table))
    tasks = [Task(f"{LOOPS}:by_inserting", (url, batch, table, pause)), worker, worker]
    with Crew(len(tasks)) as crew:
        crew.run(tasks, slice_)
        ends = time.monotonic() + minutes * 60
        slices = []
        while time.monotonic() < ends:
            slices.append(crew.run(tasks, slice_))
    return slices


def percentiles(slices: Sequence[Sequence[Share]], part: float) -> list[float]:
    """Return the time that this fraction of the workers' calls does not exceed, by slice."""
    times = ([time for share in shares[1:] for time in share.times] for shares in slices)
    return [percentile(each, part) for each in times]


def _line(name: str, slices: list[list[Share]], minutes: float) -> Line:
    medians, tails = percentiles(slices, 0.5), percentiles(slices, 0.99)
    first, last = medians[:SLICES], medians[-SLICES:]
    base = statistics.median(first)
    ended = sum(len(share.jobs) for shares in slices for share in shares[1:])
    wrong = sum(errors(shares).total() for shares in slices)
    return Line(
        FIGURE,
        f"{name}, claim and complete, the last of {minutes:g} minutes",
        1000 * statistics.median(last),
        "ms (p50)",
        f"the first: {1000 * base:.2f} ms",
        tuple(one / base for one in last),
        most=MOST,
        note=f"{ended:,} jobs ended, p99 {1000 * tails[0]:.1f} to {1000 * tails[-1]:.1f} ms, "
        f"errors: {wrong}",
    )
