"""Tables that the code knows only as text, given by their names in the database."""

import asyncio
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from atomic_claim import Patch, PatchError, claim_reads, claims, lock_reads, patch_claims
from atomic_claim.patch.file import load_patches
from tests.databases import Database
from tests.patch.legacy import Event, Job
from tests.patch.test_shapes import fill

HERE = __name__
STATES = {"state": "state", "free": "waiting", "claimed": "running", "done": "done"}
JOBS = {"table": "jobs", "order": "place", **STATES}
LEASED = {**JOBS, "lease": "lease_until", "token": "claim_token", "naive_times": "utc"}
# What the code knows of its tables.
events = sa.table("events", sa.column("id"), sa.column("published"))
known = sa.table("jobs", sa.column("id"), sa.column("state"), sa.column("place"))


def take(bind: Any) -> Any:
    """Find and mark by raw SQL."""
    found = bind.execute(sa.text("SELECT id FROM jobs WHERE state = 'waiting' LIMIT 1")).first()
    bind.execute(sa.text("UPDATE jobs SET state = 'running' WHERE id = :id"), {"id": found.id})
    return found


async def take_async(session: AsyncSession) -> Any:
    """Never called: a claim stands in its place."""
    raise AssertionError(session)


class Queue:
    """A queue that is told its table."""

    def __init__(self, table_name: Any) -> None:
        self.table_name = table_name

    def take(self, session: Session) -> Any:
        """Find and mark by raw SQL."""
        return session.execute(sa.text(f"SELECT id FROM {self.table_name}")).first()


def relay(connection: sa.Connection) -> list[int]:
    """Publish all events in one transaction."""
    found = connection.scalars(sa.select(events.c.id).where(events.c.published.is_(False))).all()
    for key in found:
        connection.execute(sa.update(events).where(events.c.id == key).values(published=True))
    connection.commit()
    return list(found)


def run_all(connection: sa.Connection) -> list[int]:
    """Run all jobs, and commit each."""
    free = sa.select(known.c.id).where(known.c.state == "waiting").order_by(known.c.place)
    found = connection.scalars(free).all()
    for key in found:
        connection.execute(sa.update(known).where(known.c.id == key).values(state="done"))
        connection.commit()
    return list(found)


@pytest.fixture
def engine(database: Database) -> sa.Engine:
    """Create an engine with three jobs and three events."""
    engine = database.engine()
    fill(engine, Job, 3)
    with engine.begin() as connection:
        connection.execute(sa.insert(Event), [{"id": number} for number in range(1, 4)])
    return engine


@pytest.fixture
def letters(engine: sa.Engine) -> Iterator[sa.Engine]:
    """Create a table that no module defines."""
    table = sa.Table(
        "letters",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("locked_at", sa.DateTime),
    )
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(table), [{"id": 1}, {"id": 2}])
    yield engine
    table.drop(engine)


BINDS: dict[str, Callable[[sa.Engine], Any]] = {
    "engine": lambda engine: engine,
    "factory": sessionmaker,
    "session": Session,
    "connection": sa.Engine.connect,
}


@pytest.mark.parametrize("kind", BINDS)
def test_a_claim(engine: sa.Engine, kind: str) -> None:
    """The table is reflected from the bind of the first call, whatever that is."""
    made = patch_claims(take, JOBS, session="bind", commit=True, returns="id")
    bind = BINDS[kind](engine)
    with made as patch:
        assert [take(bind) for _ in range(4)] == [1, 2, 3, None]
    assert patch.claimed == 3
    if hasattr(bind, "close"):
        assert not bind.in_transaction()
        bind.close()


def test_roles_are_read_from_the_columns(letters: sa.Engine) -> None:
    """A bare name is read as a reflected table would be, with its schema if it has one."""
    schema = sa.inspect(letters).default_schema_name

    @claims(f"{schema}.letters", session=letters, returns="id", order_by="id")
    def send() -> Any:
        raise AssertionError

    assert [send(), send(), send()] == [1, 2, None]


def test_reads_that_lock(engine: sa.Engine) -> None:
    """The table is reflected from the connection of the first find."""
    with lock_reads(relay, "events") as patch, engine.connect() as connection:
        assert relay(connection) == [1, 2, 3]
    assert (patch.claimed, patch.passed_through) == (3, 0)


def test_reads_that_are_claimed(engine: sa.Engine) -> None:
    """A table is found by name where the rows are claimed first, too."""
    with claim_reads(run_all, LEASED, limit=2) as patch, engine.connect() as connection:
        assert [run_all(connection) for _ in range(3)] == [[1, 2], [3], []]
    assert (patch.claimed, patch.passed_through) == (3, 0)


class Own(DeclarativeBase):
    """The tables of this file."""


class Parcel(Own):
    """A parcel with a UUID as its key, a type that not every database has."""

    __tablename__ = "parcels"

    id: Mapped[str] = mapped_column(
        sa.Uuid(as_uuid=False), primary_key=True, default=lambda: str(uuid.uuid4())
    )
    number: Mapped[int]
    sent: Mapped[bool] = mapped_column(default=False)


def send_parcels(session: Session, sent: list[int], fails: int) -> None:
    """Send all parcels, each in its own transaction."""
    for parcel in session.scalars(
        sa.select(Parcel).where(Parcel.sent.is_(False)).order_by(Parcel.number)
    ).all():
        sent.append(parcel.number)
        if parcel.number == fails:
            raise ZeroDivisionError
        parcel.sent = True
        session.commit()


@pytest.fixture
def parcels(database: Database) -> Iterator[sa.Engine]:
    """Create an engine with five parcels."""
    engine = database.engine()
    Own.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add_all(Parcel(number=number) for number in range(1, 6))
    yield engine
    Own.metadata.drop_all(engine)


TABLES: dict[str, Any] = {
    "the class": {"table": f"{HERE}:Parcel", "state": "sent"},
    "its name": {"table": "parcels", "state": "sent", "free": False, "claimed": True},
}


@pytest.mark.parametrize("table", TABLES)
def test_keys_of_other_types(parcels: sa.Engine, table: str) -> None:
    """Rows that a loop has marked stay so, whatever the type of the key is reflected as."""
    sent: list[int] = []
    with Session(parcels) as session, claim_reads(send_parcels, TABLES[table], at_most_once=True):
        with pytest.raises(ZeroDivisionError):
            send_parcels(session, sent, 3)
        session.rollback()
        send_parcels(session, sent, 0)
    assert sent == [1, 2, 3, 3, 4, 5]


@pytest.mark.databases("sqlite", "postgresql")
def test_in_a_file(engine: sa.Engine, tmp_path: Path) -> None:
    """A file says the same."""
    path = tmp_path / "patches.toml"
    path.write_text(
        f"""
        [patches."{HERE}:take"]
        session = "bind"
        commit = true
        returns = "id"
        table = {{ table = "jobs", order = "place", state = "state", free = "waiting", \
claimed = "running", done = "done" }}

        [patches."{HERE}:relay"]
        by = "lock_reads"
        table = "events"

        [patches."{HERE}:run_all"]
        by = "claim_reads"
        at_most_once = true
        table = {{ table = "jobs", state = "state", free = "waiting", claimed = "running", \
done = "done" }}
        """,
        encoding="utf-8",
    )
    patches: list[Patch] = load_patches(path)
    with engine.connect() as connection:
        assert take(connection) == 1
        assert relay(connection) == [1, 2, 3]
        assert run_all(connection) == [2, 3]
    for patch in patches:
        patch.undo()


@pytest.mark.databases("sqlite", "postgresql")
def test_a_path_to_a_name(letters: sa.Engine) -> None:
    """A path or a callable may give a name, too."""
    own, other = Queue("letters"), Queue("nothing")
    with Session(letters) as session:
        with patch_claims(Queue.take, "self.table_name", commit=True, order_by="id"):
            assert own.take(session).id == 1
            with pytest.raises(PatchError, match="'nothing' is neither a parameter of the"):
                other.take(session)
        with patch_claims(Queue.take, lambda call: call.self.table_name, commit=True) as patch:
            assert own.take(session).id == 2
            assert patch.claimed == 1


def table_of(call: Any) -> Any:
    """Give the table of a call, for an option that names this."""
    return call.self.table_name


def test_a_callable_that_is_named(letters: sa.Engine) -> None:
    """A name may be that of a callable, in a module that is imported already, too."""
    queue = Queue("letters")
    named = {"table": f"{HERE}:table_of", "order": "id"}
    with Session(letters) as session, patch_claims(Queue.take, named, commit=True):
        assert queue.take(session).id == 1


@pytest.mark.databases("sqlite", "postgresql")
def test_a_path_with_the_columns_beside_it(engine: sa.Engine) -> None:
    """A dictionary names the columns of whatever a path gives, a name or a table."""
    named, mapped = Queue("jobs"), Queue(Job)
    table = {**JOBS, "table": "self.table_name"}
    with Session(engine) as session, patch_claims(Queue.take, table, commit=True):
        assert [named.take(session).id, mapped.take(session).id] == [1, 2]


def test_a_table_that_is_not_there_yet(tmp_path: Path) -> None:
    """The error says what the name could be; the next call looks again."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'jobs'}")
    with patch_claims(take, JOBS, session="bind"), pytest.raises(PatchError, match="a parameter"):
        take(engine)
    with patch_claims(take, JOBS, session="bind", returns="id"):
        with pytest.raises(PatchError, match=r"nor a table in the database .*'package.models:Job'"):
            take(engine)
        fill(engine, Job, 1)
        assert take(engine) == 1
    engine.dispose()


def test_an_asynchronous_session(tmp_path: Path) -> None:
    """A coroutine's table is reflected beside the event loop."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'jobs'}"

    async def run() -> list[Any]:
        engine = create_async_engine(url)
        async with AsyncSession(engine) as session:
            found = [await take_async(session) for _ in range(3)]
        await engine.dispose()
        return found

    engine = sa.create_engine(f"sqlite:///{tmp_path / 'jobs'}")
    fill(engine, Job, 2)
    with patch_claims(take_async, JOBS, commit=True, returns="id"):
        assert asyncio.run(run()) == [1, 2, None]
    engine.dispose()
