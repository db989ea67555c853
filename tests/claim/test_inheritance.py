"""Classes that inherit: in joined tables, where the base holds the state, and in a single one."""

from datetime import datetime
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from sqlalchemy import ForeignKey, String
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from atomic_claim import ClaimError, JobTable, claim_jobs, claim_statement
from tests.databases import Database
from tests.jobs import START, bound, ids


class Base(DeclarativeBase):
    """The classes of this file."""


class Job(Base):
    """A job of any kind; all of them have their state here."""

    __tablename__ = "jobs"
    __mapper_args__: ClassVar[dict[str, Any]] = {
        "polymorphic_on": "kind",
        "polymorphic_identity": "job",
    }

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    processing: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime]


class Mail(Job):
    """A job with a table of its own beside the base's, whose key has another name."""

    __tablename__ = "mails"
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "mail"}

    mail_id: Mapped[int] = mapped_column(ForeignKey(Job.id), primary_key=True)
    address: Mapped[str] = mapped_column(String(50))
    body: Mapped[str | None] = mapped_column(String(50), deferred=True)


class Letter(Mail):
    """One more table down."""

    __tablename__ = "letters"
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "letter"}

    letter_id: Mapped[int] = mapped_column(ForeignKey(Mail.mail_id), primary_key=True)
    stamp: Mapped[int]


class Backup(Job):
    """A job in the base's own table, told apart by its kind."""

    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "backup"}

    target: Mapped[str | None] = mapped_column(String(50))


def filled(database: Database) -> sa.Engine:
    """Jobs 1 to 8, each class by turns, the highest number first."""
    engine = database.engine()
    Base.metadata.create_all(engine)
    makes: list[Any] = [
        Job,
        lambda: Mail(address="a@b", body="hello"),
        lambda: Letter(address="c@d", body="dear", stamp=5),
        lambda: Backup(target="tape"),
    ]
    with Session(engine) as session:
        for number in range(1, 9):
            job = makes[number % 4]()
            job.id, job.created_at = number, START.replace(year=2030 - number)
            session.add(job)
        session.commit()
    return engine


def running(engine: sa.Engine) -> list[int]:
    """Return the ids of the marked rows, read from the base's table."""
    with engine.connect() as connection:
        query = sa.select(Job.id).where(Job.processing).order_by(Job.id.desc())
        return list(connection.scalars(query))


both = pytest.mark.parametrize("kind", ["session", "sessionmaker"])


@both
@pytest.mark.parametrize("limit", [1, 8])
def test_the_base_gives_what_each_row_is(database: Database, kind: str, limit: int) -> None:
    """A claim of the base class takes every row, in order, as the class that it is of."""
    engine = filled(database)
    with bound(engine, kind) as bind:
        claimed = claim_jobs(bind, Job, limit)
        assert ids(claimed) == list(range(8, 8 - limit, -1))
        assert claimed.keys == tuple((number,) for number in ids(claimed))
        assert [type(job) for job in claimed] == ([Job, Backup, Letter, Mail] * 2)[:limit]
        assert all(job.processing for job in claimed)
        if kind == "session":
            bind.commit()
    assert running(engine) == list(range(8, 8 - limit, -1))


@both
@pytest.mark.parametrize("limit", [1, 5])
@pytest.mark.parametrize(
    ("given", "expected"),
    [(Mail, [6, 5, 2, 1]), (Letter, [6, 2]), (Backup, [7, 3])],
    ids=["joined", "joined twice", "single"],
)
def test_a_subclass_takes_only_its_rows(
    database: Database, kind: str, limit: int, given: type[Job], expected: list[int]
) -> None:
    """A claim of a subclass takes its own rows, and those of its subclasses."""
    engine = filled(database)
    with bound(engine, kind) as bind:
        claimed = claim_jobs(bind, given, limit)
        assert ids(claimed) == expected[:limit]
        assert all(isinstance(job, given) for job in claimed)
        if kind == "session":
            bind.commit()
    assert running(engine) == expected[:limit]


@pytest.mark.parametrize("limit", [1, 8])
def test_detached_entities_have_what_their_class_adds(database: Database, limit: int) -> None:
    """By sessionmaker, the subclasses' columns are loaded, deferred ones too."""
    claimed = claim_jobs(sessionmaker(filled(database)), Job, limit, order_by=Job.id)
    assert all(sa_inspect(job).detached for job in claimed)
    assert claimed[0].address == "a@b"
    assert claimed[0].body == "hello"
    for job in claimed:
        assert not sa_inspect(job).unloaded
    letters = [job for job in claimed if type(job) is Letter]
    assert [(job.address, job.body, job.stamp) for job in letters] == [
        ("c@d", "dear", 5) for _ in letters
    ]
    assert {job.target for job in claimed if type(job) is Backup} <= {"tape"}


@pytest.mark.parametrize("kind", ["connection", "engine"])
def test_rows_of_a_class_in_several_tables(database: Database, kind: str) -> None:
    """By engine or connection, a row has the columns of all of the class's tables."""
    with bound(filled(database), kind) as bind:
        claimed = claim_jobs(bind, Mail, 3)
        assert claimed.keys == ((6,), (5,), (2,))
        row = claimed[0]._mapping
        assert (row["id"], row["processing"], row["address"], row["body"]) == (
            6,
            True,
            "c@d",
            "dear",
        )


def test_rows_of_a_class_in_a_single_table(database: Database) -> None:
    """Rows of a single-table subclass are its own only."""
    engine = filled(database)
    claimed = claim_jobs(engine, Backup, 5)
    assert [(job.id, job.kind) for job in claimed] == [(7, "backup"), (3, "backup")]


def test_conditions_and_values_of_the_base_and_the_subclass(database: Database) -> None:
    """Conditions and the order may use the subclass's columns; what is written is the base's."""
    engine = filled(database)
    with Session(engine) as session:
        session.execute(sa.update(Mail.__table__).where(Mail.mail_id == 2).values(address="z@z"))
        claimed = claim_jobs(session, Mail, 3, where=Mail.address > "b", order_by=Mail.address)
        assert ids(claimed) == [6, 2]
        session.rollback()
        claimed = claim_jobs(session, Mail, where=Mail.kind == "mail", values={"created_at": START})
        assert (claimed[0].id, claimed[0].created_at) == (5, START)


def test_a_declared_subclass(database: Database) -> None:
    """A JobTable of the subclass finds the table that holds the state."""
    roles = JobTable(Letter, state="processing", order=Letter.stamp)
    assert roles.table is Job.__table__
    assert sorted(ids(claim_jobs(sessionmaker(filled(database)), roles, 5))) == [2, 6]


@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_others_hold_some(database: Database) -> None:
    """While one transaction holds rows, the next takes others, whatever class it asks for."""
    engine = filled(database)
    with Session(engine) as one, Session(engine) as other, Session(engine) as third:
        assert ids(claim_jobs(one, Mail, 2)) == [6, 5]
        assert ids(claim_jobs(other, Job, 3)) == [8, 7, 4]
        assert ids(claim_jobs(third, Mail, 2)) == [2, 1]


def test_one_statement_cannot_return_several_tables(database: Database) -> None:
    """The construct is refused for such a class, before anything is executed."""
    engine = filled(database)
    with pytest.raises(ClaimError, match="several tables"):
        claim_statement(Mail, 3)
    assert running(engine) == []
