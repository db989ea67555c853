"""Trap 4: in AUTOCOMMIT the row locks are gone before the rows are marked."""

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, String

from atomic_claim import ClaimError, JobTable, claim_jobs
from tests.databases import Database
from tests.jobs import CALLERS, OWN, bound, fill, ids, job_table, taken


def by_create_engine(database: Database) -> sa.Engine:
    """Create an engine in AUTOCOMMIT."""
    return database.engine(isolation_level="AUTOCOMMIT")


def by_execution_options(database: Database) -> sa.Engine:
    """Copy an engine with `execution_options` that set AUTOCOMMIT."""
    return database.engine().execution_options(isolation_level="AUTOCOMMIT")


def by_the_driver(database: Database) -> sa.Engine:
    """Create an engine whose autocommit is set on the driver's connections only."""
    engine = database.engine()

    @sa.event.listens_for(engine, "checkout")
    def _(driver: Any, *_: object) -> None:
        if database.name in {"mysql", "mariadb"}:
            driver.autocommit(True)
        elif database.name == "postgresql":
            driver.autocommit = True
        else:
            driver.isolation_level = None

    return engine


each_way = pytest.mark.parametrize(
    "make", [by_create_engine, by_execution_options, by_the_driver], ids=lambda way: way.__name__
)


@each_way
@pytest.mark.databases("mysql", "mariadb")
def test_it_is_refused_where_locks_must_last(
    database: Database, make: Callable[[Database], sa.Engine]
) -> None:
    """A claim under AUTOCOMMIT, wherever it was set, is refused and writes nothing."""
    table, engine = job_table(), make(database)
    fill(database.engine(), table, 10)
    for kind in CALLERS:
        with bound(engine, kind) as bind, pytest.raises(ClaimError, match="AUTOCOMMIT") as raised:
            claim_jobs(bind, table, 5)
        assert 'isolation_level="READ COMMITTED"' in str(raised.value)
    assert taken(database.engine(), table) == []


@each_way
def test_own_transactions_begin_all_the_same(
    database: Database, make: Callable[[Database], sa.Engine]
) -> None:
    """A transaction of the call's own is one, and the connection is in AUTOCOMMIT afterwards."""
    table, engine = job_table(), make(database)
    fill(database.engine(), table, 10)
    for first, kind in zip((1, 4), OWN, strict=True):
        with bound(engine, kind) as bind:
            assert ids(claim_jobs(bind, table, 3)) == [first, first + 1, first + 2]
        with engine.connect() as connection:
            driver = connection.connection.dbapi_connection
            assert driver is not None
            assert engine.dialect.detect_autocommit_setting(driver)
    assert taken(database.engine(), table) == list(range(1, 7))


@pytest.mark.databases("mysql", "mariadb")
def test_the_driver_of_one_connection_is_asked(database: Database) -> None:
    """It is refused on a connection that only the driver knows to be in autocommit, no other."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 10)
    with engine.connect() as sly, engine.connect() as honest:
        sly.connection.driver_connection.autocommit(True)
        assert sly.get_isolation_level() != "AUTOCOMMIT"
        with pytest.raises(ClaimError, match="AUTOCOMMIT"):
            claim_jobs(sly, table, 5)
        assert ids(claim_jobs(honest, table, 5)) == [1, 2, 3, 4, 5]


@each_way
@pytest.mark.databases("sqlite", "postgresql")
def test_one_statement_needs_no_transaction(
    database: Database, make: Callable[[Database], sa.Engine]
) -> None:
    """A claim of one statement with a token is allowed; one without could not be traced."""
    table, engine = job_table(Column("claim_token", String(32))), make(database)
    fill(database.engine(), table, 16)
    without = JobTable(table, state="processing")
    for first, kind in zip((1, 5), CALLERS, strict=True):
        with bound(engine, kind) as a, bound(engine, kind) as b:
            assert ids(claim_jobs(a, table, 2)) == [first, first + 1]
            assert ids(claim_jobs(b, table, 2)) == [first + 2, first + 3]
            with pytest.raises(ClaimError, match="AUTOCOMMIT"):
                claim_jobs(a, without, 2)
    assert taken(database.engine(), table) == list(range(1, 9))


@each_way
def test_the_sequence_hands_rows_out_twice(
    database: Database, make: Callable[[Database], sa.Engine]
) -> None:
    """The twin: lock, then mark, in AUTOCOMMIT; two workers hold the same five rows."""
    table = job_table()
    fill(database.engine(), table, 10)
    lock = sa.select(table.c.id).where(table.c.processing == sa.false(), table.c.id <= 5)
    lock = lock.order_by(table.c.id).with_for_update(skip_locked=True)
    mark = table.update().values(processing=True)
    engine = make(database)
    with engine.connect() as a, engine.connect() as b:
        found = [list(worker.scalars(lock)) for worker in (a, b)]
        marked = [
            worker.execute(mark.where(table.c.id.in_(keys))).rowcount
            for worker, keys in zip((a, b), found, strict=True)
        ]
    assert found == [[1, 2, 3, 4, 5]] * 2
    assert marked == [5, 5]
