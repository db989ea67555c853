"""Leases that are kept while the work goes on: what the thread does, and what the block learns."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from atomic_claim import (
    Claim,
    ClaimError,
    ClaimLost,
    JobTable,
    aio,
    claim_jobs,
    complete_jobs,
    fail_jobs,
    keep_claims,
    release_jobs,
)
from atomic_claim.backends import Transaction
from atomic_claim.heartbeat import prepared_beat
from tests.claim.test_aio import DRIVERS
from tests.counting import counted_jobs
from tests.databases import Database
from tests.ending.test_lease import LEASE, PAST, mapped, row
from tests.jobs import fill, ids, in_thread, soon
from tests.own_servers import own_server
from tests.waiting import wait_until

EVERY = timedelta(milliseconds=20)
ON_SERVERS = ("postgresql", "mysql", "mariadb")


def made(database: Database, count: int) -> tuple[sa.Engine, JobTable]:
    """Create an engine and a table with `count` free jobs."""
    engine, jobs = database.engine(), counted_jobs()
    fill(engine, jobs.table, count)
    return engine, jobs


def threads() -> list[threading.Thread]:
    """Return the threads that extend leases now."""
    return [thread for thread in threading.enumerate() if "keep_claims" in thread.name]


@contextmanager
def beats(engine: sa.Engine) -> Iterator[list[str]]:
    """Record the updates that are tried through an engine during the block."""
    seen: list[str] = []

    def note(*arguments: Any) -> None:
        if arguments[2].startswith("UPDATE"):
            seen.append(arguments[2])

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


def knocks(engine: sa.Engine) -> list[Any]:
    """Return a list that collects the connections that an engine tries from now on."""
    tried: list[Any] = []
    sa.event.listen(engine, "do_connect", lambda *arguments: tried.append(arguments))
    return tried


def grows(engine: sa.Engine, jobs: JobTable, number: int) -> None:
    """Wait until the lease of a row ends later than it does now."""
    before = row(engine, jobs, number).lease_until
    wait_until(lambda: row(engine, jobs, number).lease_until > before)


def take(engine: sa.Engine, jobs: JobTable, number: int) -> Claim[Any]:
    """Let the lease of a row run out and another worker claim it, before a beat can extend it."""
    with engine.begin() as connection:
        past = jobs.now(jobs.lease, sa.literal(PAST.total_seconds(), sa.Float()))
        this = jobs.table.c.id == number
        connection.execute(jobs.table.update().where(this).values(lease_until=past))
        claim = claim_jobs(connection, jobs, where=this, lease=LEASE, worker="successor")
    assert ids(claim) == [number]
    return claim


@pytest.mark.parametrize("bind", ["engine", "sessionmaker"])
def test_leases_are_extended_while_the_block_runs(database: Database, bind: str) -> None:
    """Every row's lease grows, and grows again; when the block is over, the thread is too."""
    engine, jobs = made(database, 2)
    claim = claim_jobs(engine, jobs, 2, lease=LEASE)
    maker = sessionmaker(engine)
    with keep_claims(engine if bind == "engine" else maker, claim, every=EVERY) as keeper:
        assert len(threads()) == 1
        for number in (1, 2, 1, 2):
            grows(engine, jobs, number)
        keeper.check()
    assert threads() == []
    assert keeper.lost == ()
    assert complete_jobs(engine, claim) == 2


def test_a_ticket_is_kept_too(database: Database) -> None:
    """A ticket that has been through JSON stands for its claim."""
    engine, jobs = made(database, 1)
    claim = claim_jobs(engine, jobs, lease=LEASE)
    ticket = json.loads(json.dumps(claim.ticket(claim[0])))
    with keep_claims(engine, Claim.from_ticket(jobs, ticket), every=EVERY):
        grows(engine, jobs, 1)


def test_what_cannot_be_kept_is_refused(database: Database) -> None:
    """No lease, no time to keep it in, or a bind that is the caller's: no thread is started."""
    engine, jobs = made(database, 2)
    unleased = claim_jobs(engine, jobs)
    leased = claim_jobs(engine, jobs, lease=LEASE)
    with pytest.raises(ClaimError, match="has no lease"), keep_claims(engine, unleased):
        pass
    for every in (timedelta(0), LEASE):
        with pytest.raises(ClaimError, match="every is"), keep_claims(engine, leased, every=every):
            pass
    with Session(engine) as session, engine.connect() as connection:
        for bind in (session, connection):
            with pytest.raises(ClaimError, match="is the caller's"), keep_claims(bind, leased):  # type: ignore[arg-type]
                pass
    assert threads() == []


@pytest.mark.databases("sqlite")
def test_a_pool_of_one_connection_is_refused(database: Database) -> None:
    """A pool that hands the thread the block's own connection, or another memory, is no use."""
    for engine in (
        database.engine(poolclass=StaticPool, connect_args={"check_same_thread": False}),
        database.engine(url=sa.make_url("sqlite://")),
    ):
        jobs = counted_jobs()
        fill(engine, jobs.table, 1)
        claim = claim_jobs(engine, jobs, lease=LEASE)
        with pytest.raises(ClaimError, match="one connection"), keep_claims(engine, claim):
            pass
        jobs.table.metadata.drop_all(engine)


def test_a_claim_must_be_committed(database: Database) -> None:
    """A claim that others cannot see yet is refused; after its commit it is kept."""
    engine, jobs = made(database, 1)
    _, declared = mapped(jobs)
    with Session(engine) as session:
        claim = claim_jobs(session, declared, lease=LEASE)
        with pytest.raises(ClaimError, match="commit it before"), keep_claims(engine, claim):
            pass
        session.commit()
        with keep_claims(engine, claim, every=EVERY):
            grows(engine, jobs, 1)


def test_a_lease_that_is_almost_over(database: Database) -> None:
    """A lease that is almost over is extended before the block begins, not a period later."""
    engine, jobs = made(database, 1)
    claim = claim_jobs(engine, jobs, lease=LEASE)
    with engine.begin() as connection:
        soon = jobs.now(jobs.lease, sa.literal(10.0, sa.Float()))
        connection.execute(jobs.table.update().values(lease_until=soon))
    before = row(engine, jobs, 1).lease_until
    with keep_claims(engine, claim) as keeper:
        assert row(engine, jobs, 1).lease_until > before + timedelta(minutes=1)
        keeper.check()


@pytest.mark.databases(*ON_SERVERS)
def test_an_uncommitted_completion_is_passed_over(database: Database) -> None:
    """A row that the block has completed is not waited for, nor lost; the others are extended."""
    engine, jobs = made(database, 2)
    claim = claim_jobs(engine, jobs, 2, lease=LEASE)
    with engine.connect() as connection, ExitStack() as keeping:
        keeper = keeping.enter_context(keep_claims(engine, claim, every=EVERY))
        complete_jobs(connection, claim[:1])
        for _ in range(3):
            grows(engine, jobs, 2)
        assert keeper.lost == ()
        soon(keeping.close)
        connection.commit()
    assert row(engine, jobs, 1).done_at is not None


@pytest.mark.databases("sqlite")
def test_a_failed_extension_is_not_a_beat(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """While SQLite's block writes, its leases run out: the others are lost, by the reason kept.

    The row that the block has ended is not: it is extended again after the rollback.
    """
    engine, jobs = made(database, 2)
    keeping = database.engine()
    claim = claim_jobs(engine, jobs, 2, lease=timedelta(seconds=1))
    with engine.connect() as connection, keep_claims(keeping, claim, every=EVERY) as keeper:
        complete_jobs(connection, claim[:1])
        wait_until(lambda: keeper.error)
        assert keeper.lost == ()
        wait_until(lambda: keeper.lost)
        with pytest.raises(ClaimLost) as raised:
            keeper.check()
        assert (raised.value.keys, raised.value.__cause__) == (((2,),), keeper.error)
        connection.rollback()
        grows(engine, jobs, 1)
        assert keeper.error is None
    said = [each.getMessage() for each in caplog.records]
    assert [text.partition(":")[0] for text in said if not text.startswith("Lost(")] == [
        "2 leases of jobs are not extended"
    ]
    assert said.count("Lost(table='jobs', keys=((2,),))") <= 1


def test_a_beat_does_not_wait_long(database: Database) -> None:
    """However long the period, a beat that meets the block's own locks is over at once."""
    engine, jobs = made(database, 1)
    claim = claim_jobs(engine, jobs, lease=LEASE)
    beat = prepared_beat(engine, claim, timedelta(seconds=100))
    with engine.connect() as connection:
        complete_jobs(connection, claim)
        assert soon(beat.once) == ()
        connection.rollback()


def test_the_end_comes_at_once(database: Database) -> None:
    """The end of the block does not wait for the next beat, nor do exceptions."""
    engine, jobs = made(database, 1)
    claim = claim_jobs(engine, jobs, lease=LEASE)

    def fail() -> None:
        with keep_claims(engine, claim):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        soon(fail)
    assert threads() == []


def test_what_the_block_has_ended_is_not_lost(database: Database) -> None:
    """Rows that the block completes, fails and releases are let go, and the others kept."""
    engine, jobs = made(database, 4)
    claim = claim_jobs(engine, jobs, 4, lease=LEASE)
    lost: list[Any] = []
    with keep_claims(engine, claim, every=EVERY, on_lost=lost.append) as keeper:
        complete_jobs(engine, claim[:1])
        fail_jobs(engine, claim[1:2], retry=timedelta(hours=1))
        release_jobs(engine, claim[2:3])
        for _ in range(2):
            grows(engine, jobs, 4)
        keeper.check()
    assert (lost, keeper.lost) == ([], ())
    assert row(engine, jobs, 3).lease_until is None


def test_what_another_process_has_completed_is_not_lost(database: Database) -> None:
    """A row that was completed by its ticket, elsewhere, still bears the claim's token."""
    engine, jobs = made(database, 2)
    claim = claim_jobs(engine, jobs, 2, lease=LEASE)
    with keep_claims(engine, claim, every=EVERY) as keeper:
        done = {"done_at": jobs.now(jobs.table.c.done_at), "lease_until": None}
        with engine.begin() as connection:
            connection.execute(jobs.table.update().where(jobs.table.c.id == 1).values(done))
        for _ in range(2):
            grows(engine, jobs, 2)
        keeper.check()


def test_what_the_block_has_freed_may_be_taken(database: Database) -> None:
    """A row that the block has released is not lost when another worker takes it."""
    engine, jobs = made(database, 2)
    claim = claim_jobs(engine, jobs, 2, lease=LEASE)
    with keep_claims(engine, claim, every=EVERY) as keeper:
        with engine.begin() as connection:
            release_jobs(connection, claim[:1])
            assert ids(claim_jobs(connection, jobs, lease=LEASE)) == [1]
        for _ in range(2):
            grows(engine, jobs, 2)
        keeper.check()


@pytest.mark.databases("sqlite")
def test_what_is_freed_while_leases_are_extended(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block releases a row between the heartbeat's look and its UPDATE; another takes it."""
    engine, jobs = made(database, 2)
    claim = claim_jobs(engine, jobs, 2, lease=LEASE)
    beat = prepared_beat(engine, claim, EVERY)
    look = Transaction.unlocked

    def then_release(*arguments: Any) -> Any:
        found = look(*arguments)
        monkeypatch.undo()
        release_jobs(engine, claim[:1])
        assert ids(claim_jobs(engine, jobs, lease=LEASE)) == [1]
        return found

    monkeypatch.setattr(Transaction, "unlocked", then_release)
    assert [beat.once(), beat.once()] == [(), ()]
    assert beat.lost == ()


def test_an_end_that_is_rolled_back(database: Database) -> None:
    """A row that the block's rollback has given back is kept, and its loss is a loss again."""
    engine, jobs = made(database, 1)
    claim = claim_jobs(engine, jobs, lease=LEASE)
    with keep_claims(engine, claim, every=EVERY) as keeper:
        with engine.connect() as connection:
            complete_jobs(connection, claim)
            connection.rollback()
        grows(engine, jobs, 1)
        take(engine, jobs, 1)
        wait_until(lambda: keeper.lost)


def test_after_the_block(database: Database) -> None:
    """A keeper reports on its block only; a lease that expires later does not change it."""
    engine, jobs = made(database, 2)
    lease = timedelta(seconds=0.5)
    claim = claim_jobs(engine, jobs, 2, lease=lease)
    with keep_claims(engine, claim) as keeper:
        complete_jobs(engine, claim[:1])
    until = time.monotonic() + lease.total_seconds()
    wait_until(lambda: time.monotonic() > until)
    assert keeper.lost == ()


def test_a_row_taken_by_another_worker_is_lost(database: Database) -> None:
    """The flag, the check and the callback name it; its new owner's lease is left alone."""
    engine, jobs = made(database, 2)
    claim = claim_jobs(engine, jobs, 2, lease=LEASE)
    lost: list[Any] = []
    with keep_claims(engine, claim, every=EVERY, on_lost=lost.append) as keeper:
        keeper.check()
        successor = take(engine, jobs, 2)
        wait_until(lambda: lost)
        with pytest.raises(ClaimLost) as raised:
            keeper.check()
        assert raised.value.keys == keeper.lost == ((2,),)
        for _ in range(2):
            grows(engine, jobs, 1)
    assert lost == [((2,),)]
    owned = row(engine, jobs, 2)
    assert (owned.claim_token, owned.lease_until) == (successor.token, successor[0].lease_until)


def fail(_: object) -> None:
    """Raise, as a callback."""
    raise ZeroDivisionError


def test_a_failing_callback_reaches_the_block(database: Database) -> None:
    """Where on_lost raises, nothing is kept any more, and the end of the block raises it."""
    engine, jobs = made(database, 2)
    claim = claim_jobs(engine, jobs, 2, lease=LEASE)
    keeping = ExitStack()
    keeper = keeping.enter_context(keep_claims(engine, claim, every=EVERY, on_lost=fail))
    take(engine, jobs, 2)
    wait_until(lambda: not threads())
    with pytest.raises(ClaimLost) as raised:
        keeper.check()
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert keeper.lost == ((1,), (2,))
    with pytest.raises(ZeroDivisionError):
        keeping.close()


def test_a_failing_callback_reaches_an_asynchronous_block(database: Database) -> None:
    """The twin of a task: its end raises what on_lost raised, once."""
    engine, jobs = made(database, 1)
    claim = claim_jobs(engine, jobs, lease=LEASE)

    async def block() -> None:
        url = database.url.set(drivername=DRIVERS[database.name][0])
        keeping = create_async_engine(url)
        try:
            async with aio.keep_claims(keeping, claim, every=EVERY, on_lost=fail) as keeper:
                take(engine, jobs, 1)
                while not keeper.error:
                    await asyncio.sleep(0.01)
        finally:
            await keeping.dispose()

    with pytest.raises(ZeroDivisionError):
        asyncio.run(asyncio.wait_for(block(), 60))


def test_rows_that_are_not_the_claims_before_the_block(database: Database) -> None:
    """Ended, cancelled, taken: ClaimLost names these rows, and the others can be kept."""
    engine, jobs = made(database, 4)
    claim = claim_jobs(engine, jobs, 4, lease=LEASE)
    complete_jobs(engine, claim[:1])
    with engine.begin() as connection:
        connection.execute(jobs.table.delete().where(jobs.table.c.id == 2))
    take(engine, jobs, 3)
    with pytest.raises(ClaimLost) as raised, keep_claims(engine, claim, every=EVERY):
        pass
    assert raised.value.keys == ((1,), (2,), (3,))
    with keep_claims(engine, claim[3:], every=EVERY):
        grows(engine, jobs, 4)


@pytest.mark.databases(*ON_SERVERS)
def test_a_row_that_stays_locked_is_lost_with_its_lease(database: Database) -> None:
    """A row that a beat passes over for longer than its lease is not extended, so it is lost."""
    engine, jobs = made(database, 2)
    claim = claim_jobs(engine, jobs, 2, lease=timedelta(seconds=1))
    with engine.connect() as connection, keep_claims(engine, claim, every=EVERY) as keeper:
        connection.execute(
            jobs.table.update().where(jobs.table.c.id == 1).values(last_error="slow")
        )
        wait_until(lambda: keeper.lost)
        assert keeper.lost == ((1,),)
        connection.rollback()


def test_a_pool_without_a_free_connection(database: Database) -> None:
    """A beat that gets no connection is tried again; what is not kept in time counts as lost."""
    engine, jobs = made(database, 2)
    keeping = database.engine(poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.05)
    claim = claim_jobs(engine, jobs, 2, lease=timedelta(seconds=2))

    def connected() -> sa.Connection | None:
        # A beat may have it at the moment.
        with suppress(sa.exc.TimeoutError):
            return keeping.connect()
        return None

    with keep_claims(keeping, claim, every=EVERY) as keeper:
        grows(engine, jobs, 1)
        with wait_until(connected):
            complete_jobs(engine, claim[:1])
            wait_until(lambda: keeper.lost)
            assert keeper.lost == ((2,),)


def test_a_beat_that_hangs_shows_as_a_loss(database: Database) -> None:
    """A lease that is over counts as lost for the block even if the thread is stuck."""
    engine, jobs = made(database, 1)
    claim = claim_jobs(engine, jobs, lease=timedelta(seconds=1))
    stuck, let_go = threading.Event(), threading.Event()
    keeping = database.engine()

    @sa.event.listens_for(keeping, "before_cursor_execute")
    def hang(*arguments: Any) -> None:
        if "keep_claims" in threading.current_thread().name and arguments[2].startswith("UPDATE"):
            stuck.set()
            let_go.wait(30)

    with keep_claims(keeping, claim, every=EVERY) as keeper:
        assert stuck.wait(30)
        try:
            wait_until(lambda: keeper.lost)
            with pytest.raises(ClaimLost):
                keeper.check()
        finally:
            let_go.set()


@pytest.mark.databases("postgresql")
def test_two_blocks_at_a_time(database: Database) -> None:
    """Claims of one engine are kept side by side."""
    engine, jobs = made(database, 2)
    first, second = (claim_jobs(engine, jobs, lease=LEASE) for _ in range(2))
    with keep_claims(engine, first, every=EVERY), keep_claims(engine, second, every=EVERY):
        assert len(threads()) == 2
        grows(engine, jobs, 1)
        grows(engine, jobs, 2)
    assert threads() == []


@pytest.mark.databases(*ON_SERVERS)
def test_a_table_lock_is_not_waited_for(database: Database) -> None:
    """A beat that meets a migration's lock gives up in time, and the next ones get through."""
    engine, jobs = made(database, 1)
    claim = claim_jobs(engine, jobs, lease=LEASE)
    lock = {"postgresql": "LOCK TABLE jobs"}.get(database.name, "LOCK TABLES jobs WRITE")
    beat = prepared_beat(engine, claim, timedelta(seconds=1))
    with engine.connect() as connection:
        connection.execute(sa.text(lock))
        with in_thread(beat.once) as beating:
            try:
                assert beating.result(timeout=20) == ()
            finally:
                if database.name != "postgresql":
                    connection.execute(sa.text("UNLOCK TABLES"))
                connection.rollback()
    before = row(engine, jobs, 1).lease_until
    assert beat.once() == ()
    assert row(engine, jobs, 1).lease_until > before


def test_asynchronous_blocks_end_cleanly(database: Database) -> None:
    """Whatever a beat is doing when its block ends: no task, no lock and no loss is left behind."""
    _, jobs = made(database, 2)

    async def end_blocks(drivername: str) -> None:
        keeping = create_async_engine(database.url.set(drivername=drivername))
        claim = await aio.claim_jobs(keeping, jobs, 2, lease=LEASE)
        for turns in range(60):
            every = timedelta(milliseconds=1)
            async with aio.keep_claims(keeping, claim, every=every) as keeper:
                await asyncio.sleep(0.001)
                for _ in range(turns):
                    await asyncio.sleep(0)
            assert keeper.lost == ()
        assert len(asyncio.all_tasks()) == 1
        assert await aio.release_jobs(keeping, claim) == 2
        await keeping.dispose()

    for drivername in DRIVERS[database.name]:
        asyncio.run(end_blocks(drivername))


def test_a_beat_leaves_the_connection_as_it_was(database: Database) -> None:
    """A beat limits its wait for locks, and gives its connection back without the limit."""
    asked = {
        "sqlite": "PRAGMA busy_timeout",
        "postgresql": "SHOW lock_timeout",
    }.get(database.name, "SELECT @@lock_wait_timeout + 1000000 * @@innodb_lock_wait_timeout")
    engine = database.engine(poolclass=QueuePool, pool_size=1, max_overflow=0)
    jobs = counted_jobs()
    fill(engine, jobs.table, 1)
    claim = claim_jobs(engine, jobs, lease=LEASE)

    def setting() -> Any:
        with engine.connect() as connection:
            return connection.scalar(sa.text(asked))

    before = setting()
    assert prepared_beat(engine, claim, None).once() == ()
    assert setting() == before


@pytest.mark.once
@pytest.mark.parametrize("name", ON_SERVERS)
def test_a_restart_inside_the_lease(name: str) -> None:
    """The server dies and comes back: the leases grow on, and nothing is lost, sync or async."""
    with own_server(name) as server, server.database() as database:
        keeping, jobs = made(database, 2)
        engine = database.engine(poolclass=NullPool)
        claim = claim_jobs(engine, jobs, 2, lease=LEASE)
        lost: list[Any] = []
        with keep_claims(keeping, claim, every=EVERY, on_lost=lost.append) as keeper:
            grows(engine, jobs, 1)
            server.stop()
            refused = knocks(keeping)
            wait_until(lambda: len(refused) > 1)
            server.start()
            for number in (1, 2):
                grows(engine, jobs, number)
            keeper.check()

        async def keep(drivername: str) -> None:
            keeping = create_async_engine(database.url.set(drivername=drivername))
            async with aio.keep_claims(keeping, claim, every=EVERY, on_lost=lost.append) as keeper:
                server.stop()
                refused = knocks(keeping.sync_engine)
                while len(refused) < 2:
                    await asyncio.sleep(0.01)
                server.start()
                before = row(engine, jobs, 1).lease_until
                while row(engine, jobs, 1).lease_until <= before:
                    await asyncio.sleep(0.01)
                keeper.check()
            await keeping.dispose()

        for drivername in DRIVERS[name]:
            asyncio.run(asyncio.wait_for(keep(drivername), 60))
        assert lost == []
        assert complete_jobs(engine, claim) == 2
