"""A queue that is used for minutes: the last one beside the first."""

import statistics
import time
from collections.abc import Iterator

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
        url = engine.url.render_as_string(hide_password=False)
        worker = Task(f"{LOOPS}:by_engine_and_complete", (url, batch, TABLE))
        producer = Task(f"{LOOPS}:by_inserting", (url, batch, TABLE, PAUSE))
        slice_ = min(60.0, minutes * 60 / 3) / SLICES
        ends = time.monotonic() + minutes * 60
        slices: list[list[Share]] = []
        with Crew(3) as crew:
            crew.run([producer, worker, worker], slice_)
            while time.monotonic() < ends:
                slices.append(crew.run([producer, worker, worker], slice_))
        yield [_line(name, slices, minutes)]


def _line(name: str, slices: list[list[Share]], minutes: float) -> Line:
    medians, tails = [], []
    for shares in slices:
        times = [time for share in shares[1:] for time in share.times]
        medians.append(statistics.median(times))
        tails.append(percentile(times, 0.99))
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
