"""Classes that map less, or more, than the table of a claim; and keys that do not find rows."""

import enum
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, ForeignKey, Integer, MetaData, String, Table
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, registry, sessionmaker

from atomic_claim import ClaimError, JobTable, claim_jobs, complete_jobs, extend_jobs
from atomic_claim.claim import dequeue_jobs
from tests.databases import Database
from tests.jobs import BINDS, START, bound, fill, ids, job_table, rows, taken

once = pytest.mark.databases("sqlite")


def token_table(*more: Any) -> Table:
    """Build a job table with a token and an end."""
    return job_table(Column("claim_token", String(32)), Column("done", Integer), *more)


ROLES: dict[str, Any] = {"state": "processing", "token": "claim_token", "done": {"done": 1}}


# --- what a class leaves out


@pytest.mark.parametrize("kind", ["session", "sessionmaker"])
def test_columns_that_a_class_leaves_out(database: Database, kind: str) -> None:
    """A role may have a column that the mapped class excludes; its jobs are claimed and ended."""
    engine, table = database.engine(), token_table()
    fill(engine, table, 3)
    job = registry().map_imperatively(
        type("Job", (), {}), table, exclude_properties=["claim_token", "done", "processing"]
    )
    jobs = JobTable(job.class_, **ROLES)
    with bound(engine, kind) as bind:
        claim = claim_jobs(bind, jobs, 2)
        assert complete_jobs(bind, claim) == 2
        if kind == "session":
            bind.commit()
    assert claim.keys == ((1,), (2,))
    assert ids(claim_jobs(engine, jobs, 5)) == [3]


def test_what_an_update_sets_by_itself_is_read_again(database: Database) -> None:
    """After an end by Session, an entity has what the database or ``onupdate`` made of it."""
    engine = database.engine()
    table = token_table(
        Column("ends", Integer, sa.Computed("done * 2", persisted=True)),
        Column("touched", Integer, onupdate=7),
    )
    fill(engine, table, 1)
    job = registry().map_imperatively(type("Job", (), {}), table)
    with Session(engine) as session:
        claim = claim_jobs(session, JobTable(job.class_, **ROLES))
        session.execute(table.update().values(touched=0))
        session.refresh(claim[0])
        complete_jobs(session, claim)
        assert (claim[0].done, claim[0].ends, claim[0].touched) == (1, 2, 7)


# --- savepoints


def test_entities_after_a_rollback_to_a_savepoint(database: Database) -> None:
    """They are as the row is then, with their version, and can be changed and flushed."""
    engine, table = database.engine(), token_table(Column("version", Integer, nullable=False))
    fill(engine, table, 1, version=1)
    job = registry().map_imperatively(type("Job", (), {}), table, version_id_col=table.c.version)
    jobs = JobTable(job.class_, **ROLES)
    with Session(engine) as session:
        found = session.get(job.class_, 1)
        savepoint = session.begin_nested()
        [claimed] = claim_jobs(session, jobs)
        assert (claimed is found, found.processing, found.version) == (True, True, 2)
        savepoint.rollback()
        assert (found.processing, found.claim_token, found.version) == (False, None, 1)
        claim = claim_jobs(session, jobs)
        savepoint = session.begin_nested()
        complete_jobs(session, claim)
        assert (found.done, found.version) == (1, 3)
        savepoint.rollback()
        assert (found.done, found.version) == (None, 2)
        found.note = "flushed"
        session.commit()
        assert (found.note, found.version) == ("flushed", 3)


# --- classes that a table does not identify


class Base(DeclarativeBase):
    """A class in two tables, with its state in the second one."""


class Thing(Base):
    """A thing with a version."""

    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    v: Mapped[int] = mapped_column()
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": kind, "version_id_col": v}


class VersionedJob(Thing):
    """A thing that is claimed."""

    __tablename__ = "versioned_jobs"
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "job"}

    id: Mapped[int] = mapped_column(ForeignKey(Thing.id), primary_key=True)
    processing: Mapped[bool]


def by_another_key() -> Any:
    """Return a class that has another primary key than its table."""
    table = job_table(Column("code", String(20), unique=True))
    return (
        registry().map_imperatively(type("Job", (), {}), table, primary_key=[table.c.code]).class_
    )


def by_a_query() -> Any:
    """Return a class that is mapped to a SELECT."""
    query = sa.select(job_table()).subquery()
    return registry().map_imperatively(type("Job", (), {}), query, primary_key=[query.c.id]).class_


CLASSES: dict[str, tuple[Callable[[], Any], str]] = {
    "another key": (by_another_key, "has the primary key jobs.code, which is not that of 'jobs'"),
    "a query": (by_a_query, "has the primary key anon_1.id, which is not that of 'jobs'"),
    "a version elsewhere": (
        lambda: VersionedJob,
        "has its version in things.v, which is not that of 'versioned_jobs'",
    ),
}


@once
@pytest.mark.parametrize("kind", CLASSES)
def test_classes_that_are_refused(kind: str) -> None:
    """A claim updates one table, so the identity and the version have to be there."""
    make, words = CLASSES[kind]
    given = make()
    with pytest.raises(ClaimError, match="declare the Table") as raised:
        JobTable(given, state="processing")
    assert words in str(raised.value)


def test_deletion_of_a_class_in_several_tables(database: Database) -> None:
    """By engine it would leave the rows of all but one table; by session all of them go."""
    engine, metadata = database.engine(), MetaData()
    table = job_table().to_metadata(metadata)
    more = Table("more", metadata, Column("job_id", ForeignKey(table.c.id), primary_key=True))
    job = registry(metadata=metadata).map_imperatively(
        type("Job", (), {}), sa.join(table, more), properties={"id": [table.c.id, more.c.job_id]}
    )
    fill(engine, table, 2)
    with engine.begin() as connection:
        connection.execute(more.insert(), [{"job_id": 1}, {"job_id": 2}])
    jobs = JobTable(job.class_, state="processing")
    for kind in ("engine", "connection"):
        with bound(engine, kind) as bind, pytest.raises(ClaimError, match="several tables"):
            dequeue_jobs(bind, jobs)
    assert dequeue_jobs(sessionmaker(engine), jobs).keys == ((1,),)
    with engine.connect() as connection:
        assert list(connection.scalars(sa.select(table.c.id))) == [2]
        assert list(connection.scalars(sa.select(more.c.job_id))) == [2]


# --- keys


class Kind(enum.Enum):
    """A key that is a member."""

    B = 2
    A = 1


KEYS: dict[str, Any] = {
    "single precision": sa.Float(),
    "REAL": sa.REAL(),
    "JSON": sa.JSON(),
    "an array": postgresql.ARRAY(Integer),
    "a set": mysql.SET("a", "b"),
}


@once
@pytest.mark.parametrize("kind", KEYS)
def test_keys_that_do_not_find_their_rows(kind: str) -> None:
    """Rows could not be marked, or ended, by a value that comes back changed or has no hash."""
    table = Table(
        "jobs",
        MetaData(),
        Column("id", KEYS[kind], primary_key=True),
        Column("processing", sa.Boolean),
    )
    with pytest.raises(ClaimError, match=r"primary_key='id' is .* expected hashable values"):
        JobTable(table, state="processing")


@pytest.mark.databases("mysql", "mariadb")
def test_a_key_of_single_precision(database: Database) -> None:
    """The twin: the value that was read finds no row."""
    engine = database.engine()
    table = Table(
        "jobs", MetaData(), Column("id", sa.Float(), primary_key=True, autoincrement=False)
    )
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), {"id": 0.1})
        found = connection.scalars(sa.select(table.c.id)).one()
        assert not list(connection.scalars(sa.select(table.c.id).where(table.c.id == found)))


@pytest.mark.parametrize(
    ("type_", "keys"),
    [
        (sa.Double(), [0.1, 3.3, -2.0]),
        (sa.Enum(Kind, name="kind"), [Kind.B, Kind.A]),
        (sa.Enum(Kind, native_enum=False), [Kind.B, Kind.A]),
    ],
    ids=["double", "enum", "enum as text"],
)
@pytest.mark.parametrize("kind", ["engine", "session"])
def test_keys_that_find_their_rows(
    database: Database, kind: str, type_: Any, keys: list[Any]
) -> None:
    """The twin: such keys are read and found again."""
    table = Table(
        "jobs",
        MetaData(),
        Column("id", type_, primary_key=True, autoincrement=False),
        *(column._copy() for column in token_table().columns if column.name != "id"),
    )
    engine = database.engine()
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        values = [rows(1, first=n)[0] | {"id": key} for n, key in enumerate(keys)]
        connection.execute(table.insert(), values)
    jobs = JobTable(table, order="created_at", **ROLES)
    with bound(engine, kind) as bind:
        claim = claim_jobs(bind, jobs, 5)
        assert claim.keys == tuple((key,) for key in keys)
        assert complete_jobs(bind, claim) == len(keys)


@pytest.mark.parametrize("kind", BINDS)
@pytest.mark.databases("sqlite", "postgresql")
def test_a_key_that_is_null(database: Database, kind: str) -> None:
    """The first row has no key, so it cannot be marked: the claim says so, and claims nothing."""
    engine = database.engine()
    text = "TEXT PRIMARY KEY" if database.name == "sqlite" else "TEXT UNIQUE"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TABLE jobs (id {text}, processing BOOL, created_at TIMESTAMP)"
        )
        for key in ("NULL", "'a'"):
            connection.exec_driver_sql(f"INSERT INTO jobs VALUES ({key}, false, '2024-01-01')")
    table = Table(
        "jobs",
        MetaData(),
        Column("id", String, primary_key=True),
        Column("processing", sa.Boolean),
        Column("created_at", sa.DateTime),
    )
    jobs = JobTable(table, state="processing", order=[table.c.id.is_(None).desc()])
    for limit in (1, 2):
        with bound(engine, kind) as bind, pytest.raises(ClaimError, match="a key that is NULL"):
            claim_jobs(bind, jobs, limit)
    assert taken(engine, table) == []


OTHER_KEYS = {
    "none": ("id INT NOT NULL UNIQUE", "['id'] in the Table of 'jobs' and [] in the database"),
    "another": ("no INT PRIMARY KEY AUTO_INCREMENT, id INT NOT NULL UNIQUE", "and ['no'] in the"),
    "a view": ("id INT PRIMARY KEY", "a view reads"),
}


@pytest.mark.parametrize("kind", BINDS)
@pytest.mark.parametrize("key", OTHER_KEYS)
@pytest.mark.databases("mysql", "mariadb")
def test_a_key_that_is_not_the_tables_own(database: Database, key: str, kind: str) -> None:
    """InnoDB would lock every row on the way to those that are claimed."""
    engine, (columns, words) = database.engine(), OTHER_KEYS[key]
    name = "jobs_" if key == "a view" else "jobs"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TABLE {name} ({columns}, processing BOOL NOT NULL, "
            "created_at DATETIME NOT NULL, note VARCHAR(50))"
        )
        if key == "a view":
            connection.exec_driver_sql(f"CREATE VIEW jobs AS SELECT * FROM {name}")
    table = job_table()
    fill(engine, table, 2)
    with bound(engine, kind) as bind, pytest.raises(ClaimError) as raised:
        claim_jobs(bind, JobTable(table, state="processing"))
    assert words in str(raised.value)


@pytest.mark.databases("mysql", "mariadb")
def test_a_part_of_the_declared_key_may_be_the_tables_own(database: Database) -> None:
    """A key that holds the table's own in other letters, and more, finds each row by it."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 2)
    declared = Table(
        "jobs",
        MetaData(),
        Column("ID", Integer, primary_key=True),
        Column("note", String(50), primary_key=True),
        Column("processing", sa.Boolean),
    )
    with engine.begin() as connection:
        connection.execute(table.update().values(note="x"))
    assert claim_jobs(engine, JobTable(declared, state="processing"), 5).keys == (
        (1, "x"),
        (2, "x"),
    )


# --- triggers


@pytest.mark.parametrize("kind", BINDS)
@pytest.mark.parametrize("name", ["attached.jobs", "JOBS"])
@once
def test_a_veto_by_a_trigger_elsewhere(database: Database, name: str, kind: str) -> None:
    """A trigger of an attached database, or under a name in other letters, is looked for too."""
    engine = database.engine()

    @sa.event.listens_for(engine, "connect")
    def attach(connection: Any, _: object) -> None:
        connection.execute(f"ATTACH '{database.url.database}.other' AS attached")

    schema, _, bare = name.rpartition(".")
    table = job_table(name=bare, schema=schema or None)
    where = schema or "main"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TABLE {where}.jobs (id INTEGER PRIMARY KEY, processing, created_at, note)"
        )
        connection.exec_driver_sql(
            f"CREATE TRIGGER {where}.veto BEFORE UPDATE ON jobs BEGIN SELECT RAISE(IGNORE); END"
        )
        connection.execute(table.insert(), rows(2))
    for limit in (1, 5):
        with bound(engine, kind) as bind, pytest.raises(ClaimError, match="look for a trigger"):
            claim_jobs(bind, table, limit)


# --- names and types


@pytest.mark.parametrize("kind", BINDS)
def test_columns_called_like_the_library(database: Database, kind: str) -> None:
    """Columns that were added for it may have its name."""
    engine = database.engine()
    names = {role: f"atomic_claim_{role}" for role in ("token", "lease", "worker", "attempts")}
    table = job_table(
        Column(names["token"], String(32)),
        Column(names["lease"], sa.DateTime),
        Column(names["worker"], String(20)),
        Column(names["attempts"], Integer, default=0),
        *(Column(f"atomic_claim_{name}", Integer) for name in ("least", "instant", "keys")),
    )
    fill(engine, table, 3)
    jobs = JobTable(table, state="processing", naive_times="utc", **names)
    lease = START.replace(year=2025) - START
    with bound(engine, kind) as bind:
        claim = claim_jobs(bind, jobs, 2, lease=lease, worker="ann")
        assert extend_jobs(bind, claim) == 2
        assert [(job.id, job.atomic_claim_worker) for job in claim] == [(1, "ann"), (2, "ann")]
        if kind in {"connection", "session"}:
            bind.commit()
    with engine.connect() as connection:
        ours = [table.c[f"atomic_claim_{name}"] for name in ("least", "instant", "keys")]
        assert set(connection.execute(sa.select(*ours))) == {(None, None, None)}


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("varying", [False, True])
def test_states_of_bits(database: Database, varying: bool) -> None:
    """PostgreSQL's BIT and VARBIT hold texts of digits."""
    engine = database.engine()
    table = job_table(Column("bits", postgresql.BIT(1, varying=varying), nullable=False))
    fill(engine, table, 2, bits="0")
    jobs = JobTable(table, state="bits", free="0", claimed="1", released="0")
    assert [job.bits for job in claim_jobs(engine, jobs, 5)] == ["1", "1"]
    assert ids(claim_jobs(engine, jobs, 5)) == []


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("name", ["claim_nearest", "claim_taken", "claim_all", "held", "branch_1"])
def test_tables_called_like_parts_of_the_statement(database: Database, name: str) -> None:
    """The statement of a claim with leases has more of them."""
    engine = database.engine()
    table = job_table(
        Column("claim_token", String(32)), Column("lease_until", sa.DateTime), name=name
    )
    fill(engine, table, 3)
    jobs = JobTable(
        table, state="processing", token="claim_token", lease="lease_until", naive_times="utc"
    )
    lease = START.replace(year=2025) - START
    assert ids(claim_jobs(engine, jobs, 2, lease=lease)) == [1, 2]
    assert ids(claim_jobs(engine, jobs, 2, lease=lease)) == [3]


@pytest.mark.databases("postgresql", "sqlite")
@pytest.mark.parametrize("name", ["claim_near", "claim_rest", "claim_step", "claim_turn"])
def test_tables_called_like_parts_of_the_search(database: Database, name: str) -> None:
    """The search for rows that are due, or in turns, has parts of its own, too."""
    engine = database.engine()
    table = job_table(Column("run_at", sa.DateTime), Column("attempts", Integer), name=name)
    fill(engine, table, 3)
    roles: dict[str, Any] = {"due": "run_at", "attempts": "attempts", "max_attempts": 3}
    if name == "claim_turn":
        roles = {"fair_by": "attempts"}
    jobs = JobTable(table, state="processing", order="created_at", naive_times="utc", **roles)
    assert [ids(claim_jobs(engine, jobs, 2)) for _ in range(2)] == [[1, 2], [3]]


@pytest.mark.parametrize("event", ["after_commit", "after_transaction_end"])
def test_a_listener_that_raises_after_the_commit(database: Database, event: str) -> None:
    """The claimed rows are freed again, since they are not handed out; no other row is tried."""
    engine, table = database.engine(), token_table()
    fill(engine, table, 8)
    maker = sessionmaker(engine)

    def fail(*_: object) -> None:
        raise RuntimeError("after the commit")

    sa.event.listen(maker, event, fail)
    with pytest.raises(RuntimeError, match="after the commit"):
        claim_jobs(maker, JobTable(table, order="created_at", **ROLES), 2)
    assert taken(engine, table) == []


def test_entities_that_are_false(database: Database) -> None:
    """A class may have a length; its entities are expired like others."""
    engine, table = database.engine(), token_table()
    fill(engine, table, 1)
    job = registry().map_imperatively(type("Job", (), {"__len__": lambda _: 0}), table).class_
    with Session(engine) as session:
        claim = claim_jobs(session, JobTable(job, order="created_at", **ROLES), 1)
        assert claim[0].processing
        assert complete_jobs(session, claim) == 1
        assert claim[0].done == 1
