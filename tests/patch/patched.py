"""The shapes of legacy code, how each is declared, and how a worker of it drains its table."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import greenlet_spawn

from atomic_claim import ClaimConflict, JobTable, Patch, claim_reads, lock_reads, patch_claims
from tests.jobs import code_of
from tests.patch import legacy
from tests.patch.legacy import Event, Job, Mail, Message, Work

LEASE = timedelta(seconds=60)
DEADLOCK = 1213
jobs = JobTable(Job, state="state", free="waiting", claimed="running", done="done", order="place")
leased = JobTable(
    Job,
    state="state",
    free="waiting",
    claimed="running",
    done="done",
    order="place",
    lease="lease_until",
    token="claim_token",
    naive_times="utc",
)
mails = JobTable(
    Mail, state="sent", lease="lease_until", token="claim_token", order="id", naive_times="utc"
)


@dataclass(frozen=True)
class Shape:
    """One legacy function: what patches it, and one turn of a worker with it.

    Attributes:
        patch: patches it, with declarations only.
        turn: calls it once with a bind, runs what it gave, and tells whether there was anything.
        bind: makes the worker's bind of an engine.
        model: the table it takes its jobs from.
        on_loop: whether it is a coroutine.
    """

    patch: Callable[[], Patch]
    turn: Callable[[Any], Any]
    bind: Callable[[Any], Any]
    model: Any
    on_loop: bool = False


def run_all(found: Any) -> bool:
    """Run the jobs of a batch, and tell whether there were any."""
    found = list(found)
    for job in found:
        Work.run(job if isinstance(job, int) else job.id)
    return bool(found)


def one(found: Any) -> bool:
    """Run one job, if it is one."""
    return run_all([] if found is None else [found])


def or_empty(call: Callable[[], Any]) -> bool:
    """Run what a call gives, which raises if there is nothing."""
    try:
        found = call()
    except legacy.Empty:
        return False
    return run_all([int(found["id"] if isinstance(found, dict) else found)])


def marked(store: legacy.Store) -> bool:
    """Run what is due, and mark each job later, as schedulers do."""
    found = list(store.get_due_jobs())[:5]
    for job in found:
        Work.run(job.id)
        store.update_job(job)
    return bool(found)


async def one_async(call: Awaitable[Any]) -> bool:
    """Run one job of a coroutine, if it is one."""
    return one(await call)


async def all_async(call: Awaitable[Any]) -> bool:
    """Run a coroutine's batch."""
    return run_all(await call)


async def or_empty_async(call: Awaitable[Any]) -> bool:
    """Run what a coroutine gives, which raises if there is nothing."""
    try:
        found = await call
    except legacy.Empty:
        return False
    return run_all([int(found)])


SHAPES = {
    "A": Shape(
        lambda: patch_claims("tests.patch.legacy:claim_next", jobs, commit=True),
        lambda session: one(legacy.claim_next(session)),
        Session,
        Job,
    ),
    "B": Shape(
        lambda: patch_claims(
            "tests.patch.legacy:Channel._get",
            jobs,
            session="self.session",
            where=lambda call: {"queue": call["queue"]},
            returns=lambda job: {"id": job.id, "queue": job.queue},
            empty=legacy.Empty,
            commit=True,
        ),
        lambda session: or_empty(lambda: legacy.Channel(session)._get("default")),
        Session,
        Job,
    ),
    "C": Shape(
        lambda: patch_claims(
            "tests.patch.legacy:Repository.claim_batch",
            jobs,
            session="self.session",
            limit="limit",
            where=lambda call: {"queue": call.queue} if call.queue else None,
            values={"owner": "self.name"},
            commit=True,
        ),
        lambda session: run_all(legacy.Repository(session).claim_batch(7)),
        Session,
        Job,
    ),
    "C by sessionmaker": Shape(
        lambda: patch_claims(
            "tests.patch.legacy:Repository.claim_ids",
            jobs,
            session="maker",
            limit="cls.batch_size",
            returns="id",
        ),
        lambda maker: run_all(legacy.Repository.claim_ids(maker)),
        sessionmaker,
        Job,
    ),
    "C by Core": Shape(
        lambda: patch_claims("tests.patch.legacy:Repository.claim_rows", jobs, limit="count"),
        lambda engine: run_all(legacy.Repository.claim_rows(engine, 7)),
        lambda engine: engine,
        Job,
    ),
    "D": Shape(
        lambda: patch_claims(
            "tests.patch.legacy:Store.get_due_jobs",
            leased,
            session="self.session",
            limit=5,
            lease=LEASE,
            commit=True,
        ),
        lambda session: marked(legacy.Store(session)),
        Session,
        Job,
    ),
    "E": Shape(
        lambda: lock_reads("tests.patch.legacy:relay", Event),
        lambda session: legacy.relay(session),
        Session,
        Event,
    ),
    "E by Core": Shape(
        lambda: lock_reads("tests.patch.legacy:relay_rows", Event.__table__),
        lambda engine: legacy.relay_rows(engine),
        lambda engine: engine,
        Event,
    ),
    "F": Shape(
        lambda: claim_reads("tests.patch.legacy:send_all", mails, lease=LEASE),
        lambda session: legacy.send_all(session),
        Session,
        Mail,
    ),
    "F with a state": Shape(
        lambda: claim_reads("tests.patch.legacy:work_all", leased, lease=LEASE),
        lambda session: legacy.work_all(session),
        Session,
        Job,
    ),
    "G": Shape(
        lambda: patch_claims(
            "tests.patch.legacy:pop",
            Message,
            delete=True,
            returns="payload",
            empty=legacy.Empty,
            commit=True,
        ),
        lambda session: or_empty(lambda: legacy.pop(session)),
        Session,
        Message,
    ),
    "A async": Shape(
        lambda: patch_claims("tests.patch.legacy:claim_next_async", jobs, commit=True),
        lambda session: one_async(legacy.claim_next_async(session)),
        AsyncSession,
        Job,
        on_loop=True,
    ),
    "B async": Shape(
        lambda: patch_claims(
            "tests.patch.legacy:AsyncRepository.get",
            jobs,
            session="self.session",
            where=lambda call: Job.queue == call["queue"],
            returns="id",
            empty=legacy.Empty(),
            commit=True,
        ),
        lambda session: or_empty_async(legacy.AsyncRepository(session).get("default")),
        AsyncSession,
        Job,
        on_loop=True,
    ),
    "C async": Shape(
        lambda: patch_claims(
            "tests.patch.legacy:AsyncRepository.claim_batch",
            jobs,
            session="self.session",
            limit="limit",
            commit=True,
        ),
        lambda session: all_async(legacy.AsyncRepository(session).claim_batch(7)),
        AsyncSession,
        Job,
        on_loop=True,
    ),
    "D async": Shape(
        lambda: patch_claims(
            "tests.patch.legacy:AsyncRepository.get_due_jobs",
            leased,
            session="self.session",
            limit=5,
            lease=60,
            commit=True,
        ),
        lambda session: all_async(legacy.AsyncRepository(session).get_due_jobs()),
        AsyncSession,
        Job,
        on_loop=True,
    ),
    "E async": Shape(
        lambda: lock_reads("tests.patch.legacy:relay_async", Event),
        lambda session: legacy.relay_async(session),
        AsyncSession,
        Event,
        on_loop=True,
    ),
    "F async": Shape(
        lambda: claim_reads("tests.patch.legacy:send_all_async", mails, lease=LEASE),
        lambda session: legacy.send_all_async(session),
        partial(AsyncSession, expire_on_commit=False),
        Mail,
        on_loop=True,
    ),
    "G async": Shape(
        lambda: patch_claims(
            "tests.patch.legacy:pop_async",
            Message,
            delete=True,
            returns="payload",
            empty=legacy.Empty,
        ),
        lambda engine: or_empty_async(legacy.pop_async(engine)),
        lambda engine: engine,
        Message,
        on_loop=True,
    ),
}
KILLED = ("E", "E by Core", "F", "F with a state", "E async", "F async")
IDLE = 0.05
"""Seconds after which a worker that found nothing looks again."""


@dataclass(frozen=True)
class Order:
    """Instructions for one worker.

    Attributes:
        shape: the name of its shape.
        url: where its jobs are; with an asynchronous driver for coroutines.
        record: the file in which its work writes down what it did.
        patched: whether the function is patched.
        dies_at: after how many jobs it is killed, in the middle of the loop.
    """

    shape: str
    url: str
    record: Path
    patched: bool = True
    dies_at: int | None = None


def prepare(engine: sa.Engine) -> None:
    """Give writers of one SQLite file patience, and spare the disk."""
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def _(connection: Any, __: object) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA busy_timeout = 60000")
            cursor.execute("PRAGMA synchronous = OFF")
            cursor.close()


def is_left(engine: sa.Engine, model: Any) -> bool:
    """Wait, then return True if jobs are still undone, for example those of a dead worker."""
    time.sleep(IDLE)
    return undone(engine, model) > 0


def undone(engine: sa.Engine, model: Any) -> int:
    """How many rows are left to be done."""
    query = sa.select(sa.func.count()).select_from(model)
    if model is Event:
        query = query.where(Event.published == sa.false())
    elif model is Mail:
        query = query.where(Mail.sent == sa.false())
    elif model is Job:
        query = query.where(Job.state != "done")
    with engine.connect() as connection:
        return connection.execute(query).scalar_one()


def refuse_others(error: Exception) -> None:
    """Raise an error again, unless it is a deadlock, after which the transaction is repeated.

    InnoDB's manual: applications must always be ready to run a transaction again.
    """
    if not isinstance(error, ClaimConflict) and code_of(error) != DEADLOCK:
        raise error


def work(order: Order, start: Any) -> None:
    """Be a worker until there is nothing to do."""
    Work.path, Work.dies_at = order.record, order.dies_at
    shape = SHAPES[order.shape]
    with ExitStack() as stack:
        if order.patched:
            stack.enter_context(shape.patch())
        if shape.on_loop:
            asyncio.run(_work_async(shape, order, start))
            return
        engine = sa.create_engine(order.url)
        prepare(engine)
        bind = shape.bind(engine)
        if start is not None:
            start.wait(60)
        more = True
        while more:
            try:
                more = bool(shape.turn(bind))
            except (ClaimConflict, OperationalError) as error:
                refuse_others(error)
                if isinstance(bind, Session):
                    bind.rollback()
                continue
            more = more or (order.shape in KILLED and is_left(engine, shape.model))
        if isinstance(bind, Session):
            bind.close()
        engine.dispose()


async def _work_async(shape: Shape, order: Order, start: Any) -> None:
    engine = create_async_engine(order.url)
    prepare(engine.sync_engine)
    bind = shape.bind(engine)
    if start is not None:
        start.wait(60)
    more = True
    while more:
        try:
            more = bool(await shape.turn(bind))
        except (ClaimConflict, OperationalError) as error:
            refuse_others(error)
            if isinstance(bind, AsyncSession):
                await bind.rollback()
            continue
        if not more and order.shape in KILLED:
            more = await greenlet_spawn(is_left, engine.sync_engine, shape.model)
    if isinstance(bind, AsyncSession):
        await bind.close()
    await engine.dispose()
