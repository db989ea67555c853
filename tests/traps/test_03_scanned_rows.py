"""Trap 3: MySQL and MariaDB lock what they scan, not what they return."""

import pytest
import sqlalchemy as sa
from sqlalchemy import Index
from sqlalchemy.exc import OperationalError

from atomic_claim import claim_jobs
from tests.databases import Database
from tests.jobs import START, ids, job_table, rows

FREE, ALL = 20, 1000
LEVELS = ["REPEATABLE READ", "READ COMMITTED"]
INDEXES = {
    "none": [],
    "state": [["processing"]],
    "order": [["created_at"]],
    "state and order": [["processing", "created_at"]],
}
LOCK_WAIT_TIMEOUT = 1205

indexed = pytest.mark.parametrize("index", INDEXES)
at_both_levels = pytest.mark.parametrize("level", LEVELS)


def filled(
    database: Database, index: str, level: str, *, small: bool = False
) -> tuple[sa.Engine, sa.Table]:
    """Create a table whose last twenty rows are free, with up-to-date statistics."""
    options = {} if database.name == "sqlite" else {"isolation_level": level}
    engine = database.engine(**options)
    table = job_table(*(Index(f"jobs_{columns[0]}", *columns) for columns in INDEXES[index]))
    done = 0 if small else ALL - FREE
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        if done:
            connection.execute(table.insert(), rows(done, processing=True))
        connection.execute(table.insert(), rows(FREE, first=done + 1))
    analyze = "ANALYZE TABLE jobs" if database.name in {"mysql", "mariadb"} else "ANALYZE"
    with engine.connect() as connection:
        connection.execute(sa.text(analyze))
        connection.commit()
    return engine, table


def insert_at_once(connection: sa.Connection, table: sa.Table, number: int) -> None:
    """Insert as a producer that fails where it would have to wait."""
    connection.execute(sa.text("SET innodb_lock_wait_timeout = 1"))
    values = rows(1, first=number)[0]
    connection.execute(table.insert(), values | {"created_at": START})


@indexed
@at_both_levels
@pytest.mark.parametrize("small", [False, True], ids=["20 of 1000", "20 rows"])
@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_others_get_full_claims_and_producers_pass(
    database: Database, index: str, level: str, small: bool
) -> None:
    """While one worker holds five rows, two others get their full five, and an INSERT passes."""
    engine, table = filled(database, index, level, small=small)
    first = 1 if small else ALL - FREE + 1
    with engine.begin() as a, engine.begin() as b, engine.begin() as c, engine.begin() as producer:
        assert ids(claim_jobs(a, table, 5)) == list(range(first, first + 5))
        assert ids(claim_jobs(b, table, 5)) == list(range(first + 5, first + 10))
        if database.name != "postgresql":
            insert_at_once(producer, table, ALL + 1)
        else:
            producer.execute(sa.text("SET lock_timeout = '1s'"))
            producer.execute(table.insert(), rows(1, first=ALL + 1))
        assert ids(claim_jobs(c, table, 5)) == list(range(first + 10, first + 15))


@at_both_levels
@pytest.mark.databases("mysql", "mariadb")
def test_an_ordered_locking_read_hides_the_queue(database: Database, level: str) -> None:
    """The twin: ORDER BY ... LIMIT ... SKIP LOCKED locks every row it sorts; the next gets 0."""
    engine, table = filled(database, "none", level, small=True)
    query = sa.select(table.c.id).where(table.c.processing == sa.false())
    query = query.order_by(table.c.created_at).limit(5).with_for_update(skip_locked=True)
    with engine.begin() as a, engine.begin() as b, engine.begin() as producer:
        assert len(a.execute(query).all()) == 5
        assert b.execute(query).all() == []
        if level == "REPEATABLE READ":
            with pytest.raises(OperationalError) as raised:
                insert_at_once(producer, table, ALL + 1)
            assert raised.value.orig.args[0] == LOCK_WAIT_TIMEOUT


@pytest.mark.databases("mysql", "mariadb")
def test_a_lock_by_key_goes_through_another_index(database: Database) -> None:
    """The twin of FORCE INDEX: the optimiser prefers (state, order), and the next gets 0."""
    engine, table = filled(database, "state and order", "REPEATABLE READ")
    free = list(range(ALL - FREE + 1, ALL + 1))

    def lock(connection: sa.Connection, keys: list[int]) -> list[int]:
        query = sa.select(table.c.id).where(table.c.id.in_(keys))
        query = query.where(table.c.processing == sa.false()).with_for_update(skip_locked=True)
        return list(connection.scalars(query))

    with engine.begin() as a, engine.begin() as b:
        assert sorted(lock(a, free[:5])) == free[:5]
        assert lock(b, free[5:10]) == []


@pytest.mark.databases("mysql", "mariadb")
def test_a_hint_for_mysql_is_lost_on_mariadb(database: Database) -> None:
    """The twin of the two names: a hint said for "mysql" alone is not rendered for mariadb://."""
    engine, table = database.engine(), job_table()
    query = sa.select(table.c.id).with_hint(table, "FORCE INDEX (PRIMARY)", "mysql")
    rendered = "FORCE INDEX" in str(query.compile(engine))
    assert rendered == (database.name == "mysql")
