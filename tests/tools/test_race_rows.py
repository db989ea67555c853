"""Rows that a table accepts, made for a race."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, ForeignKey, Integer, MetaData, String, Table
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from atomic_claim import JobTable, claim_jobs
from atomic_claim.testing import RaceError
from atomic_claim.testing.results import Key
from atomic_claim.testing.rows import Factory
from atomic_claim.testing.tables import filled
from tests.databases import Database


class Base(DeclarativeBase):
    """Declarative base of all tables."""


class Task(Base):
    """Half of a job."""

    __tablename__ = "tasks"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "task"}  # noqa: RUF012
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    processing: Mapped[bool]


class Mail(Task):
    """The other half."""

    __tablename__ = "mails"
    __mapper_args__ = {"polymorphic_identity": "mail"}  # noqa: RUF012
    id: Mapped[int] = mapped_column(ForeignKey("tasks.id"), primary_key=True)
    address: Mapped[str] = mapped_column(String(4), unique=True)


@contextmanager
def made(
    engine: sa.Engine,
    given: Any,
    count: int = 3,
    *,
    factory: Factory | None = None,
    existing: bool = False,
) -> Iterator[frozenset[Key]]:
    """Yield the filled table; SQLite checks the foreign keys."""
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", lambda c, _: c.execute("PRAGMA foreign_keys = ON"))
    with filled(engine, given, count, factory=factory, existing=existing) as found:
        yield found


@pytest.fixture
def engine() -> Iterator[sa.Engine]:
    """Yield an engine for an in-memory database."""
    engine = sa.create_engine("sqlite://")
    yield engine
    engine.dispose()


def keys(*numbers: Any) -> set[tuple[str, ...]]:
    """Keys of one column."""
    return {(str(number),) for number in numbers}


def test_joined_classes(database: Database) -> None:
    """A job in two tables has its row in both, is of its class, and can be claimed."""
    engine = database.engine()
    with made(engine, Mail) as found:
        assert found == keys(1, 2, 3)
        with Session(engine) as session:
            claim = claim_jobs(session, Mail, 5)
            assert [(mail.id, mail.kind, mail.processing) for mail in claim] == [
                (number, "mail", True) for number in (1, 2, 3)
            ]
            session.rollback()
    assert sa.inspect(engine).get_table_names() == []


def test_a_key_of_several_columns(database: Database) -> None:
    """A tenant is made for all, and the jobs are numbered."""
    metadata = MetaData()
    tenants = Table("tenants", metadata, Column("name", String(9), primary_key=True))
    table = Table(
        "jobs",
        metadata,
        Column("tenant", ForeignKey(tenants.c.name), primary_key=True),
        Column("number", Integer, primary_key=True, autoincrement=False),
        Column("processing", sa.Boolean, nullable=False),
    )
    engine = database.engine()
    with made(engine, table) as found:
        assert found == {("name-1", str(number)) for number in (1, 2, 3)}
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(tenants.insert().values(name="north"))
        connection.execute(table.insert().values(tenant="north", number=7, processing=True))
    with made(engine, table, existing=True) as found:
        assert {number for _, number in found} == {"8", "9", "10"}
    with engine.connect() as connection:
        assert connection.execute(sa.select(table)).all() == [("north", 7, True)]
        assert connection.execute(sa.select(tenants)).all() == [("north",)]


@pytest.mark.databases("postgresql")
def test_rows_of_another_program(database: Database) -> None:
    """Rows that another program inserts meanwhile refuse the race, and stay."""
    engine = database.engine()
    table = columns(Column("size", Integer, nullable=False))
    table.create(engine)
    other = database.engine()

    @sa.event.listens_for(engine, "before_cursor_execute")
    def insert_another(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT"):
            with other.begin() as connection:
                connection.execute(table.insert().values(id=100, size=7))

    with (
        pytest.raises(RaceError, match="has 4 new rows, expected 3: stop what else writes"),
        made(engine, table, existing=True),
    ):
        pass
    with other.connect() as connection:
        assert connection.execute(sa.select(table)).all() == [(100, 7)]


def test_rows_are_free_and_due(engine: sa.Engine) -> None:
    """Declared values, times to come, and columns that may be empty, are as a free job's are."""
    table = Table(
        "jobs",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("stage", String(9), nullable=False, default="draft"),
        Column("run_at", sa.DateTime),
        Column("locked_by", String(9)),
        Column("paused", sa.Boolean),
        Column("attempts", Integer),
        Column("created_at", sa.DateTime, nullable=False),
    )
    given = JobTable(
        table, state="stage", free="ready", claimed="busy", due="run_at", attempts="attempts"
    )
    with made(engine, given), engine.connect() as connection:
        rows = connection.execute(sa.select(table)).all()
        now = datetime.now(UTC).replace(tzinfo=None)
        for row in rows:
            assert (row.stage, row.locked_by, row.paused, row.attempts) == ("ready", None, False, 0)
            assert row.run_at < now
        times = [row.created_at for row in rows]
        assert times == sorted(set(times))
    with made(engine, table), engine.connect() as connection:
        assert {row.stage for row in connection.execute(sa.select(table))} == {"draft"}


def columns(*more: Any) -> Table:
    """Build a table with these columns."""
    return Table("jobs", MetaData(), Column("id", Integer, primary_key=True), *more)


class Odd(sa.types.UserDefinedType[Any]):
    """A type that the generator of rows does not know."""

    cache_ok = True

    def get_col_spec(self) -> str:
        """Its name."""
        return "ODD"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (lambda: columns(Column("odd", Odd, nullable=False)), r"jobs\.odd, a .*factory="),
        (lambda: columns(Column("code", String(1), unique=True, nullable=False)), "too few"),
        (
            lambda: columns(Column("tags", sa.ARRAY(Integer))),
            "sqlite can't render .* ARRAY; .*url=",
        ),
        (lambda: columns(Column("other", ForeignKey("others.id"))), "which its metadata|'others'"),
        (lambda: columns(Column("up", ForeignKey("jobs.id"), nullable=False)), "factory="),
        (lambda: Table("jobs", MetaData(), Column("id", Integer)), "no primary key"),
        (lambda: columns(Column("n", Integer), sa.CheckConstraint("n = 1 AND id = 1")), "n = 1"),
    ],
)
def test_what_cannot_be_filled(engine: sa.Engine, table: Callable[[], Table], said: str) -> None:
    """The obstacle to filling the table is named, and no table is left behind."""
    with pytest.raises(RaceError, match=said), made(engine, table(), 10):
        pass
    assert sa.inspect(engine).get_table_names() == []


def test_what_a_factory_gives_goes_first(engine: sa.Engine) -> None:
    """Dictionaries by column or name, objects, and none of what it does not give is lost."""
    table = columns(Column("odd", Odd, nullable=False), Column("size", Integer, nullable=False))
    factories: list[Factory] = [
        lambda number: {"odd": f"o{number}"},
        lambda number: {table.c.odd: f"o{number}", "size": 0},
        lambda count: ({"odd": f"o{1 + place}"} for place in range(count)),
    ]
    for factory in factories:
        with made(engine, table, factory=factory), engine.connect() as connection:
            rows = connection.execute(sa.select(table)).all()
            assert rows == [(number, f"o{number}", 0) for number in (1, 2, 3)]
    with (
        made(engine, Mail, factory=lambda number: Mail(address=f"m{number}")),
        Session(engine) as session,
    ):
        assert session.scalars(sa.select(Mail.address)).all() == ["m1", "m2", "m3"]
