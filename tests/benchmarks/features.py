"""Cost of leases, tokens, worker names, heartbeats and exclusive keys against a plain claim."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import sqlalchemy as sa

from atomic_claim import JobTable, claim_jobs, keep_claims
from tests.benchmarks.ground import Ground, Rows, fill, free_all, job_table
from tests.benchmarks.measuring import Line, check_whole, in_turns, rates, ratios

FIGURE = "features"
PLAIN = "a plain claim"
LIMITS = (1, 100)
JOBS_A_TURN = 3000
KEYS = 10_000
BUSY = {"none busy": 0, "a tenth busy": KEYS // 10}


def measure(ground: Ground, *, rounds: int, limits: Sequence[int] = LIMITS) -> Iterator[list[Line]]:
    """Claims per second of each feature against a plain claim of the same table and columns."""
    for name in ground.kinds():
        engine = ground.engine(name)
        for limit in limits:
            what, calls = f"limit {limit}", max(5, JOBS_A_TURN // limit // 10)
            found = _measured(engine, limit, rounds=rounds, calls=calls)
            yield _lines(found, f"{name}, {{}}, {what}")
            for busy, running in BUSY.items():
                found = _by_key(engine, limit, running, rounds=rounds, calls=calls)
                yield _lines(found, f"{name}, {{}} of {KEYS:,}, {busy}, {what}")


def _measured(
    engine: sa.Engine, limit: int, *, rounds: int, calls: int
) -> dict[str, list[list[float]]]:
    jobs, lease = job_table(lease=True), timedelta(minutes=5)
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
    return in_turns(ways, rounds=rounds, calls=calls, before=lambda _: free_all(engine, jobs))


def _by_key(
    engine: sa.Engine, limit: int, running: int, *, rounds: int, calls: int
) -> dict[str, list[list[float]]]:
    """Time claims with and without an exclusive key while `running` rows are running."""
    jobs = job_table(lease=True, keys=True)
    fill(engine, jobs, Rows(2 * KEYS, running=running, keys=KEYS))
    plain, by_key = _declared(jobs.table), _declared(jobs.table, exclusive_by="customer_id")
    ways: dict[str, Callable[[], object]] = {
        PLAIN: lambda: check_whole(claim_jobs(engine, plain, limit), limit),
        "an exclusive key": lambda: check_whole(claim_jobs(engine, by_key, limit), limit),
    }

    def refill(_: str) -> None:
        free_all(engine, jobs, kept=running)

    return in_turns(ways, rounds=rounds, calls=calls, before=refill)


def _lines(found: dict[str, list[list[float]]], name: str) -> list[Line]:
    speed = {way: rates(turns) for way, turns in found.items()}
    return [
        Line(
            FIGURE,
            name.format(way),
            statistics.median(speed[way]),
            "claims/s",
            PLAIN,
            ratios(speed[way], speed[PLAIN]),
        )
        for way in speed
        if way != PLAIN
    ]


def _declared(table: sa.Table, **roles: str) -> JobTable:
    done = {"completed_at": sa.func.now()}
    return JobTable(
        table, state="processing", order="created_at", done=done, naive_times="utc", **roles
    )
