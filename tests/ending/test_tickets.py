"""Claims as sequences, as tickets and pickled."""

import datetime as dt
import enum
import ipaddress
import json
import pickle
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from atomic_claim import Claim, ClaimError, ClaimLost, JobTable, claim_jobs, complete_jobs
from tests.databases import Database
from tests.ending.test_lease import LEASE, made, mapped, row
from tests.jobs import ids


class Queue(enum.Enum):
    """Values of an Enum column."""

    MAIL = "mail"


class Rank(enum.IntEnum):
    """An integer by its class, which JSON would write as one."""

    FIRST = 1


class Hex(sa.TypeDecorator[uuid.UUID]):
    """A UUID in a CHAR column, as SQLAlchemy's recipe has it."""

    impl = sa.CHAR(32)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:  # noqa: ARG002
        """Write it without hyphens."""
        return None if value is None else value.hex

    def process_result_value(self, value: Any, dialect: Any) -> Any:  # noqa: ARG002
        """Read it."""
        return None if value is None else uuid.UUID(value)


class Ranked(sa.TypeDecorator[Rank]):
    """An enum in an INTEGER column."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:  # noqa: ARG002
        """Write its number."""
        return int(value)

    def process_result_value(self, value: Any, dialect: Any) -> Any:  # noqa: ARG002
        """Read it."""
        return Rank(value)


PRECISE = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
BYTES = sa.LargeBinary().with_variant(mysql.VARBINARY(16), "mysql", "mariadb")
NOON = dt.datetime(2024, 1, 2, 12, 0, 0, 250000)  # noqa: DTZ001 - of a column without a zone
KEYS: dict[str, tuple[Any, Any]] = {
    "enum": (sa.Enum(Queue), Queue.MAIL),
    "hex": (Hex(), uuid.UUID(int=7)),
    "ranked": (Ranked(), Rank.FIRST),
    "uuid": (sa.Uuid(), uuid.UUID(int=2**90)),
    "uuid as text": (sa.Uuid(as_uuid=False), str(uuid.UUID(int=9))),
    "time": (sa.Time(), dt.time(12, 1)),
    "date": (sa.Date(), dt.date(2024, 1, 2)),
    "datetime": (PRECISE, NOON),
    "numeric": (sa.Numeric(30, 2), Decimal("1234567890123456789012345678.10")),
    "bytes": (BYTES, b"\x00\xff1"),
    "boolean": (sa.Boolean(), True),
    "integer": (sa.BigInteger(), 2**60 + 1),
    "text": (sa.String(20), '"ab"\\'),
    "interval": (
        sa.Interval(),
        dt.timedelta(days=2, seconds=5),
    ),
}


@pytest.mark.parametrize("kind", KEYS)
def test_every_kind_of_key_survives(database: Database, kind: str) -> None:
    """Two rows share a ticket's token, and the ticket ends the one that it names."""
    type_, value = KEYS[kind]
    if kind == "numeric" and database.name == "sqlite":
        pytest.skip("SQLite stores it as a float")
    engine = database.engine()
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        Column("part", type_, primary_key=True),
        Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        Column("processing", sa.Boolean, nullable=False, default=False),
        Column("done_at", sa.DateTime),
        Column("claim_token", sa.String(32)),
    )
    table.create(engine)
    with engine.begin() as connection:
        rows = [{"part": value, "id": 2**53}, {"part": value, "id": 2**53 + 1}]
        connection.execute(table.insert(), rows)
    done = {"done_at": sa.func.now()}
    jobs = JobTable(table, state="processing", done=done, token="claim_token")
    claim = claim_jobs(engine, jobs, 2)
    text = json.dumps(claim.ticket(claim.keys[1]))
    assert str(2**53 + 1) not in text.replace(f'"{2**53 + 1}"', "")
    ticket = Claim.from_ticket(table_copy(jobs), json.loads(text))
    assert ticket.keys == (claim.keys[1],)
    assert complete_jobs(engine, ticket) == 1
    with engine.connect() as connection:
        left = connection.scalars(sa.select(table.c.id).where(table.c.done_at.is_(None))).all()
    assert left == [2**53]


def table_copy(jobs: JobTable) -> JobTable:
    """Declare the table as another process does, with a Table of its own."""
    table = jobs.table.to_metadata(sa.MetaData())
    done = {"done_at": sa.func.now()}
    return JobTable(table, state="processing", done=done, token="claim_token")


@pytest.mark.once
@pytest.mark.databases("sqlite")
def test_a_key_that_does_not_survive_is_refused_at_once(database: Database) -> None:
    """The error names the key; where a claim is of another table, both are named."""
    engine, jobs = made(database, 2)
    inet = sa.Table(
        "nodes",
        sa.MetaData(),
        Column("ip", postgresql.INET, primary_key=True),
        Column("note", sa.String(1)),
    )
    address = ipaddress.ip_address("10.0.0.1")
    free = {"free": sa.true(), "claimed": {"note": "x"}}
    nodes: Claim[Any] = Claim((address,), table=JobTable(inet, **free), keys=((address,),))
    with pytest.raises(ClaimError, match=r"ip=IPv4Address.* does not survive JSON"):
        nodes.ticket(address)
    ticket = claim_jobs(engine, jobs, lease=LEASE).ticket(1)
    for wrong in (
        ticket | {"table": "nodes"},
        ticket | {"token": None},
        ticket | {"key": {"number": ["int", "1"]}},
        ticket | {"key": {"id": "1"}},
        ticket | {"key": {"id": ["list", "1"]}},
        ticket | {"lease": "long"},
        ticket | {"lease": float("nan")},
        {},
    ):
        with pytest.raises(ClaimError, match=r"ticket"):
            Claim.from_ticket(jobs, wrong)
    with pytest.raises(ClaimError, match=r"pass Claim.from_ticket\(table, ticket\)"):
        complete_jobs(engine, ticket)  # type: ignore[arg-type]


def test_a_ticket_of_whatever_names_the_job(database: Database) -> None:
    """An entity, a merged one, a row and a key are the same job; another claim's is not."""
    engine, jobs = made(database, 3)
    model, declared = mapped(jobs)
    claim = claim_jobs(sessionmaker(engine), declared, 2, lease=LEASE)
    with Session(engine) as session:
        merged = session.merge(claim[1])
        found = session.execute(sa.select(jobs.table).where(jobs.table.c.id == 2)).one()
        tickets = [claim.ticket(job) for job in (claim[1], merged, found, (2,), 2)]
        other = session.get(model, 3)
        assert complete_jobs(session, claim, [merged, found, 2]) == 1
        session.rollback()
    assert tickets == tickets[:1] * 5
    for job in (other, 3, "2", model(id=2), {"id": 2}, None, found._mapping):
        with pytest.raises(ClaimError, match="is not one of the claim's 2 jobs"):
            claim.ticket(job)
    for jobs_given in ("ab", claim[0], found, 2, {1: 2}):
        with pytest.raises(ClaimError, match=r"write \[job\]"):
            complete_jobs(engine, claim, jobs_given)  # type: ignore[arg-type]


@pytest.mark.once
@pytest.mark.databases("sqlite")
def test_a_claim_is_an_immutable_sequence(database: Database) -> None:
    """Its parts are claims of their own jobs, it equals a list, and nothing changes it."""
    engine, jobs = made(database, 3)
    claim = claim_jobs(engine, jobs, 3, lease=LEASE)
    assert isinstance(claim, Sequence)
    assert claim == list(claim)
    assert list(claim) == claim
    assert claim == claim[:]
    assert claim != claim[:2]
    assert claim[::-1].keys == ((3,), (2,), (1,))
    assert ids(reversed(claim)) == [3, 2, 1]
    assert claim[1] in claim
    for name in ("append", "pop", "sort", "reverse", "remove", "__setitem__", "__delitem__"):
        assert not hasattr(claim, name)
    with pytest.raises(AttributeError):
        claim.keys = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        hash(claim)
    assert complete_jobs(engine, claim[::-1][:1]) == 1
    assert row(engine, jobs, 3).done_at is not None


class Base(DeclarativeBase):
    """Of the mapped class that is pickled by its name."""


class Letter(Base):
    """A mapped job."""

    __tablename__ = "letters"
    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(sa.String(10), default="new")
    claim_token: Mapped[str | None] = mapped_column(sa.String(32))


def test_a_claim_can_be_pickled(database: Database) -> None:
    """Rows and entities come back equal, with a table that ends them by Engine and Session."""
    engine, jobs = made(database, 2)
    claim = claim_jobs(engine, jobs, 2, lease=LEASE)
    again: Claim[Any] = pickle.loads(pickle.dumps(claim))  # noqa: S301 - our own
    assert (list(again), again.keys, again.token) == (list(claim), claim.keys, claim.token)
    assert again == claim
    assert complete_jobs(engine, again[:1]) == 1
    for column, read in zip(jobs.table.columns, again.table.table.columns, strict=True):
        assert type(read.comparator.type) is type(column.comparator.type)

    Base.metadata.create_all(engine)
    letters = JobTable(
        Letter,
        state=Letter.state,
        free="new",
        claimed="busy",
        done="sent",
        token=Letter.claim_token,
    )
    with Session(engine) as session:
        session.add_all([Letter(id=1), Letter(id=2)])
        session.commit()
        claimed = claim_jobs(session, letters, 2)
        session.commit()
        pickled = pickle.dumps(claimed)
    with Session(engine) as session:
        found = pickle.loads(pickled)  # noqa: S301 - our own
        assert found.table.table is Letter.__table__
        letter = session.get(Letter, 1)
        assert letter is not None
        assert letter.state == "busy"
        assert complete_jobs(session, found, [letter]) == 1
        assert letter.state == "sent"
        session.commit()
    assert complete_jobs(engine, found[1:]) == 1
    with pytest.raises(ClaimLost):
        complete_jobs(engine, found)
    Base.metadata.drop_all(engine)
