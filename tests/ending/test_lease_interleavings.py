"""Two workers and the passing of time, in every order: a job has one owner and ends once.

The orders are enumerated, not sampled. Each has a row of its own, and in the end the table is
asked: every change that left a row done has been counted by a trigger.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Final

import pytest
import sqlalchemy as sa

from atomic_claim import (
    Claim,
    ClaimConflict,
    ClaimLost,
    JobTable,
    claim_jobs,
    complete_jobs,
    extend_jobs,
    fail_jobs,
    release_jobs,
)
from tests.counting import completions, make_counted
from tests.databases import Database
from tests.ending.test_lease import LEASE, PAST
from tests.jobs import hurried
from tests.waiting import wait_until

pytestmark = pytest.mark.once

Order = tuple[str, ...]

EXPIRY: Final = "time passes"
ENDS: Final = ("complete", "fail", "retry", "release")
CALLS: Final[dict[str, Callable[[Any, Claim[Any]], int]]] = {
    "extend": extend_jobs,
    "complete": complete_jobs,
    "fail": fail_jobs,
    "retry": lambda bind, claim: fail_jobs(bind, claim, retry=timedelta(0)),
    "release": release_jobs,
}


def quick_engine(database: Database) -> sa.Engine:
    """Create an engine that waits neither for locks nor for the disk on SQLite."""
    if database.name != "sqlite":
        return database.engine()
    engine = database.engine(connect_args={"timeout": 0})

    @sa.event.listens_for(engine, "connect")
    def forget_the_disk(driver_connection: Any, _: object) -> None:
        driver_connection.execute("PRAGMA synchronous = OFF")

    return engine


def merged(first: Sequence[str], second: Sequence[str]) -> Iterator[Order]:
    """Every order in which the steps of two workers can follow each other."""
    count = len(first) + len(second)
    for places in itertools.combinations(range(count), len(first)):
        mine, others = iter(first), iter(second)
        yield tuple(next(mine) if place in places else next(others) for place in range(count))


def with_expiry(orders: Iterable[Order]) -> Iterator[Order]:
    """Each order as it is, and with leases that run out at every place in it."""
    for order in orders:
        yield order
        for place in range(len(order) + 1):
            yield (*order[:place], EXPIRY, *order[place:])


def expire(bind: sa.Connection, jobs: JobTable, number: int) -> None:
    """Let the lease of a row run out, if it has one."""
    past = jobs.now(jobs.lease, sa.literal(PAST.total_seconds(), sa.Float()))
    leased = jobs.table.update().where(jobs.table.c.id == number, jobs.lease.is_not(None))
    bind.execute(leased.values(lease_until=past))


def attempt(call: str, bind: Any, claim: Claim[Any]) -> bool:
    """End or extend a claim; whether it was still the worker's."""
    try:
        changed = CALLS[call](bind, claim)
    except ClaimLost as lost:
        refused = lost.keys
    else:
        return changed == 1
    assert refused == claim.keys
    return False


def owners(engine: sa.Engine, claims: Iterable[Claim[Any]]) -> list[str | None]:
    """Return the tokens of the claims that own their row, that is, can extend it."""
    return [claim.token for claim in claims if claim and attempt("extend", engine, claim)]


@dataclass
class Model:
    """A model of the expected state of a row."""

    owner: str | None = None
    expired: bool = False
    ended: str | None = None

    def step(self, step: str) -> bool:
        """Apply a step to the row and return True if the step succeeds."""
        if step == EXPIRY:
            matters = self.owner is not None and not self.ended and not self.expired
            self.expired = self.expired or matters
            return matters
        worker, call = step.split()
        if call == "claim":
            if self.ended or (self.owner is not None and not self.expired):
                return False
            self.owner, self.expired = worker, False
            return True
        if self.owner != worker or self.ended:
            return False
        if call == "extend":
            self.expired = False
        elif call in {"complete", "fail"}:
            self.ended = call
        else:
            self.owner = None
        return True


def orders_by_engine() -> list[Order]:
    """Return the orders of two workers whose steps are transactions of their own."""
    found: list[Order] = []
    for mine, other in itertools.product(ENDS, ("complete", "release")):
        for first in (("a claim", f"a {mine}"), ("a claim", "a extend", f"a {mine}")):
            found += with_expiry(merged(first, ("b claim", f"b {other}")))
    return [order for order in found if time_matters(order)]


def time_matters(order: Order) -> bool:
    """Return True if a lease expires wherever time passes; if not, the order is redundant."""
    model = Model()
    return all(model.step(step) or step != EXPIRY for step in order)


def test_every_order_of_two_workers(database: Database) -> None:
    """By engine every step does what it should, given those before it; nothing ends twice."""
    engine, orders = quick_engine(database), orders_by_engine()
    assert len(orders) == len(set(orders)) > 400
    jobs = make_counted(engine, len(orders))
    expected: list[tuple[int, str | None]] = []
    seen: Counter[tuple[str, bool]] = Counter()
    for number, order in enumerate(orders, 1):
        model = Model()
        claims: dict[str, Claim[Any]] = {}
        for step in order:
            should = model.step(step)
            if step == EXPIRY:
                with engine.begin() as connection:
                    expire(connection, jobs, number)
                continue
            worker, call = step.split()
            if call == "claim":
                this = jobs.table.c.id == number
                claims[worker] = claim_jobs(engine, jobs, where=this, lease=LEASE, worker=worker)
                done = bool(claims[worker])
            else:
                done = worker in claims and attempt(call, engine, claims[worker])
            assert done is should, (order, step)
            seen[call, done] += 1
            if done and call == "complete":
                expected.append((number, claims[worker].token))
        owner = [claims[model.owner].token] if model.owner and not model.ended else []
        assert owners(engine, claims.values()) == owner, order
    assert sorted(completions(engine)) == sorted(expected)
    # Each call has been granted and refused, so nothing of this was passed over.
    assert set(seen) == set(itertools.product(["claim", *CALLS], [True, False]))


@dataclass
class Stage:
    """A row, a worker with transactions of its own, and one that comes and goes by engine.

    What has to wait for the first worker's transaction is done, in its turn, when that is over.
    """

    database: Database
    engine: sa.Engine
    jobs: JobTable
    number: int
    threads: ThreadPoolExecutor
    claims: dict[str, Claim[Any]] = field(default_factory=dict)
    results: dict[str, bool] = field(default_factory=dict)
    completed: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    blocked: Future[bool] | None = None
    holds: bool = False
    time_passed: bool = False
    waits: int = 0

    def play(self, order: Order) -> None:
        """Perform the steps of an order."""
        with self.engine.connect() as connection:
            for step in order:
                worker, _, call = step.partition(" ")
                if step == EXPIRY:
                    self.expire(connection)
                elif worker == "b":
                    self.waiting.append(call)
                    self.go_on()
                elif call in {"commit", "rollback"}:
                    self.end(connection, call)
                else:
                    self.results[step] = granted = self.call(connection, worker, call)
                    self.holds = granted or self.locks_what_it_refuses(call)

    def call(self, bind: Any, worker: str, call: str) -> bool:
        """Perform a call of a worker's; whether it was granted."""
        if call == "claim":
            this = self.jobs.table.c.id == self.number
            claim = claim_jobs(bind, self.jobs, where=this, lease=LEASE, worker=worker)
            self.claims[worker] = claim
            return bool(claim)
        return bool(self.claims.get(worker)) and attempt(call, bind, self.claims[worker])

    def locks_what_it_refuses(self, call: str) -> bool:
        """Return True if a refused call keeps a lock: SQLite's file lock or InnoDB's row lock."""
        if self.database.name == "sqlite":
            return call == "claim" or bool(self.claims.get("a"))
        return self.database.name != "postgresql" and call == "complete"

    def go_on(self) -> None:
        """Perform what the second worker has to do, as far as it gets."""
        while self.waiting and self.blocked is None:
            call = self.waiting[0]
            future = self.threads.submit(self.in_own_transaction, call)
            wait([future], 0.01)
            wait_until(partial(self.is_settled, future))
            if not future.done():
                self.blocked = future
            elif isinstance(future.exception(), ClaimConflict):
                assert self.holds
                assert self.database.name == "sqlite"
                return
            else:
                self.note(future)

    def note(self, future: Future[bool]) -> None:
        """Keep what became of the second worker's call, which is committed."""
        call = self.waiting.pop(0)
        self.results[f"b {call}"] = granted = future.result(timeout=30)
        if granted and call == "complete":
            self.completed.append("b")

    def in_own_transaction(self, call: str) -> bool:
        """Perform a call by engine, where trying again does not take any time."""
        with hurried():
            return self.call(self.engine, "b", call)

    def is_settled(self, future: Future[bool]) -> bool:
        """Return True if the second worker's call has ended or waits for a lock."""
        may_wait = self.holds and self.database.name != "sqlite"
        return future.done() or (may_wait and self.database.lock_waiters() > 0)

    def expire(self, connection: sa.Connection) -> None:
        """Let the lease run out, on a connection that can write to the row."""
        if self.holds:
            expire(connection, self.jobs, self.number)
            self.time_passed = True
            return
        with self.engine.begin() as other:
            expire(other, self.jobs, self.number)

    def end(self, connection: sa.Connection, how: str) -> None:
        """End the first worker's transaction, and let the second go on."""
        getattr(connection, how)()
        self.holds = False
        if how == "rollback" and self.time_passed and self.blocked is None:
            # What time did is not undone.
            self.expire(connection)
        self.time_passed = False
        if how == "commit" and self.results.get("a complete"):
            self.completed.append("a")
        if self.blocked is not None:
            blocked, self.blocked = self.blocked, None
            self.note(blocked)
            self.waits += 1
        self.go_on()


def orders_by_session() -> list[Order]:
    """Return the orders of two transactions, kept or rolled back, and a worker by engine."""
    found: list[Order] = []
    for first, second in itertools.product(("commit", "rollback"), repeat=2):
        steps = ("a claim", f"a {first}", "a complete", f"a {second}")
        found += with_expiry(merged(steps, ("b claim", "b complete")))
    return found


def test_every_order_of_a_session_and_a_worker(database: Database) -> None:
    """Whatever is committed, undone or waited for: one owner, one completion, and nothing lost."""
    engine, orders = quick_engine(database), orders_by_session()
    assert len(orders) == len(set(orders)) == 480
    jobs = make_counted(engine, len(orders))
    expected: list[tuple[int, str | None]] = []
    seen: Counter[tuple[str, bool]] = Counter()
    waits = 0
    with ThreadPoolExecutor(1) as threads:
        for number, order in enumerate(orders, 1):
            stage = Stage(database, engine, jobs, number, threads)
            stage.play(order)
            assert stage.waiting == []
            owned = owners(engine, stage.claims.values())
            assert len(owned) + len(stage.completed) <= 1, order
            if EXPIRY not in order and stage.results["b claim"]:
                assert stage.completed == ["b"], order
            seen.update(stage.results.items())
            waits += stage.waits
            if stage.completed:
                finisher = stage.claims[stage.completed[0]]
            else:
                with engine.begin() as connection:
                    expire(connection, jobs, number)
                finisher = claim_jobs(engine, jobs, where=jobs.table.c.id == number, lease=LEASE)
                assert complete_jobs(engine, finisher) == 1, order
            expected.append((number, finisher.token))
    assert sorted(completions(engine)) == sorted(expected)
    calls = [f"{worker} {call}" for worker in "ab" for call in ("claim", "complete")]
    assert set(seen) == set(itertools.product(calls, [True, False]))
    assert (waits > 0) is (database.name != "sqlite")


@pytest.mark.databases("mysql", "mariadb")
@pytest.mark.parametrize("meanwhile", ["extend", "complete", "claim"])
def test_between_the_look_and_the_lock(database: Database, meanwhile: str) -> None:
    """A row that was free when a claim looked, and is not when it locks, is left alone."""
    engine, others = database.engine(), database.engine()
    jobs = make_counted(engine, 1)
    owner = claim_jobs(others, jobs, lease=LEASE)
    with others.begin() as connection:
        expire(connection, jobs, 1)
    owners: list[Claim[Any]] = []

    @sa.event.listens_for(engine, "after_cursor_execute")
    def act(*arguments: Any) -> None:
        if "ORDER BY" in arguments[2] and not owners:
            if meanwhile == "claim":
                owners.append(claim_jobs(others, jobs, lease=LEASE))
            else:
                owners.append(owner)
                assert attempt(meanwhile, others, owner)

    assert claim_jobs(engine, jobs, lease=LEASE) == []
    assert len(owners) == 1
    assert attempt("complete", others, owners[0]) is (meanwhile != "complete")
    assert completions(others) == [(1, owners[0].token)]
