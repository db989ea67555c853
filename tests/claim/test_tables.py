"""Tables of every make: their keys, their names and their types."""

import enum
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, ForeignKey, Integer, MetaData, String, Table
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, registry, sessionmaker

from atomic_claim import JobTable, claim_jobs
from tests.databases import Database
from tests.jobs import START, bound, fill, ids, job_table, rows, taken

# Rows in a transaction of our own, and whatever is asked for in the caller's.
both = pytest.mark.parametrize("kind", ["engine", "session"])


def claim_by(engine: sa.Engine, kind: str, table: Any, limit: int, **arguments: Any) -> Any:
    """Claim by a bind of this kind, and have it committed."""
    with bound(engine, kind) as bind:
        claimed = claim_jobs(bind, table, limit, **arguments)
        if kind == "session":
            bind.expire_on_commit = False
            bind.commit()
    return claimed


def created(database: Database, table: sa.Table, values: list[dict[str, Any]]) -> sa.Engine:
    """Create the table with these rows and return the engine."""
    engine = database.engine()
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), values)
    return engine


# --- keys


def composite() -> Table:
    """Build a table with a key of two columns, and an order that is not the key's."""
    return Table(
        "jobs",
        MetaData(),
        Column("region", String(10), primary_key=True),
        Column("number", Integer, primary_key=True, autoincrement=False),
        Column("processing", sa.Boolean, nullable=False),
        Column("created_at", sa.DateTime, nullable=False),
    )


def composite_rows(count: int) -> list[dict[str, Any]]:
    """Rows in two regions by turns, the later numbers first."""
    return [
        {
            "region": "eu" if number % 2 else "us",
            "number": number,
            "processing": False,
            "created_at": datetime.fromtimestamp(10**9 - number),  # noqa: DTZ006
        }
        for number in range(1, count + 1)
    ]


@both
@pytest.mark.parametrize("entities", [False, True], ids=["rows", "entities"])
def test_a_key_of_several_columns(database: Database, kind: str, entities: bool) -> None:
    """Rows are told apart by all of their key's columns."""
    table = composite()
    engine = created(database, table, composite_rows(6))
    given = registry().map_imperatively(type("Job", (), {}), table).class_ if entities else table
    claimed = claim_by(engine, kind, given, 3)
    assert claimed.keys == (("us", 6), ("eu", 5), ("us", 4))
    assert [(job.region, job.number) for job in claimed] == list(claimed.keys)
    with engine.connect() as connection:
        left = connection.execute(sa.select(table.c.number).where(~table.c.processing)).scalars()
        assert sorted(left) == [1, 2, 3]


@pytest.mark.parametrize("order", [None, "region"], ids=["by time", "by text"])
def test_many_keys_of_several_columns(database: Database, order: str | None) -> None:
    """A claim of 1,050 such rows is more than one condition of ORs may hold."""
    table = composite()
    engine = created(database, table, composite_rows(1100))
    claimed = claim_jobs(engine, table, 1050, order_by=order and [order, "number"])
    expected = [("eu" if number % 2 else "us", number) for number in range(1100, 50, -1)]
    if order:
        everything = sorted(("eu" if n % 2 else "us", n) for n in range(1, 1101))
        expected = everything[:1050]
    assert list(claimed.keys) == expected
    assert len(claim_jobs(engine, table, 1050)) == 50


@pytest.mark.parametrize(
    ("type_", "keys"),
    [
        (sa.Uuid(), [uuid.UUID(int=number) for number in (2**127, 1, 77)]),
        (sa.Uuid(native_uuid=False), [uuid.UUID(int=number) for number in (2**127, 1, 77)]),
        (String(40), ["it's", "50% : done", "ünï \\ code"]),
        (sa.LargeBinary(16), [b"\x00\xff'", b"b", b"c" * 16]),
        (sa.BigInteger(), [2**62, -5, 7]),
        (sa.Date(), [datetime(2024, 5, day).date() for day in (3, 1, 2)]),  # noqa: DTZ001
        (sa.Numeric(20, 2), [sa.Numeric().python_type(value) for value in ("1.10", "3", "-2.5")]),
    ],
    ids=["uuid", "uuid as text", "text", "binary", "bigint", "date", "numeric"],
)
@both
def test_types_of_keys(database: Database, kind: str, type_: Any, keys: list[Any]) -> None:
    """Keys of any type are read, compared and given back as they are."""
    if isinstance(type_, sa.LargeBinary) and database.name in {"mysql", "mariadb"}:
        type_ = sa.VARBINARY(16)
    table = Table(
        "jobs",
        MetaData(),
        Column("id", type_, primary_key=True, autoincrement=False),
        Column("processing", sa.Boolean, nullable=False),
        Column("created_at", sa.DateTime, nullable=False),
    )
    values = [rows(1, first=n)[0] | {"id": key} for n, key in enumerate(keys, 1)]
    engine = created(database, table, values)
    assert claim_by(engine, kind, table, 2).keys == tuple((key,) for key in keys[:2])
    assert claim_by(engine, kind, table, 2).keys == ((keys[2],),)


def test_a_key_that_python_decorates(database: Database) -> None:
    """A key whose type is the user's own is bound and read by that type."""

    class Tagged(sa.types.TypeDecorator[str]):
        impl = String(20)
        cache_ok = True

        def process_bind_param(self, value: str | None, _: object) -> str | None:
            return value and "job:" + value

        def process_result_value(self, value: str | None, _: object) -> str | None:
            return value and value.removeprefix("job:")

    table = Table(
        "jobs",
        MetaData(),
        Column("id", Tagged, primary_key=True),
        Column("processing", sa.Boolean, nullable=False),
        Column("created_at", sa.DateTime, nullable=False),
    )
    engine = created(database, table, [rows(1, first=n)[0] | {"id": f"{n}"} for n in (1, 2, 3)])
    assert claim_jobs(engine, table, 2).keys == (("1",), ("2",))
    with Session(engine) as session:
        assert claim_jobs(session, table, 2).keys == (("3",),)


# --- names


@both
@pytest.mark.parametrize(
    "names",
    [
        ("order", "select", "from", "group"),
        ("Order", "Id", "isProcessing", "createdAt"),
        ("job queue", "the id", "is free?", "created at"),
        ("100%", "%s", "%(x)s", "a%%b"),
        ("a:b", ":id", "x::y", "(created_at)"),
        ("jobs", "order_1", "claimed", "claimable"),
        ("claimed", "param_1", "jobs", "order_2"),
        ("claimable", "id", "processing", "branches"),
        ("dots.in", "i.d", "state's", 'say "when"'),
    ],
    ids=" ".join,
)
def test_names_that_need_quotes(database: Database, kind: str, names: tuple[str, ...]) -> None:
    """Reserved words, mixed case, blanks, signs of parameters, and the names of our own CTEs."""
    name, key, state, order = names
    table = Table(
        name,
        MetaData(),
        Column(key, Integer, primary_key=True, autoincrement=False),
        Column(state, sa.Boolean, nullable=False),
        Column(order, Integer, nullable=False),
        Column("token", String(32)),
    )
    values = [{key: n, state: False, order: -n} for n in range(1, 6)]
    engine = created(database, table, values)
    roles = JobTable(table, state=state, order=order, token="token")
    for expected in ([5], [4, 3, 2]):
        claimed = claim_by(engine, kind, roles, len(expected), where=table.c[order] < 0)
        assert [tuple(job) for job in claimed] == [(n, True, -n, claimed.token) for n in expected]
    with engine.connect() as connection:
        left = connection.execute(sa.select(table).where(table.c[state] == sa.false())).all()
    assert [tuple(row) for row in left] == [(1, False, -1, None)]


@both
def test_keys_that_differ_from_names(database: Database, kind: str) -> None:
    """A column may have another key in its Table than its name in the database."""
    table = Table(
        "jobs",
        MetaData(),
        Column("job_no", Integer, primary_key=True, key="id"),
        Column("processing", Integer, key="size"),
        Column("in_use", sa.Boolean, nullable=False, key="processing"),
        Column("born", sa.DateTime, nullable=False, key="created_at"),
    )
    engine = created(database, table, [each | {"size": 3} for each in rows(4)])
    roles = JobTable(table, state="processing", order="created_at")
    for expected in ([1], [2, 3, 4]):
        claimed = claim_by(engine, kind, roles, len(expected), values={"size": 5})
        assert [tuple(job)[:3] for job in claimed] == [(n, 5, True) for n in expected]


class Base(DeclarativeBase):
    """The classes of this file."""


class Renamed(Base):
    """A class whose attributes have other names than their columns, some of them swapped."""

    __tablename__ = "jobs"

    number: Mapped[int] = mapped_column("id", primary_key=True)
    processing: Mapped[bool] = mapped_column("busy")
    born: Mapped[datetime] = mapped_column("created_at")
    created_at: Mapped[str | None] = mapped_column("note", String(50))


@both
def test_attributes_that_differ_from_columns(database: Database, kind: str) -> None:
    """The roles of a class go by its attributes as well as by its columns."""
    table: Any = Renamed.__table__
    values = [
        {"id": n, "busy": False, "created_at": START.replace(year=2030 - n), "note": "x"}
        for n in range(1, 5)
    ]
    engine = created(database, table, values)
    roles = JobTable(Renamed, state="processing", order=Renamed.born)
    more = {"where": Renamed.created_at == "x", "values": {Renamed.created_at: "y"}}
    for expected in ([4], [3, 2, 1]):
        claimed = claim_by(engine, kind, roles, len(expected), **more)
        assert claimed.keys == tuple((n,) for n in expected)
        if kind == "session":
            assert [(job.number, job.processing, job.created_at) for job in claimed] == [
                (n, True, "y") for n in expected
            ]


@contextmanager
def other_schema(database: Database) -> Iterator[tuple[sa.Engine, str]]:
    """Yield an engine and the name of a schema beside the default one."""
    name = f"Other {uuid4().hex[:12]}"
    engine = database.engine()
    if database.name == "sqlite":
        path = database.url.database

        @sa.event.listens_for(engine, "connect")
        def attach(connection: Any, _: object) -> None:
            connection.execute(f"ATTACH '{path}.other' AS \"{name}\"")

        yield engine, name
        return
    quoted = engine.dialect.identifier_preparer.quote_identifier(name)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {quoted}")
    try:
        yield engine, name
    finally:
        with engine.begin() as connection:
            cascade = "CASCADE" if database.name == "postgresql" else ""
            connection.exec_driver_sql(f"DROP SCHEMA {quoted} {cascade}")


@both
def test_a_table_of_another_schema(database: Database, kind: str) -> None:
    """A table may lie in another schema, beside one of the same name in the default one."""
    with other_schema(database) as (engine, schema):
        here, there = job_table(), job_table(schema=schema)
        fill(engine, here, 4)
        fill(engine, there, 4, first=11)
        for expected in ([11], [12, 13, 14]):
            claimed = claim_by(engine, kind, there, len(expected), where=there.c.note.is_(None))
            assert ids(claimed) == expected
        assert taken(engine, here) == []
        assert taken(engine, there) == [11, 12, 13, 14]


@both
def test_a_schema_that_is_translated(database: Database, kind: str) -> None:
    """SQLAlchemy's `schema_translate_map` of an engine holds for claims too."""
    with other_schema(database) as (engine, schema):
        fill(engine, job_table(schema=schema), 3, first=11)
        table = job_table(schema="tenant")
        translated = engine.execution_options(schema_translate_map={"tenant": schema})
        assert ids(claim_by(translated, kind, table, 2)) == [11, 12]
        assert taken(translated, table) == [11, 12]


# --- types


class Status(enum.Enum):
    """A status whose values are not what the column holds."""

    WAITING = "w"
    RUNNING = "r"
    DONE = "d"


ENUMS = {
    "native": sa.Enum(Status, name="job_status"),
    "not native": sa.Enum(Status, native_enum=False, name="job_status"),
    "checked": sa.Enum(Status, native_enum=False, create_constraint=True, name="job_status"),
    "by value": sa.Enum(
        Status, name="job_status", values_callable=lambda members: [m.value for m in members]
    ),
}


@both
@pytest.mark.parametrize("type_", ENUMS)
def test_a_status_of_an_enum(database: Database, kind: str, type_: str) -> None:
    """An Enum is declared by its members, however the column holds them, or by inference."""
    table = Table(
        "jobs",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("status", ENUMS[type_], nullable=False),
        Column("created_at", sa.DateTime, nullable=False),
    )
    waiting, running, done = Status.WAITING, Status.RUNNING, Status.DONE
    statuses = [done, waiting, running, waiting, waiting, waiting]
    values = [
        {"id": n, "status": status, "created_at": START.replace(day=n)}
        for n, status in enumerate(statuses, 1)
    ]
    engine = created(database, table, values)
    declared = JobTable(table, state="status", free=waiting, claimed=running, done=done)
    for given, expected in ((declared, [2]), (table, [4, 5]), (declared, [6])):
        claimed = claim_by(engine, kind, given, len(expected))
        assert ids(claimed) == expected
        assert {job.status for job in claimed} == {running}


def test_an_enum_of_plain_strings(database: Database) -> None:
    """An Enum of strings is declared by them."""
    table = job_table(Column("status", sa.Enum("new", "busy", name="job_state"), nullable=False))
    engine = created(database, table, [each | {"status": "new"} for each in rows(3)])
    roles = JobTable(table, state="status", free="new", claimed="busy")
    assert [job.status for job in claim_jobs(engine, roles, 2)] == ["busy", "busy"]


def test_a_status_of_integers(database: Database) -> None:
    """A status may be numbers."""
    table = job_table(Column("status", sa.SmallInteger, nullable=False))
    engine = created(database, table, [each | {"status": n} for n, each in enumerate(rows(3))])
    roles = JobTable(table, state="status", free=(0, 2), claimed=1)
    assert ids(claim_jobs(engine, roles, 5)) == [1, 3]


def test_other_columns_of_any_type(database: Database) -> None:
    """Columns that the claim has nothing to do with come back as their types say."""
    table = job_table(
        Column("data", sa.JSON),
        Column("blob", sa.LargeBinary),
        Column("price", sa.Numeric(10, 2)),
        Column("span", sa.Interval),
    )
    data = {"a": [1, None, "ü"], "%s": ":x"}
    span = START - START.replace(year=2023)
    values = [each | {"data": data, "blob": b"\x00", "price": 5, "span": span} for each in rows(3)]
    engine = created(database, table, values)
    for claimed in (claim_jobs(engine, table), claim_jobs(sessionmaker(engine), table, 2)):
        for job in claimed:
            assert (job.data, bytes(job.blob), job.price, job.span) == (data, b"\x00", 5, span)


def test_values_of_json(database: Database) -> None:
    """A value of the call's is bound by its column's type."""
    table = job_table(Column("data", sa.JSON))
    engine = created(database, table, rows(2))
    claimed = claim_jobs(engine, table, 2, values={"data": {"by": ["us"]}})
    assert [job.data for job in claimed] == [{"by": ["us"]}] * 2


def test_a_computed_column(database: Database) -> None:
    """A column that the database computes comes back computed from what the claim wrote."""
    table = job_table(
        Column("size", Integer), Column("twice", Integer, sa.Computed("size * 2", persisted=True))
    )
    engine = created(database, table, [each | {"size": 1} for each in rows(3)])
    assert [job.twice for job in claim_jobs(engine, table, 2, values={"size": 4})] == [8, 8]


def test_a_table_that_refers_to_itself(database: Database) -> None:
    """Jobs with a parent among the jobs: a condition may ask for the parent by an alias."""
    table = job_table(Column("parent_id", ForeignKey("jobs.id")))
    engine = created(database, table, [each | {"parent_id": None} for each in rows(2)])
    with engine.begin() as connection:
        connection.execute(table.insert(), [e | {"parent_id": 1} for e in rows(2, first=3)])
    parent = table.alias("parent")
    running = sa.exists().where(parent.c.id == table.c.parent_id, parent.c.processing)
    assert ids(claim_jobs(engine, table, where=table.c.parent_id.is_(None))) == [1]
    assert ids(claim_jobs(engine, table, 5, where=running)) == [3, 4]
