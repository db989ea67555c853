"""What a lease, a token, a worker's name and a heartbeat cost, beside a plain claim."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import sqlalchemy as sa

from atomic_claim import JobTable, claim_jobs, keep_claims
from tests.benchmarks.ground import Ground, Rows, fill, job_table
from tests.benchmarks.measuring import Line, in_turns, rates, ratios

FIGURE = "features"
PLAIN = "a plain claim"
LIMITS = (1, 100)
JOBS_A_TURN = 3000


def measure(ground: Ground, *, rounds: int, limits: Sequence[int] = LIMITS) -> Iterator[list[Line]]:
    """Claims per second of each feature against a plain claim of the same table and columns."""
    for name in ground.kinds():
        engine = ground.engine(name)
        for limit in limits:
            yield _measured(engine, name, limit, rounds)


def _measured(engine: sa.Engine, name: str, limit: int, rounds: int) -> list[Line]:
    jobs, lease = job_table(lease=True), timedelta(minutes=5)
    calls = max(5, JOBS_A_TURN // limit // 10)
    fill(engine, jobs, Rows(limit * (calls + 2)))
    table = jobs.table
    plain = _declared(table)
    token = _declared(table, token="claim_token")
    leased = _declared(table, token="claim_token", lease="lease_until")

    def kept() -> None:
        claim = claim_jobs(engine, leased, limit, lease=lease)
        with keep_claims(engine, claim):
            pass

    ways: dict[str, Callable[[], object]] = {
        PLAIN: lambda: claim_jobs(engine, plain, limit),
        "a token": lambda: claim_jobs(engine, token, limit),
        "a lease": lambda: claim_jobs(engine, leased, limit, lease=lease),
        "a lease, worker, attempts and due time": lambda: claim_jobs(
            engine, jobs, limit, lease=lease, worker="w1"
        ),
        "a lease and a heartbeat": kept,
    }
    free = table.update().values(
        processing=False, claim_token=None, lease_until=None, attempts=0, worker=None
    )

    def refill(_: str) -> None:
        with engine.begin() as connection:
            connection.execute(free.where(table.c.processing == sa.true()))

    found = in_turns(ways, rounds=rounds, calls=calls, before=refill)
    speed = {way: rates(turns) for way, turns in found.items()}
    return [
        Line(
            FIGURE,
            f"{name}, {way}, limit {limit}",
            statistics.median(speed[way]),
            "claims/s",
            PLAIN,
            ratios(speed[way], speed[PLAIN]),
        )
        for way in ways
        if way != PLAIN
    ]


def _declared(table: sa.Table, **roles: str) -> JobTable:
    done = {"completed_at": sa.func.now()}
    return JobTable(
        table, state="processing", order="created_at", done=done, naive_times="utc", **roles
    )
