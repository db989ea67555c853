"""One claim in small and in large tables, behind rows that it passes over, and beside others."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import Any

import sqlalchemy as sa

from atomic_claim import JobTable, claim_jobs
from tests.benchmarks.churn import percentiles, used
from tests.benchmarks.ground import ORDERS, Ground, Rows, fill, job_table
from tests.benchmarks.measuring import Line, alternating, in_turns, percentile

FIGURE = "growth"
SIZES = (10_000, 1_000_000, 10_000_000)
# So many rows of a hundred wait, the others are done.
FREE = 10
AHEAD = 200_000
KINDS = {"not due": "not_due", "running": "running", "with spent attempts": "spent", "done": "done"}
# Behind them: rows without a time where it may be NULL, and some whose time has come; at most as
# many as a claim sorts (RIPE in candidates.py).
BEHIND = {True: Rows(10_000, timed=100), False: Rows(800)}
HOLDERS = (0, 64)
# So many jobs a second are inserted beside an old snapshot, in batches; the minutes in slices.
PER_SECOND, BATCH, SLICES = 500, 10, 10
LEASE = timedelta(minutes=5)
MOST_BY_SIZE, MOST_BEHIND, MOST_BESIDE = 1.3, 3.0, 2.5


def measure(
    ground: Ground,
    *,
    rounds: int,
    sizes: Sequence[int] = SIZES,
    calls: int = 100,
    minutes: float = 10,
) -> Iterator[list[Line]]:
    """Measure the p50 and p99 of one claim beside another, call by call in turn."""
    if min(sizes) * FREE // 100 < (wanted := rounds * (calls + 1) + 1):
        raise ValueError(
            f"--rows {min(sizes)}: {FREE} % of them are free, and {wanted} are claimed from; "
            "ask for more rows, or fewer --calls"
        )
    for name in ground.kinds():
        engine = ground.engine(name, pool_size=1, max_overflow=max(HOLDERS))
        for lease in (False, True):
            what = f"{name}, {'with' if lease else 'without'} a lease"
            made = partial(job_table, lease=lease)
            tables = {f"{size:,} rows": (made, Rows(size, FREE)) for size in sizes}
            yield _compared(engine, what, tables, rounds=rounds, calls=calls, most=MOST_BY_SIZE)
        for order in ORDERS:
            for nullable in BEHIND:
                what = f"{name}, by {order}, due {'' if nullable else 'NOT '}NULL"
                yield _behind(
                    engine, what, order=order, nullable=nullable, rounds=rounds, calls=calls
                )
        yield _beside_holders(engine, name, rounds, calls)
        if minutes and name != "sqlite":
            yield [_beside_a_snapshot(engine, name, minutes)]


def _behind(
    engine: sa.Engine, what: str, *, order: str, nullable: bool, rounds: int, calls: int
) -> list[Line]:
    """Time claims behind many rows of each kind that they pass over."""
    behind = BEHIND[nullable]
    made = partial(job_table, lease=True, order=order, nullable=nullable)
    rows = {"none ahead": behind} | {
        f"{AHEAD:,} rows {kind} ahead": Rows(behind.count, timed=behind.timed, **{field: AHEAD})
        for kind, field in KINDS.items()
    }
    tables = {label: (made, each) for label, each in rows.items()}
    # Rows for all of them.
    calls = min(calls, behind.count // (rounds + 1))
    return _compared(engine, what, tables, rounds=rounds, calls=calls, most=MOST_BEHIND)


def _compared(
    engine: sa.Engine,
    what: str,
    tables: dict[str, tuple[Any, Rows]],
    *,
    rounds: int,
    calls: int,
    most: float,
) -> list[Line]:
    """Time claims from these tables call by call, and compare each table with the first one."""
    made = {}
    for place, (label, (declare, rows)) in enumerate(tables.items()):
        made[label] = declare(f"bench_growth_{place}")
        fill(engine, made[label], rows)
    ways = {label: partial(_claim, engine, jobs) for label, jobs in made.items()}
    found = alternating(ways, rounds=rounds, calls=calls, before=lambda: None)
    for jobs in made.values():
        jobs.table.drop(engine)
    return _lines(found, what, most)


def _lines(found: dict[str, list[list[float]]], what: str, most: float) -> list[Line]:
    first, *others = found
    base = [statistics.median(times) for times in found[first]]
    lines = []
    for label in others:
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


def _beside_holders(engine: sa.Engine, name: str, rounds: int, calls: int) -> list[Line]:
    """Time a claim while other workers hold one claim each.

    They hold it in open transactions; on SQLite, where one of these keeps all others out, by lease.
    """
    jobs = job_table("bench_growth_0", lease=True)
    fill(engine, jobs, Rows(1_000_000, FREE))
    with ExitStack() as stack:
        held: list[sa.Connection] = []

        def hold(label: str) -> None:
            wanted = int(label.split(maxsplit=1)[0])
            while len(held) > wanted:
                held.pop().close()
            while len(held) < wanted:
                held.append(stack.enter_context(engine.connect()))
                assert len(claim_jobs(held[-1], jobs, lease=LEASE)) == 1
                if name == "sqlite":
                    held[-1].commit()

        ways = {f"{count} holding a claim": partial(_claim, engine, jobs) for count in HOLDERS}
        found = in_turns(ways, rounds=rounds, calls=calls, before=hold)
    jobs.table.drop(engine)
    return _lines(found, f"{name}, 1,000,000 rows", MOST_BESIDE)


def _beside_a_snapshot(engine: sa.Engine, name: str, minutes: float) -> Line:
    """Time claims and their ends beside an open transaction, for which no row version goes."""
    jobs = job_table("bench_growth_0", lease=True)
    fill(engine, jobs, Rows(100_000, FREE))
    old = engine.execution_options(isolation_level="REPEATABLE READ")
    with old.connect() as connection:
        connection.execute(sa.select(jobs.table.c.id).limit(1)).all()
        slices = used(
            engine,
            jobs.table.name,
            minutes=minutes,
            slice_=minutes * 60 / SLICES,
            batch=BATCH,
            pause=BATCH / PER_SECOND,
        )
    jobs.table.drop(engine)
    medians, tails = percentiles(slices, 0.5), percentiles(slices, 0.99)
    ended = sum(len(share.jobs) for shares in slices for share in shares[1:])
    shown = " ".join(
        f"{1000 * one:.1f}/{1000 * other:.0f}" for one, other in zip(medians, tails, strict=True)
    )
    return Line(
        FIGURE,
        f"{name}, claim and complete {BATCH}: the last tenth of {minutes:g} min beside a snapshot",
        1000 * medians[-1],
        "ms (p50)",
        f"the first tenth: {1000 * medians[0]:.2f} ms",
        tuple(one / medians[0] for one in medians[-2:]),
        note=f"{ended:,} jobs; p50/p99 of each tenth in ms: {shown}",
    )


def _claim(engine: sa.Engine, jobs: JobTable) -> None:
    options: dict[str, Any] = {} if jobs.lease is None else {"lease": LEASE}
    if len(claim_jobs(engine, jobs, **options)) != 1:
        raise AssertionError("nothing was left to claim")
