"""Errors for bad input: each names the value and the fix, and nothing is written before it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, MetaData, String, Table
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session, aliased, scoped_session, sessionmaker

from atomic_claim import AmbiguousTable, ClaimError, JobTable, claim_jobs, claim_statement
from tests.databases import Database
from tests.jobs import BINDS, START, bound, fill, ids, job_table, mapped, rows


def a_table() -> Table:
    """Build a job table, with another table in its metadata."""
    table = job_table(Column("locked_at", DateTime), Column("data", sa.JSON))
    Table(
        "steps", table.metadata, Column("id", Integer, primary_key=True), Column("job_id", Integer)
    )
    return table


def of_steps(table: Table) -> Table:
    """Return the other table of the metadata."""
    return table.metadata.tables["steps"]


def filled(database: Database) -> tuple[sa.Engine, Table]:
    """Three free jobs."""
    engine, table = database.engine(), a_table()
    fill(engine, table, 3)
    return engine, table


@contextmanager
def refused(engine: sa.Engine, table: Table, error: type[Exception], *words: str) -> Iterator[None]:
    """Expect this very error, with all these words in its message, and the table unchanged."""
    everything = sa.select(table).order_by(table.c.id)
    with engine.connect() as connection:
        before = connection.execute(everything).all()
    with pytest.raises(error) as raised:
        yield
    assert type(raised.value) is error
    for word in words:
        assert word in str(raised.value)
    with engine.connect() as connection:
        assert connection.execute(everything).all() == before


# --- the limit

LIMITS = [
    (0, ValueError),
    (-1, ValueError),
    (True, TypeError),
    ("5", TypeError),
    (2.0, TypeError),
    (None, TypeError),
]


@pytest.mark.parametrize(("limit", "error"), LIMITS)
def test_limits(database: Database, limit: Any, error: type[Exception]) -> None:
    """A limit is an int of at least 1, and True is none."""
    engine, table = filled(database)
    words = (f"limit is {limit!r}", "expected an int of at least 1")
    with refused(engine, table, error, *words):
        claim_jobs(engine, table, limit)
    with Session(engine) as session, refused(engine, table, error, *words):
        claim_jobs(session, table, limit)
    with refused(engine, table, error, *words):
        claim_statement(table, limit)


# --- the table


def test_a_table_without_a_primary_key(database: Database) -> None:
    """Its rows cannot be told apart; the message says what to add."""
    engine = database.engine()
    bare = Table("bare", MetaData(), Column("id", Integer), Column("processing", sa.Boolean))
    bare.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(bare.insert(), {"id": 1, "processing": False})
    words = ("'bare' has no primary key", "PrimaryKeyConstraint")
    with refused(engine, bare, ClaimError, *words):
        claim_jobs(engine, bare)
    with refused(engine, bare, ClaimError, *words):
        JobTable(bare, state="processing")


def test_what_is_no_table(database: Database) -> None:
    """An unmapped class, an instance, a name, an alias or a query is refused by its repr."""
    engine, table = filled(database)
    job = mapped(table)
    instance = job()
    for given in (Database, instance, "jobs", table.alias(), sa.select(table), None, aliased(job)):
        with refused(engine, table, ClaimError, f"{given!r} is not a table", "mapped class"):
            claim_jobs(engine, given)
        with refused(engine, table, ClaimError, f"{given!r} is not a table"):
            JobTable(given, state="processing")
        with refused(engine, table, ClaimError, f"{given!r} is not a table"):
            claim_statement(given)
    with refused(engine, table, ClaimError, "(is the class mapped?)"):
        claim_jobs(engine, Database)


# --- the bind


def test_a_session_that_is_closed_for_good(database: Database) -> None:
    """A Session that may not be used after `close()` says so."""
    engine, table = filled(database)
    session = Session(engine, close_resets_only=False)
    session.close()
    for given in (table, mapped(table)):
        with refused(engine, table, ClaimError, "the Session cannot be used", "closed"):
            claim_jobs(session, given)


def test_a_session_whose_flush_has_failed(database: Database) -> None:
    """A Session that must be rolled back first says so."""
    engine, table = filled(database)
    job = mapped(table)
    with Session(engine) as session:
        session.add(job(**rows(1)[0]))
        with pytest.raises(IntegrityError):
            session.flush()
        with refused(engine, table, ClaimError, "the Session cannot be used", "rollback()"):
            claim_jobs(session, job)
        session.rollback()
        assert ids(claim_jobs(session, job)) == [1]


def test_an_unbound_session(database: Database) -> None:
    """A Session, or a maker of Sessions, that knows no database says so."""
    engine, table = filled(database)
    for bind in (Session(), sessionmaker(), scoped_session(sessionmaker())):
        for given in (table, mapped(table)):
            with refused(engine, table, ClaimError, "no bind for this table"):
                claim_jobs(bind, given)


def test_a_closed_connection(database: Database) -> None:
    """A closed Connection says so."""
    engine, table = filled(database)
    connection = engine.connect()
    connection.close()
    with refused(engine, table, ClaimError, "the Connection is closed", "engine.connect()"):
        claim_jobs(connection, table)


def test_a_sessionmaker_on_a_connection(database: Database) -> None:
    """Another caller's transaction is neither committed nor used."""
    engine, table = filled(database)
    with engine.connect() as connection:
        with refused(engine, table, ClaimError, "bound to a Connection", "pass that Connection"):
            claim_jobs(sessionmaker(connection), table)
        assert not connection.in_transaction()


def test_an_asynchronous_engine(database: Database) -> None:
    """An asynchronous engine is refused with a reference to `atomic_claim.aio`."""
    engine, table = filled(database)
    asynchronous = create_async_engine("sqlite+aiosqlite://")
    with refused(engine, table, ClaimError, "is not a bind", "AsyncEngine", "atomic_claim.aio"):
        claim_jobs(asynchronous, table)


def test_what_is_no_bind(database: Database) -> None:
    """Neither is a URL or nothing at all."""
    engine, table = filled(database)
    for bind in (engine.url, "sqlite://", None):
        with refused(engine, table, ClaimError, f"{bind!r} is not a bind", "sessionmaker"):
            claim_jobs(bind, table)


# --- the arguments

Arguments = Callable[[Table], dict[str, Any]]
CALLS: dict[str, tuple[Arguments, tuple[str, ...]]] = {
    "where on another table": (
        lambda t: {"where": of_steps(t).c.job_id == t.c.id},
        ("steps.job_id is a column of steps", "correlated subquery", "exists()"),
    ),
    "one of several on another table": (
        lambda t: {"where": [t.c.id > 0, of_steps(t).c.id == 1]},
        ("steps.id is a column of steps", "correlated subquery"),
    ),
    "where on an alias of the table": (
        lambda t: {"where": t.alias("twin").c.id == 1},
        ("twin.id is a column of twin", "correlated subquery"),
    ),
    "order on another table": (
        lambda t: {"order_by": of_steps(t).c.id.desc()},
        ("steps.id is a column of steps", "correlated subquery"),
    ),
    "where as text": (
        lambda _: {"where": "id = 1"},
        ("where='id = 1'", "expected an SQLAlchemy expression"),
    ),
    "where as a bool": (
        lambda _: {"where": True},
        ("where=True", "expected an SQLAlchemy expression"),
    ),
    "order by what is no column": (
        lambda _: {"order_by": "nope"},
        ("order=nope is not a column of table 'jobs'", "id, processing, created_at"),
    ),
    "order by a number": (
        lambda _: {"order_by": 5},
        ("order=5", "expected a column", "desc()"),
    ),
    "values for what is no column": (
        lambda _: {"values": {"nope": 1}},
        ("values=nope is not a column of table 'jobs'", "id, processing, created_at"),
    ),
    "values for another table's column": (
        lambda t: {"values": {of_steps(t).c.job_id: 1}},
        ("values=steps.job_id is not a column of table 'jobs'",),
    ),
    "values as a list": (
        lambda _: {"values": ["note"]},
        ("values is ['note']", "expected a mapping"),
    ),
    "values that undo the mark": (
        lambda _: {"values": {"processing": False}},
        ("values sets 'processing' to False", "processing = True", "leave it out"),
    ),
    "values that empty the mark": (
        lambda t: {"values": {t.c.processing: None}},
        ("values sets 'processing' to None", "leave it out"),
    ),
    "values that compute the mark": (
        lambda t: {"values": {t.c.processing: sa.not_(t.c.processing)}},
        ("values sets 'processing'", "leave it out"),
    ),
    "a worker without a column": (
        lambda _: {"worker": "ann"},
        ("worker='ann' needs a worker column", "'jobs'", "JobTable(worker=...)"),
    ),
    "a worker that is no name": (
        lambda _: {"worker": 7},
        ("worker is 7", "a str"),
    ),
    "a lease without columns": (
        lambda _: {"lease": timedelta(minutes=5)},
        ("lease=datetime.timedelta", "JobTable(lease=...)", "ALTER TABLE jobs ADD COLUMN"),
    ),
    "a lease of seconds": (
        lambda _: {"lease": 300},
        ("lease is 300", "a timedelta above zero"),
    ),
    "a lease of nothing": (
        lambda _: {"lease": timedelta(0)},
        ("lease is datetime.timedelta(0)", "above zero"),
    ),
    "a lease that is over": (
        lambda _: {"lease": timedelta(seconds=-1)},
        ("lease is datetime.timedelta(days=-1", "above zero"),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_arguments(database: Database, call: str) -> None:
    """Arguments that do not fit are refused by every bind and by the construct alike."""
    engine, table = filled(database)
    arguments, words = CALLS[call]
    for kind in BINDS:
        with bound(engine, kind) as bind, refused(engine, table, ClaimError, *words):
            claim_jobs(bind, table, **arguments(table))
    with refused(engine, table, ClaimError, *words):
        claim_statement(table, **arguments(table))


def test_bad_arguments_after_good_ones(database: Database) -> None:
    """A statement that is already built does not spare the check of the next call's arguments."""
    engine, table = filled(database)
    roles = JobTable(table, state="processing", worker="note")
    assert len(claim_jobs(engine, roles, worker="ann")) == 1
    with refused(engine, table, ClaimError, "worker is 7"):
        claim_jobs(engine, roles, worker=7)


def test_a_time_that_is_emptied(database: Database) -> None:
    """A mark that is a time may not be emptied, and may be given otherwise."""
    engine, table = filled(database)
    roles = JobTable(table, state="locked_at", naive_times="utc")
    words = ("values sets 'locked_at' to None", "leave it out")
    with refused(engine, table, ClaimError, *words):
        claim_jobs(engine, roles, values={"locked_at": None})
    assert claim_jobs(engine, roles, values={"locked_at": START})[0].locked_at == START


# --- the declaration

Roles = dict[str, Any]
DECLARATIONS: dict[str, tuple[Roles, type[Exception], tuple[str, ...]]] = {
    "nothing": ({}, AmbiguousTable, ("state=...", "free=<expression>", "claimed={column: value}")),
    "an unknown state": (
        {"state": "nope"},
        ClaimError,
        ("state=nope is not a column of table 'jobs'", "id, processing, created_at"),
    ),
    "an unknown due": ({"due": "nope"}, ClaimError, ("due=nope is not a column",)),
    "an unknown worker": ({"worker": "nope"}, ClaimError, ("worker=nope is not a column",)),
    "an unknown stamp": ({"stamps": "nope"}, ClaimError, ("stamps=nope is not a column",)),
    "an unknown order": ({"order": "nope"}, ClaimError, ("order=nope is not a column",)),
    "an unknown mark": (
        {"claimed": {"processing": True, "nope": 1}},
        ClaimError,
        ("claimed=nope is not a column",),
    ),
    "a mark without the state": (
        {"state": "short", "free": "a", "claimed": {"note": "x"}},
        AmbiguousTable,
        ("jobs.short is String(length=10), whose values are not declared: give claimed=...",),
    ),
    "no mark": (
        {"state": None, "free": sa.true(), "claimed": {}},
        AmbiguousTable,
        ("give free=<expression> and claimed={column: value}",),
    ),
    "a value without a state": (
        {"state": None, "free": 0, "claimed": {"processing": True}},
        ClaimError,
        ("free=0 is a value", "state=..."),
    ),
    "a status without values": (
        {"state": "note"},
        AmbiguousTable,
        ("jobs.note is String", "free=... and claimed=..."),
    ),
    "a value that is not hashable": (
        {"state": "data", "free": {"a": [1]}, "claimed": "x"},
        ClaimError,
        ("state='data' is JSON()", "expected one value"),
    ),
    "a short token": (
        {"token": "short"},
        ClaimError,
        ("token='short' is String(length=10)", "at least 32 characters"),
    ),
    "a token of numbers": (
        {"token": "id"},
        ClaimError,
        ("token='id' is Integer()", "a string of at least 32 characters"),
    ),
    "text as a time": (
        {"due": "note"},
        AmbiguousTable,
        ("jobs.note is String(length=50)", "used as a time", "text_times='%Y-%m-%dT%H:%M:%fZ'"),
    ),
    "a number as a time": ({"due": "id"}, AmbiguousTable, ("jobs.id is Integer()", "as a time")),
    "a zone by name": (
        {"naive_times": "Europe/Vienna"},
        ClaimError,
        ("naive_times is 'Europe/Vienna'", "'utc', 'server' or None"),
    ),
    "a maximum without attempts": (
        {"max_attempts": 3},
        ClaimError,
        ("max_attempts needs attempts=...",),
    ),
    "a maximum of nothing": (
        {"attempts": "size", "max_attempts": 0},
        ClaimError,
        ("max_attempts is 0", "an int of at least 1"),
    ),
    "a maximum of True": (
        {"attempts": "size", "max_attempts": True},
        ClaimError,
        ("max_attempts is True", "an int of at least 1"),
    ),
    "a maximum of two and a half": (
        {"attempts": "size", "max_attempts": 2.5},
        ClaimError,
        ("max_attempts is 2.5", "an int of at least 1"),
    ),
}


@pytest.mark.parametrize("declaration", DECLARATIONS)
def test_declarations(declaration: str) -> None:
    """A JobTable that cannot be meant is refused when it is made, before there is a database."""
    table = job_table(Column("data", sa.JSON), Column("short", String(10)), Column("size", Integer))
    roles, error, words = DECLARATIONS[declaration]
    given: Roles = ({"state": "processing"} | roles) if roles else {}
    with pytest.raises(error) as raised:
        JobTable(table, **{role: value for role, value in given.items() if value is not None})
    assert type(raised.value) is error
    for word in words:
        assert word in str(raised.value)


# --- tables without row locks


def without_transactions() -> Table:
    """Build a job table for an engine that has neither row locks nor transactions."""
    return job_table(mysql_engine="MyISAM", mariadb_engine="MyISAM")


@pytest.mark.databases("mysql", "mariadb")
@pytest.mark.parametrize("kind", BINDS)
def test_a_table_without_row_locks(database: Database, kind: str) -> None:
    """A table whose storage engine locks no rows is refused, every time."""
    engine, table = database.engine(), without_transactions()
    fill(engine, table, 3)
    words = ("'jobs' is MyISAM", "ALTER TABLE jobs ENGINE=InnoDB")
    for _ in range(2):
        with bound(engine, kind) as bind, refused(engine, table, ClaimError, *words):
            claim_jobs(bind, table, 1)


@pytest.mark.databases("mysql", "mariadb")
def test_two_workers_lock_the_same_rows_without_row_locks(database: Database) -> None:
    """The twin: there SKIP LOCKED skips nothing, and two workers get the same rows."""
    engine, table = database.engine(), without_transactions()
    fill(engine, table, 3)
    query = sa.select(table.c.id).where(table.c.processing == sa.false())
    query = query.order_by(table.c.id).with_for_update(skip_locked=True)
    with engine.connect() as first, engine.connect() as second:
        assert list(first.scalars(query)) == list(second.scalars(query)) == [1, 2, 3]
