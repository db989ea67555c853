"""Claims that go to the driver's own cursor: nobody can tell them from those by SQLAlchemy."""

import logging
import re
import signal
import threading
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, String

from atomic_claim import Claim, JobTable, claim_jobs
from tests.databases import Database
from tests.jobs import fill, ids, job_table, taken
from tests.waiting import wait_until

pytestmark = pytest.mark.databases("sqlite", "postgresql", "mysql", "mariadb")
limited = pytest.mark.parametrize("limit", [1, 3])
# Parts are claimed so often by SQLAlchemy before it is left out.
FIRST = 2


class NotDirect(Exception):
    """SQLAlchemy was asked to execute something."""


@pytest.fixture
def no_detour(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes SQLAlchemy refuse all further `execute` calls."""

    def refuse(*_: Any, **__: Any) -> None:
        raise NotDirect

    return lambda: monkeypatch.setattr(sa.Connection, "execute", refuse)


def claimed_before(engine: sa.Engine, table: Any, limit: int, **options: Any) -> None:
    """Claim as often as SQLAlchemy is needed for it."""
    for _ in range(FIRST):
        assert len(claim_jobs(engine, table, limit, **options)) == limit


def typed_table() -> sa.Table:
    """Build a job table of many types, with one column whose key differs from its name."""
    return job_table(
        Column("given name", String(20), key="given"),
        Column("price", sa.Numeric(10, 2)),
        Column("ratio", sa.Float),
        Column("day", sa.Date),
        Column("hour", sa.Time),
        Column("flag", sa.Boolean),
        Column("uuid", sa.Uuid),
        Column("blob", sa.LargeBinary),
    )


@limited
def test_rows_are_those_of_sqlalchemy(database: Database, no_detour: Any, limit: int) -> None:
    """Values, their types, and the ways to get at them are the same, NULLs included."""
    engine, watched, table = database.engine(), database.engine(), typed_table()
    values = {
        "given": "ann",
        "price": sa.literal("12.50").cast(sa.Numeric(10, 2)),
        "ratio": 0.25,
        "day": sa.func.date("2024-02-03") if database.name == "sqlite" else sa.text("'2024-02-03'"),
        "flag": True,
        "blob": b"\x00\xff",
        "uuid": uuid.UUID(int=7),
        "hour": sa.text("'01:02:03.000000'"),
    }
    fill(engine, table, 20)
    with engine.begin() as connection:
        connection.execute(table.update().where(table.c.id % 2 == 0).values(values))
    claimed_before(engine, table, limit)
    again = table.update().values(processing=False)
    expected = claim_jobs(watched, table, limit)
    expected = expected + claim_jobs(watched, table, limit)
    with engine.begin() as connection:
        connection.execute(again.where(table.c.id.in_(ids(expected))))
    no_detour()
    found = [*claim_jobs(engine, table, limit), *claim_jobs(engine, table, limit)]
    assert found == expected
    assert len(found) == 2 * limit
    for one, other in zip(found, expected, strict=True):
        assert [type(value) for value in one] == [type(value) for value in other]
        assert one._fields == other._fields
        assert one._asdict() == other._asdict()
        assert one.given == one._mapping[table.c.given] == other.given


def test_a_listener_has_sqlalchemy_execute(database: Database, no_detour: Any) -> None:
    """The twin: where somebody listens, SQLAlchemy executes."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 9)
    claimed_before(engine, table, 1)
    sa.event.listen(engine, "after_execute", lambda *_: None)
    no_detour()
    with pytest.raises(NotDirect):
        claim_jobs(engine, table)


@pytest.mark.parametrize("event", ["before_cursor_execute", "after_cursor_execute", "commit"])
def test_a_late_listener_hears_of_the_next_claim(database: Database, event: str) -> None:
    """A listener that is added after many claims is called for each later one."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 9)
    claimed_before(engine, table, 1)
    claim_jobs(engine, table)
    heard: list[Any] = []
    sa.event.listen(engine, event, lambda *arguments: heard.append(arguments))
    assert ids(claim_jobs(engine, table)) == [FIRST + 2]
    innodb = database.name in {"mysql", "mariadb"}
    assert len(heard) == (4 if innodb and event != "commit" else 1)


def test_a_log_is_kept(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Nor is a claim missing in SQLAlchemy's log."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 9)
    claimed_before(engine, table, 1)
    with caplog.at_level(logging.INFO, "sqlalchemy.engine"):
        claim_jobs(engine, table)
    assert any("UPDATE jobs" in record.getMessage() for record in caplog.records)


@limited
def test_parameters_are_each_claim_s_own(database: Database, no_detour: Any, limit: int) -> None:
    """Worker, token and lease are written as given each time."""
    engine = database.engine()
    table = job_table(
        Column("worker", String(20)),
        Column("claim_token", String(32)),
        Column("lease_until", DateTime(timezone=True)),
        Column("attempts", Integer, nullable=False, default=0),
    )
    fill(engine, table, 20)
    claimed_before(engine, table, limit, worker="first", lease=timedelta(hours=1))
    no_detour()
    claims: list[Claim[Any]] = [
        claim_jobs(engine, table, limit, worker=f"w{turn}", lease=timedelta(hours=turn))
        for turn in (2, 5)
    ]
    for claim, turn in zip(claims, (2, 5), strict=True):
        assert {job.worker for job in claim} == {f"w{turn}"}
        assert {job.claim_token for job in claim} == {claim.token}
        assert {job.attempts for job in claim} == {1}
    later, earlier = claims[1][0].lease_until, claims[0][0].lease_until
    assert timedelta(hours=2.9) < later - earlier < timedelta(hours=3.1)
    assert ids(claims[0] + claims[1]) == list(range(FIRST * limit + 1, (FIRST + 2) * limit + 1))


def test_constants_of_equal_statements(database: Database, no_detour: Any) -> None:
    """Two declarations that differ in nothing but a constant keep their own."""
    engine, table = database.engine(), job_table(Column("owner", String(10)))
    fill(engine, table, 9, owner="ann")
    fill(engine, table, 9, first=10, owner="bob")
    both = {
        name: JobTable(
            table,
            free=(table.c.owner == name) & (table.c.processing == sa.false()),
            claimed={"processing": True},
        )
        for name in ("ann", "bob")
    }
    for declared in both.values():
        claimed_before(engine, declared, 2)
    no_detour()
    for name, declared in both.items():
        assert {job.owner for job in claim_jobs(engine, declared, 2)} == {name}


def test_limits_are_each_claim_s_own(database: Database, no_detour: Any) -> None:
    """Any number of limits is served, and an empty queue."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 300)
    claimed_before(engine, table, 2)
    no_detour()
    found = [len(claim_jobs(engine, table, limit)) for limit in (3, 7, 2, 40, 200, 250, 5)]
    assert found == [3, 7, 2, 40, 200, 44, 0]


def test_more_limits_than_are_remembered(
    database: Database, monkeypatch: pytest.MonkeyPatch, no_detour: Any
) -> None:
    """The texts of old limits are forgotten."""
    monkeypatch.setattr("atomic_claim.backends.direct.MOST_TEXTS", 2)
    engine, table = database.engine(), job_table()
    fill(engine, table, 60)
    claimed_before(engine, table, 2)
    no_detour()
    limits = (2, 3, 4, 5, 2, 3, 4, 5)
    assert [len(claim_jobs(engine, table, limit)) for limit in limits] == list(limits)


def test_an_error_is_sqlalchemy_s(database: Database) -> None:
    """A database error is raised as SQLAlchemy's, and the engine can be used afterwards."""
    engine = database.engine(pool_size=1, max_overflow=0)
    table = job_table(sa.Index("one", "note", unique=True), Column("note_too", Integer))
    declared = JobTable(
        table, state="processing", free=False, claimed={"processing": True, "note": "busy"}
    )
    free = table.update().values(processing=False, note=None)
    fill(engine, table, 3)
    for _ in range(FIRST + 1):
        assert ids(claim_jobs(engine, declared)) == [1]
        with engine.begin() as connection:
            connection.execute(free)
    assert ids(claim_jobs(engine, declared)) == [1]
    with pytest.raises(sa.exc.IntegrityError, match=r"(?s)\[SQL: .*UPDATE jobs"):
        claim_jobs(engine, declared)
    with engine.begin() as connection:
        connection.execute(free)
    assert ids(claim_jobs(engine, declared)) == [1]


@pytest.mark.parametrize("begin", [False, True], ids=["direct", "by SQLAlchemy"])
@pytest.mark.databases("postgresql")
def test_a_value_that_the_driver_cannot_read(database: Database, begin: bool) -> None:
    """It raises the same, and no other row is claimed in its place."""
    engine, table = database.engine(), job_table(Column("until", DateTime))
    fill(engine, table, 9)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET until = 'infinity' WHERE id = 3")
    claimed_before(engine, table, 1)
    if begin:
        sa.event.listen(engine, "after_execute", lambda *_: None)
    with pytest.raises(sa.exc.DataError, match="timestamp too large"):
        claim_jobs(engine, table)
    assert taken(database.engine(), table) == [1, 2, 3]


@pytest.mark.parametrize("token", [False, True], ids=["without a token", "with a token"])
@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_a_connection_that_is_gone(database: Database, token: bool) -> None:
    """SQLAlchemy hears of it: the error is its own, and its pool is emptied of the lost ones."""
    engine = database.engine()
    table = job_table(*([Column("claim_token", String(32))] if token else []))
    fill(engine, table, 9)
    claimed_before(engine, table, 1)
    asking, ending = {
        "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({}, 10000)")
    }.get(database.name, ("SELECT connection_id()", "KILL {}"))
    with engine.connect() as one, engine.connect() as other:
        backends = [each.exec_driver_sql(asking).scalar_one() for each in (one, other)]
    with database.engine().connect() as connection:
        for backend in backends:
            connection.exec_driver_sql(ending.format(backend))
    if not token:
        with pytest.raises(sa.exc.DBAPIError) as raised:
            claim_jobs(engine, table)
        assert raised.value.connection_invalidated
        [note] = raised.value.__notes__
        assert re.search("terminating connection|Lost connection|killed", note)
    assert ids(claim_jobs(engine, table)) == [FIRST + 1]
    assert ids(claim_jobs(engine, table)) == [FIRST + 2]


class Doubled(sa.types.TypeDecorator[int]):
    """A number that is stored twice as large."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: int | None, _: sa.Dialect) -> int | None:
        """Half of it is what is meant."""
        return None if value is None else 2 * value

    def process_result_value(self, value: int | None, _: sa.Dialect) -> int | None:
        """And back."""
        return None if value is None else value // 2


CONSTANTS = {
    "decorated": (Doubled(), 21),
    "time": (sa.DateTime(), datetime(2024, 2, 3, 4, 5, 6)),  # noqa: DTZ001 - the column's own
    "uuid": (sa.Uuid(), uuid.UUID(int=7)),
}


@limited
@pytest.mark.parametrize("constant", CONSTANTS)
def test_constants_are_what_their_types_say(
    database: Database, no_detour: Any, limit: int, constant: str
) -> None:
    """A value in a condition goes through its column's type every time.

    Without that the driver would be given 21 where the column holds 42, and nothing be found.
    """
    type_, value = CONSTANTS[constant]
    name = "a%b:c (d)"
    engine, table = database.engine(), job_table(column := Column(name, type_))
    declared = JobTable(
        table,
        free=(table.c.processing == sa.false()) & (column == value),
        claimed={"processing": True},
    )
    fill(engine, table, 5 * limit, **{name: value})
    claimed_before(engine, declared, limit)
    if constant != "decorated":
        # Python code of the user's own may fail to read a row, before it is committed.
        no_detour()
    for _ in range(3):
        found = claim_jobs(engine, declared, limit)
        assert [job._mapping[column] for job in found] == limit * [value]


def test_python_s_onupdate_is_called_every_time(database: Database) -> None:
    """A value that Python makes for every UPDATE is not remembered."""
    numbers = iter(range(100))
    table = job_table(Column("version", Integer, onupdate=lambda: next(numbers)))
    engine = database.engine()
    fill(engine, table, 9)
    assert [claim_jobs(engine, table)[0].version for _ in range(5)] == [0, 1, 2, 3, 4]


@limited
@pytest.mark.databases("sqlite", "postgresql", "mysql", "mariadb")
def test_columns_that_need_no_reading(database: Database, no_detour: Any, limit: int) -> None:
    """Rows have their own columns only, whatever else was returned to put them in order."""
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        Column("id", Integer, primary_key=True),
        Column("state", Integer, nullable=False),
        Column("priority", Integer, nullable=False),
    )
    declared = JobTable(
        table, free=table.c.state == 0, claimed={"state": 1}, order=table.c.priority.desc()
    )
    engine = database.engine()
    table.create(engine)
    with engine.begin() as connection:
        numbers = range(1, 5 * limit + 1)
        rows = [{"id": number, "state": 0, "priority": number} for number in numbers]
        connection.execute(table.insert(), rows)
    claimed_before(engine, declared, limit)
    no_detour()
    first = 3 * limit
    found = claim_jobs(engine, declared, limit)
    assert [tuple(job) for job in found] == [(n, 1, n) for n in range(first, first - limit, -1)]


def test_more_engines_than_are_remembered(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that is claimed from by ever new engines does not keep them all."""
    monkeypatch.setattr("atomic_claim.backends.direct.MOST_DIALECTS", 2)
    declared = JobTable(table := job_table(), state="processing")
    fill(database.engine(), table, 30)
    engines = [database.engine() for _ in range(4)]
    found = [ids(claim_jobs(engine, declared)) for _ in range(5) for engine in engines]
    assert found == [[number] for number in range(1, 21)]
    [parts] = declared.statements.values()
    assert len(parts.prepared["learned"]) == 2


@pytest.fixture
def interrupted() -> Iterator[None]:
    """Let SIGUSR1 interrupt as Ctrl-C does."""
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("interrupted")
@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_an_interrupt_spoils_the_connection(database: Database) -> None:
    """A connection on which a reply may be outstanding is never reused."""
    engine, other = database.engine(pool_size=1, max_overflow=0), database.engine()
    table = job_table()
    fill(engine, table, 9)
    claimed_before(engine, table, 1)
    locking, unlocking, waiting = {
        "postgresql": (
            "LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE",
            "COMMIT",
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'",
        )
    }.get(
        database.name,
        (
            "LOCK TABLES jobs WRITE",
            "UNLOCK TABLES",
            "SELECT count(*) FROM information_schema.processlist WHERE state LIKE '%%metadata%%'",
        ),
    )
    with engine.connect() as connection:
        before = connection.connection.driver_connection
    main = threading.get_ident()

    def interrupt() -> None:
        with other.connect() as watching:
            wait_until(lambda: watching.exec_driver_sql(waiting).scalar_one())
        signal.pthread_kill(main, signal.SIGUSR1)

    with other.connect() as holder:
        holder.exec_driver_sql(locking)
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            claim_jobs(engine, table)
        thread.join()
        holder.exec_driver_sql(unlocking)
    with engine.connect() as connection:
        assert connection.connection.driver_connection is not before
    assert ids(claim_jobs(engine, table)) == [FIRST + 1]
