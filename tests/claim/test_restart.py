"""The connection or the whole server goes away in the middle: nothing lost, nothing done twice."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from atomic_claim import (
    Claim,
    ClaimLost,
    JobTable,
    aio,
    claim_jobs,
    complete_jobs,
    extend_jobs,
    fail_jobs,
    release_jobs,
)
from tests.claim.test_aio import DRIVERS
from tests.counting import completions, make_counted
from tests.databases import ServerDatabase
from tests.ending.test_lease import LEASE, mapped, row
from tests.jobs import fill, ids, in_thread, job_table
from tests.own_servers import OwnServer, backend_of, own_server
from tests.proxy import Proxy
from tests.waiting import wait_until

JOBS = 6
MOMENTS = ("before the change", "after the change", "before the commit")
OPERATIONS: dict[str, Callable[[Any, Claim[Any]], int]] = {
    "complete": complete_jobs,
    "extend": extend_jobs,
    "fail": fail_jobs,
    "release": release_jobs,
}


@pytest.fixture(scope="module", params=["postgresql", "mysql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Iterator[OwnServer]:
    """Yield a server that the tests of this file may kill."""
    with own_server(request.param) as server:
        yield server


@dataclass
class Ground:
    """A database with jobs, an engine to lose, and one to look with."""

    server: OwnServer
    database: ServerDatabase
    engine: sa.Engine
    watch: sa.Engine
    jobs: JobTable


@pytest.fixture
def ground(server: OwnServer) -> Iterator[Ground]:
    """Yield a new database with six free jobs."""
    with server.database() as database:
        engine, watch = database.engine(), database.engine(poolclass=NullPool)
        yield Ground(server, database, engine, watch, make_counted(watch, JOBS))


@pytest.fixture(params=["terminated", "restarted"])
def lose(request: pytest.FixtureRequest, server: OwnServer) -> Callable[[sa.Connection], None]:
    """Return a function that terminates a connection's backend or restarts the server."""

    def terminate(connection: sa.Connection) -> None:
        server.end_backend(backend_of(driver_of(connection)))

    def restart(_: sa.Connection) -> None:
        server.stop()
        server.start()

    return terminate if request.param == "terminated" else restart


def driver_of(connection: sa.Connection) -> Any:
    """Return the raw DBAPI connection."""
    return connection.connection.driver_connection


def once(engine: sa.Engine, moment: str, act: Callable[[sa.Connection], None]) -> list[str]:
    """Do something in the middle of the next change by an engine; tells when it has been done."""
    done: list[str] = []

    def on_statement(*arguments: Any) -> None:
        if not done and arguments[2].startswith(("UPDATE", "WITH")):
            done.append(arguments[2])
            act(arguments[0])

    def on_commit(connection: sa.Connection) -> None:
        if not done:
            done.append("COMMIT")
            act(connection)

    if moment == "before the commit":
        sa.event.listen(engine, "commit", on_commit)
    else:
        event = "before_cursor_execute" if moment == "before the change" else "after_cursor_execute"
        sa.event.listen(engine, event, on_statement)
    return done


def in_transactions(engine: sa.Engine) -> None:
    """Have every claim and change begin and commit, rather than be one statement in autocommit."""
    sa.event.listen(engine, "begin", lambda _: None)


def state(ground: Ground) -> dict[int, tuple[str | None, bool, int]]:
    """Return the token, the running state and the attempts of each job."""
    with ground.watch.connect() as connection:
        return {
            each.id: (each.claim_token, each.processing and each.done_at is None, each.attempts)
            for each in connection.execute(sa.select(ground.jobs.table))
        }


def finish(ground: Ground) -> None:
    """Claim and complete the remaining jobs; assert that every job was completed once."""
    rest = claim_jobs(ground.watch, ground.jobs, JOBS, lease=LEASE)
    assert complete_jobs(ground.watch, rest) == len(rest)
    assert sorted(number for number, _ in completions(ground.watch)) == list(range(1, JOBS + 1))


def check_claim(ground: Ground, claim: Claim[Any], first: int = 1) -> None:
    """Assert that the claim owns three rows in order, and that no other rows are running."""
    assert ids(claim) == [first, first + 1, first + 2]
    running = {number: each for number, each in state(ground).items() if each[1]}
    attempts = 0 if claim.table.attempts is None else 1
    assert running == dict.fromkeys(ids(claim), (claim.token, True, attempts))
    assert complete_jobs(ground.watch, claim) == 3
    finish(ground)


@pytest.mark.parametrize("begin", [False, True], ids=["plain", "with a begin listener"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_in_the_middle_of_a_claim(
    ground: Ground, lose: Callable[[sa.Connection], None], moment: str, begin: bool
) -> None:
    """The claim is made once, and given to the caller, whatever its connection died of."""
    if begin:
        in_transactions(ground.engine)
    done = once(ground.engine, moment, lose)
    claim = claim_jobs(ground.engine, ground.jobs, 3, lease=LEASE)
    assert done
    check_claim(ground, claim)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("operation", ["complete", "extend"])
def test_in_the_middle_of_a_change(
    ground: Ground, lose: Callable[[sa.Connection], None], operation: str, moment: str
) -> None:
    """The change is made once, and the caller hears of it; the other rows stay as they are."""
    claim = claim_jobs(ground.engine, ground.jobs, 3, lease=LEASE)
    other = claim_jobs(ground.engine, ground.jobs, 1, lease=LEASE)
    in_transactions(ground.engine)
    done = once(ground.engine, moment, lose)
    assert OPERATIONS[operation](ground.engine, claim) == 3
    assert done
    check_change(ground, operation, claim, other)


def check_change(ground: Ground, operation: str, claim: Claim[Any], other: Claim[Any]) -> None:
    """Every row of the claim has been changed once, and no other row."""
    rows = [row(ground.watch, ground.jobs, number) for number in ids(claim)]
    assert {each.done_at is not None for each in rows} == {operation == "complete"}
    assert {each.failed_at is not None for each in rows} == {operation == "fail"}
    assert {each.attempts for each in rows} == {0 if operation == "release" else 1}
    assert row(ground.watch, ground.jobs, other[0].id) == other[0]
    if operation == "extend":
        assert min(each.lease_until for each in rows) > claim[0].lease_until
        assert complete_jobs(ground.watch, claim) == 3
    assert complete_jobs(ground.watch, other) == 1
    if operation != "fail":
        finish(ground)


def by_proxy(ground: Ground, proxy: Proxy) -> sa.Engine:
    """Create an engine whose connections go through the proxy."""
    # The proxy has to read what is sent; MySQL's TLS would be used without being asked for.
    plain = {} if ground.server.name == "postgresql" else {"ssl_disabled": True}
    url = ground.database.url.set(port=proxy.port)
    return ground.database.engine(url=url, connect_args=plain)


@pytest.fixture
def proxy(ground: Ground) -> Iterator[Proxy]:
    """Yield a proxy in front of the server."""
    port = ground.database.url.port
    assert port is not None
    with Proxy(port, postgresql=ground.server.name == "postgresql") as proxy:
        yield proxy


@pytest.mark.parametrize("replaced", [False, True], ids=["as it is", "replaced by a listener"])
@pytest.mark.parametrize(
    "bind", ["engine", "engine of many claims", "engine with a begin listener", "sessionmaker"]
)
def test_the_reply_to_a_claim_is_lost(
    ground: Ground, proxy: Proxy, bind: str, replaced: bool
) -> None:
    """The claim is committed and the reply is lost: the next try finds the claimed rows.

    A listener may turn the database's errors into others, as oslo.db's does.
    """
    engine = by_proxy(ground, proxy)
    if replaced:

        @sa.event.listens_for(engine, "handle_error")
        def replace(context: sa.ExceptionContext) -> None:
            raise LookupError(str(context.original_exception))

    if bind == "engine with a begin listener":
        in_transactions(engine)
    for _ in range(2 if bind == "engine of many claims" else 0):
        release_jobs(engine, claim_jobs(engine, ground.jobs, 3, lease=LEASE))
    at_once = ground.server.name == "postgresql" and bind != "engine with a begin listener"
    proxy.lose_reply_to(b"UPDATE" if at_once else b"COMMIT")
    if bind == "sessionmaker":
        _, declared = mapped(ground.jobs)
        claim = claim_jobs(sessionmaker(engine), declared, 3, lease=LEASE)
    else:
        claim = claim_jobs(engine, ground.jobs, 3, lease=LEASE)
    assert proxy.lost.is_set()
    check_claim(ground, claim)


@pytest.mark.parametrize("begin", [False, True], ids=["plain", "with a begin listener"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_reply_to_a_change_is_lost(
    ground: Ground, proxy: Proxy, operation: str, begin: bool
) -> None:
    """The change is committed and the reply is lost: it is not repeated, nor reported as lost."""
    engine = by_proxy(ground, proxy)
    if begin:
        in_transactions(engine)
    claim = claim_jobs(ground.watch, ground.jobs, 3, lease=LEASE)
    other = claim_jobs(ground.watch, ground.jobs, 1, lease=LEASE)
    at_once = ground.server.name == "postgresql" and not begin
    proxy.lose_reply_to(b"UPDATE" if at_once else b"COMMIT")
    assert OPERATIONS[operation](engine, claim) == 3
    assert proxy.lost.is_set()
    check_change(ground, operation, claim, other)


@pytest.mark.parametrize("second", ["fail", "release"])
def test_the_reply_to_a_refusal_is_lost(ground: Ground, second: str) -> None:
    """A second, different end raises `ClaimLost`, even if its connection was lost."""
    claim = claim_jobs(ground.watch, ground.jobs, 3, lease=LEASE)
    assert complete_jobs(ground.watch, claim) == 3
    in_transactions(ground.engine)
    done: list[str] = []

    @sa.event.listens_for(ground.engine, "commit")
    def lose_it(connection: sa.Connection) -> None:
        if not done:
            done.append("COMMIT")
            ground.server.end_backend(backend_of(driver_of(connection)))

    with pytest.raises(ClaimLost) as raised:
        OPERATIONS[second](ground.engine, claim)
    assert done
    assert raised.value.keys == ((1,), (2,), (3,))
    finish(ground)


def test_a_completion_that_goes_on_without_us(ground: Ground, proxy: Proxy) -> None:
    """The first try still waits for a lock when its connection is lost: the second waits too."""
    engine = by_proxy(ground, proxy)
    claim = claim_jobs(ground.watch, ground.jobs, 3, lease=LEASE)
    with (
        ground.watch.connect() as holder,
        in_thread(lambda: complete_jobs(engine, claim)) as completing,
    ):
        key = ground.jobs.table.c.id
        holder.execute(sa.select(key).where(key == 2).with_for_update())
        ground.database.wait_until_blocked()
        proxy.cut_clients()
        ground.database.wait_until_blocked(2)
        holder.rollback()
        assert completing.result(timeout=60) == 3
    finish(ground)


def stays_away(server: OwnServer, engine: sa.Engine) -> list[int]:
    """Kill the server before the next change, and start it when two have knocked in vain."""
    knocks: list[int] = []

    def kill(_: sa.Connection) -> None:
        server.stop()

        @sa.event.listens_for(engine, "do_connect")
        def knock(*_: Any) -> None:
            knocks.append(1)
            if len(knocks) == 3:
                server.start()

    once(engine, "before the change", kill)
    return knocks


def test_the_server_stays_away(ground: Ground) -> None:
    """While the server does not answer, a claim and a completion are tried again."""
    claim: Claim[Any] = Claim(table=ground.jobs)
    for call in ("claim", "complete"):
        engine = ground.database.engine()
        with engine.connect():
            pass
        knocks = stays_away(ground.server, engine)
        if call == "claim":
            claim = claim_jobs(engine, ground.jobs, 3, lease=LEASE)
        else:
            assert complete_jobs(engine, claim) == 3
        assert len(knocks) == 3
    finish(ground)


def test_the_server_stays_away_asynchronously(ground: Ground) -> None:
    """The same on the asynchronous drivers, whose refusals are errors of the system's."""

    async def claim_and_complete(drivername: str) -> None:
        engine = create_async_engine(ground.database.url.set(drivername=drivername))
        async with engine.connect():
            pass
        knocks = stays_away(ground.server, engine.sync_engine)
        claim = await aio.claim_jobs(engine, ground.jobs, 3, lease=LEASE)
        assert len(knocks) == 3
        assert await aio.release_jobs(engine, claim) == 3
        await engine.dispose()

    for drivername in DRIVERS[ground.server.name]:
        asyncio.run(asyncio.wait_for(claim_and_complete(drivername), 60))
    finish(ground)


def test_without_a_token_nobody_can_tell(ground: Ground) -> None:
    """Where the table cannot tell what became of a claim, it is not tried again: it raises."""
    table = job_table(name="plain")
    fill(ground.watch, table, 3)
    once(
        ground.engine,
        "before the commit",
        lambda c: ground.server.end_backend(backend_of(driver_of(c))),
    )
    in_transactions(ground.engine)
    with pytest.raises(DBAPIError) as raised:
        claim_jobs(ground.engine, table, 2)
    assert raised.value.connection_invalidated
    with ground.watch.connect() as connection:
        assert connection.execute(sa.select(table.c.id).where(table.c.processing)).all() == []


@pytest.mark.parametrize("operation", ["claim", "complete"])
def test_the_callers_transaction_is_the_callers(ground: Ground, operation: str) -> None:
    """By session a lost connection raises; nothing of it is stored, and it can be repeated."""
    claim = claim_jobs(ground.watch, ground.jobs, 3, lease=LEASE)
    with Session(ground.engine) as session:
        if operation == "claim":
            claim_jobs(session, ground.jobs, 3, lease=LEASE)
        else:
            complete_jobs(session, claim)
        before = state(ground)
        ground.server.end_backend(backend_of(driver_of(session.connection())))
        with pytest.raises(DBAPIError):
            complete_jobs(session, claim)
        session.rollback()
        assert state(ground) == before
        assert complete_jobs(session, claim) == 3
        session.commit()
    finish(ground)


def test_a_drain_under_fire(ground: Ground) -> None:
    """Four workers drain the table while one after the other loses its connection."""
    count, chance = 300, random.Random(20240101)
    with ground.watch.begin() as connection:
        connection.execute(ground.jobs.table.delete())
    fill(ground.watch, ground.jobs.table, count)
    alive: dict[int, int] = {}
    turns = threading.Semaphore(0)

    def work(name: int) -> None:
        engine = ground.database.engine()

        @sa.event.listens_for(engine, "checkout")
        def note(driver: Any, *_: Any) -> None:
            alive[name] = backend_of(driver)

        while turns.acquire() and (claim := claim_jobs(engine, ground.jobs, 3, lease=LEASE)):
            assert complete_jobs(engine, claim) == len(claim)

    with ThreadPoolExecutor(4) as threads:
        working = [threads.submit(work, name) for name in range(4)]
        # Fewer claims than the jobs are enough for, so that no worker ends before the last kill.
        for _ in range(20):
            turns.release(4)
            backends = wait_until(
                lambda: set(ground.server.backends(ground.database)).intersection(alive.values())
            )
            ground.server.end_backend(chance.choice(sorted(backends)))
        turns.release(count)
        wait(working)
    assert [future.exception() for future in working] == [None] * 4
    done = [each for each, _ in completions(ground.watch)]
    assert sorted(done) == list(range(1, count + 1))
