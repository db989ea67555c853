"""Claims by ``claim_jobs`` beside the same statements by SQLAlchemy and by the driver alone.

Each side claims the same rows of the same table and commits each claim. The statements that
SQLAlchemy executes alone are the constructs that the library executes itself, built before.
"""

import asyncio
import secrets
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn

from atomic_claim import JobTable, aio, claim_jobs
from tests.benchmarks.bare import BOUND, by_hand
from tests.benchmarks.ground import Ground, Rows, fill, free_all, job_table, with_class
from tests.benchmarks.measuring import Line, Way, alternating, check_whole, ratios, typical_rates
from tests.benchmarks.replay import by_core, by_orm, replay, steps_of

FIGURE = "overhead"
LIMITS = (1, 50)
JOBS_A_ROUND = {1: 60, 50: 750}
MORE_JOBS = 3_000
AUTOCOMMIT, BEGIN = "AUTOCOMMIT", "BEGIN … COMMIT"
STATEMENTS = "the ORM alone, the claim's statements"
LOOP = "the ORM alone, select, set, flush"
ASYNC_DRIVERS = ("asyncpg", "psycopg")
MOST_WAYS = 14


class Target(NamedTuple):
    """A ratio to reach, and a smaller one that is accepted."""

    least: float | None = None
    accepted: float | None = None


LITTLE_ADDED = Target(0.85)


@dataclass(frozen=True)
class Case:
    """A table and what is claimed from it.

    Attributes:
        database: the kind of database.
        rich: whether the table has JSON, Enum and, on PostgreSQL, timestamptz columns.
        token: whether the table has a token column.
        limit: the number of rows of a claim.
        calls: the number of claims of each way in a round.
    """

    database: str
    rich: bool
    token: bool
    limit: int
    calls: int

    def __str__(self) -> str:
        table = "rich" if self.rich else "plain"
        token = "token" if self.token else "no token"
        return f"{self.database}, {table}, {token}, limit {self.limit:,}"

    @property
    def mode(self) -> str:
        """The transaction mode of the library's own claim."""
        return AUTOCOMMIT if self.token and self.database == "postgresql" else BEGIN

    def by_engine(self) -> Target:
        """Return the target of a claim by Engine against Core alone in the same mode."""
        if self.database == "sqlite":
            return Target()
        if self.database != "postgresql":
            return LITTLE_ADDED
        return Target(0.95, 0.93) if self.token and self.limit == 1 else Target(0.93)


@dataclass(frozen=True)
class Group:
    """One way to claim by the library and those that it is compared with.

    Attributes:
        name: the name of the library's way.
        way: the library's way.
        others: the other ways by name.
        targets: the targets by the name of the other way; the rest is for information.
    """

    name: str
    way: Way
    others: dict[str, Way]
    targets: dict[str, Target] = field(default_factory=dict)

    def lines(self, case: Case, speed: dict[str, list[float]]) -> Iterator[Line]:
        """Yield a line for each comparison, from the rates of each round by way."""
        for other in self.others:
            least, accepted = self.targets.get(other, Target())
            yield Line(
                FIGURE,
                f"{case}: {self.name}",
                statistics.median(speed[self.name]),
                "claims/s",
                other,
                ratios(speed[self.name], speed[other]),
                least=least,
                accepted=accepted,
            )


def measure(
    ground: Ground,
    *,
    rounds: int,
    limits: Sequence[int] = LIMITS,
    calls: int | None = None,
) -> Iterator[list[Line]]:
    """Claims per second as a part of the others' claims, for every database, table and limit."""
    lines: list[Line] = []
    for name in ground.kinds():
        for rich, token, limit in product((False, True), (True, False), limits):
            each = calls or max(3, JOBS_A_ROUND.get(limit, MORE_JOBS) // limit)
            case = Case(name, rich, token, limit, each)
            lines += measured(sa.create_engine(ground.url(name)), case, rounds)
    yield lines


def measured(engine: sa.Engine, case: Case, rounds: int) -> list[Line]:
    """Measure one case in a table that is made for it; the ways alternate call by call."""
    name = "bench_rich" if case.rich else "bench_jobs"
    jobs = job_table(name, token=case.token, rich=case.rich)
    fill(engine, jobs, Rows(MOST_WAYS * case.limit * (case.calls + 1) + 1000))

    def turns() -> list[Line]:
        with ExitStack() as stack:
            stack.callback(engine.dispose)
            groups = list(_groups(engine, jobs, case, stack))
            ways = {group.name: group.way for group in groups}
            ways |= {name: way for group in groups for name, way in group.others.items()}
            found = alternating(
                ways, rounds=rounds, calls=case.calls, before=lambda: free_all(engine, jobs)
            )
            speed = {name: typical_rates(times) for name, times in found.items()}
            return [line for group in groups for line in group.lines(case, speed)]

    # The asynchronous ways are awaited from within the turns, on one event loop.
    return asyncio.run(greenlet_spawn(turns))


def _groups(engine: sa.Engine, jobs: JobTable, case: Case, stack: ExitStack) -> Iterator[Group]:
    yield _by_engine(engine, jobs, case, stack)
    yield _by_session(engine, jobs, case, stack)
    if case.database == "postgresql":
        for driver in ASYNC_DRIVERS:
            yield _by_async_engine(engine, jobs, case, stack, driver)


def _by_engine(engine: sa.Engine, jobs: JobTable, case: Case, stack: ExitStack) -> Group:
    limit = case.limit
    steps = steps_of(engine.url, lambda own: claim_jobs(own, jobs, limit))
    claim = replay(steps, limit)

    def in_transaction() -> None:
        with engine.begin() as connection:
            claim(by_core(connection))

    def in_autocommit() -> None:
        with engine.connect().execution_options(isolation_level=AUTOCOMMIT) as connection:
            claim(by_core(connection))

    others: dict[str, Way] = {f"Core alone, {BEGIN}": in_transaction}
    if len(steps) == 1:
        kept = stack.enter_context(engine.connect())
        kept.execution_options(isolation_level=AUTOCOMMIT)
        others |= {
            f"Core alone, {AUTOCOMMIT}": in_autocommit,
            f"Core alone, {AUTOCOMMIT}, connection kept": lambda: claim(by_core(kept)),
        }
    others |= stack.enter_context(by_hand(engine.url, steps, limit))
    targets = {f"Core alone, {case.mode}": case.by_engine()}
    if case.token and limit == 1:
        targets[BOUND] = Target(0.80)
    way = lambda: check_whole(claim_jobs(engine, jobs, limit), limit)  # noqa: E731
    return Group("claim_jobs by Engine", way, others, targets)


def _by_session(engine: sa.Engine, jobs: JobTable, case: Case, stack: ExitStack) -> Group:
    """Compare with the same statements, and with the loop that applications write.

    The target is against the former, which give the same guarantees by the same round trips.
    """
    table, limit = jobs.table, case.limit
    declared = with_class(jobs)
    entity: Any = declared.entity

    def claim_by(bind: sa.Engine) -> None:
        with Session(bind) as session:
            check_whole(claim_jobs(session, declared, limit), limit)
            session.commit()

    claim = replay(steps_of(engine.url, claim_by), limit)
    ours, theirs, own = (stack.enter_context(Session(engine)) for _ in range(3))
    free = sa.select(entity).where(table.c.processing == sa.false(), table.c.completed_at.is_(None))
    free = free.order_by(table.c.created_at).limit(limit)
    free = free.with_for_update(skip_locked=True, key_share=True)

    def by_us() -> None:
        check_whole(claim_jobs(ours, declared, limit), limit)
        ours.commit()

    def by_statements() -> None:
        claim(by_orm(theirs))
        theirs.commit()

    def by_loop() -> None:
        found, token = own.scalars(free).all(), secrets.token_hex(16)
        for job in found:
            job.processing = True
            if case.token:
                job.claim_token = token
        own.flush()
        check_whole(found, limit)
        own.commit()

    others: dict[str, Way] = {STATEMENTS: by_statements, LOOP: by_loop}
    return Group("claim_jobs by Session, entities", by_us, others, {STATEMENTS: LITTLE_ADDED})


def _by_async_engine(
    engine: sa.Engine, jobs: JobTable, case: Case, stack: ExitStack, driver: str
) -> Group:
    limit = case.limit
    [step] = steps_of(engine.url, lambda own: claim_jobs(own, jobs, limit))
    own = create_async_engine(engine.url.set(drivername=f"postgresql+{driver}"))
    stack.callback(lambda: await_only(own.dispose()))
    claim = replay([step], limit)

    async def by_us() -> None:
        check_whole(await aio.claim_jobs(own, jobs, limit), limit)

    async def alone() -> None:
        async with own.connect() as connection:
            if case.mode == AUTOCOMMIT:
                await connection.execution_options(isolation_level=AUTOCOMMIT)
            await connection.run_sync(lambda connection: claim(by_core(connection)))
            if case.mode != AUTOCOMMIT:
                await connection.commit()

    other = f"Core alone, AsyncEngine, {driver}, {case.mode}"
    return Group(
        f"claim_jobs by AsyncEngine, {driver}",
        lambda: await_only(by_us()),
        {other: lambda: await_only(alone())},
        {other: LITTLE_ADDED},
    )
