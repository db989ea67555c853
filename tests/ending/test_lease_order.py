"""Rows whose lease has run out: their place in the order, and what a claim holds of them."""

from collections.abc import Iterable
from datetime import timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria

from atomic_claim import JobTable, claim_jobs
from atomic_claim.plan import MARGIN
from tests.benchmarks.ground import add_indexes
from tests.databases import Database
from tests.ending.test_lease import made
from tests.jobs import ids, mapped
from tests.traps.test_09_or import plan_of

LEASE = timedelta(minutes=5)


def expire_in_turn(engine: sa.Engine, jobs: JobTable, numbers: Iterable[int]) -> None:
    """Let the leases of these rows have run out, the later ones in this list first."""
    with engine.begin() as connection:
        for place, number in enumerate(numbers, 1):
            past = jobs.now(jobs.lease, sa.literal(-3600.0 - 60 * place, sa.Float()))
            connection.execute(
                jobs.table.update()
                .where(jobs.table.c.id == number)
                .values(processing=True, lease_until=past, claim_token="a" * 32)
            )


@pytest.mark.parametrize("limit", [1, 2, 4, 10])
def test_expired_rows_keep_their_place_in_the_order(database: Database, limit: int) -> None:
    """Neither whether a row is free or expired, nor whose lease ended first, changes the order."""
    engine, jobs = made(database, 10)
    expire_in_turn(engine, jobs, [1, 2, 5, 6, 9])
    found: list[int] = []
    while claim := claim_jobs(engine, jobs, limit, lease=LEASE):
        found += ids(claim)
    assert found == list(range(1, 11))


def test_among_very_many_the_first_to_expire_come_first(database: Database) -> None:
    """Of more expired rows than are looked at, those that expired long ago are put in order."""
    engine, jobs = made(database, 2 * MARGIN)
    expire_in_turn(engine, jobs, range(1, 2 * MARGIN + 1))
    # The first rows expired last: they are the ones that the look does not reach.
    first, second = ids(claim_jobs(engine, jobs, 2, lease=LEASE))
    assert 1 < first <= MARGIN
    assert second == first + 1


@pytest.mark.databases("postgresql", "mysql", "mariadb")
@pytest.mark.parametrize("free", [0, 5, 10], ids="{} free".format)
def test_a_claim_holds_no_more_than_it_returns(database: Database, free: int) -> None:
    """While one worker holds five of ten rows, however many are expired, the next has the rest."""
    engine, jobs = made(database, 10)
    expire_in_turn(engine, jobs, range(free + 1, 11))
    with engine.connect() as first, engine.connect() as second, engine.connect() as third:
        assert ids(claim_jobs(first, jobs, 5, lease=LEASE)) == [1, 2, 3, 4, 5]
        assert ids(claim_jobs(second, jobs, 3, lease=LEASE)) == [6, 7, 8]
        assert ids(claim_jobs(third, jobs, 3, lease=LEASE)) == [9, 10]


@pytest.mark.databases("postgresql")
def test_a_select_for_each_reason_holds_too_much(database: Database) -> None:
    """The twin: locked reason by reason, free rows are held that the claim does not return."""
    engine, jobs = made(database, 10)
    expire_in_turn(engine, jobs, range(1, 6))
    table = jobs.table
    running = table.c.processing.is_(True)
    branches = [
        sa.select(table.c.id).where(reason).limit(5).with_for_update(skip_locked=True)
        for reason in (~running, running & (table.c.lease_until <= jobs.now(jobs.lease)))
    ]
    both = sa.union_all(*(sa.select(branch.subquery()) for branch in branches)).subquery()
    claim = sa.select(both.c.id).order_by(both.c.id).limit(5)
    with engine.connect() as first, engine.connect() as second:
        assert list(first.scalars(claim)) == [1, 2, 3, 4, 5]
        assert list(second.scalars(claim)) == []


@pytest.mark.databases("postgresql", "mysql", "mariadb")
@pytest.mark.parametrize("limit", [1, 20])
def test_a_long_line_of_rows_that_others_hold_is_passed(database: Database, limit: int) -> None:
    """Claims are full, and hold no more than they return, behind more rows than they look at."""
    count = 3 * MARGIN
    engine, jobs = made(database, count + 2 * limit)
    expire_in_turn(engine, jobs, range(2, count + 2 * limit, 2))
    with engine.connect() as first, engine.connect() as second, engine.connect() as third:
        assert len(claim_jobs(first, jobs, count, lease=LEASE)) == count
        one = ids(claim_jobs(second, jobs, limit, lease=LEASE))
        two = ids(claim_jobs(third, jobs, limit, lease=LEASE))
    assert sorted(one + two) == list(range(count + 1, count + 2 * limit + 1))
    assert one == sorted(one)
    assert two == sorted(two)


@pytest.mark.databases("postgresql")
def test_free_rows_alone_are_read_no_farther_than_they_are_locked(database: Database) -> None:
    """Where no lease has run out, a claim reads the rows that others hold, and its own."""
    engine, jobs = made(database, 10 * MARGIN)
    add_indexes(engine, jobs)
    with engine.connect() as holder:
        held = len(claim_jobs(holder, jobs, MARGIN // 2, lease=LEASE))
        plan = plan_of(engine, 1, lambda bind: claim_jobs(bind, jobs, 1, lease=LEASE))
    # Its own is looked at, locked and marked.
    assert plan.effort <= held + 3


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("limit", [1, 2, 4])
def test_a_session_with_criteria_keeps_the_order(database: Database, limit: int) -> None:
    """Where a listener adds to a session's SELECTs, it adds to all of the claim's."""
    engine, jobs = made(database, 12)
    job_class = mapped(jobs.table)
    arguments = {name: getattr(jobs, name) for name in ("done", "order", "token", "lease")}
    jobs = JobTable(job_class, state="processing", **arguments)
    expire_in_turn(engine, jobs, [1, 2, 5, 6, 9, 12])

    def add(state: ORMExecuteState) -> None:
        own = with_loader_criteria(job_class, job_class.id <= 10)
        state.statement = state.statement.options(own)

    found: list[int] = []
    with Session(engine) as session, Session(engine) as other:
        sa.event.listen(session, "do_orm_execute", add)
        sa.event.listen(other, "do_orm_execute", add)
        while claim := claim_jobs(session, jobs, limit, lease=LEASE):
            found += ids(claim)
            if len(found) == limit:
                # What the first claim has not returned, it does not hold.
                rest = ids(claim_jobs(other, jobs, 10, lease=LEASE))
                assert rest == list(range(limit + 1, 11))
                other.rollback()
    assert found == list(range(1, 11))
