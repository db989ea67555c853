"""Tests of the rows that claim_jobs returns, writes and leaves unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, String
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    column_property,
    mapped_column,
    registry,
    relationship,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.orm.exc import DetachedInstanceError

from atomic_claim import Claim, JobTable, claim_jobs
from tests.databases import Database
from tests.jobs import BINDS, CALLERS, OWN, START, bound, fill, ids, job_table, mapped, rows, taken


class Base(DeclarativeBase):
    """The classes of this file."""


class Job(Base):
    """A job with columns of every kind of loading, and its steps."""

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    processing: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime]
    note: Mapped[str | None] = mapped_column(String(50))
    payload: Mapped[str | None] = mapped_column(String(50), deferred=True)
    secret: Mapped[str | None] = mapped_column(
        String(50), deferred=True, deferred_raiseload=True, deferred_group="secrets"
    )
    double: Mapped[int] = column_property(sa.literal_column("id * 2", Integer), deferred=True)
    steps: Mapped[list["Step"]] = relationship()


class Step(Base):
    """One of the several steps of a job."""

    __tablename__ = "steps"

    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(sa.ForeignKey(Job.id))


COLUMNS = ["id", "processing", "created_at", "note", "payload", "secret"]
TABLES = {
    "Table": lambda: Job.__table__,
    "mapped class": lambda: Job,
    "JobTable of a Table": lambda: JobTable(Job.__table__, state="processing", order="created_at"),
    "JobTable of a class": lambda: JobTable(Job, state="processing", order="created_at"),
}


def filled(database: Database, count: int = 4) -> sa.Engine:
    """Create an engine and a table with free jobs."""
    engine = database.engine()
    table: Any = Job.__table__
    fill(engine, table, count, note="n", payload="p", secret="s")
    return engine


@contextmanager
def any_bind(engine: sa.Engine, kind: str) -> Iterator[Any]:
    """Everything that one can claim by."""
    if kind == "scoped_session":
        scoped = scoped_session(sessionmaker(engine))
        yield scoped
        scoped.remove()
        return
    with bound(engine, kind) as bind:
        yield bind


every_bind = pytest.mark.parametrize("kind", [*BINDS, "scoped_session"])


# --- results


@every_bind
@pytest.mark.parametrize("table", TABLES)
def test_what_each_bind_gives_of_each_table(database: Database, kind: str, table: str) -> None:
    """A class gives entities by a session or sessionmaker; everything else gives rows."""
    with any_bind(filled(database), kind) as bind:
        claimed = claim_jobs(bind, TABLES[table](), 2)
        assert isinstance(claimed, Claim)
        assert ids(claimed) == [1, 2]
        assert [job.processing for job in claimed] == [True, True]
        if "class" in table and kind not in {"connection", "engine"}:
            assert [type(job) for job in claimed] == [Job, Job]
            state = sa_inspect(claimed[0])
            assert state.detached if kind == "sessionmaker" else state.session is not None
        else:
            assert all(isinstance(job, sa.Row) for job in claimed)
            assert list(claimed[0]._mapping) == COLUMNS
            assert claimed[1]._mapping[Job.__table__.c.note] == "n"


@pytest.mark.parametrize("limit", [1, 3])
def test_detached_entities_have_every_column(database: Database, limit: int) -> None:
    """By sessionmaker, deferred columns and column properties are loaded too."""
    for job in claim_jobs(sessionmaker(filled(database)), Job, limit):
        assert sa_inspect(job).detached
        assert (job.note, job.payload, job.secret) == ("n", "p", "s")
        assert job.double == 2 * job.id


def test_detached_entities_have_no_relationships(database: Database) -> None:
    """Relationships are not loaded: each would be a read that the caller did not ask for."""
    job = claim_jobs(sessionmaker(filled(database)), Job)[0]
    with pytest.raises(DetachedInstanceError):
        _ = job.steps


@pytest.mark.parametrize("lazy", ["joined", "selectin", "subquery", "immediate", "raise"])
@pytest.mark.parametrize("kind", ["session", "sessionmaker"])
def test_relationships_that_are_loaded_at_once(database: Database, kind: str, lazy: Any) -> None:
    """However a class loads its relationships, it is claimed, and they are not taken for empty."""
    engine, table = database.engine(), job_table()
    steps = sa.Table(
        "steps",
        table.metadata,
        Column("id", Integer, primary_key=True),
        Column("job_id", sa.ForeignKey(table.c.id)),
    )
    mappers = registry()
    step = mappers.map_imperatively(type("Step", (), {}), steps).class_
    properties = {"steps": relationship(step, lazy=lazy)}
    job = mappers.map_imperatively(type("Job", (), {}), table, properties=properties).class_
    fill(engine, table, 4)
    with engine.begin() as connection:
        connection.execute(steps.insert(), [{"id": n, "job_id": 1 + n % 4} for n in range(1, 13)])
    with bound(engine, kind) as bind:
        for expected in ([1], [2, 3, 4]):
            claimed = claim_jobs(bind, job, len(expected))
            assert ids(claimed) == expected
            for each in claimed:
                with suppress(DetachedInstanceError, InvalidRequestError):
                    assert len(each.steps) == 3


def test_a_sessionmaker_s_own_options_are_kept(database: Database) -> None:
    """A maker that expires at commit gives loaded entities all the same, and keeps its setting."""
    maker = sessionmaker(filled(database), expire_on_commit=True)
    assert claim_jobs(maker, Job)[0].note == "n"
    assert maker.kw["expire_on_commit"] is True


def test_attached_entities_are_live(database: Database) -> None:
    """By session, an entity loads what it lacks, and is written back at the next flush."""
    engine = filled(database)
    with Session(engine) as session:
        job = claim_jobs(session, Job)[0]
        assert sa_inspect(job).persistent
        assert job not in session.dirty
        assert (job.payload, job.steps) == ("p", [])
        job.note = "done"
        session.commit()
    with engine.connect() as connection:
        assert connection.scalar(sa.select(Job.note).where(Job.id == 1)) == "done"


@every_bind
def test_nothing_to_claim(database: Database, kind: str) -> None:
    """An empty queue gives an empty Claim, which is as false as an empty list."""
    engine = filled(database, 1)
    with any_bind(engine, kind) as bind:
        assert ids(claim_jobs(bind, Job, 5)) == [1]
        nothing = claim_jobs(bind, Job, 5)
    assert nothing == []
    assert (nothing.keys, nothing[:1].keys) == ((), ())


# --- the Claim


def with_roles(*more: Any) -> sa.Table:
    """Build a job table with columns for the worker, the token and the attempts."""
    return job_table(
        Column("worker", String(20)),
        Column("claim_token", String(32)),
        Column("attempts", Integer, nullable=False, default=0),
        *more,
    )


def stored(engine: sa.Engine, table: sa.Table, *names: str) -> list[tuple[Any, ...]]:
    """Return the committed values of these columns for all rows, in the order of their ids."""
    with engine.connect() as connection:
        query = sa.select(*(table.c[name] for name in names)).order_by(table.c.id)
        return [tuple(row) for row in connection.execute(query)]


@every_bind
def test_the_claim_knows_what_was_claimed(database: Database, kind: str) -> None:
    """A Claim knows its table, its keys in claim order, its worker and its token."""
    engine, table = database.engine(), with_roles()
    fill(engine, table, 3)
    roles = JobTable.infer(table)
    with any_bind(engine, kind) as bind:
        claimed = claim_jobs(bind, roles, 2, worker="ann", order_by=table.c.id.desc())
        if kind in CALLERS or kind == "scoped_session":
            bind.commit()
    assert claimed.table is roles
    assert claimed.keys == ((3,), (2,))
    assert claimed.worker == "ann"
    assert claimed.lease is None
    assert stored(engine, table, "worker", "claim_token", "attempts") == [
        (None, None, 0),
        ("ann", claimed.token, 1),
        ("ann", claimed.token, 1),
    ]


def test_a_slice_is_a_claim(database: Database) -> None:
    """A part of a claim knows its own keys, and what the whole knows."""
    engine, table = database.engine(), with_roles()
    fill(engine, table, 4)
    claimed = claim_jobs(engine, table, 4, worker="ann")
    part = claimed[1:3]
    assert isinstance(part, Claim)
    assert (ids(part), part.keys) == ([2, 3], ((2,), (3,)))
    assert (part.table, part.token, part.worker) == (claimed.table, claimed.token, "ann")
    assert claimed[::-1].keys == ((4,), (3,), (2,), (1,))
    assert claimed[-1].id == 4


def test_every_claim_has_a_token_of_its_own(database: Database) -> None:
    """Tokens are 128 random bits as text, another for each claim; what is written is the token."""
    engine, table = database.engine(), with_roles()
    fill(engine, table, 20)
    tokens = [claim_jobs(engine, table).token for _ in range(10)]
    with Session(engine) as session:
        tokens += [claim_jobs(session, table).token for _ in range(10)]
        session.commit()
    assert len(set(tokens)) == 20
    assert all(len(token or "") == 32 and int(token or "", 16) >= 0 for token in tokens)
    assert [token for (token,) in stored(engine, table, "claim_token")] == tokens


def test_a_claim_without_a_token_column(database: Database) -> None:
    """Where the table has no place for it, there is no token."""
    assert claim_jobs(filled(database), Job).token is None


def test_a_worker_that_is_not_named_is_not_written(database: Database) -> None:
    """A claim without a name leaves the column as it is, which may be NOT NULL."""
    engine, table = database.engine(), with_roles()
    fill(engine, table, 1, worker="bob", claim_token="b" * 32)
    claimed = claim_jobs(engine, table)
    assert stored(engine, table, "worker", "claim_token") == [("bob", claimed.token)]


def test_a_claim_tells_what_it_is(database: Database) -> None:
    """Its repr names the table and the jobs."""
    claimed = claim_jobs(filled(database), job_table(), 2)
    assert repr(claimed).startswith("<Claim of 2 from jobs: [(1, True, ")


# --- what the caller owns


@pytest.mark.parametrize("kind", CALLERS)
def test_the_caller_commits(database: Database, kind: str) -> None:
    """In the caller's transaction, others see the claim at commit, and not before."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 3)
    with bound(engine, kind) as bind:
        assert ids(claim_jobs(bind, table, 2)) == [1, 2]
        assert bind.in_transaction()
        assert taken(engine, table) == []
        bind.commit()
        assert taken(engine, table) == [1, 2]


@pytest.mark.parametrize("kind", CALLERS)
@pytest.mark.parametrize("limit", [1, 3])
def test_the_caller_rolls_back(database: Database, kind: str, limit: int) -> None:
    """A rollback undoes the claim, whole and without a trace."""
    engine, table = database.engine(), with_roles()
    fill(engine, table, 3)
    with bound(engine, kind) as bind:
        assert len(claim_jobs(bind, table, limit, worker="ann")) == limit
        bind.rollback()
        assert (
            stored(engine, table, "processing", "worker", "claim_token", "attempts")
            == [(False, None, None, 0)] * 3
        )
        assert len(claim_jobs(bind, table, limit)) == limit


@pytest.mark.parametrize("kind", CALLERS)
@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_a_savepoint_of_the_caller_s(database: Database, kind: str) -> None:
    """A claim within a savepoint is undone with it, and what was before it is kept."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 3)
    with bound(engine, kind) as bind:
        claim_jobs(bind, table)
        savepoint = bind.begin_nested()
        assert ids(claim_jobs(bind, table)) == [2]
        savepoint.rollback()
        bind.commit()
    assert taken(engine, table) == [1]


@pytest.mark.parametrize("kind", OWN)
def test_our_own_transaction_is_committed(database: Database, kind: str) -> None:
    """By engine or sessionmaker the claim is everybody's to see once it is returned."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 3)
    with bound(engine, kind) as bind:
        assert ids(claim_jobs(bind, table, 2)) == [1, 2]
        assert taken(engine, table) == [1, 2]
        assert engine.pool.checkedout() == 0


def test_what_else_the_session_holds_is_left_alone(database: Database) -> None:
    """Other entities are neither expired nor reloaded, and edits of theirs are kept."""
    engine = filled(database)
    with Session(engine) as session:
        session.add_all([Step(id=1, job_id=3), Step(id=2, job_id=3)])
        session.commit()
        other, step, edited = session.get(Job, 4), session.get(Step, 1), session.get(Step, 2)
        assert other is not None
        assert edited is not None
        edited.job_id = 4
        with session.no_autoflush:
            claim_jobs(session, Job, 2)
            assert edited.job_id == 4
            assert edited in session.dirty
        for each in (other, step):
            assert not sa_inspect(each).expired
            assert "id" in sa_inspect(each).dict


def test_what_the_session_has_not_flushed_is_claimed_too(database: Database) -> None:
    """With autoflush, as for any query of the session's, new jobs are there before the claim."""
    with Session(filled(database, 1)) as session:
        session.add(Job(id=9, created_at=START))
        assert ids(claim_jobs(session, Job, 5)) == [9, 1]


def test_a_changed_job_is_flushed_first(database: Database) -> None:
    """With autoflush, a job that the caller has just marked is not claimed."""
    with Session(filled(database, 3)) as session:
        first = session.get(Job, 1)
        assert first is not None
        first.processing = True
        assert ids(claim_jobs(session, Job, 5)) == [2, 3]


@pytest.mark.parametrize("kind", CALLERS)
def test_the_bind_stays_open(database: Database, kind: str) -> None:
    """The caller's session or connection goes on in the same transaction."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 3)
    with bound(engine, kind) as bind:
        claim_jobs(bind, table)
        before = bind.get_transaction()
        claim_jobs(bind, table)
        assert bind.get_transaction() is before
        assert bind.execute(sa.select(table.c.id).where(table.c.processing)).all() == [(1,), (2,)]


# --- the arguments


def test_where(database: Database) -> None:
    """Conditions come as an expression or as a list of them, by column or by attribute."""
    engine, table = database.engine(), job_table(Column("queue", String(20)))
    fill(engine, table, 3, queue="mail")
    fill(engine, table, 3, first=4, queue="film")
    job = mapped(table)
    film = table.c.queue == "film"
    assert ids(claim_jobs(engine, table, where=film)) == [4]
    assert ids(claim_jobs(engine, table, 5, where=[film, table.c.id > 5])) == [6]
    assert ids(claim_jobs(sessionmaker(engine), job, where=job.queue == "film")) == [5]
    assert ids(claim_jobs(engine, table, 5, where=sa.or_(film, table.c.id == 2))) == [2]
    assert ids(claim_jobs(engine, table, 5, where=sa.text("queue = 'mail'"))) == [1, 3]
    assert claim_jobs(engine, table, 5, where=film) == []


def test_where_may_ask_another_table(database: Database) -> None:
    """A correlated subquery on another table is a condition like any other."""
    engine = filled(database)
    with Session(engine) as session:
        session.add(Step(id=1, job_id=3))
        session.commit()
        has_steps = sa.exists().where(Step.job_id == Job.id)
        assert ids(claim_jobs(session, Job, 5, where=has_steps)) == [3]
        session.rollback()
        assert ids(claim_jobs(session, Job, 5, where=~Job.steps.any())) == [1, 2, 4]
        session.rollback()
        table: Any = Job.__table__
        among = table.c.id.in_(sa.select(Step.job_id))
        assert ids(claim_jobs(session, table, 5, where=~among)) == [1, 2, 4]
    steps = Step.__table__
    has_steps = sa.exists().where(steps.c.job_id == table.c.id)
    assert ids(claim_jobs(engine, table, 5, where=has_steps)) == [3]


def test_a_condition_is_met_by_what_is_claimed_only(database: Database) -> None:
    """Values of one call do not stay for the next: the statement is kept, they are not."""
    engine, table = database.engine(), job_table(Column("queue", String(20)))
    for number, queue in enumerate("abcabc", 1):
        fill(engine, table, 1, first=number, queue=queue)
    for queue, expected in (("b", [2, 5]), ("a", [1, 4]), ("d", []), ("c", [3, 6])):
        assert ids(claim_jobs(engine, table, 9, where=table.c.queue == queue)) == expected


def test_order_by(database: Database) -> None:
    """The call's order goes before the table's own; terms may be names, columns, expressions."""
    engine, table = database.engine(), job_table(Column("size", Integer))
    for number, size in enumerate([5, 3, 3, 9, 1], 1):
        fill(engine, table, 1, first=number, size=size)
    newest, by_size = table.c.created_at.desc(), [table.c.size, table.c.id.desc()]
    for order, expected in (
        (newest, [5, 4, 3, 2, 1]),
        ("size", [5]),
        (by_size, [5, 3, 2, 1, 4]),
        ([sa.func.abs(table.c.size - 4), "id"], [1, 2, 3, 5, 4]),
        (mapped(table).size.desc(), [4]),
        (None, [1, 2, 3, 4, 5]),
    ):
        with engine.connect() as connection:
            assert ids(claim_jobs(connection, table, len(expected), order_by=order)) == expected


def test_values(database: Database) -> None:
    """Further values are written, by column, attribute or name, plain or as SQL."""
    engine, table = database.engine(), job_table(Column("size", Integer))
    fill(engine, table, 4, size=4)
    job = mapped(table)
    claim_jobs(engine, table, values={"note": "a"})
    claim_jobs(engine, table, values={table.c.note: "b", "size": table.c.size + 1})
    claimed = claim_jobs(sessionmaker(engine), job, values={job.note: sa.func.lower("C")})
    claim_jobs(engine, table, values={"note": None})
    assert claimed[0].note == "c"
    assert stored(engine, table, "note", "size") == [("a", 4), ("b", 5), ("c", 4), (None, 4)]


def test_values_that_agree_with_the_mark(database: Database) -> None:
    """Saying the mark itself once more is no contradiction."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 2)
    assert ids(claim_jobs(engine, table, 2, values={"processing": True})) == [1, 2]
    assert taken(engine, table) == [1, 2]


def test_what_an_update_sets_by_itself(database: Database) -> None:
    """Columns with `onupdate`, by Python or by SQL, are set as in any other UPDATE."""
    engine = database.engine()
    table = job_table(
        Column("revised", Integer, onupdate=lambda: 7),
        Column("updated_at", DateTime, onupdate=sa.func.now()),
    )
    fill(engine, table, 3)
    (one,) = claim_jobs(engine, table)
    with Session(engine) as session:
        (two,) = claim_jobs(session, mapped(table))
        assert (one.revised, two.revised) == (7, 7)
        assert one.updated_at > START
        assert two.updated_at > START


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_limit_above_what_is_there(database: Database, count: int) -> None:
    """Fewer free rows than the limit are claimed all."""
    engine, table = database.engine(), job_table()
    fill(engine, table, count)
    assert ids(claim_jobs(engine, table, 3)) == list(range(1, count + 1))


@pytest.mark.parametrize("kind", ["engine", "session"])
def test_thousands_in_one_claim(database: Database, kind: str) -> None:
    """A claim of 5,000 goes beyond what one statement may have of parameters."""
    engine, table = database.engine(), job_table()
    job = mapped(table)
    fill(engine, table, 6000)
    with bound(engine, kind) as bind:
        claimed = claim_jobs(bind, job, 5000, values={"note": "taken"})
        assert ids(claimed) == list(range(1, 5001))
        assert {each.note for each in claimed} == {"taken"}
        assert len(claim_jobs(bind, job, 5000)) == 1000


def test_thousands_in_an_order_that_only_the_database_knows(database: Database) -> None:
    """A claim of 5,000 rows that come back in chunks keeps an order that follows a collation."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 3000, note="b")
    fill(engine, table, 3000, first=3001, note="a")
    claimed = claim_jobs(engine, table, 5000, order_by=[table.c.note, table.c.id])
    assert ids(claimed) == [*range(3001, 6001), *range(1, 2001)]


# --- what the columns mean


def claims(database: Database, table: sa.Table, values: list[dict[str, Any]], **roles: Any) -> Any:
    """Claim all that is free of rows with these values, as the roles say; the engine and claim."""
    engine = database.engine()
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        for number, each in enumerate(values, 1):
            connection.execute(table.insert(), rows(1, first=number)[0] | each)
    given = JobTable(table, **roles) if roles else table
    return engine, claim_jobs(engine, given, 50)


def test_spent_attempts(database: Database) -> None:
    """Rows that were claimed as often as allowed are claimed no more; a claim counts one up."""
    table = job_table(Column("attempts", Integer))
    values = [{"attempts": attempts} for attempts in (0, 2, 3, 4, None)]
    engine, claimed = claims(
        database, table, values, state="processing", attempts="attempts", max_attempts=3
    )
    assert ids(claimed) == [1, 2, 5]
    assert [job.attempts for job in claimed] == [1, 3, 1]
    assert stored(engine, table, "attempts") == [(1,), (3,), (3,), (4,), (1,)]


def test_attempts_limited_by_a_column(database: Database) -> None:
    """The maximum may differ from row to row."""
    table = job_table(
        Column("attempts", Integer, nullable=False), Column("max_attempts", Integer, nullable=False)
    )
    values = [{"attempts": 1, "max_attempts": most} for most in (1, 2, 0, 5)]
    roles = {"state": "processing", "attempts": "attempts", "max_attempts": "max_attempts"}
    _, claimed = claims(database, table, values, **roles)
    assert ids(claimed) == [2, 4]


def test_a_visible_flag(database: Database) -> None:
    """A flag turned the other way round is true for what is free."""
    table = job_table(Column("visible", sa.Boolean, nullable=False))
    values = [{"visible": visible} for visible in (True, False, True)]
    engine, claimed = claims(database, table, values, state="visible", free=True)
    assert ids(claimed) == [1, 3]
    assert stored(engine, table, "visible") == [(False,)] * 3


def test_a_nullable_time(database: Database) -> None:
    """A time that is NULL until a row is claimed is set to the database's clock."""
    table = job_table(Column("locked_at", DateTime))
    values = [{"locked_at": locked} for locked in (None, START, None)]
    engine, claimed = claims(database, table, values, state="locked_at", naive_times="utc")
    assert ids(claimed) == [1, 3]
    first, second, third = (locked for (locked,) in stored(engine, table, "locked_at"))
    assert second == START
    assert first == third
    assert abs((first - datetime.now()).total_seconds()) < 24 * 3600  # noqa: DTZ005 - near enough


def test_a_status_of_strings(database: Database) -> None:
    """A status has values that are free, and one that marks what is claimed."""
    table = job_table(Column("status", String(10), nullable=False))
    values = [{"status": status} for status in ("new", "running", "retry", "done", "failed")]
    roles = {"free": ("new", "retry"), "claimed": "running", "done": "done", "failed": "failed"}
    engine, claimed = claims(database, table, values, state="status", **roles)
    assert ids(claimed) == [1, 3]
    expected = ["running", "running", "running", "done", "failed"]
    assert [status for (status,) in stored(engine, table, "status")] == expected


def test_a_mark_of_several_columns(database: Database) -> None:
    """A claim may write several columns, the clock among them."""
    table = job_table(Column("status", String(10)), Column("started_at", DateTime))
    marks = {"status": "run's", "started_at": sa.func.now(), "note": None}
    engine, claimed = claims(
        database,
        table,
        [{"status": "new", "note": "old"}, {"status": "run's"}],
        state="status",
        free="new",
        claimed=marks,
        naive_times="utc",
    )
    assert ids(claimed) == [1]
    first, _ = stored(engine, table, "status", "started_at", "note")
    assert (first[0], first[2]) == ("run's", None)
    assert first[1] > START


def test_any_expression_for_free(database: Database) -> None:
    """Without a state column, what is free is any expression, and what is claimed a mapping."""
    table = job_table(Column("tries", Integer, nullable=False), Column("owner", String(20)))
    values = [
        {"tries": 0, "owner": None},
        {"tries": 0, "owner": "bob"},
        {"tries": 9, "owner": None},
        {"tries": 1, "owner": ""},
    ]
    free = sa.and_(sa.func.coalesce(table.c.owner, "") == "", table.c.tries < 5)
    roles = {"free": free, "claimed": {"owner": "us", "tries": table.c.tries + 1}}
    engine, claimed = claims(database, table, values, **roles)
    assert ids(claimed) == [1, 4]
    expected = [("us", 1), ("bob", 0), (None, 9), ("us", 2)]
    assert stored(engine, table, "owner", "tries") == expected


def test_what_has_ended_is_never_claimed(database: Database) -> None:
    """Rows that are done, failed or withdrawn are not free, whatever their state says."""
    table = job_table(
        Column("completed_at", DateTime),
        Column("has_error", sa.Boolean, nullable=False, default=False),
        Column("cancelled_at", DateTime),
    )
    values = [{"completed_at": START}, {"has_error": True}, {"cancelled_at": START}, {}]
    _, claimed = claims(database, table, [each | {"note": None} for each in values])
    assert ids(claimed) == [4]


def test_what_is_not_due_is_not_claimed(database: Database) -> None:
    """Rows with a time to come wait; those without one are due at once."""
    table = job_table(Column("run_at", DateTime))
    values = [{"run_at": at} for at in (START, datetime(9000, 1, 1), None)]  # noqa: DTZ001
    engine = database.engine()
    _, claimed = claims(database, table, values, **roles_of(table))
    assert ids(claimed) == [1, 3]
    assert taken(engine, table) == [1, 3]


def roles_of(table: sa.Table) -> dict[str, Any]:
    """Declare a boolean state and a due time without a zone, which is in UTC."""
    return {"state": "processing", "due": table.c.run_at, "order": "id", "naive_times": "utc"}


def test_stamps(database: Database) -> None:
    """Stamps such as `updated_at` are set to the database's clock."""
    table = job_table(Column("updated_at", DateTime, nullable=False))
    roles = {"state": "processing", "stamps": "updated_at", "naive_times": "utc"}
    engine, claimed = claims(database, table, [{"updated_at": START}], **roles)
    assert claimed[0].updated_at > START
    assert stored(engine, table, "updated_at") == [(claimed[0].updated_at,)]


def test_without_an_order_the_key_decides(database: Database) -> None:
    """A table that says no order is worked off by its primary key."""
    table = job_table()
    roles = {"state": "processing"}
    _, claimed = claims(database, table, [{"created_at": START}] * 4, **roles)
    assert ids(claimed) == [1, 2, 3, 4]


@pytest.mark.databases("postgresql")
def test_a_session_that_sends_reads_elsewhere(database: Database) -> None:
    """A session's `get_bind` receives a claim as an UPDATE."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 3)
    reader = engine.execution_options(postgresql_readonly=True)

    class Routing(Session):
        def get_bind(self, *_: Any, clause: Any = None, **__: Any) -> sa.Engine:
            return engine if isinstance(clause, (sa.Update, sa.Table)) else reader

    with Routing() as session:
        assert ids(claim_jobs(session, mapped(table))) == [1]
        session.commit()
    assert taken(engine, table) == [1]
