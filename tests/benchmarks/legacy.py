"""The claim beside what applications have: the legacy loop, a waiting lock, the article's form."""

from collections.abc import Iterator, Sequence

from tests.benchmarks.crew import Crew, Task, doubled, errors, rate
from tests.benchmarks.ground import Ground, Rows, fill, free_all, job_table
from tests.benchmarks.measuring import Line, ratios

FIGURE = "legacy"
LOOPS = "tests.benchmarks.loops"
OURS = "claim_jobs by engine"
THEIRS = {
    "legacy loop": "by_legacy_loop",
    "FOR UPDATE, waiting": "by_waiting_lock",
    "IN (SELECT … SKIP LOCKED)": "by_article_form",
}
LIMIT = 100


def measure(
    ground: Ground,
    *,
    rounds: int,
    rows: int = 100_000,
    workers: Sequence[int] = (1, 4),
    seconds: float = 1.0,
) -> Iterator[list[Line]]:
    """Jobs per second with one worker and with several, and how many jobs were handed out twice."""
    engine, jobs = ground.engine("postgresql"), job_table()
    fill(engine, jobs, Rows(rows))
    url = engine.url.render_as_string(hide_password=False)
    ways = {OURS: Task(f"{LOOPS}:by_engine", (url, LIMIT))} | {
        name: Task(f"{LOOPS}:{opener}", (url, LIMIT)) for name, opener in THEIRS.items()
    }
    with Crew(max(workers)) as crew:
        for size in workers:
            speeds: dict[str, list[float]] = {name: [] for name in ways}
            twice, wrong = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
            for turn in range(rounds):
                for name in list(ways) if turn % 2 else reversed(list(ways)):
                    free_all(engine, jobs)
                    shares = crew.run([ways[name]] * size, seconds)
                    speeds[name].append(rate(shares))
                    twice[name] += doubled(shares)
                    wrong[name] += errors(shares).total()
            yield [
                Line(
                    FIGURE,
                    f"{OURS}, {size} worker{'s' if size > 1 else ''}, limit {LIMIT}",
                    sorted(speeds[OURS])[rounds // 2],
                    "jobs/s",
                    name,
                    ratios(speeds[OURS], speeds[name]),
                    least=15 if size == 1 and name == "legacy loop" else None,
                    note=f"twice: {twice[OURS]} against {twice[name]}, "
                    f"errors: {wrong[OURS]} against {wrong[name]}",
                )
                for name in THEIRS
            ]
