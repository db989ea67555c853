"""Ends of jobs at their edges: texts, refused rows, dead letters."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, String
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import sessionmaker

from atomic_claim import (
    ClaimError,
    ClaimLost,
    JobTable,
    aio,
    claim_jobs,
    complete_jobs,
    fail_jobs,
    requeue_jobs,
    sweep_jobs,
)
from atomic_claim.lifecycle import release_left
from atomic_claim.telemetry import Event, Requeued, Swept, subscribe
from tests.claim.test_aio import DRIVERS
from tests.counting import counted_jobs
from tests.databases import Database
from tests.ending.test_lease import LEASE, made, row
from tests.jobs import CALLERS, OWN, START, bound, fill, ids, job_table, taken
from tests.stepping import stopped

SERVERS = pytest.mark.databases("postgresql", "mysql", "mariadb")
# A job of size 3 has to run.
RUNNING = "size < 3 OR processing <> false"
NARROW = sa.Text().with_variant(mysql.TEXT(charset="utf8mb3"), "mysql", "mariadb")
LATIN = sa.Text().with_variant(mysql.TINYTEXT(charset="latin1"), "mysql", "mariadb")
TEXTS: dict[str, tuple[Any, Any, Any]] = {
    "nul": (sa.Text(), "bad \x00 byte", "bad \\x00 byte"),
    "surrogate": (sa.Text(), "name \udcff", "name \\udcff"),
    "long": (sa.Text(), "x" * 70_000, "x" * 65_532 + "..."),
    "long in bytes": (sa.Text(), "é" * 40_000, "é" * 32_766 + "..."),
    "characters": (String(10), "é" * 50, "é" * 7 + "..."),
    "two characters": (String(2), "abc", ".."),
    "no message": (sa.Text(), ValueError(), "ValueError"),
    "json": (sa.JSON(), "no \x00 \udcff", {"message": "no \\x00 \\udcff"}),
    "emoji": (NARROW, "\U0001f600 no", None),
    "short and latin": (LATIN, "\U0001f600" * 400, None),
}


@pytest.fixture
def events() -> Iterator[list[Event]]:
    """Collect the events of the test."""
    found: list[Event] = []
    end = subscribe(found.append)
    yield found
    end()


def failing(error: Any, *more: Any) -> JobTable:
    """Declare a table that stores an error of this type."""
    table = job_table(
        Column("done_at", DateTime),
        Column("failed_at", DateTime),
        Column("claim_token", String(32)),
        Column("last_error", error),
        *more,
    )
    return JobTable(
        table,
        state="processing",
        done={"done_at": sa.func.now()},
        failed={"failed_at": sa.func.now()},
        token="claim_token",
        error="last_error",
    )


@pytest.mark.parametrize("what", TEXTS)
def test_no_text_keeps_a_job_from_failing(database: Database, what: str) -> None:
    """By Engine and in the caller's transaction; what cannot be stored is escaped or cut."""
    type_, error, expected = TEXTS[what]
    engine, jobs = database.engine(), failing(type_)
    fill(engine, jobs.table, 4)
    claim = claim_jobs(engine, jobs, 4)
    assert fail_jobs(engine, claim[:2], error=error) == 2
    with engine.begin() as connection:
        assert fail_jobs(connection, claim[2:3], error=error) == 1
        assert fail_jobs(connection, claim[3:], error="no") == 1
    stored = [row(engine, jobs, number).last_error for number in (1, 2, 3, 4)]
    if expected is None:
        is_narrow = database.name in {"mysql", "mariadb"}
        expected = (r"\U0001f600" * 400)[:252] + "..." if what == "short and latin" else None
        expected = expected or r"\U0001f600 no"
        expected = expected if is_narrow else error
    plain = {"message": "no"} if what == "json" else "no"
    assert stored == [expected] * 3 + [plain]


def plain_only(database: Database) -> JobTable:
    """Declare a table that stores an error in ASCII only."""
    size = "octet_length" if database.name == "postgresql" else "length"
    return failing(String(50), sa.CheckConstraint(f"{size}(last_error) = char_length(last_error)"))


@pytest.mark.parametrize("kind", CALLERS)
@SERVERS
def test_a_refused_text_on_an_engine_that_begins_by_itself(database: Database, kind: str) -> None:
    """Its driver is in autocommit; the caller's transaction outlasts the text all the same."""
    engine, jobs = database.engine(), plain_only(database)
    fill(engine, jobs.table, 1)
    claim = claim_jobs(engine, jobs)
    beginning = database.engine()

    @sa.event.listens_for(beginning, "connect")
    def automatic(connection: Any, _: object) -> None:
        beginning.dialect.set_isolation_level(connection, "AUTOCOMMIT")

    @sa.event.listens_for(beginning, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    with bound(beginning, kind) as bind:
        assert fail_jobs(bind, claim, error="\U0001f600") == 1
        assert row(engine, jobs, 1).failed_at is None
        bind.rollback()
    assert row(engine, jobs, 1).last_error is None
    with bound(beginning, kind) as bind:
        assert fail_jobs(bind, claim, error="\U0001f600") == 1
        bind.commit()
    assert row(engine, jobs, 1).last_error == r"\U0001f600"


@SERVERS
def test_a_refused_text_on_a_driver_that_is_not_known(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that does not tell whether it is in AUTOCOMMIT is taken for one that is not."""
    engine, jobs = database.engine(), plain_only(database)
    fill(engine, jobs.table, 1)
    claim = claim_jobs(engine, jobs)

    def silent(*_: object) -> bool:
        raise NotImplementedError

    monkeypatch.setattr(type(engine.dialect), "detect_autocommit_setting", silent)
    monkeypatch.setattr(type(engine.dialect), "driver", "invented")
    with engine.begin() as connection:
        if database.name == "postgresql":
            assert fail_jobs(connection, claim, error="\U0001f600") == 1
        else:
            with pytest.raises(ClaimError, match="'invented'"):
                fail_jobs(connection, claim, error="\U0001f600")
    stored = row(engine, jobs, 1).last_error
    assert stored == (r"\U0001f600" if database.name == "postgresql" else None)


def refusing(database: Database) -> tuple[sa.Engine, JobTable]:
    """Create five jobs; the third cannot be completed."""
    engine = database.engine()
    jobs = failing(
        sa.Text(), Column("size", Integer), sa.CheckConstraint("done_at IS NULL OR size < 3")
    )
    jobs.table.metadata.create_all(engine)
    with engine.begin() as connection:
        sizes = [{"id": number, "size": 3 if number == 3 else 1} for number in range(1, 6)]
        created = {"created_at": sa.func.now()}
        connection.execute(jobs.table.insert().values(created), sizes)
    return engine, jobs


def test_a_row_that_is_refused_does_not_cost_the_others(database: Database) -> None:
    """The others are done, the error names the row, and it can be failed; a lost row is lost."""
    engine, jobs = refusing(database)
    claim = claim_jobs(sessionmaker(engine), jobs, 5)
    fail_jobs(engine, claim[4:])
    with pytest.raises(ClaimLost, match=r"1 of 5 jobs") as raised:
        complete_jobs(engine, claim)
    assert raised.value.keys == ((5,),)
    refused = raised.value.__cause__
    assert isinstance(refused, ClaimError)
    assert "refused the change of 1 of 5 jobs of 'jobs', their keys: [(3,)]" in str(refused)
    assert isinstance(refused.__cause__, sa.exc.DBAPIError)
    done = [number for number in range(1, 6) if row(engine, jobs, number).done_at is not None]
    assert done == [1, 2, 4]
    with pytest.raises(ClaimError, match=r"(?s)their keys: \[\(3,\)\].* the other 0 were"):
        complete_jobs(engine, claim[2:3])
    assert fail_jobs(engine, claim[2:3], error="too large") == 1


@pytest.mark.databases("postgresql")
def test_a_refused_row_in_the_callers_transaction(database: Database) -> None:
    """The transaction is the caller's to roll back, so the database's own error is raised."""
    engine, jobs = refusing(database)
    claim = claim_jobs(engine, jobs, 5)
    with engine.connect() as connection, pytest.raises(IntegrityError):
        complete_jobs(connection, claim)


@pytest.fixture
def stuck(database: Database) -> tuple[sa.Engine, JobTable]:
    """Five failed jobs, five whose attempts are spent; 3 cannot be freed, 8 cannot be failed."""
    engine = database.engine()
    table = job_table(
        Column("failed_at", DateTime),
        Column("attempts", Integer),
        Column("size", Integer),
        sa.CheckConstraint("size <> 3 OR failed_at IS NOT NULL"),
        sa.CheckConstraint("size <> 8 OR failed_at IS NULL"),
    )
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        created = {"created_at": START, "attempts": 2}
        rows = [{"id": number, "size": number} for number in range(1, 11)]
        rows = [each | created | {"failed_at": START} for each in rows[:5]] + [
            each | created | {"failed_at": None} for each in rows[5:]
        ]
        connection.execute(table.insert(), rows)
    failed = {"failed_at": sa.func.now()}
    return engine, JobTable(
        table, state="processing", failed=failed, attempts="attempts", max_attempts=2
    )


def failed(engine: sa.Engine, jobs: JobTable) -> list[int]:
    """Return the ids of the jobs that are marked as failed."""
    with engine.connect() as connection:
        table = jobs.table
        query = sa.select(table.c.id).where(table.c.failed_at.is_not(None)).order_by(table.c.id)
        return list(connection.scalars(query))


@pytest.mark.parametrize("kind", OWN)
def test_a_refused_row_does_not_stop_a_sweep(
    stuck: tuple[sa.Engine, JobTable], kind: str, events: list[Event]
) -> None:
    """The others are marked and reported, and the error names the row."""
    engine, jobs = stuck
    said = r"(?s)of 1 of 5 jobs of 'jobs', their keys: \[\(8,\)\].* as they were, and the other 4"
    with bound(engine, kind) as bind, pytest.raises(ClaimError, match=said) as raised:
        sweep_jobs(bind, jobs)
    assert isinstance(raised.value.__cause__, sa.exc.DBAPIError)
    assert failed(engine, jobs) == [1, 2, 3, 4, 5, 6, 7, 9, 10]
    [event] = events
    assert isinstance(event, Swept)
    assert sorted(event.keys) == [(6,), (7,), (9,), (10,)]


@pytest.mark.parametrize("kind", OWN)
def test_a_refused_row_does_not_stop_a_requeue(
    stuck: tuple[sa.Engine, JobTable], kind: str, events: list[Event]
) -> None:
    """It counts for the limit, which the parts do not exceed together."""
    engine, jobs = stuck
    said = r"(?s)of 1 of 4 jobs of 'jobs', their keys: \[\(3,\)\].* as they were, and the other 3"
    with bound(engine, kind) as bind, pytest.raises(ClaimError, match=said):
        requeue_jobs(bind, jobs, limit=4)
    assert failed(engine, jobs) == [3, 5]
    [event] = events
    assert isinstance(event, Requeued)
    assert sorted(event.keys) == [(1,), (2,), (4,)]


@pytest.mark.parametrize("kind", CALLERS)
def test_a_refused_row_in_the_callers_sweep(
    stuck: tuple[sa.Engine, JobTable], kind: str, events: list[Event]
) -> None:
    """The transaction is the caller's to roll back, so the database's own error is raised."""
    engine, jobs = stuck
    for call in (sweep_jobs, requeue_jobs):
        with bound(engine, kind) as bind, pytest.raises(DBAPIError):
            call(bind, jobs)
    assert (failed(engine, jobs), events) == ([1, 2, 3, 4, 5], [])


def test_a_requeue_that_cannot_find_its_rows(stuck: tuple[sa.Engine, JobTable]) -> None:
    """A condition that fails on every row is not taken for a row's fault."""
    engine, jobs = stuck
    with pytest.raises(DBAPIError):
        requeue_jobs(engine, jobs, where=sa.text("no_such_column = 1"))
    assert failed(engine, jobs) == [1, 2, 3, 4, 5]


def test_what_is_left_of_a_claim_is_freed_beside_a_refused_row(database: Database) -> None:
    """The database's own error is raised once the others are free."""
    engine = database.engine()
    jobs = failing(sa.Text(), Column("size", Integer), sa.CheckConstraint(RUNNING))
    fill(engine, jobs.table, 4, size=1)
    claim = claim_jobs(engine, jobs, 4)
    with engine.begin() as connection:
        connection.execute(jobs.table.update().where(jobs.table.c.id == 2).values(size=3))
    with pytest.raises(DBAPIError):
        release_left(engine, claim)
    assert taken(engine, jobs.table) == [2]


@pytest.fixture
def dead(database: Database) -> tuple[sa.Engine, JobTable]:
    """Four failed jobs, a job that runs and one that is done."""
    engine, jobs = made(database, 6)
    claim = claim_jobs(engine, jobs, 6, lease=LEASE, worker="w")
    fail_jobs(engine, claim[:4], error="card declined")
    complete_jobs(engine, claim[5:])
    return engine, jobs


def test_failed_jobs_are_requeued(dead: tuple[sa.Engine, JobTable]) -> None:
    """They are free again with all their attempts; what runs or is done is left as it is."""
    engine, jobs = dead
    this = jobs.table.c.id
    with engine.begin() as connection:
        assert requeue_jobs(connection, jobs, where=this == 2, keep_error=False) == 1
    assert requeue_jobs(engine, jobs, limit=2) == 2
    freed = row(engine, jobs, 1)
    assert (freed.processing, freed.failed_at, freed.attempts) == (False, None, 0)
    assert (freed.worker, freed.lease_until, freed.last_error) == (None, None, "card declined")
    assert row(engine, jobs, 2).last_error is None
    assert ids(claim_jobs(engine, jobs, 9, lease=LEASE)) == [1, 2, 3]
    assert requeue_jobs(engine, jobs, where=[this > 1, this < 9]) == 1
    assert requeue_jobs(engine, jobs) == 0
    assert (row(engine, jobs, 5).processing, row(engine, jobs, 6).done_at is None) == (True, False)
    with pytest.raises(ValueError, match="limit is 0"):
        requeue_jobs(engine, jobs, limit=0)


@pytest.mark.parametrize("kind", [*OWN, *CALLERS])
def test_a_requeued_job_meets_the_condition_when_it_is_freed(
    database: Database, dead: tuple[sa.Engine, JobTable], kind: str
) -> None:
    """A job that another program changes between the search and the lock stays failed."""
    engine, jobs = dead
    text, this = jobs.table.c.last_error, jobs.table.c.id
    searches = []

    def is_lock(statement: str) -> bool:
        searches.extend([statement] if statement.startswith("SELECT") else [])
        return len(searches) > 1

    def requeue() -> int:
        with bound(engine, kind) as bind:
            return requeue_jobs(bind, jobs, where=text == "card declined")

    with stopped(engine, requeue, is_lock) as step, database.engine().begin() as connection:
        connection.execute(jobs.table.update().where(this == 2).values(last_error="blocked"))
        connection.commit()
        assert step.go() == 3
    changed = row(engine, jobs, 2)
    assert (changed.failed_at is None, changed.last_error) == (False, "blocked")


def test_failed_jobs_are_requeued_beside_an_event_loop(
    database: Database, dead: tuple[sa.Engine, JobTable]
) -> None:
    """The asynchronous twin."""

    async def requeue(drivername: str) -> int:
        engine = create_async_engine(database.url.set(drivername=drivername))
        found = await aio.requeue_jobs(engine, dead[1], limit=3)
        await engine.dispose()
        return found

    assert asyncio.run(requeue(DRIVERS[database.name][0])) == 3


@pytest.mark.databases("sqlite")
def test_states_that_a_requeue_leads_back(database: Database) -> None:
    """A state, a flag and a nullable column are undone; what else failed means has to be said."""
    engine = database.engine()
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        Column("id", Integer, primary_key=True),
        Column("state", String(10), nullable=False, default="new"),
        Column("is_dead", sa.Boolean, nullable=False, default=False),
        Column("reason", String(10)),
        Column("kind", String(10), nullable=False, default="a"),
        Column("claim_token", String(32)),
    )
    said = {"state": "state", "free": "new", "claimed": "busy", "token": "claim_token"}
    jobs = JobTable(table, failed={"state": "dead", "is_dead": True, "reason": "x"}, **said)
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), [{"id": 1}])
    fail_jobs(engine, claim_jobs(engine, jobs))
    assert claim_jobs(engine, jobs) == []
    assert requeue_jobs(engine, jobs) == 1
    [job] = claim_jobs(engine, jobs)
    assert (job.state, job.is_dead, job.reason) == ("busy", False, None)
    with pytest.raises(ClaimError, match=r"'kind'.*JobTable\(released="):
        requeue_jobs(engine, JobTable(table, failed={"state": "dead", "kind": "b"}, **said))
    with pytest.raises(ClaimError, match=r"JobTable\(failed="):
        requeue_jobs(engine, JobTable(table, **said))


def test_one_batch_is_retried_and_ended(database: Database) -> None:
    """The rows that have no attempts left are failed, and the others wait."""
    engine, jobs = made(database, 2)
    claim = claim_jobs(engine, jobs, 2, lease=LEASE)
    with engine.begin() as connection:
        spent = jobs.table.update().where(jobs.table.c.id == 1)
        connection.execute(spent.values(attempts=3))
    assert fail_jobs(engine, claim, retry=timedelta(0), error="again") == 2
    assert row(engine, jobs, 1).failed_at is not None
    assert (row(engine, jobs, 2).failed_at, row(engine, jobs, 2).last_error) == (None, "again")
    assert ids(claim_jobs(engine, jobs, 2, lease=LEASE)) == [2]


@pytest.mark.databases("sqlite")
def test_ends_look_their_rows_up_by_key(database: Database) -> None:
    """Not in the index of all running rows, which makes the time grow with their square."""
    engine, jobs = database.engine(), counted_jobs()
    fill(engine, jobs.table, 400)
    columns = jobs.table.c
    running = sa.text("processing = 1 AND done_at IS NULL AND failed_at IS NULL")
    leases = sa.Index(
        "running", columns.processing, columns.done_at, columns.lease_until, sqlite_where=running
    )
    leases.create(engine)
    claim = claim_jobs(engine, jobs, 400, lease=timedelta(minutes=1))
    sent: list[tuple[str, Any]] = []

    def keep(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        sent.append((statement, parameters))

    sa.event.listen(engine, "before_cursor_execute", keep)
    complete_jobs(engine, claim)
    ((statement, parameters),) = [each for each in sent if each[0].startswith("UPDATE")]
    with engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    assert plan[0].detail.endswith("USING INTEGER PRIMARY KEY (rowid=?)")
    leases.drop(engine)


REFUSING_AT_COMMIT = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'refused' USING ERRCODE = '23514';
    END $$;
    CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON jobs
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.id IN (3, 6))
        EXECUTE FUNCTION refuse();
"""


@pytest.mark.databases("postgresql")
def test_a_row_that_is_refused_at_the_commit(database: Database) -> None:
    """A deferred constraint costs neither a claim nor an end the other rows."""
    engine, jobs = database.engine(), failing(sa.Text())
    fill(engine, jobs.table, 6)
    claim = claim_jobs(engine, jobs, 4)
    with engine.begin() as connection:
        connection.exec_driver_sql(REFUSING_AT_COMMIT)
    with pytest.raises(ClaimError, match=r"(?s)keys: \[\(3,\)\].* the other 3 were"):
        complete_jobs(engine, claim)
    done = [number for number in range(1, 7) if row(engine, jobs, number).done_at is not None]
    assert done == [1, 2, 4]
    others = claim_jobs(engine, jobs, 2)
    assert (ids(others), others.unreadable) == ([5], ((6,),))
