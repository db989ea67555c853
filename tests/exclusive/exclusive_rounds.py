"""Rounds in which workers drain a table of a few keys, and record what ran at the same time.

    python -m tests.exclusive.exclusive_rounds --database mariadb --rounds 50 --no-index

runs every combination that fits, each round with four processes, and exits with 1 if two rows of
a key ran at once that must not, or a row did not run exactly once.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import registry, sessionmaker

from atomic_claim import JobTable, claim_jobs, complete_jobs
from tests.benchmarks.ground import Ground
from tests.databases import NAMES

KEYS = 6
PATIENCE = 100


@dataclass(frozen=True)
class Combination:
    """The parts of a round.

    Attributes:
        index: whether the table has indexes of the keys.
        by: `engine` or `sessionmaker`.
        ends: `complete_jobs`, or `update` for the user's own UPDATE.
        most: how many rows of a key may run.
        ties: whether rows share a place in the order.
    """

    index: bool = True
    by: str = "engine"
    ends: str = "complete_jobs"
    most: int = 1
    ties: bool = False

    def __str__(self) -> str:
        return ", ".join(f"{each.name}={getattr(self, each.name)}" for each in fields(self))


ALL = tuple(
    itertools.starmap(
        Combination,
        itertools.product(
            (True, False),
            ("engine", "sessionmaker"),
            ("complete_jobs", "update"),
            (1, 3),
            (False, True),
        ),
    )
)
# Of five parts with two values each: those that differ from the first in an even number of parts.
HALF = tuple(
    each
    for each in ALL
    if sum(getattr(each, part.name) != getattr(ALL[0], part.name) for part in fields(each)) % 2 == 0
)


class Ran(NamedTuple):
    """A row's run, by the clock that all processes share."""

    row: int
    key: int
    began: float
    ended: float


class Outcome(NamedTuple):
    """The result of a round: how many rows ran, and how many of a key at once, at most."""

    rows: int
    most: int


def declared(combination: Combination) -> JobTable:
    """Build the declaration of a round."""
    table = sa.Table(
        "keyed",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("customer", sa.Integer),
        sa.Column("place", sa.Integer),
        sa.Column("processing", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("done", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("token", sa.String(32)),
    )
    if combination.index:
        sa.Index("keyed_keys", table.c.processing, table.c.done, table.c.customer, table.c.place)
        sa.Index("keyed_free", table.c.processing, table.c.done, table.c.place)
    given: Any = table
    if combination.by == "sessionmaker":
        given = type("Keyed", (), {})
        registry().map_imperatively(given, table)
    return JobTable(
        given,
        state="processing",
        done={"done": True},
        token="token",
        order="place",
        exclusive_by="customer",
        max_per_key=combination.most,
    )


def prepare(engine: sa.Engine, combination: Combination, rows: int) -> None:
    """Replace the table, and fill it."""
    table = declared(combination).table
    table.drop(engine, checkfirst=True)
    table.create(engine)
    with engine.begin() as connection:
        jobs = [
            {"id": n, "customer": min(n % 13, KEYS - 1), "place": n // 7 if combination.ties else n}
            for n in range(1, rows + 1)
        ]
        connection.execute(table.insert(), jobs)


def work(url: sa.URL, combination: Combination) -> list[Ran]:
    """Claim, run and end rows until none is left; return what ran, and when."""
    engine = sa.create_engine(url)
    try:
        return drain(engine, combination)
    finally:
        engine.dispose()


def drain(engine: sa.Engine, combination: Combination) -> list[Ran]:
    """Claim, run and end rows by an engine until none is left."""
    jobs = declared(combination)
    table = jobs.table
    bind: Any = engine if combination.by == "engine" else sessionmaker(engine)
    left = sa.select(sa.func.count()).where(~table.c.done)
    found: list[Ran] = []
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        claim = claim_jobs(bind, jobs, 3)
        began = time.monotonic()
        if claim:
            time.sleep(0.002)
            ended = time.monotonic()
            found += [Ran(job.id, job.customer, began, ended) for job in claim]
            if combination.ends == "complete_jobs":
                complete_jobs(engine, claim)
                continue
            ours = table.c.id.in_([job.id for job in claim])
            with engine.begin() as connection:
                connection.execute(sa.update(table).where(ours).values(done=True))
            continue
        with engine.connect() as connection:
            if connection.scalar(left) == 0:
                return found
    raise TimeoutError(f"rows are left after {PATIENCE} s")


def most_at_once(intervals: Sequence[tuple[int, float, float]]) -> dict[int, int]:
    """How many runs of each key there were at the same time, at most."""
    found: dict[int, int] = Counter()
    for key in {interval[0] for interval in intervals}:
        moments = [(begin, 1) for k, begin, _ in intervals if k == key]
        moments += [(end, -1) for k, _, end in intervals if k == key]
        running = 0
        for _, change in sorted(moments):
            running += change
            found[key] = max(found[key], running)
    return found


def run_round(
    executor: Executor, engine: sa.Engine, combination: Combination, *, rows: int, workers: int
) -> Outcome:
    """Run a round.

    Raises:
        AssertionError: a row did not run exactly once.
    """
    prepare(engine, combination, rows)
    results = executor.map(work, [engine.url] * workers, [combination] * workers)
    ran = [each for result in results for each in result]
    counts = Counter(each.row for each in ran)
    wrong = {row: counts[row] for row in range(1, rows + 1) if counts[row] != 1}
    assert not wrong, f"{combination}: rows and how often they ran: {wrong}"
    intervals = [(each.key, each.began, each.ended) for each in ran]
    return Outcome(len(ran), max(most_at_once(intervals).values()))


def main() -> int:
    """Run the rounds, and print a line for each combination."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.exclusive.exclusive_rounds", description=__doc__
    )
    parser.add_argument("--database", choices=NAMES, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--index", action=argparse.BooleanOptionalAction)
    options = parser.parse_args()
    clashes = 0
    context = multiprocessing.get_context("forkserver")
    names = options.database or NAMES
    with Ground({}, names) as ground, ProcessPoolExecutor(4, context) as executor:
        for name, combination in itertools.product(names, ALL):
            if options.index not in {None, combination.index}:
                continue
            found = [
                run_round(executor, ground.engine(name), combination, rows=200, workers=4)
                for _ in range(options.rounds)
            ]
            most = max(each.most for each in found)
            clashes += most > combination.most
            said = f"{name}: {combination}: {len(found)} rounds, at most {most} at once"
            print(said, flush=True)  # noqa: T201 - a command
    return int(clashes > 0)


if __name__ == "__main__":
    sys.exit(main())
