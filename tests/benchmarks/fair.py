"""Cost of claims that take turns by a key, against a plain claim, and of many keys against few."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa

from atomic_claim import JobTable, claim_jobs
from tests.benchmarks.ground import PRECISE, Ground, Rows, add_indexes, fill, free_all, job_table
from tests.benchmarks.measuring import Line, alternating, check_whole

FIGURE = "fair"
PLAIN = "a plain claim"
ROWS = 200_000
FEW, MANY = 1_000, 100_000
CALLS = 100
MOST = 4.0
LIMITS = (10,)


def measure(ground: Ground, *, rounds: int, limits: Sequence[int] = LIMITS) -> Iterator[list[Line]]:
    """Measure the p50 of a claim by turns in tables of few and of many tenants, side by side."""
    for name in ground.kinds():
        engine = ground.engine(name)
        ways: dict[str, Callable[..., object]] = {}
        made = []
        for keys in (FEW, MANY):
            plain, fair, timed = _declared(f"bench_fair_{keys}")
            fill(engine, timed, Rows(ROWS, keys=keys))
            add_indexes(engine, plain)
            made.append(plain)
            declared = {"by turns": fair, "by turns, with a claim time": timed}
            if keys == FEW:
                declared[PLAIN] = plain
            ways |= {
                f"{way}, {keys:,} tenants": partial(_claim, engine, d)
                for way, d in declared.items()
            }
        for limit in limits:
            found = alternating(
                {way: partial(claim, limit) for way, claim in ways.items()},
                rounds=rounds,
                calls=max(5, CALLS // limit * 5),
                before=partial(_free, engine, made),
            )
            yield list(_lines(found, f"{name}, limit {limit}"))
        for jobs in made:
            jobs.table.drop(engine)


def _declared(name: str) -> tuple[JobTable, JobTable, JobTable]:
    """Declare a table for plain claims, for turns, and for turns that go by the claim time."""
    table = job_table(name, keys=True).table
    table.append_column(sa.Column("claimed_at", PRECISE))
    roles: dict[str, Any] = {
        "state": "processing",
        "order": "created_at",
        "done": {"completed_at": sa.func.now()},
        "naive_times": "utc",
    }
    time: dict[str, Any] = {"claimed": {"processing": True, "claimed_at": sa.func.now()}}
    by_turns: dict[str, Any] = {"fair_by": "customer_id"}
    return (
        JobTable(table, **roles),
        JobTable(table, **roles | by_turns),
        JobTable(table, **roles | by_turns | time),
    )


def _free(engine: sa.Engine, made: Sequence[JobTable]) -> None:
    for jobs in made:
        free_all(engine, jobs)


def _claim(engine: sa.Engine, jobs: JobTable, limit: int) -> None:
    check_whole(claim_jobs(engine, jobs, limit), limit)


def _lines(found: dict[str, list[list[float]]], what: str) -> Iterator[Line]:
    medians = {way: [statistics.median(turn) for turn in turns] for way, turns in found.items()}
    for way, ours in medians.items():
        base = way.replace(f"{MANY:,}", f"{FEW:,}")
        if base == way:
            base = f"{PLAIN}, {FEW:,} tenants"
        if base == way:
            continue
        times = [time for turn in found[way] for time in turn]
        yield Line(
            FIGURE,
            f"{what}: {way}",
            1000 * statistics.median(times),
            "ms (p50)",
            f"{base}: {1000 * statistics.median(medians[base]):.2f} ms",
            tuple(one / other for one, other in zip(ours, medians[base], strict=True)),
            most=MOST if base.startswith(PLAIN) else None,
        )
