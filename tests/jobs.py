"""The job table that most tests use, and a person's way of filling and reading it."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, TypeVar
from unittest.mock import patch

import sqlalchemy as sa
from sqlalchemy.orm import Session, registry, sessionmaker

from atomic_claim import execution

T = TypeVar("T")

# In whose transaction a claim may be: the caller's, or its own.
CALLERS = ("connection", "session")
OWN = ("engine", "sessionmaker")
BINDS = CALLERS + OWN

START = datetime(2024, 1, 1)  # noqa: DTZ001 - the columns are without a zone


def job_table(*more: Any, name: str = "jobs", processing: Any = None, **options: Any) -> sa.Table:
    """Build a boolean job table in created order, with further columns and indexes."""
    return sa.Table(
        name,
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("processing", sa.Boolean, nullable=False, default=False)
        if processing is None
        else processing,
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("note", sa.String(50)),
        *more,
        **options,
    )


def rows(count: int, *, first: int = 1, **values: Any) -> list[dict[str, Any]]:
    """`count` rows numbered from `first`, a minute apart, all free unless said otherwise."""
    return [
        {"id": number, "created_at": START + timedelta(minutes=number), "processing": False}
        | values
        for number in range(first, first + count)
    ]


def fill(engine: sa.Engine, table: sa.Table, count: int, **values: Any) -> None:
    """Create the table, if it is not there, and insert `count` rows."""
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), rows(count, **values))


def ids(claimed: Any) -> list[int]:
    """Return the ids of claimed rows or entities, in their order."""
    return [job.id for job in claimed]


def taken(engine: sa.Engine, table: sa.Table) -> list[int]:
    """Return the ids of the rows that are marked as claimed in committed data."""
    with engine.connect() as connection:
        query = sa.select(table.c.id).where(table.c.processing == sa.true()).order_by(table.c.id)
        return list(connection.scalars(query))


@contextmanager
def bound(engine: sa.Engine, kind: str) -> Iterator[Any]:
    """Something of this kind to claim by."""
    if kind == "connection":
        with engine.connect() as connection:
            yield connection
    elif kind == "session":
        with Session(engine) as session:
            yield session
    else:
        yield engine if kind == "engine" else sessionmaker(engine)


@contextmanager
def hurried() -> Iterator[None]:
    """Leave out the pauses between two tries."""
    at_once = {"FIRST_PAUSE": 0.0, "FIRST_OUTAGE_PAUSE": 0.0}
    with patch.multiple(execution, **at_once):
        yield


def mapped(table: sa.Table) -> Any:
    """Return a class mapped to the table."""
    return registry().map_imperatively(type("Job", (), {}), table).class_


def code_of(error: BaseException) -> Any:
    """Return an error's code: PostgreSQL's SQLSTATE, MySQL's number, SQLite's message."""
    original = getattr(error, "orig", None) or error
    number = original.args[0]
    return number if isinstance(number, int) else getattr(original, "sqlstate", number)


@contextmanager
def in_thread(run: Callable[[], T]) -> Iterator[Future[T]]:
    """Run something that may block beside the test; it is over when the block is."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(run())
        except BaseException as error:  # noqa: BLE001 - handed over, not swallowed
            future.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield future
    finally:
        thread.join(60)
        assert not thread.is_alive(), "the thread beside the test never ended"


def soon(run: Callable[[], T], *, seconds: float = 30) -> T:
    """Return the result of something that must not wait for what the test itself holds.

    Raises:
        TimeoutError: it is still running after that time, far longer than it can take.
    """
    with in_thread(run) as running:
        return running.result(timeout=seconds)
