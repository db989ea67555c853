"""Trap 6: at REPEATABLE READ the candidates come from a snapshot that may be old."""

from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from atomic_claim import ClaimConflict, claim_jobs
from tests.databases import Database
from tests.jobs import CALLERS, bound, code_of, fill, ids, job_table, rows, taken
from tests.statements import sent_by

pytestmark = pytest.mark.databases("mysql", "mariadb")

CHANGED, LOCK_WAIT_TIMEOUT = 1020, 1205

each_caller = pytest.mark.parametrize("kind", CALLERS)


def repeatable(database: Database, *settings: str, level: str = "REPEATABLE READ") -> sa.Engine:
    """Create an engine at REPEATABLE READ with a short lock timeout."""
    commands = ", ".join(["innodb_lock_wait_timeout = 1", *settings])
    return database.engine(isolation_level=level, connect_args={"init_command": f"SET {commands}"})


def take_snapshot(bind: Any, table: sa.Table) -> list[int]:
    """Begin the caller's transaction with a look at the queue."""
    free = sa.select(table.c.id).where(table.c.processing == sa.false()).order_by(table.c.id)
    return list(bind.execute(free).scalars())


def claimed_and_refilled(engine: sa.Engine, table: sa.Table) -> None:
    """Another worker takes all twenty rows and commits; a producer adds three."""
    assert len(claim_jobs(engine, table, 20)) == 20
    fill(engine, table, 3, first=21)


def producer_and_worker_pass(engine: sa.Engine, table: sa.Table, number: int) -> None:
    """Insert a row, and complete a row that is being worked on, without waiting."""
    with engine.begin() as producer:
        producer.execute(table.insert(), rows(1, first=number))
    with engine.begin() as worker:
        worker.execute(table.update().where(table.c.id == 1).values(note="done"))


@each_caller
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_what_is_newer_than_the_snapshot_is_claimed(
    database: Database, kind: str, limit: int
) -> None:
    """All that the snapshot shows is taken; the claim finds the three rows that came after it."""
    engine, table = repeatable(database), job_table()
    fill(engine, table, 20)
    with bound(engine, kind) as bind:
        assert len(take_snapshot(bind, table)) == 20
        claimed_and_refilled(engine, table)
        assert sorted(ids(claim_jobs(bind, table, limit))) == [21, 22, 23][:limit]
        bind.commit()
    assert taken(engine, table) == list(range(1, min(limit, 3) + 21))


@each_caller
def test_a_few_of_the_snapshot_are_left(database: Database, kind: str) -> None:
    """Rows of the snapshot that are still free come first, then newer ones, none twice."""
    engine, table = repeatable(database), job_table()
    fill(engine, table, 20)
    with bound(engine, kind) as bind:
        take_snapshot(bind, table)
        assert len(claim_jobs(engine, table, 18)) == 18
        fill(engine, table, 3, first=21)
        assert ids(claim_jobs(bind, table, 5)) == [19, 20, 21, 22, 23]


@each_caller
def test_what_was_deleted_meanwhile_does_not_hide_newer_rows(database: Database, kind: str) -> None:
    """It finds them too where workers delete what they have done."""
    engine, table = repeatable(database), job_table()
    fill(engine, table, 20)
    with bound(engine, kind) as bind:
        take_snapshot(bind, table)
        with engine.begin() as worker:
            worker.execute(table.delete())
        fill(engine, table, 3, first=21)
        assert ids(claim_jobs(bind, table, 5)) == [21, 22, 23]


def test_a_plain_read_misses_them(database: Database) -> None:
    """The twin: candidates from the snapshot, then a lock by key: 5 seen, 0 got, 3 missed."""
    engine, table = repeatable(database), job_table()
    fill(engine, table, 20)
    free = sa.select(table.c.id).where(table.c.processing == sa.false())
    with engine.connect() as worker:
        take_snapshot(worker, table)
        claimed_and_refilled(engine, table)
        candidates = list(worker.scalars(free.order_by(table.c.created_at).limit(5)))
        lock = free.where(table.c.id.in_(candidates)).with_for_update(skip_locked=True)
        assert candidates == [1, 2, 3, 4, 5]
        assert list(worker.scalars(lock)) == []
    assert len(take_snapshot(engine.connect(), table)) == 3


@each_caller
def test_an_empty_queue_locks_nothing(database: Database, kind: str) -> None:
    """With an old snapshot of an empty queue the claim is empty and blocks no other."""
    engine, table = repeatable(database), job_table()
    fill(engine, table, 3, processing=True)
    with bound(engine, kind) as bind:
        assert take_snapshot(bind, table) == []
        producer_and_worker_pass(engine, table, 4)
        assert ids(claim_jobs(bind, table, 5)) == []
        producer_and_worker_pass(engine, table, 5)
        assert ids(claim_jobs(engine, table, 5)) == [4, 5]


@each_caller
def test_rows_that_others_hold_are_no_sign_of_age(database: Database, kind: str) -> None:
    """Candidates that are locked by others do not make the claim lock the rest."""
    engine, table = repeatable(database), job_table()
    fill(engine, table, 1, processing=True)
    fill(engine, table, 3, first=2)
    with bound(engine, kind) as bind, engine.begin() as other:
        assert len(take_snapshot(bind, table)) == 3
        assert ids(claim_jobs(other, table, 5)) == [2, 3, 4]
        assert ids(claim_jobs(bind, table, 5)) == []
        with engine.begin() as worker:
            worker.execute(table.update().where(table.c.id == 1).values(note="done"))


@pytest.mark.parametrize("level", ["REPEATABLE READ", "READ COMMITTED"])
def test_producers_pass_where_others_hold_the_last_row(database: Database, level: str) -> None:
    """A claim that skips the last row of the table does not block inserts after it."""
    engine, table = repeatable(database, level=level), job_table()
    fill(engine, table, 4)
    with engine.begin() as other, engine.begin() as bind:
        assert ids(claim_jobs(other, table, 4)) == [1, 2, 3, 4]
        assert ids(claim_jobs(bind, table, 4)) == []
        with engine.begin() as producer:
            producer.execute(table.insert(), rows(1, first=5))


ORDERS: dict[str, Any] = {
    "the key's order": lambda table: table.c.id,
    "backwards": lambda table: table.c.id.desc(),
    "another order": lambda table: (table.c.id * 7919) % 1009,
}


@pytest.mark.parametrize("order", ORDERS)
def test_many_rows_that_others_hold_are_passed_over_soon(database: Database, order: str) -> None:
    """Behind workers that hold 50 rows each a claim of 50 is full, soon, and holds no more."""
    engine, table = repeatable(database), job_table()
    fill(engine, table, 300)
    order_by = ORDERS[order](table)
    with ExitStack() as stack:
        held: set[int] = set()
        for _ in range(3):
            worker = stack.enter_context(engine.connect())
            held.update(ids(claim_jobs(worker, table, 50, order_by=order_by)))
        bind = stack.enter_context(engine.connect())
        sent = sent_by(engine)
        found = ids(claim_jobs(bind, table, 50, order_by=order_by))
        assert len(found) == 50
        assert held.isdisjoint(found)
        assert len(sent) < 45
        others = stack.enter_context(engine.connect())
        rest = ids(claim_jobs(others, table, 300, order_by=order_by))
        assert sorted([*held, *found, *rest]) == list(range(1, 301))


def test_a_skipped_row_leaves_a_locked_gap(database: Database) -> None:
    """The twin: SKIP LOCKED by key locks the gap behind the row that it skips."""
    engine, table = repeatable(database), job_table()
    fill(engine, table, 4)
    last = sa.select(table.c.id).where(table.c.id == 4)
    with engine.begin() as other, engine.begin() as worker:
        other.execute(last.with_for_update()).all()
        assert worker.execute(last.with_for_update(skip_locked=True)).all() == []
        with pytest.raises(OperationalError) as raised, engine.begin() as producer:
            producer.execute(table.insert(), rows(1, first=5))
    assert code_of(raised.value) == LOCK_WAIT_TIMEOUT


def test_a_locking_read_is_in_everybodys_way(database: Database) -> None:
    """The twin: reading the latest at once finds nothing either, and locks producers out."""
    engine, table = repeatable(database), job_table()
    fill(engine, table, 3, processing=True)
    free = sa.select(table.c.id).where(table.c.processing == sa.false())
    with engine.connect() as worker:
        assert worker.execute(free.limit(5).with_for_update(skip_locked=True)).all() == []
        with pytest.raises(OperationalError) as raised:
            producer_and_worker_pass(engine, table, 4)
    assert code_of(raised.value) == LOCK_WAIT_TIMEOUT


@each_caller
@pytest.mark.databases("mariadb")
def test_snapshot_isolation_makes_it_a_conflict(database: Database, kind: str) -> None:
    """Where MariaDB refuses to lock what is newer than the snapshot, it is a `ClaimConflict`."""
    engine, table = repeatable(database, "innodb_snapshot_isolation = ON"), job_table()
    fill(engine, table, 20)
    with bound(engine, kind) as bind:
        take_snapshot(bind, table)
        claimed_and_refilled(engine, table)
        with pytest.raises(ClaimConflict, match="roll back, and claim again"):
            claim_jobs(bind, table, 5)
        bind.rollback()
        assert ids(claim_jobs(bind, table, 5)) == [21, 22, 23]


@pytest.mark.databases("mariadb")
def test_snapshot_isolation_fails_raw(database: Database) -> None:
    """The twin: locking the candidates by key raises error 1020."""
    engine, table = repeatable(database, "innodb_snapshot_isolation = ON"), job_table()
    fill(engine, table, 20)
    with engine.connect() as worker:
        candidates = take_snapshot(worker, table)
        claimed_and_refilled(engine, table)
        lock = sa.select(table.c.id).where(table.c.id.in_(candidates))
        with pytest.raises(OperationalError) as raised:
            worker.execute(lock.with_for_update(skip_locked=True))
    assert code_of(raised.value) == CHANGED
