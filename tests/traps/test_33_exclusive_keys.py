"""Trap 33: a look that is older than the lock of the key, or a lock that ends before the commit.

The rule is: whatever makes or keeps a row running locks the key first, looks for running rows in
a later statement that reads committed data, and keeps the lock until the commit. Each step that
can come between is driven by hand here, and each has a twin that breaks the rule.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any, Self

import pymysql
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import sessionmaker

from atomic_claim import (
    ClaimConflict,
    ClaimLost,
    JobTable,
    claim_jobs,
    complete_jobs,
    extend_jobs,
    lifecycle,
    predicates,
)
from atomic_claim.backends import Transaction, mysql, named_lock, sqlite
from atomic_claim.backends.advisory import AdvisoryLocks
from atomic_claim.backends.base import KeyLocks
from atomic_claim.backends.by_key import KeySearch
from tests.databases import Database, end_connection
from tests.exclusive.test_exclusive import LEASE, expire, filled, keyed_table, quick, running
from tests.jobs import ids, in_thread
from tests.stepping import Stepped, commit_after, stopped

SERVERS = pytest.mark.databases("postgresql", "mysql", "mariadb")
INNODB = pytest.mark.databases("mysql", "mariadb")
MARK = "UPDATE jobs"
# What claims rows without a look, and what takes the lock of the key, by database.
LOOKS = {"postgresql": "UPDATE jobs", "sqlite": "claim_given", "mysql": "claim_given"}
LOCKS = {"postgresql": "pg_try_advisory_xact_lock", "mysql": "get_lock"}


def of(texts: dict[str, str], database: Database) -> str:
    """Return the text for a database."""
    return texts["mysql" if database.name == "mariadb" else database.name]


def claims(engine: sa.Engine, jobs: JobTable, number: int) -> Callable[[], list[int]]:
    """Return a claim of one row by its number, as a worker with a filter of its own makes it."""
    return lambda: ids(claim_jobs(engine, jobs, 1, where=jobs.table.c.id == number, lease=LEASE))


def claims_beside(
    database: Database, held: Stepped[Any], call: Callable[[], list[int]]
) -> list[int]:
    """Claim while another call has stopped, which is let go if the claim waits for it."""
    with in_thread(call) as future:
        if database.name == "postgresql":
            found = future.result(60)
            held.go()
            return found
        database.wait_until_blocked()
        held.go()
        return future.result(60)


# The lock ends before the commit.


def test_another_claim_is_not_committed(database: Database) -> None:
    """No other row of its key is claimed, before the commit or after it."""
    jobs = filled(database, [1, 1])
    engine, others = database.engine(), quick(database)
    with stopped(engine, claims(engine, jobs, 1), commit_after(MARK)) as first:
        if database.name == "sqlite":
            # A connection, since an engine would try again.
            with others.connect() as connection, pytest.raises(ClaimConflict):
                claim_jobs(connection, jobs, 2)
        else:
            assert claims_beside(database, first, claims(others, jobs, 2)) == []
        assert first.go() == [1]
    assert claims(others, jobs, 2)() == []
    assert running(engine, jobs) == [1]


@contextmanager
def no_lock(*_: Any) -> Iterator[None]:
    """Hold no lock."""
    yield


def without_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have claims and extensions hold no lock of the key when they commit."""
    for name in ("lock", "held"):
        monkeypatch.setattr(AdvisoryLocks, name, getattr(KeyLocks, name))
    monkeypatch.setattr(mysql, "named_lock", no_lock)


@SERVERS
def test_a_lock_that_ends_before_the_commit(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap: the look cannot see the claim that is not committed."""
    jobs = filled(database, [1, 1])
    engine = database.engine()
    without_lock(monkeypatch)
    with stopped(engine, claims(engine, jobs, 1), commit_after(MARK)) as first:
        assert claims(database.engine(), jobs, 2)() == [2]
        assert first.go() == [1]
    assert running(engine, jobs) == [1, 2]


# The look comes before the lock.


@SERVERS
def test_another_claims_between_search_and_lock(database: Database) -> None:
    """The search saw the key free, and the look does not."""
    jobs = filled(database, [1, 1])
    engine = database.engine()
    with stopped(engine, claims(engine, jobs, 2), of(LOCKS, database)) as second:
        assert claims(database.engine(), jobs, 1)() == [1]
        assert second.go() == []
    assert running(engine, jobs) == [1]


@SERVERS
def test_a_look_before_the_lock(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: what the search saw before the lock is believed after it."""
    jobs = filled(database, [1, 1])
    engine = database.engine()
    without_look(monkeypatch)
    with stopped(engine, claims(engine, jobs, 2), of(LOCKS, database)) as second:
        assert claims(database.engine(), jobs, 1)() == [1]
        assert second.go() == [2]
    assert running(engine, jobs) == [1, 2]


def without_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have claims believe the search."""
    usual = KeySearch._room

    def room(self: KeySearch, rows: Any) -> Any:
        return sa.literal(1) if rows.name == "atomic_claim_placed" else usual(self, rows)

    monkeypatch.setattr(KeySearch, "_room", room)


@pytest.mark.databases("sqlite")
def test_the_write_lock_comes_before_the_search(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No claim comes between search and mark; without the lock two rows run."""
    jobs = filled(database, [1, 1])
    engine = database.engine()
    with stopped(engine, claims(engine, jobs, 2), "claim_given") as second:
        with quick(database).connect() as connection, pytest.raises(ClaimConflict):
            claims(connection, jobs, 1)()  # type: ignore[arg-type]
        assert second.go() == [2]
    complete(engine, jobs, 2)
    engine = database.engine(isolation_level="AUTOCOMMIT")
    monkeypatch.setattr(sqlite.SQLite, "before_search", lambda *_: None)
    monkeypatch.setattr(Transaction, "refuse_autocommit", lambda *_: None)
    with engine.begin() as connection:
        connection.execute(jobs.table.insert(), [{"id": n, "customer_id": 1} for n in (3, 4)])
    with stopped(engine, claims(engine, jobs, 4), MARK) as second:
        assert claims(database.engine(), jobs, 3)() == [3]
        assert second.go() == [4]
    assert running(engine, jobs) == [3, 4]


def complete(engine: sa.Engine, jobs: JobTable, number: int) -> None:
    """End a row as the user's own UPDATE does."""
    with engine.begin() as connection:
        connection.execute(
            sa.update(jobs.table).where(jobs.table.c.id == number).values(state="done")
        )


# A row that is given another key meanwhile.


@SERVERS
def test_a_row_is_moved_to_a_busy_key(database: Database) -> None:
    """The key that was locked is not the row's any more, so the row is passed over."""
    jobs = filled(database, [1, 2])
    engine, others = database.engine(), database.engine()
    before = "UPDATE jobs" if database.name == "postgresql" else "FOR UPDATE"

    def move() -> None:
        """Move row 1 to the key of row 2, which runs."""
        with others.begin() as connection:
            key = sa.update(jobs.table).values(customer_id=2)
            connection.execute(key.where(jobs.table.c.id == 1))
            if database.name != "postgresql":
                running = sa.update(jobs.table).values(state="running")
                connection.execute(running.where(jobs.table.c.id == 2))

    if database.name == "postgresql":
        assert claims(others, jobs, 2)() == [2]
    with stopped(engine, claims(engine, jobs, 1), before) as first:
        move()
        assert first.go() == []
    assert running(engine, jobs) == [2]


# An end that is not committed.


@SERVERS
def test_an_end_that_is_rolled_back(database: Database) -> None:
    """A row whose end is not committed runs still."""
    jobs = filled(database, [1, 1])
    engine = database.engine()
    claim = claim_jobs(engine, jobs, 1, lease=LEASE)
    with engine.connect() as holder:
        complete_jobs(holder, claim)
        assert claims(engine, jobs, 2)() == []
        holder.rollback()
    assert claims(engine, jobs, 2)() == []
    complete_jobs(engine, claim)
    assert claims(engine, jobs, 2)() == [2]


@INNODB
def test_a_dirty_look(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: what is uncommitted says that the key is free, and then it is not."""
    jobs = filled(database, [1, 1])
    engine = database.engine()
    claim = claim_jobs(engine, jobs, 1, lease=LEASE)
    dirty = sa.text("SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED")
    monkeypatch.setattr(mysql, "read_committed", lambda connection: connection.execute(dirty))
    with engine.connect() as holder:
        complete_jobs(holder, claim)
        assert claims(engine, jobs, 2)() == [2]
        holder.rollback()
    assert running(engine, jobs) == [1, 2]


# A lease that runs out.


@SERVERS
def test_a_lease_ends_between_search_and_look(database: Database) -> None:
    """The look says what holds once the key is locked."""
    jobs = filled(database, [1, 1, 2])
    engine = database.engine()
    claim = claim_jobs(engine, jobs, 1, lease=LEASE)
    call = lambda: ids(claim_jobs(engine, jobs, 5, lease=LEASE))  # noqa: E731 - a call
    with stopped(engine, call, of(LOOKS, database)) as second:
        expire(database.engine(), jobs, 1)
        assert second.go() == [3]
    assert ids(claim_jobs(engine, jobs, 5, lease=LEASE)) == [1]
    with pytest.raises(ClaimLost):
        extend_jobs(engine, claim)


def extends(engine: sa.Engine, claim: Any) -> Callable[[], int]:
    """Return an extension."""
    return lambda: extend_jobs(engine, claim, lease=timedelta(hours=2))


@SERVERS
def test_a_lease_ends_between_lock_and_extension(database: Database) -> None:
    """The row may have given its key away, so it is lost."""
    jobs = filled(database, [1, 1])
    engine = database.engine()
    claim = claim_jobs(engine, jobs, 1, lease=LEASE)
    before = "UPDATE" if database.name == "postgresql" else "FOR UPDATE"
    with stopped(engine, extends(engine, claim), before) as extension:
        expire(database.engine(), jobs, 1)
        with pytest.raises(ClaimLost):
            extension.go()
    assert claims(engine, jobs, 2)() == [2]


@SERVERS
def test_an_extension_of_a_lease_that_is_over(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap: the row's token is its own still, and its key another's."""
    jobs = filled(database, [1, 1])
    engine = database.engine()
    claim = claim_jobs(engine, jobs, 1, lease=LEASE)
    expire(engine, jobs, 1)
    assert claims(engine, jobs, 2)() == [2]
    monkeypatch.setattr(lifecycle, "lasting", lifecycle.owning)
    assert extend_jobs(engine, claim, lease=LEASE) == 1
    assert running(engine, jobs) == [1, 2]


class Later(JobTable):
    """The declaration of a worker that claims an hour later."""

    def now(self, column: Any, offset: Any = None, **how: Any) -> Any:
        """Return the database's time in an hour."""
        hour = sa.literal(3600, sa.Float())
        return super().now(column, hour if offset is None else hour + offset, **how)


@SERVERS
def test_an_extension_commits_after_its_lease_has_ended(database: Database) -> None:
    """It holds the key's lock, so no other row of the key is claimed meanwhile."""
    jobs = filled(database, [1, 1])
    engine, others = database.engine(), database.engine()
    claim = claim_jobs(engine, jobs, 1, lease=LEASE)
    later = keyed_table(Later)
    with stopped(engine, extends(engine, claim), commit_after(MARK)) as extension:
        assert claims_beside(database, extension, claims(others, later, 2)) == []
        assert extension.go() == 1
    assert claims(others, later, 2)() == []


@SERVERS
def test_an_extension_that_takes_no_lock(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap: another row of the key is claimed before the extension is committed."""
    jobs = filled(database, [1, 1])
    engine, others = database.engine(), database.engine()
    claim = claim_jobs(engine, jobs, 1, lease=LEASE)
    without_lock(monkeypatch)
    later = keyed_table(Later)
    with stopped(engine, extends(engine, claim), commit_after(MARK)) as extension:
        assert claims(others, later, 2)() == [2]
        assert extension.go() == 1
    held = sa.select(later.table.c.id).where(predicates.is_held(later))
    with engine.connect() as connection:
        assert sorted(connection.scalars(held)) == [1, 2]


# Three at once, and a lost connection.


@SERVERS
def test_three_claimers_get_their_full_shares(database: Database) -> None:
    """Of forty free keys each of three gets ten, though all have searched before any claims."""
    jobs = filled(database, list(range(1, 41)) * 2)
    engines = [database.engine() for _ in range(3)]
    locks = of(LOCKS, database)

    def call(engine: sa.Engine) -> Callable[[], list[int]]:
        return lambda: ids(claim_jobs(engine, jobs, 10, lease=LEASE))

    with ExitStack() as stack:
        # All three have searched, and seen the same; then they lock, one after the other.
        held = [stack.enter_context(stopped(e, call(e), locks)) for e in engines]
        found = [step.go() for step in held]
    assert [len(numbers) for numbers in found] == [10, 10, 10]
    assert sorted(number for numbers in found for number in numbers) == list(range(1, 31))


@SERVERS
def test_a_lost_connection_at_each_message(database: Database) -> None:
    """Whichever message is the last, the claim is made once, and no lock is left."""
    jobs = filled(database, [1, 1, 2, 2])
    ended = 0
    for place in range(40):
        engine = database.engine()
        with KillAt(database, engine, place) as seen:
            found = claim_jobs(engine, jobs, 2, lease=LEASE)
        assert ids(found) == [1, 3]
        assert running(engine, jobs) == [1, 3]
        others = database.engine()
        assert ids(claim_jobs(others, jobs, 4, lease=LEASE)) == []
        with others.begin() as connection:
            connection.execute(sa.update(jobs.table).values(state="waiting", token=None))
        if not seen.has_killed:
            break
        ended += 1
    assert ended >= 6


class KillAt:
    """Kill the connection of an engine before its nth message, counted from 0."""

    def __init__(self, database: Database, engine: sa.Engine, place: int) -> None:
        self.admin = database.engine(isolation_level="AUTOCOMMIT")
        self.engine = engine
        self.left = place
        self.has_killed = False

    def __enter__(self) -> Self:
        sa.event.listen(self.engine, "before_cursor_execute", self.execute)
        sa.event.listen(self.engine, "commit", self.message)
        return self

    def __exit__(self, *_: object) -> None:
        sa.event.remove(self.engine, "before_cursor_execute", self.execute)
        sa.event.remove(self.engine, "commit", self.message)

    def execute(self, connection: sa.Connection, *_: Any) -> None:
        """Count a statement."""
        self.message(connection)

    def message(self, connection: sa.Connection) -> None:
        """Kill before the message if it is the one."""
        self.left -= 1
        if self.left != -1:
            return
        self.has_killed = True
        end_connection(self.admin, connection.connection.driver_connection)


@INNODB
@pytest.mark.parametrize("after", ["get_lock", "UPDATE jobs", "release_lock", "COMMIT"])
def test_a_hook_that_raises(database: Database, after: str) -> None:
    """Wherever it does, neither the lock nor a short lock wait stays with a pooled connection."""
    jobs = filled(database, [1, 1])
    engine = database.engine(pool_size=1)
    claim = claim_jobs(engine, jobs, 1, lease=LEASE)
    for call in (claims(engine, jobs, 2), extends(engine, claim)):
        step = commit_after(MARK) if after == "COMMIT" else lambda statement: after in statement

        def execute(_: Any, __: Any, statement: str, *___: Any) -> None:
            if step(statement):  # noqa: B023 - called within the loop
                raise ZeroDivisionError

        def commit(_: Any) -> None:
            if step("COMMIT"):  # noqa: B023 - called within the loop
                raise ZeroDivisionError

        sa.event.listen(engine, "after_cursor_execute", execute)
        sa.event.listen(engine, "commit", commit)
        with suppress(ZeroDivisionError):
            call()
        sa.event.remove(engine, "after_cursor_execute", execute)
        sa.event.remove(engine, "commit", commit)
        with engine.connect() as connection:
            found = connection.execute(
                sa.text(
                    "SELECT @@innodb_lock_wait_timeout > 1, @@lock_wait_timeout > 1, "
                    "(SELECT count(*) FROM information_schema.innodb_trx "
                    "WHERE trx_mysql_thread_id = connection_id())"
                )
            )
            assert tuple(found.one()) == (1, 1, 0)
    assert claims(database.engine(), jobs, 2)() == []


@INNODB
def test_a_commit_that_is_refused_is_tried_again(database: Database) -> None:
    """The server chose the claim to end a deadlock."""
    jobs = filled(database, [1, 1])
    for kind in (lambda engine: engine, sessionmaker):
        engine = database.engine()
        refusing = engine.dialect.do_commit
        refused = list[bool]()

        def do_commit(driver: Any) -> None:
            if not refused:  # noqa: B023 - called within the loop
                refused.append(True)  # noqa: B023
                driver.rollback()
                raise pymysql.err.OperationalError(1213, "Deadlock found")
            refusing(driver)  # noqa: B023

        engine.dialect.do_commit = do_commit  # type: ignore[method-assign]
        claim = claim_jobs(kind(engine), jobs, 1, lease=LEASE)  # type: ignore[no-untyped-call]
        assert (ids(claim), refused) == ([1], [True])
        complete_jobs(database.engine(), claim)
        with database.engine().begin() as connection:
            connection.execute(sa.update(jobs.table).values(state="waiting", token=None))


@INNODB
def test_a_lock_that_is_not_given_back(database: Database) -> None:
    """A connection that keeps the lock goes back to no pool."""
    jobs = filled(database, [1, 1])
    engine = database.engine()
    with engine.connect() as connection:
        before = connection.connection.dbapi_connection
    with engine.connect() as connection, named_lock.named_lock(connection, jobs.table):
        connection.execute(sa.text("DO RELEASE_ALL_LOCKS()"))
    with engine.connect() as connection:
        assert connection.connection.dbapi_connection is not before
    assert claims(engine, jobs, 1)() == [1]
