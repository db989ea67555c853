"""Ends of many jobs at once: the time grows with their number."""

import statistics
from collections.abc import Iterator, Sequence
from time import perf_counter

from atomic_claim import claim_jobs, complete_jobs
from tests.benchmarks.ground import Ground, Rows, fill, job_table
from tests.benchmarks.measuring import Line, check_whole

FIGURE = "ends"
SIZES = (10_000, 100_000)
# Ten times as many jobs take ten times as long, and the larger ones fit the caches less.
MOST = 12.0


def measure(ground: Ground, *, rounds: int, sizes: Sequence[int] = SIZES) -> Iterator[list[Line]]:
    """Time ``complete_jobs`` of the first and of the last size, in turn in each round."""
    few, many = sizes[0], sizes[-1]
    jobs = job_table(lease=True)
    for name in ground.kinds():
        engine = ground.engine(name)
        seconds: dict[int, list[float]] = {few: [], many: []}
        for _ in range(rounds):
            for size in (few, many):
                fill(engine, jobs, Rows(many))
                claim = claim_jobs(engine, jobs, size)
                check_whole(claim, size)
                start = perf_counter()
                complete_jobs(engine, claim, list(claim))
                seconds[size].append(perf_counter() - start)
        grown = tuple(b / a for a, b in zip(seconds[few], seconds[many], strict=True))
        value = statistics.median(seconds[many])
        yield [
            Line(FIGURE, f"{name}, {many:,} jobs", value, "s", f"{few:,} jobs", grown, most=MOST)
        ]
