"""The guard inside the database: what it refuses, what passes, and that nothing stays behind."""

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, String
from sqlalchemy.dialects import mssql, mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from atomic_claim import (
    ClaimError,
    ClaimLost,
    JobTable,
    UnsupportedDialect,
    claim_jobs,
    complete_jobs,
    extend_jobs,
    fail_jobs,
    release_jobs,
    sweep_jobs,
)
from atomic_claim.guard import PAYLOAD, Guard, guard
from tests.claim.test_drain import connect, url_of
from tests.claim.test_tables import Status, composite, composite_rows, created, other_schema
from tests.counting import PRECISE, counted_jobs
from tests.databases import Database
from tests.ending.test_lease import LEASE, expire
from tests.guides import blocks
from tests.jobs import START, fill, ids, in_thread, job_table, mapped, rows, taken

INNODB = ("mysql", "mariadb")
NOT_INNODB = ("sqlite", "postgresql")
RUNNING = "job id=1 of jobs is running already"
ENDED = "job id=1 of jobs is not free any more"
UNNAMED = "job id=1 of jobs is claimed without an owner, which must be written to worker"


def flagged(database: Database, *more: Any, **roles: Any) -> JobTable:
    """Declare a common table; on MySQL and MariaDB with the worker that the guard needs."""
    if database.name in INNODB and not any(c.name == "worker" for c in more):
        more = (*more, Column("worker", String(20)))
    table = job_table(Column("completed_at", DateTime), *more)
    if "worker" in table.c:
        roles["worker"] = "worker"
    return JobTable(table, state="processing", done={"completed_at": sa.func.now()}, **roles)


def execute(engine: sa.Engine, statements: tuple[str, ...]) -> None:
    """Run what a guard is made of, one statement after another."""
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def guarded(engine: sa.Engine, jobs: JobTable, **options: Any) -> Guard:
    """Put the guard in."""
    found = guard(jobs, engine.dialect, **options)
    execute(engine, found.upgrade)
    return found


def name_of(jobs: JobTable, worker: str) -> str | None:
    """Return the worker name that our claim writes, or None if there is no column for it."""
    return None if jobs.worker is None else worker


def refused(message: str) -> AbstractContextManager[Any]:
    """Expect the database to refuse an UPDATE with this message; SQLite's names no key."""
    key, reason = message.split(" of ", 1)
    return pytest.raises(DBAPIError, match=f"atomic_claim: ({key}|a job) of {reason}")


@dataclass
class Legacy:
    """A worker that looks for a job and then marks it, over a connection of its own."""

    connection: sa.Connection
    jobs: JobTable
    name: str

    def find(self) -> int | None:
        """Return the id of the first free job."""
        columns = self.jobs.table.c
        query = sa.select(columns.id).where(columns.processing == sa.false())
        query = query.where(columns.completed_at.is_(None)).order_by(columns.id).limit(1)
        found = self.connection.scalar(query)
        self.connection.commit()
        return found

    def update(self, number: int, **values: Any) -> int:
        """Change a job by its key alone; how many rows that were."""
        table = self.jobs.table
        changed = table.update().where(table.c.id == number).values(**values)
        return self.connection.execute(changed).rowcount

    def mark(self, number: int) -> int:
        """Mark a job as running."""
        named = {} if self.jobs.worker is None else {"worker": self.name}
        return self.update(number, processing=True, **named)

    def complete(self, number: int) -> int:
        """Mark a job as done."""
        return self.update(number, processing=False, completed_at=START)

    def commit(self) -> None:
        """Have others see it."""
        self.connection.commit()


@pytest.fixture
def pair(database: Database) -> Iterator[tuple[sa.Engine, Legacy, Legacy]]:
    """Two legacy workers on two connections, and three free jobs."""
    engine, jobs = database.engine(), flagged(database)
    fill(engine, jobs.table, 3)
    with engine.connect() as one, engine.connect() as other:
        yield engine, Legacy(one, jobs, "a"), Legacy(other, jobs, "b")


Pair = tuple[sa.Engine, Legacy, Legacy]

# --- the second claim, step by step


def test_the_second_claim_is_refused(pair: Pair) -> None:
    """Both find the job, one marks it, and the other's UPDATE raises an error that names it."""
    engine, a, b = pair
    guarded(engine, a.jobs)
    assert (a.find(), b.find()) == (1, 1)
    assert a.mark(1) == 1
    a.commit()
    with refused(RUNNING):
        b.mark(1)
    b.connection.rollback()
    assert b.find() == 2
    assert b.mark(2) == 1


def test_without_the_guard_both_run_it(pair: Pair) -> None:
    """The twin: both UPDATEs change the row, and neither gets an error."""
    _, a, b = pair
    assert (a.find(), b.find()) == (1, 1)
    assert a.mark(1) == 1
    a.commit()
    assert b.mark(1) == 1


def test_a_fast_job_is_not_run_again(pair: Pair) -> None:
    """A claims and completes between B's look and B's UPDATE, which is refused."""
    engine, a, b = pair
    guarded(engine, a.jobs)
    assert (a.find(), b.find()) == (1, 1)
    assert a.mark(1) == 1
    a.commit()
    assert a.complete(1) == 1
    a.commit()
    with refused(ENDED):
        b.mark(1)


def test_without_the_guard_a_fast_job_is_run_again(pair: Pair) -> None:
    """The twin: B marks a job that A has finished."""
    _, a, b = pair
    assert (a.find(), b.find()) == (1, 1)
    a.mark(1)
    a.complete(1)
    a.commit()
    assert b.mark(1) == 1


@pytest.mark.databases("postgresql", "mysql", "mariadb")
@pytest.mark.parametrize("ends", [False, True], ids=["running", "ended"])
def test_a_claim_that_waited_sees_what_it_waited_for(
    database: Database, pair: Pair, ends: bool
) -> None:
    """B's UPDATE waits for A's transaction, and is judged by the row that A leaves."""
    engine, a, b = pair
    guarded(engine, a.jobs)
    assert b.find() == 1
    a.mark(1)
    if ends:
        a.complete(1)
    with in_thread(partial(b.mark, 1)) as blocked:
        database.wait_until_blocked()
        a.commit()
    with refused(ENDED if ends else RUNNING):
        blocked.result()


@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_a_claim_that_waited_for_a_rollback_succeeds(database: Database, pair: Pair) -> None:
    """A mark that was rolled back does not count as a claim."""
    engine, a, b = pair
    guarded(engine, a.jobs)
    a.mark(1)
    with in_thread(partial(b.mark, 1)) as blocked:
        database.wait_until_blocked()
        a.connection.rollback()
    assert blocked.result() == 1


def test_a_second_claim_of_several_jobs_changes_none(pair: Pair) -> None:
    """One job that is not to be had has the whole UPDATE undone, and no more than that."""
    engine, a, b = pair
    guarded(engine, a.jobs)
    a.mark(2)
    a.commit()
    table, named = a.jobs.table, {} if a.jobs.worker is None else {"worker": "b"}
    b.update(3, note="kept")
    with refused("job id=2 of jobs is running already"):
        b.connection.execute(table.update().values(processing=True, **named))
    if engine.dialect.name == "postgresql":
        b.connection.rollback()
    else:
        b.commit()
    assert taken(engine, table) == [2]


def test_an_upsert_is_an_update(pair: Pair) -> None:
    """A claim by INSERT that meets the row and updates it is refused like any other."""
    engine, a, b = pair
    guarded(engine, a.jobs)
    a.mark(1)
    a.commit()
    values = (
        rows(1)[0] | {"processing": True} | ({"worker": "b"} if a.jobs.worker is not None else {})
    )
    written = {name: value for name, value in values.items() if name != "id"}
    insert: Any
    if engine.dialect.name in INNODB:
        insert = mysql.insert(a.jobs.table).values(values).on_duplicate_key_update(written)
    else:
        made: Any = {"sqlite": sqlite, "postgresql": postgresql}[engine.dialect.name]
        insert = made.insert(a.jobs.table).values(values)
        insert = insert.on_conflict_do_update(index_elements=["id"], set_=written)
    with refused(RUNNING):
        b.connection.execute(insert)


def test_a_freed_job_can_be_claimed_again(pair: Pair) -> None:
    """A job that is released, or reset after it was finished, can be claimed again."""
    engine, a, b = pair
    guarded(engine, a.jobs)
    a.mark(1)
    a.update(1, processing=False)
    assert a.mark(1) == 1
    a.complete(1)
    a.update(1, completed_at=None)
    a.commit()
    assert b.mark(1) == 1


# --- progress


def test_progress_that_leaves_the_state_alone(pair: Pair) -> None:
    """An UPDATE of another column passes, before the claim, during the job and after it."""
    engine, a, b = pair
    guarded(engine, a.jobs)
    a.update(1, note="new")
    a.mark(1)
    a.update(1, note="half")
    a.commit()
    b.update(1, note="seen by b")
    b.commit()
    a.complete(1)
    assert a.update(1, note="archived") == 1


@pytest.mark.databases(*NOT_INNODB)
def test_progress_that_rewrites_the_state(pair: Pair) -> None:
    """Where no column says whose it is, it is taken for a second claim, and the error says so."""
    engine, a, _ = pair
    guarded(engine, a.jobs)
    a.mark(1)
    with refused(RUNNING) as raised:
        a.update(1, processing=True, note="half")
    if engine.dialect.name == "postgresql":
        (shown,) = blocks("guard", "text")
        assert str(raised.value.orig).startswith(shown)
    else:
        assert isinstance(raised.value, IntegrityError)


def with_worker(database: Database) -> tuple[sa.Engine, JobTable]:
    """Create a guarded table whose loops write the worker."""
    engine, jobs = database.engine(), flagged(database, Column("worker", String(20)))
    fill(engine, jobs.table, 3)
    guarded(engine, jobs, full_rows=True)
    return engine, jobs


def test_a_worker_may_rewrite_its_own_row(database: Database) -> None:
    """Whole rows pass with the worker that claimed them, and with another's they do not."""
    engine, jobs = with_worker(database)
    with engine.connect() as connection:
        a = Legacy(connection, jobs, "a")
        a.mark(1)
        a.commit()
        assert a.update(1, processing=True, worker="a", note="half", completed_at=None) == 1
        a.commit()
        for other in ("b", "A", "a ", None):
            with refused(RUNNING):
                a.update(1, processing=True, worker=other, note="b's", completed_at=None)
            connection.rollback()
        assert a.update(1, processing=True, worker="a", completed_at=START) == 1


@pytest.mark.databases(*NOT_INNODB)
def test_without_whole_rows_only_the_state_decides(database: Database) -> None:
    """Triggers know the columns of an UPDATE, so the state must not be written by any worker."""
    engine, jobs = database.engine(), flagged(database, Column("worker", String(20)))
    fill(engine, jobs.table, 2)
    guarded(engine, jobs)
    with engine.connect() as connection:
        a = Legacy(connection, jobs, "a")
        assert a.update(1, processing=True) == 1
        a.commit()
        for values in ({}, {"worker": "a"}, {"worker": None}):
            with refused(RUNNING):
                a.update(1, processing=True, **values)
            connection.rollback()
        assert a.update(1, worker="a", note="half") == 1


def test_a_second_claim_without_an_owner_is_not_recognised(database: Database) -> None:
    """The limit where whole rows are written: such a loop is refused at every free row instead."""
    engine, jobs = with_worker(database)
    with engine.connect() as connection:
        a = Legacy(connection, jobs, "a")
        a.mark(1)
        a.commit()
        assert a.update(1, processing=True) == 1
        with refused("job id=2 of jobs is claimed without an owner"):
            a.update(2, processing=True)


def test_a_flush_leaves_out_an_owner_that_did_not_change(database: Database) -> None:
    """The limit: a session that read its own name in the free row claims without writing it."""
    engine, jobs = with_worker(database)
    with engine.begin() as connection:
        connection.execute(jobs.table.update().values(worker="a"))
    job_class = mapped(jobs.table)
    with Session(engine) as a, engine.connect() as other:
        mine = a.get(job_class, 1)
        a.expire_on_commit = False
        a.commit()
        Legacy(other, jobs, "b").mark(1)
        other.commit()
        mine.processing, mine.worker = True, "a"
        a.commit()
    with engine.connect() as connection:
        assert connection.scalar(sa.select(jobs.table.c.worker).where(jobs.table.c.id == 1)) == "b"


def test_an_owner_that_the_mapper_leaves_out() -> None:
    """A class that does not map the owner cannot write it."""
    table = declared(Column("worker", String(9)), worker="worker").table
    registry = sa.orm.registry()

    @registry.mapped
    class Job:
        __table__ = table
        __mapper_args__: ClassVar = {"exclude_properties": ["worker"]}

    jobs = JobTable(Job, state="processing", done={"completed_at": START}, worker=table.c.worker)
    with pytest.raises(ClaimError, match="Job does not map worker"):
        guard(jobs, DIALECTS["mysql"])


@pytest.mark.databases(*INNODB)
def test_a_loop_that_does_not_name_itself(database: Database) -> None:
    """Where nothing else tells two claims apart, one without a worker is refused at once."""
    engine, jobs = with_worker(database)
    with engine.connect() as connection:
        loop = Legacy(connection, jobs, "")
        for values in ({}, {"worker": None}, {"worker": ""}):
            with refused(UNNAMED):
                loop.update(1, processing=True, **values)
        assert loop.update(1, note="no claim") == 1


def save(session: Session, job: Any) -> None:
    """Write all columns of an entity, as some mappers always do."""
    for attribute in sa.inspect(job).mapper.column_attrs:
        if attribute.key != "id":
            sa.orm.attributes.flag_modified(job, attribute.key)
    session.flush()


def test_whole_rows_written_by_a_mapper(database: Database) -> None:
    """Each of two sessions has read the free row; the first to save it as its own keeps it."""
    engine, jobs = with_worker(database)
    job_class = mapped(jobs.table)
    with Session(engine, expire_on_commit=False) as a, Session(engine) as b:
        mine, other = a.get(job_class, 1), b.get(job_class, 1)
        a.commit()
        b.expire_on_commit = False
        b.commit()
        mine.processing, mine.worker = True, "a"
        save(a, mine)
        a.commit()
        other.processing, other.worker = True, "b"
        with refused(RUNNING):
            save(b, other)
        b.rollback()
        mine.note = "half"
        save(a, mine)
        mine.processing, mine.completed_at = False, START
        save(a, mine)
        a.commit()
        # A late write of what the worker had before would have the job run again.
        mine.processing, mine.completed_at = True, None
        with refused(ENDED):
            save(a, mine)


def test_a_token_names_the_owner(database: Database) -> None:
    """Whole rows pass with the token of the claim; a row without a new token is not claimed."""
    engine = database.engine()
    more = (Column("claim_token", String(32)), Column("lease_until", PRECISE))
    jobs = flagged(database, *more, token="claim_token", lease="lease_until")
    fill(engine, jobs.table, 1)
    guarded(engine, jobs, full_rows=True)
    claim = claim_jobs(engine, jobs, lease=LEASE)
    with engine.connect() as connection:
        loop = Legacy(connection, jobs, "")
        whole = {"claim_token": claim.token, "lease_until": claim[0].lease_until}
        assert loop.update(1, processing=True, note="half", **whole) == 1
        with refused(RUNNING):
            loop.update(1, processing=True, claim_token="other", lease_until=None)
        connection.rollback()
        release_jobs(engine, claim)
        # A loop has read the released row, and claims it by writing all it has read.
        with refused("job id=1 of jobs is claimed without an owner"):
            loop.update(1, processing=True, claim_token=None, lease_until=None)


# --- our own calls


def leased(_database: Database) -> JobTable:
    """Build a table with every column that the end of a claim can use."""
    return counted_jobs()


def bare(database: Database) -> JobTable:
    """Build a table with neither lease nor token."""
    more = (Column("failed_at", DateTime), Column("run_at", DateTime))
    return flagged(database, *more, failed={"failed_at": sa.func.now()}, due="run_at")


@pytest.mark.parametrize("make", [leased, bare])
def test_the_whole_life_of_our_own_claims(database: Database, make: Any) -> None:
    """Claims, completions, failures, retries and releases pass, and second claims do not."""
    engine, jobs = database.engine(), make(database)
    fill(engine, jobs.table, 8)
    guarded(engine, jobs)
    fenced = jobs.token is not None
    more: Any = {"lease": LEASE} if fenced else {}
    unfenced: Any = {} if fenced else {"unfenced": True}
    claim = claim_jobs(engine, jobs, 5, worker=name_of(jobs, "w1"), **more)
    assert ids(claim) == [1, 2, 3, 4, 5]
    for number in (1, 5):
        with engine.connect() as connection, refused(f"job id={number} of jobs is running"):
            Legacy(connection, jobs, "w2").mark(number)
    complete_jobs(engine, claim[:1], **unfenced)
    fail_jobs(engine, claim[1:2], error="no", **unfenced)
    fail_jobs(engine, claim[2:3], retry=timedelta(0), **unfenced)
    release_jobs(engine, claim[3:4], **unfenced)
    for number in (1, 2):
        with engine.connect() as connection, refused(f"job id={number} of jobs is not free"):
            Legacy(connection, jobs, "w2").mark(number)
    with Session(engine) as session:
        again = claim_jobs(session, jobs, 2, worker=name_of(jobs, "w2"), **more)
        session.commit()
    assert ids(again) == [3, 4]
    if fenced:
        extend_jobs(engine, again)
        with pytest.raises(ClaimLost):
            complete_jobs(engine, claim[3:4])
    assert complete_jobs(engine, again, **unfenced) == 2


def test_claims_by_token_need_no_worker(database: Database) -> None:
    """A token names a claim as well as a worker does, on MySQL and MariaDB too."""
    engine, jobs = database.engine(), counted_jobs()
    fill(engine, jobs.table, 2)
    guarded(engine, jobs)
    claim = claim_jobs(engine, jobs, 2)
    with engine.connect() as connection, refused(RUNNING):
        Legacy(connection, jobs, "w2").mark(1)
    assert extend_jobs(engine, claim, lease=LEASE) == 2
    assert complete_jobs(engine, claim) == 2


def test_a_lease_that_is_over_lets_the_next_claim_pass(database: Database) -> None:
    """A running row is claimed again with a new token after its lease, and otherwise refused."""
    engine, jobs = database.engine(), counted_jobs()
    fill(engine, jobs.table, 2)
    guarded(engine, jobs)
    late = claim_jobs(engine, jobs, 2, lease=LEASE, worker="w1")
    values: Any = {"processing": True, "worker": "w2", "claim_token": "0" * 32}
    with engine.connect() as connection, refused(RUNNING):
        Legacy(connection, jobs, "w2").update(1, **values)
    expire(engine, jobs, 1)
    with engine.connect() as connection, refused(RUNNING):
        Legacy(connection, jobs, "w2").mark(1)
    successor = claim_jobs(engine, jobs, 2, lease=LEASE, worker="w2")
    assert ids(successor) == [1]
    with pytest.raises(ClaimLost):
        complete_jobs(engine, late)
    assert complete_jobs(engine, successor) == 1


def test_a_late_worker_of_the_same_name(database: Database) -> None:
    """Whole rows of a worker whose lease was given to its own successor bear the old token."""
    engine, jobs = database.engine(), counted_jobs()
    fill(engine, jobs.table, 1)
    guarded(engine, jobs, full_rows=True)
    late = claim_jobs(engine, jobs, lease=LEASE, worker="w1")
    expire(engine, jobs, 1)
    claim = claim_jobs(engine, jobs, lease=LEASE, worker="w1")
    whole: Any = {"processing": True, "worker": "w1", "note": "half"}
    with engine.connect() as connection:
        loop = Legacy(connection, jobs, "w1")
        with refused(RUNNING):
            loop.update(1, claim_token=late.token, **whole)
        connection.rollback()
        assert loop.update(1, claim_token=claim.token, **whole) == 1


def test_a_lease_without_a_token(database: Database) -> None:
    """A lease that another program writes expires too, and one claim alone ends that."""
    engine = database.engine()
    jobs = flagged(database, Column("lease_until", PRECISE), lease="lease_until")
    fill(engine, jobs.table, 1)
    guarded(engine, jobs)
    with engine.connect() as connection:
        Legacy(connection, jobs, "a").mark(1)
        connection.commit()
    expire(engine, jobs, 1)
    with engine.connect() as connection, refused(RUNNING):
        Legacy(connection, jobs, "b").mark(1)
    assert ids(claim_jobs(engine, jobs, worker=name_of(jobs, "c"))) == [1]
    assert claim_jobs(engine, jobs) == []


def test_spent_and_unleased_rows(database: Database) -> None:
    """A sweep passes, and so does the claim of what ran too long without a lease."""
    engine, table = database.engine(), counted_jobs().table
    fill(engine, table, 2)
    jobs = JobTable(
        table,
        state="processing",
        done={"done_at": sa.func.now()},
        failed={"failed_at": sa.func.now()},
        stamps=["created_at"],
        worker="worker",
        token="claim_token",
        lease="lease_until",
        attempts="attempts",
        max_attempts=2,
        unleased=timedelta(hours=1),
    )
    guarded(engine, jobs)
    with engine.begin() as connection:
        Legacy(connection, jobs, "old").mark(1)
    assert ids(claim_jobs(engine, jobs, 2, lease=LEASE, worker="w1")) == [1, 2]
    with engine.begin() as connection:
        connection.execute(table.update().values(attempts=2))
    expire(engine, jobs, 1, 2)
    assert sweep_jobs(engine, jobs) == 2


# --- tables of every make


def status_table(type_: Any) -> sa.Table:
    """Build a table with a status column."""
    return sa.Table(
        "jobs",
        sa.MetaData(),
        Column("id", Integer, primary_key=True),
        Column("status", type_),
        Column("worker", String(20)),
        Column("finished_at", DateTime),
        Column("locked_at", DateTime),
        Column("owner", String(20), nullable=False, default=""),
        Column("tries", Integer, nullable=False, default=0),
    )


STATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "strings": (
        String(20),
        {"state": "status", "free": "new", "claimed": "busy", "done": "done"},
    ),
    "odd strings": (
        String(20),
        {
            "state": "status",
            "free": ("it's", "50%", "%s :x"),
            "claimed": "a\\%'%(b)s",
            "done": '100%"',
        },
    ),
    "native enum": (
        sa.Enum(Status, name="job_status"),
        {
            "state": "status",
            "free": Status.WAITING,
            "claimed": Status.RUNNING,
            "done": Status.DONE,
        },
    ),
    "numbers": (Integer, {"state": "status", "free": (0, 3), "claimed": 1, "done": 2}),
    "flag": (sa.Boolean, {"state": "status", "done": {"finished_at": sa.func.now()}}),
    "flag in a number": (
        Integer,
        {"state": "status", "free": 0, "claimed": 1, "done": {"finished_at": sa.func.now()}},
    ),
    "NULL is free": (
        sa.Boolean,
        {"state": "status", "null_is_free": True, "done": {"finished_at": sa.func.now()}},
    ),
    "visible": (
        sa.Boolean,
        {
            "state": "status",
            "free": True,
            "claimed": False,
            "done": {"finished_at": sa.func.now()},
        },
    ),
    "time": (String(20), {"state": "locked_at", "done": {"finished_at": sa.func.now()}}),
    "state and time": (
        String(20),
        {
            "state": "status",
            "free": "new",
            "claimed": {"status": "busy", "locked_at": sa.func.now()},
            "done": {"status": "done", "finished_at": sa.func.now()},
        },
    ),
}


def legacy_claim(engine: sa.Engine, jobs: JobTable, number: int) -> None:
    """Mark a job by the state alone, as far as the database allows."""
    state = next(iter(jobs.claimed))
    values: dict[Any, Any] = {state: jobs.claimed[state], jobs.table.c.worker: "legacy"}
    with engine.begin() as connection:
        changed = jobs.table.update().where(jobs.table.c.id == number).values(values)
        assert connection.execute(changed).rowcount == 1


def run_through(engine: sa.Engine, jobs: JobTable) -> None:
    """Claim, meet a second claim, complete, meet a fast job's; then have a free job claimed."""
    claim = claim_jobs(engine, jobs, worker="w1")
    assert ids(claim) == [1]
    with refused(RUNNING):
        legacy_claim(engine, jobs, 1)
    complete_jobs(engine, claim, unfenced=True)
    with refused(ENDED):
        legacy_claim(engine, jobs, 1)
    legacy_claim(engine, jobs, 2)
    with refused("job id=2 of jobs is running already"):
        claim_by_name = {jobs.table.c.worker: "w3", **jobs.claimed}
        with engine.begin() as connection:
            where = jobs.table.update().where(jobs.table.c.id == 2)
            connection.execute(where.values(claim_by_name))


@pytest.mark.parametrize("kind", STATES)
def test_states_of_every_kind(database: Database, kind: str) -> None:
    """Whatever says that a job is free, claimed or done says it to the guard too."""
    type_, roles = STATES[kind]
    table = status_table(type_)
    jobs = JobTable(table, worker="worker", **roles)
    free = jobs.released[jobs.state]
    plain = free.value if hasattr(free, "value") else free
    if not hasattr(free, "value") and free is not None:
        plain = isinstance(free, sa.sql.elements.True_)
    engine = created(database, table, [{"id": n, jobs.state.name: plain} for n in (1, 2, 3)])
    found = guarded(engine, jobs)
    run_through(engine, jobs)
    execute(engine, found.downgrade)
    legacy_claim(engine, jobs, 1)


@pytest.mark.parametrize("null_is_free", [False, True])
def test_a_flag_that_is_null(database: Database, null_is_free: bool) -> None:
    """NULL has not ended and does not run, so a loop that takes it for free may have it once."""
    table = status_table(sa.Boolean)
    done = {"finished_at": sa.func.now()}
    jobs = JobTable(table, state="status", done=done, worker="worker", null_is_free=null_is_free)
    engine = created(database, table, [{"id": 1}])
    guarded(engine, jobs)
    legacy_claim(engine, jobs, 1)
    with refused(RUNNING):
        claim: dict[Any, Any] = {table.c.status: sa.true(), table.c.worker: "other"}
        with engine.begin() as connection:
            connection.execute(table.update().values(claim))


def test_free_by_an_expression(database: Database) -> None:
    """An expression over the row's own columns can define which rows are free."""
    table = status_table(String(20))
    jobs = JobTable(
        table,
        free=(table.c.owner == "") & (table.c.tries < 5),
        claimed={"owner": "taken", "locked_at": sa.func.now()},
        done={"finished_at": sa.func.now()},
        worker="worker",
    )
    engine = created(database, table, [{"id": n} for n in (1, 2, 3)])
    guarded(engine, jobs)
    with engine.begin() as connection:
        connection.execute(table.update().where(table.c.id == 3).values(tries=5))
    run_through(engine, jobs)
    with refused("job id=3 of jobs is not free any more"):
        legacy_claim(engine, jobs, 3)


def test_a_state_that_stays_when_a_job_has_ended(database: Database) -> None:
    """A fast job is not run again where only the time of its end says that it has ended."""
    engine, jobs = with_worker(database)
    with engine.connect() as one, engine.connect() as other:
        a, b = Legacy(one, jobs, "a"), Legacy(other, jobs, "b")
        a.mark(1)
        a.update(1, completed_at=START)
        a.commit()
        with refused(ENDED):
            b.mark(1)
        b.connection.rollback()
        assert a.update(1, processing=True, worker="a", completed_at=START, note="late") == 1
        with refused(ENDED):
            a.update(1, processing=True, worker="a", completed_at=None)


def test_an_end_that_leaves_the_state_as_it_was(pair: Pair) -> None:
    """An UPDATE that ends a job is no claim, even if it writes the state and another's name."""
    engine, a, b = pair
    guarded(engine, a.jobs)
    a.mark(1)
    a.commit()
    named = {} if b.jobs.worker is None else {"worker": "b"}
    assert b.update(1, processing=True, completed_at=START, **named) == 1


def test_keys_of_several_columns(database: Database) -> None:
    """An error names all of the key's columns."""
    table = composite()
    table.append_column(Column("done_at", DateTime))
    table.append_column(Column("worker", String(20)))
    engine = created(database, table, composite_rows(3))
    jobs = JobTable(table, state="processing", done={"done_at": sa.func.now()}, worker="worker")
    guarded(engine, jobs)
    claim_jobs(engine, jobs, 3, worker="w1")
    with engine.begin() as connection, refused("job region=us, number=2 of jobs is running"):
        stolen = table.update().where(table.c.number == 2)
        connection.execute(stolen.values(processing=True, worker="w2"))


def test_keys_that_are_no_text(database: Database) -> None:
    """An error names a binary key by its digits."""
    binary = sa.VARBINARY(16) if database.name in INNODB else sa.LargeBinary()
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        Column("id", binary, primary_key=True),
        Column("processing", sa.Boolean, nullable=False),
        Column("done_at", DateTime),
        Column("worker", String(20)),
    )
    engine = created(database, table, [{"id": b"\x00\xff'", "processing": True}])
    jobs = JobTable(table, state="processing", done={"done_at": sa.func.now()}, worker="worker")
    guarded(engine, jobs)
    with engine.begin() as connection, refused("job id=(?i:00ff27) of jobs is running"):
        connection.execute(table.update().values(processing=True, worker="w2"))


@pytest.mark.parametrize(
    "names",
    [
        ("order", "Id", "from", "done at"),
        ("100%", "%s", "%(x)s", "a%%b"),
        ("a:b.c", ":id", "state::s'", 'say "when"'),
        ("old", "new", "refused", "written"),
        ("q" * 60, "k" * 60, "s" * 60, "d" * 60),
        ("ü" * 31, "ö", "ä", "ß"),
    ],
    ids=lambda names: " ".join(name[:12] for name in names),
)
def test_names_that_need_quotes(database: Database, names: tuple[str, ...]) -> None:
    """Reserved words, mixed case, blanks, signs of parameters, and names of the greatest length."""
    name, key, state, end = names
    table = sa.Table(
        name,
        sa.MetaData(),
        Column(key, Integer, primary_key=True, autoincrement=False),
        Column(state, sa.Boolean, nullable=False),
        Column(end, DateTime),
        Column("by whom%", String(20)),
    )
    engine = created(database, table, [{key: n, state: False} for n in (1, 2)])
    jobs = JobTable(table, state=state, done={end: sa.func.now()}, worker="by whom%")
    found = guarded(engine, jobs)
    claim = claim_jobs(engine, jobs, worker="w1")
    second = table.update().where(table.c[key] == 1).values({state: True, "by whom%": "w2"})
    named = "a job of " if database.name == "sqlite" else f"{key[:9]}.*=1 of "
    with engine.begin() as connection, pytest.raises(DBAPIError, match=named):
        connection.execute(second)
    complete_jobs(engine, claim, unfenced=True)
    execute(engine, found.downgrade)
    with engine.begin() as connection:
        assert connection.execute(second).rowcount == 1


def test_long_names_that_differ_at_the_end(database: Database) -> None:
    """Two tables whose guards' names would be cut to the same have guards of their own."""
    engine = database.engine()
    for last in "ab":
        table = job_table(
            Column("completed_at", DateTime), Column("worker", String(20)), name="j" * 61 + last
        )
        table.create(engine)
        guarded(engine, JobTable.infer(table))


def test_a_table_of_another_schema(database: Database) -> None:
    """A guard lies in its table's schema, and lets another of the same name be."""
    with other_schema(database) as (engine, schema):
        more = [(Column("completed_at", DateTime), Column("worker", String(20))) for _ in "ab"]
        here, there = job_table(*more[0]), job_table(*more[1], schema=schema)
        for table in (here, there):
            fill(engine, table, 1, processing=True)
        found = guarded(engine, JobTable.infer(there))
        for table, is_guarded in ((here, False), (there, True)):
            with (
                engine.begin() as connection,
                refused(r"job id=1 of .*[.]jobs") if is_guarded else nullcontext(),
            ):
                connection.execute(table.update().values(processing=True, worker="w2"))
        execute(engine, found.downgrade)
        assert ids(claim_jobs(engine, there)) == []


# --- what cannot be guarded

DIALECTS: dict[str, sa.Dialect] = {
    "postgresql": postgresql.dialect(),
    "sqlite": sqlite.dialect(),
    "mysql": mysql.dialect(),
}
every_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


def declared(*more: Any, **roles: Any) -> JobTable:
    """Declare a table without a worker column."""
    table = job_table(Column("completed_at", DateTime), *more)
    return JobTable(table, state="processing", **{"done": {"completed_at": sa.func.now()}, **roles})


def test_mysql_needs_an_owner() -> None:
    """Without a worker or token column MySQL's trigger could not tell progress from a claim."""
    with pytest.raises(ClaimError, match=r"'jobs' has no worker.*on MySQL.*ADD COLUMN"):
        guard(declared(), DIALECTS["mysql"])


def test_payloads_table_is_known_by_its_columns() -> None:
    """The columns that identify Payload's table occur in the schema that Payload creates."""
    for path in (Path(__file__).parent.parent / "payload").glob("*.sql"):
        assert all(name in path.read_text(encoding="utf-8") for name in PAYLOAD)


@every_dialect
def test_writers_of_whole_rows_need_an_owner(dialect: sa.Dialect) -> None:
    """Whole rows are refused without a column that tells progress from a claim."""
    with pytest.raises(ClaimError, match=r"where whole rows are written.*JobTable\(worker=...\)"):
        guard(declared(), dialect, full_rows=True)
    assert guard(declared(Column("worker", String(9)), worker="worker"), dialect, full_rows=True)


@every_dialect
def test_payloads_table_is_refused(dialect: sa.Dialect) -> None:
    """Payload's loop does not roll back a refused UPDATE, and no column cures that."""
    more = (Column("total_tried", Integer), Column("task_slug", String(20)))
    payload = declared(*more, Column("worker", String(9)), worker="worker")
    with pytest.raises(ClaimError, match=r"Payload.*runs in autocommit.*pool fills"):
        guard(payload, dialect)


@every_dialect
def test_an_end_must_be_known(dialect: sa.Dialect) -> None:
    """Where nothing marks a finished job, or it is deleted, a fast job could not be seen."""
    jobs = declared(Column("worker", String(9)), worker="worker", done={})
    with pytest.raises(ClaimError, match=r"nothing marks a row .*JobTable\(done=...\).*deleted"):
        guard(jobs, dialect)


@every_dialect
@pytest.mark.parametrize(
    "free",
    [
        sa.text("owner = ''"),
        sa.literal_column("owner").is_(None),
        sa.exists().where(sa.table("locks", sa.column("job")).c.job == 1),
        sa.table("others", sa.column("free")).c.free == 1,
        sa.column("processing") == sa.bindparam("later"),
    ],
    ids=["text", "literal", "subquery", "another table", "parameter"],
)
def test_expressions_about_more_than_the_row(dialect: sa.Dialect, free: Any) -> None:
    """A condition that a trigger cannot evaluate on one row is refused with the reason."""
    table = job_table(Column("worker", String(9)), Column("completed_at", DateTime))
    jobs = JobTable(
        table,
        free=free,
        claimed={"processing": True},
        done={"completed_at": sa.func.now()},
        worker="worker",
    )
    with pytest.raises(ClaimError, match="a trigger cannot evaluate on one row"):
        guard(jobs, dialect)


def test_other_databases() -> None:
    """A database that was not tried is refused, and so is what is no dialect."""
    with pytest.raises(UnsupportedDialect, match="no guard exists for 'mssql'"):
        guard(declared(), mssql.dialect())
    with pytest.raises(ClaimError, match=r"is not a dialect: pass engine\.dialect"):
        guard(declared(), sa.create_engine("sqlite://"))  # type: ignore[arg-type]


# --- upgrade and downgrade

CATALOGUES = {
    "sqlite": ["SELECT * FROM sqlite_schema ORDER BY type, name"],
    "postgresql": [
        "SELECT tgname, tgrelid FROM pg_trigger ORDER BY 1, 2",
        "SELECT proname, pronamespace FROM pg_proc ORDER BY 1, 2",
        "SELECT relname, relnamespace FROM pg_class ORDER BY 1, 2",
        "SELECT count(*) FROM pg_depend",
    ],
    "mysql": [
        "SELECT trigger_name FROM information_schema.triggers WHERE trigger_schema = database()",
        "SELECT routine_name FROM information_schema.routines WHERE routine_schema = database()",
        "SELECT table_name FROM information_schema.tables WHERE table_schema = database()",
        "SHOW CREATE TABLE jobs",
    ],
}


def catalogue(engine: sa.Engine) -> list[Any]:
    """All that the database knows of tables, triggers and functions."""
    name = "mysql" if engine.dialect.name in INNODB else engine.dialect.name
    with engine.connect() as connection:
        return [connection.exec_driver_sql(query).all() for query in CATALOGUES[name]]


def without_numbers(found: list[Any], engine: sa.Engine) -> list[Any]:
    """Return the catalogue without SQLite's page numbers, which SQLite reuses."""
    if engine.dialect.name != "sqlite":
        return found
    return [[(row.type, row.name, row.tbl_name, row.sql) for row in found[0]]]


@pytest.mark.parametrize("make", [leased, bare])
def test_the_downgrade_leaves_no_trace(database: Database, make: Any) -> None:
    """After the downgrade the catalogues are what they were, and a second upgrade does it again."""
    engine, jobs = database.engine(), make(database)
    fill(engine, jobs.table, 2)
    before = catalogue(engine)
    found = guarded(engine, jobs)
    installed = catalogue(engine)
    assert installed != before
    claim_jobs(engine, jobs, worker=name_of(jobs, "w1"))
    execute(engine, found.downgrade)
    assert without_numbers(catalogue(engine), engine) == without_numbers(before, engine)
    with engine.connect() as connection:
        assert Legacy(connection, jobs, "w2").mark(1) == 1
    execute(engine, found.upgrade)
    with engine.connect() as connection, refused(RUNNING):
        Legacy(connection, jobs, "w2").mark(1)
    execute(engine, found.downgrade)
    assert without_numbers(catalogue(engine), engine) == without_numbers(before, engine)


# --- four processes

WORKERS = 4
JOBS = 200


def set_barrier(barrier: Barrier) -> None:
    """Keep what came with the process's start; it cannot be sent later."""
    global BARRIER  # noqa: PLW0603
    BARRIER = barrier


BARRIER: Barrier


def legacy_loop(url: str, folder: Path, number: int) -> int:
    """Look for a job, mark it, run it, complete it, until none is left; how many were refused.

    All four have found the first job before any of them marks it.
    """
    engine, refusals, first = connect(url), 0, True
    table = sa.Table("jobs", sa.MetaData(), autoload_with=engine)
    jobs, record = JobTable.infer(table), folder / f"{number}"
    with engine.connect() as connection, record.open("a", encoding="ascii") as ran:
        loop = Legacy(connection, jobs, f"worker {number}")
        while (found := loop.find()) is not None:
            if first:
                BARRIER.wait(60)
                first = False
            try:
                loop.mark(found)
                loop.commit()
            except DBAPIError as error:
                connection.rollback()
                if "atomic_claim: " not in str(error):
                    raise
                refusals += 1
                continue
            ran.write(f"{found}\n")
            loop.complete(found)
            loop.commit()
    engine.dispose()
    return refusals


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Four processes, started once for all tests of this file."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        WORKERS,
        mp_context=context,
        initializer=set_barrier,
        initargs=(context.Barrier(WORKERS),),
    ) as made:
        yield made


@pytest.mark.parametrize("is_guarded", [True, False], ids=["guarded", "without the guard"])
def test_four_legacy_loops(
    database: Database, pool: ProcessPoolExecutor, tmp_path: Path, is_guarded: bool
) -> None:
    """Unpatched loops run every job once under the guard; without it all four run the first."""
    engine, jobs = database.engine(), flagged(database)
    fill(engine, jobs.table, count := JOBS if is_guarded else 20)
    if is_guarded:
        guarded(engine, jobs)
    url = url_of(database)
    loops = [pool.submit(legacy_loop, url, tmp_path, n) for n in range(WORKERS)]
    refusals = [loop.result() for loop in loops]
    times = Counter(line for path in tmp_path.iterdir() for line in path.read_text().split())
    if is_guarded:
        assert max(times.values()) == 1
        assert sum(refusals) >= WORKERS - 1
    else:
        assert times["1"] == WORKERS
        assert sum(refusals) == 0
    assert set(times) == {f"{number}" for number in range(1, count + 1)}
