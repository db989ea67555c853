"""Producers on MySQL and MariaDB, with and without many workers beside them."""

from collections.abc import Iterator

from tests.benchmarks.crew import Crew, Share, Task, errors
from tests.benchmarks.ground import Ground, Rows, fill, job_table
from tests.benchmarks.measuring import Line, percentile

FIGURE = "producers"
TABLE = "bench_producers"
LOOPS = "tests.benchmarks.loops"
MOST = 2.0
WORKERS, PRODUCERS, LIMIT = 16, 4, 10
OTHER = "bench_producers_other"
# So many seconds a producer pauses.
PAUSE = 0.005
# So many seconds a job takes, and whether a machine of two cores has time for so much of it: with
# short jobs, what producers wait for is a core.
WORKS = {0.05: True, 0.005: False}


def measure(ground: Ground, *, rounds: int, seconds: float = 60) -> Iterator[list[Line]]:
    """Compare the p99 of an INSERT with and without workers, and count the workers' errors.

    Also against that with the same workers at another table: what is left then is what they do to
    the producers by their locks, not by the machine's two cores. ``seconds`` is how long the
    workers run altogether, over all rounds.
    """
    for name in ground.kinds("mysql", "mariadb"):
        for work in WORKS:
            yield _measured(ground, name, work, rounds, seconds)


def _measured(ground: Ground, name: str, work: float, rounds: int, seconds: float) -> list[Line]:
    engine = ground.engine(name)
    for table in (TABLE, OTHER):
        fill(engine, job_table(table, lease=True), Rows(20_000))
    url = engine.url.render_as_string(hide_password=False)
    inserting = [Task(f"{LOOPS}:by_inserting", (url, 1, TABLE, PAUSE))] * PRODUCERS
    here, elsewhere = (
        [Task(f"{LOOPS}:by_engine_and_complete", (url, LIMIT, table, LIMIT * work))] * WORKERS
        for table in (TABLE, OTHER)
    )
    crews = {"without workers": [], "workers at another table": elsewhere, "beside": here}
    tails: dict[str, list[float]] = {what: [] for what in crews}
    shares: list[Share] = []
    with Crew(PRODUCERS + WORKERS) as crew:
        for tasks in crews.values():
            crew.open(inserting + tasks)
        for turn in range(rounds):
            for what in list(crews) if turn % 2 else reversed(list(crews)):
                found = crew.run(inserting + crews[what], seconds / rounds)
                tails[what].append(_p99(found[:PRODUCERS]))
                shares += found if what == "beside" else []
    wrong, ours = errors(shares), tails["beside"]
    return [
        Line(
            FIGURE,
            f"{name}, INSERT by {PRODUCERS} beside {WORKERS} workers, {1000 * work:g} ms a job",
            1000 * sorted(ours)[rounds // 2],
            "ms (p99)",
            f"{what}: {1000 * sorted(theirs)[rounds // 2]:.2f} ms",
            tuple(one / other for one, other in zip(ours, theirs, strict=True)),
            most=MOST if what == "without workers" and WORKS[work] else None,
            note=f"{seconds:g} s, errors: "
            + (", ".join(f"{count} of {what}" for what, count in wrong.items()) or "none"),
        )
        for what, theirs in tails.items()
        if what != "beside"
    ]


def _p99(shares: list[Share]) -> float:
    return percentile([time for share in shares for time in share.times], 0.99)
