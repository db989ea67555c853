"""Trap 7: a SQLite transaction that has read may not write, and WITH does not begin one."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from atomic_claim import ClaimConflict, claim_jobs, claim_statement
from tests.databases import Database
from tests.jobs import (
    BINDS,
    CALLERS,
    OWN,
    bound,
    fill,
    hurried,
    ids,
    in_thread,
    job_table,
    mapped,
    soon,
    taken,
)

pytestmark = pytest.mark.databases("sqlite")

# Longer than `soon` waits for what must not wait for a lock.
PATIENCE = 40

each_caller = pytest.mark.parametrize("kind", CALLERS)
each_journal = pytest.mark.parametrize("journal", ["delete", "wal"])


def patient(
    database: Database, *, seconds: float = PATIENCE, begin: str | None = None
) -> sa.Engine:
    """Create an engine with a busy timeout that can emit its own BEGIN, as SQLAlchemy advises."""
    engine = database.engine(connect_args={"timeout": seconds})
    if begin is not None:

        @sa.event.listens_for(engine, "connect")
        def _(driver: Any, _: object) -> None:
            driver.isolation_level = None

        @sa.event.listens_for(engine, "begin")
        def _(connection: sa.Connection) -> None:
            connection.exec_driver_sql(begin)

    return engine


def filled(database: Database, journal: str = "delete") -> sa.Table:
    """Six free rows in a file with this kind of journal."""
    table = job_table()
    with database.engine().connect() as connection:
        connection.exec_driver_sql(f"PRAGMA journal_mode = {journal}")
    fill(database.engine(), table, 6)
    return table


def mark(connection: sa.Connection, table: sa.Table, *numbers: int) -> None:
    """Take the write lock and mark rows as claimed, the way another program would."""
    connection.execute(table.update().where(table.c.id.in_(numbers)).values(processing=True))


@each_journal
@pytest.mark.parametrize("kind", BINDS)
def test_as_first_statement_the_claim_waits_and_wins(
    database: Database, journal: str, kind: str
) -> None:
    """It waits for another writer to commit, and claims what that writer left."""
    table, engine = filled(database, journal), patient(database)
    sent = threading.Event()
    sa.event.listen(engine, "before_cursor_execute", lambda *_: sent.set())

    def claim() -> list[int]:
        with bound(engine, kind) as bind:
            return ids(claim_jobs(bind, table, 2))

    with patient(database).connect() as other:
        mark(other, table, 1, 2)
        with in_thread(claim) as claiming:
            assert sent.wait(PATIENCE)
            # Who does not wait is turned away, so the claim is waiting.
            with patient(database, seconds=0).connect() as hasty, pytest.raises(ClaimConflict):
                claim_jobs(hasty, table, 2)
            assert not claiming.done()
            other.commit()
    assert claiming.result() == [3, 4]


def test_a_writer_that_outlasts_the_busy_timeout_is_a_conflict(database: Database) -> None:
    """The claim waits for the busy timeout of its connection, and no longer."""
    table = filled(database)
    with patient(database).connect() as other, patient(database, seconds=0.2).connect() as bind:
        mark(other, table, 1)
        with pytest.raises(ClaimConflict, match="claim as the first statement"):
            claim_jobs(bind, table, 2)


@each_caller
@pytest.mark.parametrize("limit", [1, 3])
def test_after_a_read_it_is_a_conflict_at_once(database: Database, kind: str, limit: int) -> None:
    """After a read and another's commit the claim says at once what to do, which then helps."""
    table, engine = filled(database, "wal"), patient(database, begin="BEGIN")
    with bound(engine, kind) as bind:
        bind.execute(sa.select(table)).all()
        assert ids(claim_jobs(patient(database), table, 2)) == [1, 2]
        with pytest.raises(ClaimConflict, match="roll back, and claim as the first statement"):
            soon(lambda: claim_jobs(bind, table, limit))
        bind.rollback()
        assert ids(claim_jobs(bind, table, limit)) == [3, 4, 5][:limit]


@each_journal
def test_after_a_read_it_does_not_wait_for_a_writer(database: Database, journal: str) -> None:
    """A writer that is still at work makes it a conflict at once too, or both would wait."""
    table, engine = filled(database, journal), patient(database, begin="BEGIN")
    with engine.connect() as bind, patient(database).connect() as other:
        bind.execute(sa.select(table)).all()
        mark(other, table, 1, 2)
        with pytest.raises(ClaimConflict, match="claim as the first statement"):
            soon(lambda: claim_jobs(bind, table, 1))
        bind.rollback()
        other.commit()
        assert ids(claim_jobs(bind, table, 1)) == [3]


@each_caller
def test_begin_immediate_makes_a_read_before_harmless(database: Database, kind: str) -> None:
    """Where the transaction took the write lock when it began, it may read first."""
    table, engine = filled(database, "wal"), patient(database, begin="BEGIN IMMEDIATE")
    with bound(engine, kind) as bind:
        bind.execute(sa.select(table)).all()
        with patient(database, seconds=0).connect() as hasty, pytest.raises(ClaimConflict):
            claim_jobs(hasty, table, 2)
        assert ids(claim_jobs(bind, table, 2)) == [1, 2]


@pytest.mark.parametrize("kind", BINDS)
@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN IMMEDIATE"])
def test_claims_of_several_statements_under_the_recipe(
    database: Database, begin: str, kind: str
) -> None:
    """A driver in autocommit whose engine begins by itself does have transactions to claim in."""
    table, engine = filled(database), patient(database, begin=begin)
    with bound(engine, kind) as bind:
        assert ids(claim_jobs(bind, table, 2, order_by=[table.c.note, table.c.id])) == [1, 2]
        if kind in CALLERS:
            bind.rollback()
    assert taken(database.engine(), table) == ([] if kind in CALLERS else [1, 2])


def test_a_reader_that_writes_fails_raw(database: Database) -> None:
    """The twin: `database is locked` at once, for all the 40 s that the connection would wait."""
    table, engine = filled(database, "wal"), patient(database, begin="BEGIN")
    with engine.connect() as worker:
        worker.execute(sa.select(table)).all()
        claim_jobs(patient(database), table, 2)
        with pytest.raises(OperationalError, match="database is locked"):
            soon(lambda: mark(worker, table, 3))


def wanted_ids(table: sa.Table) -> sa.ColumnElement[bool]:
    """Build a condition that makes a statement begin with WITH."""
    wanted = sa.select(table.c.id).where(table.c.id > 1).cte("wanted")
    return table.c.id.in_(sa.select(wanted.c.id))


def value_of(table: sa.Table) -> Any:
    """Build a value that makes a statement begin with WITH."""
    shortest = sa.select(sa.func.min(table.c.note).label("note")).cte("shortest")
    return sa.select(shortest.c.note).scalar_subquery()


SHAPES: dict[str, Callable[[sa.Table], dict[str, Any]]] = {
    "one": lambda table: {"limit": 1, "where": wanted_ids(table)},
    "several": lambda table: {"limit": 2, "where": wanted_ids(table)},
    "by key": lambda table: {
        "limit": 2,
        "where": wanted_ids(table),
        "order_by": [table.c.note, table.c.id],
    },
    "in the order": lambda table: {
        "limit": 2,
        "order_by": [sa.case((wanted_ids(table), 0), else_=1), table.c.id],
    },
    "in a value": lambda table: {
        "limit": 2,
        "where": table.c.id > 1,
        "values": {"note": value_of(table)},
    },
}
each_shape = pytest.mark.parametrize("shape", SHAPES)


@each_shape
@each_caller
def test_a_claim_that_starts_with_with_is_undone(database: Database, kind: str, shape: str) -> None:
    """After a rollback nothing stays claimed, and until then others wait."""
    table = filled(database)
    with bound(patient(database), kind) as bind:
        found = ids(claim_jobs(bind, table, **SHAPES[shape](table)))
        assert found == [2, 3][: len(found)]
        with patient(database, seconds=0).connect() as hasty, pytest.raises(ClaimConflict):
            claim_jobs(hasty, table, 1)
        bind.rollback()
    assert taken(database.engine(), table) == []


@each_shape
@pytest.mark.parametrize("kind", OWN)
def test_a_claim_that_starts_with_with_is_kept(database: Database, kind: str, shape: str) -> None:
    """By engine and sessionmaker it is committed when it returns."""
    table = filled(database)
    with bound(patient(database), kind) as bind:
        found = ids(claim_jobs(bind, table, **SHAPES[shape](table)))
    assert found == [2, 3][: len(found)]
    assert taken(database.engine(), table) == found


def test_a_claim_statement_that_starts_with_with_is_undone(database: Database) -> None:
    """A construct that begins with WITH and is executed by the caller can be rolled back too."""
    table = filled(database)
    with Session(patient(database)) as session:
        statement = claim_statement(mapped(table), 2, where=wanted_ids(table))
        assert sorted(ids(session.scalars(statement))) == [2, 3]
        session.rollback()
    assert taken(database.engine(), table) == []


def test_a_raw_with_is_not_undone(database: Database) -> None:
    """The twin: sqlite3 begins nothing for WITH, so two rows stay claimed after the rollback."""
    table = filled(database)
    claim = table.update().where(wanted_ids(table), table.c.id < 4).values(processing=True)
    with Session(patient(database)) as session:
        assert len(session.execute(claim.returning(table.c.id)).all()) == 2
        session.rollback()
    assert taken(database.engine(), table) == [2, 3]


def test_a_commit_that_a_reader_keeps_from_the_file(database: Database) -> None:
    """A failed COMMIT leaves the transaction open; the pool does not get it back like this."""
    table = job_table()
    engine = patient(database, seconds=0)
    fill(engine, table, 3)
    reading = database.engine().connect()
    rows = reading.connection.cursor()
    rows.execute("SELECT id FROM jobs")
    rows.fetchone()
    # Several statements in a transaction, since the order is an expression.
    order = sa.func.lower(table.c.note)
    with hurried(), pytest.raises(ClaimConflict):
        claim_jobs(engine, table, 2, order_by=order)
    rows.close()
    reading.close()
    pooled = engine.raw_connection()
    assert not pooled.driver_connection.in_transaction  # type: ignore[union-attr]
    pooled.close()
    assert len(claim_jobs(database.engine(), table, 3)) == 3
