"""Trap 5: SKIP LOCKED does not skip what another worker committed after the snapshot."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError

from atomic_claim import ClaimConflict, ClaimError, claim_jobs
from atomic_claim.execution import TRIES
from tests.databases import Database
from tests.jobs import (
    CALLERS,
    OWN,
    bound,
    code_of,
    fill,
    hurried,
    ids,
    in_thread,
    job_table,
    taken,
)

LEVELS = ["REPEATABLE READ", "SERIALIZABLE"]
CHANGED, LOCK_WAIT_TIMEOUT, DEADLOCK = 1020, 1205, 1213
CURE = "roll back, and claim again in a new transaction"

at_both_levels = pytest.mark.parametrize("level", LEVELS)
each_caller = pytest.mark.parametrize("kind", CALLERS)
each_own = pytest.mark.parametrize("kind", OWN)


def strict(database: Database, level: str = "REPEATABLE READ") -> sa.Engine:
    """Create an engine whose transactions cannot lock rows newer than their snapshot."""
    options: dict[str, Any] = {}
    if database.name == "mariadb":
        options["connect_args"] = {"init_command": "SET innodb_snapshot_isolation = ON"}
    return database.engine(isolation_level=level, **options)


def when_begun(
    engine: sa.Engine, times: int, then: Callable[[sa.Connection], Any]
) -> list[sa.Connection]:
    """Let something happen in an engine's first transactions; what is returned counts all."""
    begun: list[sa.Connection] = []

    def listener(connection: sa.Connection) -> None:
        begun.append(connection)
        if len(begun) <= times:
            then(connection)

    sa.event.listen(engine, "begin", listener)
    return begun


def after_snapshots(
    engine: sa.Engine, table: sa.Table, times: int, then: Callable[[], Any]
) -> list[sa.Connection]:
    """In the first transactions of an engine, let something happen once they have a snapshot."""

    def look_then_let(connection: sa.Connection) -> None:
        connection.execute(sa.select(sa.func.count()).select_from(table))
        then()

    return when_begun(engine, times, look_then_let)


def check_conflict_then_claim(database: Database, engine: sa.Engine, kind: str) -> None:
    """Assert that a claim on a stale snapshot conflicts, and succeeds after a rollback."""
    table = job_table()
    fill(database.engine(), table, 6)
    with bound(engine, kind) as bind:
        bind.execute(sa.select(table.c.id)).all()
        assert ids(claim_jobs(database.engine(), table, 3)) == [1, 2, 3]
        with pytest.raises(ClaimConflict, match=CURE):
            claim_jobs(bind, table, 2)
        bind.rollback()
        assert ids(claim_jobs(bind, table, 2)) == [4, 5]
        bind.commit()
    assert taken(database.engine(), table) == [1, 2, 3, 4, 5]


def check_tried_again(database: Database, engine: sa.Engine, kind: str) -> None:
    """Assert that a claim in its own transaction succeeds at the third attempt."""
    table = job_table()
    fill(database.engine(), table, 6)
    others = database.engine()
    begun = after_snapshots(engine, table, 2, lambda: claim_jobs(others, table, 2))
    with bound(engine, kind) as bind:
        assert ids(claim_jobs(bind, table, 2)) == [5, 6]
    assert len(begun) == 3
    assert taken(others, table) == [1, 2, 3, 4, 5, 6]


@each_caller
@at_both_levels
@pytest.mark.databases("postgresql")
def test_the_callers_transaction_gets_a_conflict(database: Database, level: str, kind: str) -> None:
    """In the caller's transaction it is a `ClaimConflict` that says what to do, which helps."""
    check_conflict_then_claim(database, strict(database, level), kind)


@each_caller
@pytest.mark.databases("mariadb")
def test_mariadbs_snapshot_isolation_is_treated_alike(database: Database, kind: str) -> None:
    """MariaDB's error 1020, the default from 11.6.2 on, is a `ClaimConflict` too."""
    check_conflict_then_claim(database, strict(database), kind)


@each_own
@at_both_levels
@pytest.mark.databases("postgresql")
def test_our_own_transaction_is_tried_again(database: Database, level: str, kind: str) -> None:
    """By an engine or a sessionmaker the claim is repeated until it meets no conflict."""
    check_tried_again(database, strict(database, level), kind)


@each_own
@pytest.mark.databases("mariadb")
def test_mariadb_is_tried_again_too(database: Database, kind: str) -> None:
    """A claim by engine or sessionmaker is also retried after MariaDB's error 1020."""
    check_tried_again(database, strict(database), kind)


@at_both_levels
@pytest.mark.databases("postgresql")
def test_it_is_tried_again_without_a_listener(database: Database, level: str) -> None:
    """The same within one statement: another worker commits between its snapshot and its locks."""
    engine, others, table = strict(database, level), database.engine(), job_table()
    fill(others, table, 3)
    errors: list[Any] = []
    sa.event.listen(
        engine, "handle_error", lambda context: errors.append(code_of(context.original_exception))
    )
    gate = sa.func.pg_advisory_xact_lock(1)
    passed = sa.select(sa.cast(gate, sa.Text)).scalar_subquery().is_not(None)
    with others.connect() as gatekeeper:
        gatekeeper.execute(sa.select(gate))
        with in_thread(lambda: claim_jobs(engine, table, 1, where=passed)) as claiming:
            database.wait_until_blocked()
            assert ids(claim_jobs(others, table, 1)) == [1]
            gatekeeper.rollback()
    assert ids(claiming.result()) == [2]
    assert errors == ["40001"]


def check_bounded(database: Database, engine: sa.Engine, kind: str) -> None:
    """Another worker comes first every time."""
    table = job_table()
    fill(database.engine(), table, 20)
    others = database.engine()
    begun = after_snapshots(engine, table, 100, lambda: claim_jobs(others, table, 1))
    with hurried(), bound(engine, kind) as bind, pytest.raises(ClaimConflict, match=CURE):
        claim_jobs(bind, table, 1)
    assert len(begun) == TRIES == 8
    assert taken(others, table) == [1, 2, 3, 4, 5, 6, 7, 8]


@each_own
@pytest.mark.databases("postgresql", "mariadb")
def test_tries_are_bounded(database: Database, kind: str) -> None:
    """After eight tries in vain the conflict comes out, and nothing of ours was claimed."""
    check_bounded(database, strict(database), kind)


@at_both_levels
@pytest.mark.databases("postgresql")
def test_skip_locked_fails_raw(database: Database, level: str) -> None:
    """The twin: the plain statement raises `could not serialize access`, and is not repeated."""
    assert raw_error(database, strict(database, level)) == "40001"


@pytest.mark.databases("mariadb")
def test_skip_locked_fails_raw_on_mariadb(database: Database) -> None:
    """The twin: MariaDB raises 1020, `Record has changed since last read`."""
    assert raw_error(database, strict(database)) == CHANGED


def raw_error(database: Database, engine: sa.Engine) -> Any:
    """Return the code of a plain locking read's error on rows claimed since the snapshot."""
    table = job_table()
    fill(database.engine(), table, 6)
    query = sa.select(table.c.id).where(table.c.processing == sa.false())
    query = query.order_by(table.c.id).limit(2).with_for_update(skip_locked=True)
    with engine.connect() as worker:
        worker.execute(sa.select(table.c.id)).all()
        claim_jobs(database.engine(), table, 3)
        with pytest.raises(DBAPIError) as raised:
            worker.execute(query)
    return code_of(raised.value)


@pytest.mark.parametrize("held", [[], [1, 2]], ids=["nothing held", "two held"])
@pytest.mark.parametrize("kind", ["session", "engine"])
@pytest.mark.databases("mysql", "mariadb")
def test_serializable_is_refused_where_plain_reads_lock(
    database: Database, kind: str, held: list[int]
) -> None:
    """At SERIALIZABLE InnoDB's plain reads wait for other workers' rows, so the claim refuses."""
    engine = impatient(database).execution_options(isolation_level="SERIALIZABLE")
    table = job_table()
    fill(database.engine(), table, 6)
    with bound(engine, kind) as bind, database.engine().connect() as other, hurried():
        other.execute(table.select().where(table.c.id.in_(held)).with_for_update()).all()
        with pytest.raises(ClaimError, match="SERIALIZABLE") as raised:
            claim_jobs(bind, table, 2)
    assert not isinstance(raised.value, ClaimConflict)
    assert taken(database.engine(), table) == []


@pytest.mark.databases("mysql", "mariadb")
@pytest.mark.parametrize("kind", CALLERS)
def test_serializable_is_refused_on_an_empty_queue_too(database: Database, kind: str) -> None:
    """Nor is it found out only once there are jobs: the empty read keeps producers out."""
    engine = impatient(database).execution_options(isolation_level="SERIALIZABLE")
    table = job_table()
    fill(engine, table, 1, processing=True)
    with bound(engine, kind) as bind, pytest.raises(ClaimError, match="SERIALIZABLE"):
        claim_jobs(bind, table, 1)


@pytest.mark.databases("mysql", "mariadb")
def test_a_plain_read_waits_at_serializable(database: Database) -> None:
    """The twin: while a worker holds two rows, the next one's candidate read times out."""
    engine = impatient(database).execution_options(isolation_level="SERIALIZABLE")
    table = job_table()
    fill(engine, table, 6)
    free = sa.select(table.c.id).where(table.c.processing == sa.false())
    with engine.connect() as a, engine.connect() as b:
        a.execute(free.limit(2).with_for_update(skip_locked=True)).all()
        with pytest.raises(DBAPIError) as raised:
            b.execute(free)
    assert code_of(raised.value) == LOCK_WAIT_TIMEOUT


def with_owners(database: Database) -> tuple[sa.Engine, sa.Table, sa.Table]:
    """Three jobs that may have an owner, by a foreign key, and two owners."""
    engine = database.engine()
    jobs = job_table(sa.Column("owner_id", sa.ForeignKey("owners.id")))
    owners = sa.Table("owners", jobs.metadata, sa.Column("id", sa.Integer, primary_key=True))
    fill(engine, jobs, 3)
    with engine.begin() as connection:
        connection.execute(owners.insert(), [{"id": 1}, {"id": 2}])
    return engine, jobs, owners


@contextmanager
def deadlock(
    database: Database, engine: sa.Engine, owners: sa.Table
) -> Iterator[list[sa.Connection]]:
    """Have the first transaction of an engine run into a deadlock when it refers to owner 1.

    Another connection holds owner 1 and waits for owner 2, which that transaction has locked.
    """
    hold = sa.select(owners.c.id).with_for_update()
    with ExitStack() as stack:
        other = stack.enter_context(database.engine().connect())
        if database.name == "postgresql":
            # Who detects it is the victim.
            other.execute(sa.text("SET LOCAL deadlock_timeout = '10min'"))
        else:
            # InnoDB's victim is the one who has done less.
            other.execute(owners.insert(), [{"id": number} for number in range(100, 300)])
        other.execute(hold.where(owners.c.id == 1))

        def wait_for_the_second_owner() -> None:
            other.execute(hold.where(owners.c.id == 2))
            other.rollback()

        def let_the_other_wait(connection: sa.Connection) -> None:
            if database.name == "postgresql":
                connection.execute(sa.text("SET LOCAL deadlock_timeout = '10ms'"))
            connection.execute(hold.where(owners.c.id == 2))
            stack.enter_context(in_thread(wait_for_the_second_owner))
            database.wait_until_blocked()

        yield when_begun(engine, 1, let_the_other_wait)


@each_own
@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_a_deadlock_is_tried_again(database: Database, kind: str) -> None:
    """The victim of a deadlock claims at its second try, when it is a transaction of our own."""
    others, jobs, owners = with_owners(database)
    engine = database.engine()
    with deadlock(database, engine, owners) as begun, bound(engine, kind) as bind:
        assert ids(claim_jobs(bind, jobs, 1, values={"owner_id": 1})) == [1]
    assert len(begun) == 2
    assert taken(others, jobs) == [1]


@each_caller
@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_a_deadlock_in_the_callers_transaction(database: Database, kind: str) -> None:
    """The caller's transaction gets a `ClaimConflict`, and claims after a rollback."""
    _, jobs, owners = with_owners(database)
    engine = database.engine()
    with deadlock(database, engine, owners), bound(engine, kind) as bind:
        with pytest.raises(ClaimConflict, match=CURE):
            claim_jobs(bind, jobs, 1, values={"owner_id": 1})
        bind.rollback()
        assert ids(claim_jobs(bind, jobs, 1, values={"owner_id": 1})) == [1]


@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_a_deadlock_comes_out_raw(database: Database) -> None:
    """The twin: a plain UPDATE in the same place is the victim, by the database's own error."""
    _, jobs, owners = with_owners(database)
    engine = database.engine()
    with (
        deadlock(database, engine, owners),
        engine.connect() as worker,
        pytest.raises(DBAPIError) as raised,
    ):
        worker.execute(jobs.update().where(jobs.c.id == 1).values(owner_id=1))
    assert code_of(raised.value) in {"40P01", DEADLOCK}


def impatient(database: Database) -> sa.Engine:
    """Create an engine with a short lock timeout."""
    options: dict[str, dict[str, Any]] = {
        "sqlite": {"timeout": 0},
        "postgresql": {"options": "-c lock_timeout=100ms"},
    }
    # MySQL has no shorter time.
    seconds = 0 if database.name == "mariadb" else 1
    init = {"init_command": f"SET innodb_lock_wait_timeout = {seconds}"}
    return database.engine(connect_args=options.get(database.name, init))


@dataclass
class Holder:
    """A connection that holds what a claim needs, and lets go at the claim's first error."""

    connection: sa.Connection
    errors: list[Any] = field(default_factory=list)

    def hold(self, owners: sa.Table) -> None:
        """Hold owner 1; on SQLite that is the whole database."""
        values = {"id": 99}
        self.connection.execute(sa.select(owners).where(owners.c.id == 1).with_for_update())
        self.connection.execute(owners.insert().values(values))

    def let_go(self, context: Any) -> None:
        """Note the error and end the transaction."""
        self.errors.append(context.original_exception)
        self.connection.rollback()


@pytest.mark.parametrize("kind", ["session", "engine"])
def test_a_lock_that_is_not_had_in_time(database: Database, kind: str) -> None:
    """A lock's timeout is tried again, or told to the owner of the transaction as a conflict."""
    others, jobs, owners = with_owners(database)
    engine = impatient(database)
    with others.connect() as connection, bound(engine, kind) as bind:
        holder = Holder(connection)
        sa.event.listen(engine, "handle_error", holder.let_go)
        holder.hold(owners)
        if kind in CALLERS:
            with pytest.raises(ClaimConflict, match="roll back, and claim"):
                claim_jobs(bind, jobs, 1, values={"owner_id": 1})
            bind.rollback()
        assert ids(claim_jobs(bind, jobs, 1, values={"owner_id": 1})) == [1]
    assert len(holder.errors) == 1


def test_a_lock_that_is_not_had_in_time_comes_out_raw(database: Database) -> None:
    """The twin: a plain UPDATE fails by the database's own error."""
    others, jobs, owners = with_owners(database)
    engine = impatient(database)
    with others.connect() as connection, engine.connect() as worker:
        Holder(connection).hold(owners)
        with pytest.raises(DBAPIError) as raised:
            worker.execute(jobs.update().where(jobs.c.id == 1).values(owner_id=1))
    expected = {"sqlite": "database is locked", "postgresql": "55P03"}
    assert code_of(raised.value) == expected.get(database.name, LOCK_WAIT_TIMEOUT)


@each_own
def test_other_errors_are_not_tried_again(database: Database, kind: str) -> None:
    """An error that no retry can resolve is raised at once, as the database's own error."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 3)
    begun = when_begun(engine, 0, lambda _: None)
    missing = sa.literal_column("missing", sa.Integer)
    errors = (ProgrammingError, OperationalError)
    with bound(engine, kind) as bind, pytest.raises(errors, match="missing"):
        claim_jobs(bind, table, 1, order_by=missing)
    # Once more, row by row.
    assert len(begun) == 2
    assert taken(engine, table) == []
