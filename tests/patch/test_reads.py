"""Reads that lock, reads that are claimed, and reads that can be neither."""

import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased

from atomic_claim import ClaimLost, JobTable, PatchError, claim_reads, lock_reads
from tests.databases import Database
from tests.jobs import in_thread
from tests.patch import legacy
from tests.patch.legacy import Event, Job, Mail, Run, Work
from tests.patch.patched import leased, mails, prepare
from tests.patch.test_shapes import fill
from tests.statements import sent_by

HERE = __name__
SERVERS = ("postgresql", "mysql", "mariadb")


class Loop:
    """A hook that the loops of this file call for each row."""

    row: Callable[[int], Any] = staticmethod(lambda _: None)


def relay(session: Session, batch: int = 5) -> list[int]:
    """E, with a hook."""
    query = sa.select(Event).where(Event.published.is_(False)).order_by(Event.id).limit(batch)
    events = session.scalars(query).all()
    for event in events:
        Loop.row(event.id)
        event.published = True
    session.commit()
    return [event.id for event in events]


def send_all(session: Session) -> list[int]:
    """F, with a hook."""
    done = []
    for mail in session.scalars(sa.select(Mail).where(Mail.sent.is_(False)).order_by(Mail.id)):
        Loop.row(mail.id)
        mail.sent = True
        session.commit()
        done.append(mail.id)
    return done


def send_by_key(session: Session) -> list[int]:
    """F, which finds keys, and looks up each row."""
    keys = session.scalars(sa.select(Mail.id).where(Mail.sent.is_(False)).limit(5)).all()
    for key in keys:
        mail = session.get_one(Mail, key)
        Loop.row(mail.id)
        mail.sent = True
        session.commit()
    return list(keys)


def commits_in_between(session: Session) -> None:
    """F in disguise: one transaction reads, another one marks."""
    events = session.scalars(sa.select(Event).where(Event.published.is_(False))).all()
    for event in events:
        event.published = True
        session.commit()


TWICE = aliased(Event, name="other")
READS: dict[str, tuple[Any, str]] = {
    "an aggregate": (sa.select(sa.func.count(Event.id)), r"aggregate count\(\)"),
    "a count of a query": (sa.select(sa.func.count()).select_from(Event), "aggregate"),
    "DISTINCT": (sa.select(Event.topic).distinct(), "DISTINCT"),
    "GROUP BY": (sa.select(Event.topic).group_by(Event.topic), "GROUP BY"),
    "a window": (sa.select(Event, sa.func.row_number().over(order_by=Event.id)), "a window"),
    "the nullable side": (
        sa.select(Job, Event).outerjoin(Event, Event.id == Job.id),
        "nullable side of an outer join",
    ),
    "a subquery": (sa.select(sa.select(Event).limit(5).subquery().c.id), "subquery"),
    "a subquery elsewhere": (sa.select(Job).where(Job.id.in_(sa.select(Event.id))), "subquery"),
    "a union": (sa.union_all(sa.select(Event.id), sa.select(Event.id)), "a UNION"),
    "itself twice": (
        sa.select(Event, TWICE).where(Event.id == TWICE.id),
        "several times",
    ),
    "raw SQL": (sa.text("SELECT id FROM events WHERE NOT published"), "by raw SQL"),
    "raw SQL of entities": (
        sa.select(Event).from_statement(sa.text("SELECT * FROM events")),
        "by raw SQL",
    ),
    "a lambda": (sa.lambda_stmt(lambda: sa.select(sa.func.max(Event.id))), "aggregate"),
    "raw SQL in a SELECT": (sa.select(sa.text("id")).select_from(sa.text("events")), "by raw SQL"),
}


class Reader:
    """Something that executes what a test gives it."""

    def execute(self, session: Session, statement: Any) -> Any:
        """Execute, by a string past all constructs."""
        if isinstance(statement, str):
            return session.connection().exec_driver_sql(statement).all()
        return session.execute(statement).all()


@pytest.fixture
def engine(database: Database) -> sa.Engine:
    """Create an engine with ten events."""
    engine = database.engine()
    prepare(engine)
    fill(engine, Event, 10)
    return engine


@pytest.fixture(autouse=True)
def no_hook() -> Iterator[None]:
    """Leave no hook to the next test."""
    yield
    Loop.row = staticmethod(lambda _: None)


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("patch", [lock_reads, claim_reads])
@pytest.mark.parametrize("name", [*READS, "the driver's own"])
def test_reads_that_cannot_be_protected(engine: sa.Engine, patch: Any, name: str) -> None:
    """They are refused when they are executed, and never passed over."""
    statement, message = READS.get(name, ("SELECT id FROM events", "by raw SQL"))
    table: Any = Event
    if patch is claim_reads:
        table, patch = JobTable(Event, state="published"), partial(claim_reads, at_most_once=True)
    with (
        patch(f"{HERE}:Reader.execute", table),
        Session(engine) as session,
        pytest.raises(PatchError, match=message),
    ):
        Reader().execute(session, statement)
    with Session(engine) as session:
        Reader().execute(session, statement)


@pytest.mark.databases("sqlite")
def test_a_lambda_is_a_read_like_others(engine: sa.Engine) -> None:
    """A statement that SQLAlchemy makes of a lambda locks, too, with the values of its call."""
    found = []
    with lock_reads(f"{HERE}:Reader.execute", Event) as patch, Session(engine) as session:
        for key in (3, 5):
            query = sa.lambda_stmt(lambda: sa.select(Event).where(Event.id == key))  # noqa: B023
            found += [event.id for (event,) in Reader().execute(session, query)]
        assert session.connection().connection.in_transaction  # type: ignore[attr-defined]
    assert (found, patch.calls, patch.passed_through) == ([3, 5], 2, 0)


@pytest.mark.databases("sqlite")
def test_a_copy_within_the_database_is_refused(engine: sa.Engine) -> None:
    """INSERT ... SELECT finds rows, too, and they cannot be locked for it."""
    copy = sa.insert(Run).from_select(["number"], sa.select(Event.id))
    with (
        lock_reads(f"{HERE}:Reader.execute", Event),
        Session(engine) as session,
        pytest.raises(PatchError, match=r"INSERT \.\.\. SELECT"),
    ):
        Reader().execute(session, copy)


@pytest.mark.databases("sqlite")
def test_other_reads_and_marks_pass(engine: sa.Engine) -> None:
    """Other tables, loads of what was found, and raw UPDATEs of locked rows are let alone."""
    with lock_reads(f"{HERE}:Reader.execute", Event) as patch, Session(engine) as session:
        Reader().execute(session, sa.select(Run))
        assert patch.passed_through == 1
        found = Reader().execute(session, sa.select(Event).where(Event.id == 3))
        session.refresh(found[0][0])
        assert (patch.calls, patch.passed_through) == (2, 1)


def test_a_locked_read_leaves_the_rest_to_others(database: Database, engine: sa.Engine) -> None:
    """While one relay holds its rows, another's batch is full, and a producer's INSERT passes."""
    if database.name == "sqlite":
        pytest.skip("one writer at a time: the other waits")
    other = Session(engine)
    found: list[list[int]] = []

    def meanwhile(number: int) -> None:
        if number != 1:
            return
        Loop.row = staticmethod(lambda _: None)
        with in_thread(lambda: relay(other)) as beside:
            pass
        found.append(beside.result())
        with engine.begin() as connection:
            connection.execute(sa.insert(Event).values(id=11, published=False))

    Loop.row = staticmethod(meanwhile)
    with lock_reads(f"{HERE}:relay", Event) as patch, Session(engine) as session:
        assert relay(session) == [1, 2, 3, 4, 5]
        assert found == [[6, 7, 8, 9, 10]]
        assert relay(session) == [11]
        assert (patch.calls, patch.claimed) == (3, 11)
    other.close()


@pytest.mark.databases("sqlite")
def test_a_locked_read_on_sqlite_makes_others_wait(engine: sa.Engine, database: Database) -> None:
    """The write lock is taken before the read, for that call only."""
    impatient = database.engine(connect_args={"timeout": 0})
    refused: list[str] = []

    def meanwhile(_: int) -> None:
        with pytest.raises(sa.exc.OperationalError) as raised, impatient.begin() as connection:
            connection.execute(sa.insert(Run).values(number=1))
        refused.append(str(raised.value.orig))

    Loop.row = staticmethod(meanwhile)
    with lock_reads(f"{HERE}:relay", Event), Session(engine) as session:
        assert relay(session, 1) == [1]
    assert refused == ["database is locked"]
    Loop.row = staticmethod(lambda _: None)
    with Session(engine) as session:
        session.scalars(sa.select(Event)).all()
        with impatient.begin() as connection:
            connection.execute(sa.insert(Run).values(number=1))


def test_a_commit_between_read_and_mark_is_refused(engine: sa.Engine) -> None:
    """Rows that the first commit unlocked are not marked; the error names the fix."""
    with (
        lock_reads(f"{HERE}:commits_in_between", Event),
        Session(engine) as session,
        pytest.raises(PatchError, match=r"Use claim_reads\(\)"),
    ):
        commits_in_between(session)
    with Session(engine) as session:
        assert session.scalars(sa.select(Event.id).where(Event.published)).all() == [1]


def test_autocommit_is_refused(database: Database, engine: sa.Engine) -> None:
    """Where the driver commits by itself, a row lock would be gone at once."""
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    with (
        lock_reads(f"{HERE}:relay", Event),
        Session(autocommit) as session,
        pytest.raises(PatchError, match=r"AUTOCOMMIT.*claim_reads\(\)"),
    ):
        relay(session)
    assert database.name


@pytest.mark.databases(*SERVERS)
def test_a_lock_alone_does_not_help_row_by_row(database: Database) -> None:
    """The twin: locked reads of two loops that commit row by row give 199 of 200 rows twice."""
    engine = database.engine()
    fill(engine, Mail, 200)
    query = sa.select(Mail).where(Mail.sent.is_(False)).with_for_update(skip_locked=True)
    with Session(engine) as one, Session(engine) as other:
        mine = one.scalars(query).all()
        mine[0].sent = True
        one.commit()
        theirs = other.scalars(query).all()
        assert len({mail.id for mail in theirs}.intersection(mail.id for mail in mine)) == 199


def test_claimed_reads_hold_through_commits(database: Database) -> None:
    """A loop beside another one, in the middle of its rows, finds none of them."""
    engine = database.engine()
    prepare(engine)
    fill(engine, Mail, 200)
    other, found = Session(engine), list[list[int]]()

    def meanwhile(number: int) -> None:
        if number in {1, 2, 150}:
            with in_thread(lambda: send_all(other)) as beside:
                pass
            found.append(beside.result())
            other.rollback()

    Loop.row = staticmethod(meanwhile)
    with claim_reads(f"{HERE}:send_all", mails) as patch, Session(engine) as session:
        assert send_all(session) == list(range(1, 201))
        assert found == [[], [], []]
        assert (patch.calls, patch.claimed) == (4, 200)
    other.close()


def test_keys_that_are_looked_up_later(database: Database) -> None:
    """A loop that finds keys and gets each row by its key works on claimed rows."""
    engine = database.engine()
    fill(engine, Mail, 8)
    with claim_reads(f"{HERE}:send_by_key", mails) as patch, Session(engine) as session:
        assert len(send_by_key(session)) == 5
        assert len(send_by_key(session)) == 3
        assert patch.claimed == 8


def test_what_a_loop_leaves_is_free_again(database: Database) -> None:
    """After an exception the rows that were not done can be found at once."""
    engine = database.engine()
    fill(engine, Mail, 4)

    def fail(number: int) -> None:
        if number == 3:
            raise ZeroDivisionError

    Loop.row = staticmethod(fail)
    with claim_reads(f"{HERE}:send_all", mails), Session(engine) as session:
        with pytest.raises(ZeroDivisionError):
            send_all(session)
        session.rollback()
        Loop.row = staticmethod(lambda _: None)
        assert send_all(session) == [3, 4]


def test_a_loop_that_stood_still_too_long(database: Database) -> None:
    """The loop's next statement says that its rows are another worker's by now."""
    engine = database.engine()
    fill(engine, Mail, 3)

    def lose(number: int) -> None:
        if number == 2:
            with engine.begin() as connection:
                connection.execute(sa.update(Mail).values(claim_token="another's"))
            # As if a third of the lease had passed.
            (watch,) = watches()
            watch._next_beat = 0

    Loop.row = staticmethod(lose)
    with (
        claim_reads(f"{HERE}:send_all", mails),
        Session(engine) as session,
        pytest.raises(ClaimLost, match="are other workers'"),
    ):
        send_all(session)


def watches() -> Any:
    """Return the watches that are active in this context."""
    from atomic_claim.patch import reads  # noqa: PLC0415

    return reads.watches.get()


@pytest.mark.databases("sqlite")
def test_at_most_once(database: Database) -> None:
    """Agreed to, a final state is written before the work."""
    engine = database.engine()
    fill(engine, Event, 3)
    seen: list[bool] = []
    with (
        claim_reads(f"{HERE}:relay", JobTable(Event, state="published"), at_most_once=True),
        Session(engine) as session,
    ):

        def look(number: int) -> None:
            with engine.connect() as connection:
                query = sa.select(Event.published).where(Event.id == number)
                seen.append(bool(connection.scalar(query)))

        Loop.row = staticmethod(look)
        assert relay(session) == [1, 2, 3]
    assert seen == [True] * 3


def test_a_dead_worker_s_rows_come_back(database: Database) -> None:
    """A row whose lease ran out is found, though it does not bear what the SELECT asks for."""
    engine = database.engine()
    fill(engine, Job, 3)
    past = "2001-01-01 00:00:00.000000"
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE jobs SET state = 'running', lease_until = :past"), {"past": past}
        )
    Work.path = Path(os.devnull)
    with (
        claim_reads("tests.patch.legacy:work_all", leased, lease=timedelta(minutes=1)),
        Session(engine) as session,
    ):
        assert legacy.work_all(session) == 3


def test_other_threads_are_untouched(engine: sa.Engine) -> None:
    """Statements of other threads are neither locked nor refused during a patched call."""
    sent = sent_by(engine)
    texts: list[str] = []

    def beside() -> None:
        with Session(engine) as session:
            session.scalars(sa.select(Event)).all()
            session.execute(sa.text("SELECT count(*) FROM events"))

    def meanwhile(number: int) -> None:
        if number == 1:
            before = len(sent)
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()
            texts.extend(each.text for each in sent[before:])

    Loop.row = staticmethod(meanwhile)
    with lock_reads(f"{HERE}:relay", Event), Session(engine) as session:
        relay(session)
    assert texts
    assert not any("UPDATE" in text for text in texts)


def test_joined_and_aliased_reads(engine: sa.Engine) -> None:
    """The table is found under an alias and beside others, and only its own rows are locked."""
    with engine.begin() as connection:
        connection.execute(sa.insert(Run), [{"number": number} for number in range(1, 11)])
    other = aliased(Event, name="e")
    joined = sa.select(Event, Run).join(Run, Run.number == Event.id).order_by(Event.id).limit(3)
    by_alias = sa.select(other).where(other.published.is_(False)).order_by(other.id).limit(3)
    for query in (joined, by_alias):
        with lock_reads(f"{HERE}:Reader.execute", Event), Session(engine) as session:
            assert [row[0].id for row in Reader().execute(session, query)] == [1, 2, 3]
            if engine.dialect.name != "sqlite":
                with (
                    in_thread(lambda q=query: _in_other(engine, q)) as beside,  # type: ignore[misc]
                ):
                    pass
                assert beside.result() == [4, 5, 6]


def _in_other(engine: sa.Engine, query: Any) -> list[int]:
    with Session(engine) as session:
        return [row[0].id for row in Reader().execute(session, query)]


def test_claimed_reads_by_an_alias_and_a_join(database: Database) -> None:
    """Conditions and the order of a SELECT on an alias or on joined tables apply to the claim."""
    engine = database.engine()
    fill(engine, Mail, 6)
    with engine.begin() as connection:
        connection.execute(sa.insert(Run), [{"number": number} for number in (2, 4, 6)])
    other = aliased(Mail, name="m")
    unsent = other.sent.is_(False)
    joined = sa.select(Mail).join(Run, Run.number == Mail.id).where(Mail.sent.is_(False))
    for query, expected in (
        (sa.select(other).where(unsent, other.id > 3).order_by(other.id.desc()).limit(2), [6, 5]),
        (joined.order_by(Mail.id), [2, 4, 6]),
        (sa.select(Mail).where(Mail.id > sa.bindparam("least")).order_by(Mail.id), [5, 6]),
        (sa.select(Mail).order_by(Mail.id != sa.bindparam("least"), Mail.id).limit(2), [4, 1]),
    ):
        given = query.params(least=4)
        with claim_reads(f"{HERE}:Reader.execute", mails), Session(engine) as session:
            assert [row[0].id for row in Reader().execute(session, given)] == expected


def send_one_by_one(session: Session, times: int) -> None:
    """Look for one mail after another, as a worker does that never ends."""
    for _ in range(times):
        query = sa.select(Mail).where(Mail.sent.is_(False)).order_by(Mail.id).limit(1)
        if (mail := session.scalars(query).first()) is not None:
            Loop.row(mail.id)
            mail.sent = True
            session.commit()


@pytest.mark.databases("sqlite", "postgresql")
def test_a_loop_that_never_ends_keeps_only_what_runs(database: Database) -> None:
    """Claims whose rows are done are forgotten when the leases of the others are extended."""
    engine = database.engine()
    fill(engine, Mail, 6)
    kept: list[int] = []

    def beat(_: int) -> None:
        (watch,) = watches()
        # As if a third of the lease had passed.
        watch._next_beat = 0
        kept.append(len(watch._claims))

    Loop.row = staticmethod(beat)
    with claim_reads(f"{HERE}:send_one_by_one", mails) as patch, Session(engine) as session:
        send_one_by_one(session, 8)
    assert kept == [1, 2, 2, 2, 2, 2]
    assert patch.claimed == 6
