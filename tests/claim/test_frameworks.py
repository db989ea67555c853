"""Sessions as applications have them: a framework's, of several binds, with criteria."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
import sqlmodel
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import String
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    Session,
    mapped_column,
    registry,
    scoped_session,
    sessionmaker,
    with_loader_criteria,
)

from atomic_claim import claim_jobs
from tests.databases import Database
from tests.jobs import fill, ids, job_table, mapped, rows, taken

FLASK = SQLAlchemy()


class FlaskJob(FLASK.Model):
    """A job as Flask-SQLAlchemy has it."""

    __tablename__ = "jobs"

    id = FLASK.Column(FLASK.Integer, primary_key=True)
    processing = FLASK.Column(FLASK.Boolean, nullable=False, default=False)
    created_at = FLASK.Column(FLASK.DateTime, nullable=False)


class OtherFlaskJob(FLASK.Model):
    """A job in the application's other database."""

    __tablename__ = "other_jobs"
    __bind_key__ = "other"

    id = FLASK.Column(FLASK.Integer, primary_key=True)
    processing = FLASK.Column(FLASK.Boolean, nullable=False, default=False)
    created_at = FLASK.Column(FLASK.DateTime, nullable=False)


@pytest.fixture
def application(database: Database) -> Iterator[Flask]:
    """Yield an application with three jobs in its database and three in its SQLite bind."""
    application = Flask("application")
    application.config |= {
        "SQLALCHEMY_DATABASE_URI": database.url,
        "SQLALCHEMY_BINDS": {"other": "sqlite://"},
    }
    # The extension takes one application after another, and is the module's only one.
    FLASK.init_app(application)
    with application.app_context():
        FLASK.create_all()
        FLASK.session.add_all(FlaskJob(**row) for row in rows(3))
        FLASK.session.add_all(OtherFlaskJob(**row) for row in rows(3, first=11))
        FLASK.session.commit()
        yield application
        FLASK.session.remove()
        for engine in FLASK.engines.values():
            engine.dispose()


@pytest.mark.usefixtures("application")
def test_flask_sqlalchemy() -> None:
    """`db.session` is a session like any other: a rollback undoes the claim."""
    claimed = claim_jobs(FLASK.session, FlaskJob, 2)
    assert ids(claimed) == [1, 2]
    assert isinstance(claimed[0], FlaskJob)
    FLASK.session.rollback()
    assert ids(claim_jobs(FLASK.session, FlaskJob)) == [1]
    FLASK.session.commit()
    FLASK.session.remove()
    assert ids(claim_jobs(FLASK.session, FlaskJob, 5)) == [2, 3]


@pytest.mark.usefixtures("application")
def test_flask_sqlalchemy_with_bind_keys() -> None:
    """A model with a bind key is claimed in its own database."""
    assert ids(claim_jobs(FLASK.session, OtherFlaskJob, 2)) == [11, 12]
    assert ids(claim_jobs(FLASK.session, OtherFlaskJob.__table__, 2)) == [13]
    FLASK.session.commit()
    assert taken(FLASK.engines["other"], OtherFlaskJob.__table__) == [11, 12, 13]
    assert taken(FLASK.engine, FlaskJob.__table__) == []


@pytest.mark.usefixtures("application")
def test_flask_sqlalchemy_by_engine() -> None:
    """`db.engine` is an engine like any other."""
    assert ids(claim_jobs(FLASK.engine, FlaskJob, 2)) == [1, 2]
    assert taken(FLASK.engine, FlaskJob.__table__) == [1, 2]


class ModelJob(sqlmodel.SQLModel, table=True):
    """A job as SQLModel has it."""

    __tablename__ = "jobs"

    id: int | None = sqlmodel.Field(default=None, primary_key=True)
    processing: bool = False
    run_at: datetime | None = None
    title: str = sqlmodel.Field(default="", max_length=50)


@pytest.mark.parametrize("limit", [1, 2])
def test_sqlmodel(database: Database, limit: int) -> None:
    """SQLModel's classes are claimed by its Session as models, without a warning."""
    engine = database.engine()
    sqlmodel.SQLModel.metadata.create_all(engine)
    with sqlmodel.Session(engine) as session:
        later, earlier = datetime(9000, 1, 1, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=UTC)
        for number, at in enumerate([later, earlier, None, earlier], 1):
            session.add(ModelJob(id=number, run_at=at, title="t"))
        session.commit()
        claimed = claim_jobs(session, ModelJob, limit)
        assert ids(claimed) == [2, 3][:limit]
        assert claimed[0].model_dump(exclude={"run_at"}) == {
            "id": 2,
            "processing": True,
            "title": "t",
        }
        claimed[0].title = "changed"
        session.commit()
        titles = session.exec(sqlmodel.select(ModelJob.title).order_by("id")).all()
        assert titles == ["t", "changed", "t", "t"]
    (job,) = claim_jobs(sessionmaker(engine, class_=sqlmodel.Session), ModelJob)
    assert (job.id, job.title) == (limit + 2, "t")


def by_mapper(job: Any, _: sa.Table, engine: sa.Engine) -> dict[Any, sa.Engine]:
    """Return a session's binds by class."""
    return {job: engine}


def by_table(_: Any, table: sa.Table, engine: sa.Engine) -> dict[Any, sa.Engine]:
    """Return a session's binds by table."""
    return {table: engine}


@pytest.mark.parametrize("binds", [by_mapper, by_table])
def test_a_session_of_several_binds(database: Database, binds: Any) -> None:
    """A session whose tables lie in several databases claims in the table's own."""
    here, there = database.engine(), database.engine(url=sa.URL.create("sqlite"))
    table, other = job_table(), job_table(name="others")
    job, another = mapped(table), mapped(other)
    fill(here, table, 3)
    fill(there, other, 3, first=11)
    maker = sessionmaker(binds=binds(job, table, here) | binds(another, other, there))
    with maker() as session:
        assert ids(claim_jobs(session, job, 2)) == [1, 2]
        assert ids(claim_jobs(session, another, 2)) == [11, 12]
        session.commit()
    assert ids(claim_jobs(maker, job, 2)) == [3]
    assert ids(claim_jobs(maker, another, 2)) == [13]
    assert taken(here, table) == [1, 2, 3]
    assert taken(there, other) == [11, 12, 13]


def test_rows_by_a_session_of_several_binds(database: Database) -> None:
    """A session that is bound by table claims rows of a bare table in its own database."""
    here, there = database.engine(), database.engine(url=sa.URL.create("sqlite"))
    table, other = job_table(), job_table(name="others")
    fill(here, table, 3)
    fill(there, other, 3, first=11)
    with Session(binds={table: here, other: there}) as session:
        assert ids(claim_jobs(session, table, 2)) == [1, 2]
        assert ids(claim_jobs(session, other, 2)) == [11, 12]
        session.commit()
    assert taken(here, table) == [1, 2]
    assert taken(there, other) == [11, 12]


def test_a_session_on_a_connection(database: Database) -> None:
    """A session that joins a connection's transaction claims within it."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 3)
    with engine.begin() as connection:
        with Session(connection, join_transaction_mode="rollback_only") as session:
            assert ids(claim_jobs(session, table, 2)) == [1, 2]
            session.commit()
        assert taken(engine, table) == []
    assert taken(engine, table) == [1, 2]


class Base(DeclarativeBase):
    """The classes with a tenant."""


class Job(Base):
    """A job of one tenant."""

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    processing: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime]
    tenant: Mapped[str] = mapped_column(String(10))


def of_two_tenants(database: Database) -> tuple[sa.Engine, sa.Table]:
    """Jobs 1 to 4 of acme, 5 to 8 of zeta."""
    engine = database.engine()
    table: Any = Job.__table__
    fill(engine, table, 4, tenant="acme")
    fill(engine, table, 4, first=5, tenant="zeta")
    return engine, table


def add_criteria(state: ORMExecuteState) -> None:
    """SQLAlchemy's documented way to add global WHERE criteria, for statements of all kinds."""
    if not state.is_column_load and not state.is_relationship_load:
        criteria = with_loader_criteria(Job, lambda cls: cls.tenant == "zeta", include_aliases=True)
        state.statement = state.statement.options(criteria)


def add_criteria_to_selects(state: ORMExecuteState) -> None:
    """Add global WHERE criteria to SELECT only, exactly as SQLAlchemy documents it."""
    if state.is_select:
        add_criteria(state)


@pytest.mark.parametrize("recipe", [add_criteria, add_criteria_to_selects])
@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("kind", ["session", "sessionmaker", "scoped_session"])
def test_criteria_of_the_session(database: Database, recipe: Any, limit: int, kind: str) -> None:
    """A tenant that the session adds to its statements keeps others' jobs out of its claims."""
    engine, table = of_two_tenants(database)
    maker = sessionmaker(engine)
    sa.event.listen(maker, "do_orm_execute", recipe)
    if kind == "sessionmaker":
        claimed = claim_jobs(maker, Job, limit)
    elif kind == "session":
        with maker() as session:
            claimed = claim_jobs(session, Job, limit)
            assert [job.tenant for job in claimed] == ["zeta"] * limit
            session.expire_on_commit = False
            session.commit()
    else:
        scoped = scoped_session(maker)
        claimed = claim_jobs(scoped, Job, limit)
        assert [job.tenant for job in claimed] == ["zeta"] * limit
        scoped().expire_on_commit = False
        scoped.commit()
        scoped.remove()
    assert ids(claimed) == [5, 6, 7][:limit]
    assert taken(engine, table) == [5, 6, 7][:limit]


def test_events_of_the_session_see_the_claim(database: Database) -> None:
    """A session's `do_orm_execute` is told of a claim, as of every statement of the session's."""
    engine, _ = of_two_tenants(database)
    seen: list[bool] = []
    with Session(engine) as session:
        sa.event.listen(
            session, "do_orm_execute", lambda state: seen.append(state.is_orm_statement)
        )
        claim_jobs(session, Job)
    assert any(seen)


def test_a_version_counter(database: Database) -> None:
    """An entity with a version counter can be changed and flushed after its claim."""
    table = job_table(sa.Column("version", sa.Integer, nullable=False))
    job = (
        registry().map_imperatively(type("Job", (), {}), table, version_id_col=table.c.version)
    ).class_
    engine = database.engine()
    fill(engine, table, 3, version=1)
    with Session(engine) as session:
        claimed = claim_jobs(session, job, 2)
        claimed[0].note = "done"
        session.commit()
        assert claimed[0].note == "done"
        assert sa_inspect(claimed[0]).persistent
