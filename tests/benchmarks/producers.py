"""Producers on MySQL and MariaDB, with and without many workers beside them."""

from collections.abc import Iterator

from tests.benchmarks.crew import Crew, Share, Task, errors
from tests.benchmarks.ground import Ground, Rows, fill, job_table
from tests.benchmarks.measuring import Line, percentile

FIGURE = "producers"
TABLE = "bench_producers"
LOOPS = "tests.benchmarks.loops"
MOST = 2.0


def measure(
    ground: Ground,
    *,
    rounds: int,
    seconds: float = 60,
    workers: int = 16,
    producers: int = 4,
    limit: int = 10,
) -> Iterator[list[Line]]:
    """The p99 of an INSERT with the workers against that without, and what errors workers saw.

    ``seconds`` is how long the workers run altogether, over all rounds.
    """
    for name in ground.kinds("mysql", "mariadb"):
        engine, jobs = ground.engine(name), job_table(TABLE, lease=True)
        fill(engine, jobs, Rows(20_000))
        url = engine.url.render_as_string(hide_password=False)
        inserting = [Task(f"{LOOPS}:by_inserting", (url, 1, TABLE))] * producers
        claiming = [Task(f"{LOOPS}:by_engine_and_complete", (url, limit, TABLE))] * workers
        alone: list[float] = []
        beside: list[float] = []
        shares: list[Share] = []
        with Crew(producers + workers) as crew:
            crew.open(inserting + claiming)
            for _ in range(rounds):
                alone.append(_p99(crew.run(inserting, seconds / rounds)))
                found = crew.run(inserting + claiming, seconds / rounds)
                beside.append(_p99(found[:producers]))
                shares += found
        wrong = errors(shares)
        yield [
            Line(
                FIGURE,
                f"{name}, INSERT by {producers} beside {workers} workers",
                1000 * sorted(beside)[rounds // 2],
                "ms (p99)",
                f"without workers: {1000 * sorted(alone)[rounds // 2]:.2f} ms",
                tuple(one / other for one, other in zip(beside, alone, strict=True)),
                most=MOST,
                note=f"{seconds:g} s, errors: "
                + (", ".join(f"{count} of {what}" for what, count in wrong.items()) or "none"),
            )
        ]


def _p99(shares: list[Share]) -> float:
    return percentile([time for share in shares for time in share.times], 0.99)
