"""Trap 21: a claim counts only after COMMIT, and a COMMIT may fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from atomic_claim import ClaimConflict, claim_jobs
from tests.databases import Database
from tests.jobs import OWN, bound, code_of, fill, hurried, ids, job_table, taken

# What each database says when a COMMIT fails and the transaction should be tried again.
REFUSALS = {
    "sqlite": "database is locked",
    "postgresql": "40001",
    "mysql": 1213,
    "mariadb": 1213,
}
REFUSING_TRIGGER = """
    CREATE SEQUENCE commits;
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        -- A sequence is not rolled back, so it counts the commits that failed.
        IF nextval('commits') <= {times} THEN
            RAISE EXCEPTION 'certification failed' USING ERRCODE = '40001';
        END IF;
        RETURN NULL;
    END $$;
    CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON jobs
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse();
"""
REFUSAL = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'certification failed'"

each_own = pytest.mark.parametrize("kind", OWN)


@contextmanager
def refused_commits(database: Database, engine: sa.Engine, times: int) -> Iterator[list[Any]]:
    """Have the first commits of an engine refused by the database; what is yielded counts them.

    PostgreSQL's are by a deferred trigger, SQLite's by a reader of the file. MySQL and MariaDB do
    what a Galera node does when COMMIT is due: they roll back and give the error 1213.
    """
    errors: list[Any] = []
    sa.event.listen(
        engine, "handle_error", lambda context: errors.append(code_of(context.original_exception))
    )
    with database.engine().connect() as other:
        if database.name == "postgresql":
            other.exec_driver_sql(REFUSING_TRIGGER.format(times=times))
            other.commit()
        elif database.name == "sqlite":
            other.exec_driver_sql("BEGIN")
            other.execute(sa.text("SELECT count(*) FROM jobs")).all()
            sa.event.listen(
                engine, "handle_error", lambda _: len(errors) >= times and other.rollback()
            )
        else:

            @sa.event.listens_for(engine, "commit")
            def _(connection: sa.Connection) -> None:
                if len(errors) < times:
                    connection.exec_driver_sql("ROLLBACK")
                    connection.exec_driver_sql(REFUSAL)

        yield errors


def impatient(database: Database, *, begins: bool = False) -> sa.Engine:
    """Create an engine without lock waits; a listener makes each claim a BEGIN ... COMMIT."""
    options = {"connect_args": {"timeout": 0}} if database.name == "sqlite" else {}
    engine = database.engine(**options)
    if begins:
        sa.event.listen(engine, "begin", lambda _: None)
    return engine


@pytest.mark.parametrize("begins", [False, True], ids=["as it likes", "by BEGIN"])
@each_own
def test_a_refused_commit_is_tried_again(database: Database, kind: str, begins: bool) -> None:
    """Two commits fail, the third does not, and each row is handed out once."""
    others, table, engine = database.engine(), job_table(), impatient(database, begins=begins)
    fill(others, table, 6)
    with bound(engine, kind) as bind, refused_commits(database, engine, 2) as errors:
        assert ids(claim_jobs(bind, table, 2)) == [1, 2]
        assert errors == [REFUSALS[database.name]] * 2
        assert taken(others, table) == [1, 2]
        assert ids(claim_jobs(bind, table, 5)) == [3, 4, 5, 6]
    assert len(errors) == 2


@each_own
def test_nothing_is_returned_if_no_commit_succeeds(database: Database, kind: str) -> None:
    """Where every commit fails the conflict comes out, no row does, and all rows stay free."""
    others, table, engine = database.engine(), job_table(), impatient(database)
    fill(others, table, 3)
    with (
        hurried(),
        bound(engine, kind) as bind,
        refused_commits(database, engine, 100) as errors,
        pytest.raises(ClaimConflict, match="roll back, and claim"),
    ):
        claim_jobs(bind, table, 2)
    assert len(errors) == 8
    assert taken(others, table) == []


@each_own
@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_nothing_is_returned_if_the_connection_ends_at_commit(
    database: Database, kind: str
) -> None:
    """A connection that is gone before COMMIT leaves the rows free for the next claim."""
    others, table, engine = database.engine(), job_table(), impatient(database, begins=True)
    fill(others, table, 3)

    def end(connection: sa.Connection) -> None:
        name = "pg_backend_pid()" if database.name == "postgresql" else "connection_id()"
        number = connection.scalar(sa.text(f"SELECT {name}"))
        how = "SELECT pg_terminate_backend(%d)" if database.name == "postgresql" else "KILL %d"
        with others.connect() as killer:
            killer.exec_driver_sql(how % number)

    sa.event.listen(engine, "commit", end)
    with bound(engine, kind) as bind:
        with pytest.raises(OperationalError) as raised:
            claim_jobs(bind, table, 2)
        assert raised.value.connection_invalidated
        sa.event.remove(engine, "commit", end)
        assert ids(claim_jobs(bind, table, 2)) == [1, 2]


def test_rows_may_be_in_hand_before_a_commit_fails(database: Database) -> None:
    """The twin: who starts work on two rows before COMMIT shares them with the next worker."""
    others, table, engine = database.engine(), job_table(), impatient(database)
    fill(others, table, 6)
    free = sa.select(table.c.id).where(table.c.processing == sa.false()).limit(2)
    free = free.order_by(table.c.id).with_for_update(skip_locked=True)

    def started(worker: sa.Connection) -> list[int]:
        found = list(worker.scalars(free))
        worker.execute(table.update().where(table.c.id.in_(found)).values(processing=True))
        return found

    with refused_commits(database, engine, 1) as errors, engine.connect() as worker:
        assert started(worker) == [1, 2]
        with pytest.raises(DBAPIError):
            worker.commit()
        worker.invalidate()
        assert errors == [REFUSALS[database.name]]
        with others.begin() as another:
            assert started(another) == [1, 2]


@each_own
@pytest.mark.databases("sqlite")
def test_a_refused_commit_leaves_nothing_behind(database: Database, kind: str) -> None:
    """Where a claim takes several statements, what a refused COMMIT left open is rolled back."""
    others, table, engine = database.engine(), job_table(), impatient(database)
    fill(others, table, 6)
    with bound(engine, kind) as bind, refused_commits(database, engine, 2):
        assert ids(claim_jobs(bind, table, 2, order_by=[table.c.note, table.c.id])) == [1, 2]
    assert taken(others, table) == [1, 2]


@pytest.mark.databases("sqlite")
def test_sqlalchemy_gives_the_open_transaction_back(database: Database) -> None:
    """The twin: after a refused COMMIT the pool hands on the open transaction, to be committed."""
    table, engine = job_table(), impatient(database)
    fill(database.engine(), table, 6)
    with refused_commits(database, engine, 1):
        with engine.connect() as worker:
            worker.execute(table.update().where(table.c.id <= 2).values(processing=True))
            with pytest.raises(OperationalError, match="database is locked"):
                worker.commit()
        with engine.begin() as next_user:
            assert next_user.connection.driver_connection.in_transaction
    assert taken(database.engine(), table) == [1, 2]


@pytest.mark.databases("sqlite")
def test_returning_comes_before_the_commit_in_autocommit(database: Database) -> None:
    """The twin: one statement in autocommit hands out its first row, then fails to commit."""
    table, engine = job_table(), impatient(database)
    fill(database.engine(), table, 6)
    with refused_commits(database, engine, 1), engine.connect() as worker:
        driver = worker.connection.driver_connection
        driver.isolation_level = None
        cursor = driver.execute("UPDATE jobs SET processing = 1 WHERE id <= 2 RETURNING id")
        assert cursor.fetchone() == (1,)
        with pytest.raises(driver.OperationalError, match="database is locked"):
            cursor.fetchall()
    assert taken(database.engine(), table) == []
