"""One claim in a small table and in a large one, with and without a lease, and beside others."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import Any

import sqlalchemy as sa

from atomic_claim import JobTable, claim_jobs
from tests.benchmarks.ground import Ground, Rows, fill, job_table
from tests.benchmarks.measuring import Line, in_turns, percentile

FIGURE = "growth"
SIZES = (10_000, 1_000_000, 10_000_000)
# So many rows of a hundred wait, the others are done.
FREE = 10
AHEAD = {
    "not yet due": {"not_due": 200_000},
    "running": {"running": 50_000},
    "with spent attempts": {"spent": 10_000},
}
HOLDERS = (0, 4, 16, 64)
LEASE = timedelta(minutes=5)
MOST = 1.3


def measure(
    ground: Ground, *, rounds: int, sizes: Sequence[int] = SIZES, calls: int = 100
) -> Iterator[list[Line]]:
    """Measure the p50 and p99 of one claim by table size, with all tables side by side."""
    if min(sizes) * FREE // 100 < (wanted := rounds * (calls + 2) + max(HOLDERS)):
        raise ValueError(
            f"--rows {min(sizes)}: {FREE} % of them are free, and {wanted} are claimed from; "
            "ask for more rows, or fewer --calls"
        )
    for name in ground.kinds():
        engine = ground.engine(name, pool_size=1, max_overflow=max(HOLDERS))
        for lease in (False, True):
            what = f"{name}, {'with' if lease else 'without'} a lease"
            tables = {f"{size:,} rows": (Rows(size, FREE), lease) for size in sizes}
            yield _compared(engine, what, tables, rounds=rounds, calls=calls, most=MOST)
        middle = sorted(sizes)[len(sizes) // 2]
        ahead = {"none ahead": (Rows(middle, FREE), True)} | {
            f"{max(more.values()):,} rows {kind} ahead": (Rows(middle, FREE, **more), True)
            for kind, more in AHEAD.items()
        }
        yield _compared(engine, f"{name}, {middle:,} rows", ahead, rounds=rounds, calls=calls)
        if name != "sqlite":
            yield _beside_holders(engine, name, middle, rounds, calls)


def _compared(
    engine: sa.Engine,
    what: str,
    tables: dict[str, tuple[Rows, bool]],
    *,
    rounds: int,
    calls: int,
    most: float | None = None,
) -> list[Line]:
    """Time claims from these tables in turns, and compare each table with the first one."""
    made = {}
    for place, (label, (rows, lease)) in enumerate(tables.items()):
        made[label] = job_table(f"bench_growth_{place}", lease=lease)
        fill(engine, made[label], rows)
    ways = {label: partial(_claim, engine, jobs) for label, jobs in made.items()}
    found = in_turns(ways, rounds=rounds, calls=calls)
    for jobs in made.values():
        jobs.table.drop(engine)
    return _lines(found, what, most)


def _lines(found: dict[str, list[list[float]]], what: str, most: float | None) -> list[Line]:
    first, *others = found
    base = [statistics.median(times) for times in found[first]]
    lines = []
    for label in others or [first]:
        turns = found[label]
        times = [time for turn in turns for time in turn]
        medians = [statistics.median(turn) for turn in turns]
        lines.append(
            Line(
                FIGURE,
                f"{what}: {label}",
                1000 * statistics.median(times),
                "ms (p50)",
                f"{first}: {1000 * statistics.median(base):.2f} ms",
                tuple(one / other for one, other in zip(medians, base, strict=True)),
                most=most,
                note=f"p99 {1000 * percentile(times, 0.99):.2f} ms",
            )
        )
    return lines


def _beside_holders(engine: sa.Engine, name: str, size: int, rounds: int, calls: int) -> list[Line]:
    """Time a claim while other workers hold one claim each in open transactions."""
    jobs = job_table("bench_growth_0", lease=True)
    fill(engine, jobs, Rows(size, FREE))
    with ExitStack() as stack:
        held: list[sa.Connection] = []

        def hold(label: str) -> None:
            wanted = int(label.split(maxsplit=1)[0])
            while len(held) > wanted:
                held.pop().close()
            while len(held) < wanted:
                held.append(stack.enter_context(engine.connect()))
                assert len(claim_jobs(held[-1], jobs, lease=LEASE)) == 1

        ways = {f"{count} holding a claim": partial(_claim, engine, jobs) for count in HOLDERS}
        found = in_turns(ways, rounds=rounds, calls=calls, before=hold)
    jobs.table.drop(engine)
    return _lines(found, f"{name}, {size:,} rows", None)


def _claim(engine: sa.Engine, jobs: JobTable) -> None:
    options: dict[str, Any] = {} if jobs.lease is None else {"lease": LEASE}
    if len(claim_jobs(engine, jobs, **options)) != 1:
        raise AssertionError("nothing was left to claim")
